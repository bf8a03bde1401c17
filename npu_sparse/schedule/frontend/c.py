"""SCoPs from C: the region between `#pragma scop` and `#pragma endscop` of a function, read with pycparser.

Handled: for loops with affine bounds in both directions and with constant strides, if with affine conditions, assignments
(also compound and chained, ++ and --), scalars, fields of structs, conditional expressions, calls of pure functions, local
declarations and constants. Arrays are taken to be in bounds and not to alias. Everything else is refused with file, line and
expression.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pycparser import c_ast, c_parser

from npu_sparse.boundary import reading
from npu_sparse.schedule.frontend import types
from npu_sparse.schedule.frontend.assemble import Record, assemble
from npu_sparse.schedule.frontend.branches import data_branch
from npu_sparse.schedule.frontend.declarations import Declarations
from npu_sparse.schedule.frontend.expressions import Loop, Scope, Symbol, Touch
from npu_sparse.schedule.frontend.fields import field_named, mixed, related, root
from npu_sparse.schedule.frontend.forms import NotAffine, add, isl_text
from npu_sparse.schedule.frontend.preprocess import run_cpp
from npu_sparse.schedule.frontend.regions import Region, find_region
from npu_sparse.schedule.frontend.surroundings import Surroundings
from npu_sparse.schedule.frontend.syntax import assigned, loop_steps, reduction_of, rewritten, show, step_assignment, subscripted
from npu_sparse.schedule.frontend.text import statement_text
from npu_sparse.schedule.scop import Scop, ScopError

KEYWORDS = {c_ast.While: "while", c_ast.DoWhile: "do", c_ast.Switch: "switch", c_ast.Goto: "goto", c_ast.Label: "label",
            c_ast.Return: "return", c_ast.Break: "break", c_ast.Continue: "continue"}


def parse_c(source: str | Path, function: str | None = None, cpp: tuple[str, ...] | None = None,
            pure: Collection[str] = (), number: int | None = None, text: str | None = None) -> Scop:
    """The SCoP of a C file, or of C text (a str of more than one line).

    Args:
        function: whose scop it is; needed where several functions hold one.
        cpp: options for `gcc -E`, such as ("-Iutilities", "-DN=100"), for files whose macros come from headers; None expands
            the macros of the file itself.
        pure: functions that the region may call beside those of the C library and those with the attribute const: each must
            depend on its arguments only and change nothing.
        number: which region of the function, from 1; needed where it has several.
        text: what is taken for the contents of the file.
    """
    if isinstance(source, str) and "\n" in source:
        return parse_text(source, "<text>", function, pure=pure, number=number)
    path = Path(source)
    text = read_c(path) if text is None else text
    if cpp is not None:
        text = run_cpp(path, tuple(cpp), text)
    scop = parse_text(text, str(path), function, pure=pure, number=number)
    return replace(scop, name=path.stem)


def read_c(path: Path) -> str:
    """The text of a C file."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ScopError(f"{path}: source must be a readable text file, got {error}") from error


def parse_text(text: str, source: str, function: str | None = None, opaques: dict | None = None, context: str = "",
               pure: Collection[str] = (), number: int | None = None) -> Scop:
    """The SCoP of C text; `opaques` gives the footprints of calls that are statements (see builder.py)."""
    with reading(source, ScopError, "its C"):
        try:
            region = find_region(text, source, function, number)
            layouts: dict = {}
            while True:  # again where an array turned out to have rows
                walk = Walk(source, region, opaques or {}, context, frozenset(pure))
                walk.scope.layouts = dict(layouts)
                scop = walk.scop()
                scop = replace(scop, function="") if region.bare else scop
                if walk.scope.layouts == layouts:
                    return scop
                layouts = walk.scope.layouts
        except RecursionError as error:
            raise ScopError(f"{source}: code must be nested less deeply, got too many levels") from error


class Walk:
    """The walk over one function. What changes on the way - open loops, conditions, counters - is in the attributes."""

    def __init__(self, source: str, region: Region, opaques: dict, context: str, pure: frozenset[str]):
        self.start, self.function, self.opaques = region.start, region.function, opaques
        rewritten(self.function, lambda node: field_named(subscripted(node)))
        self.scope = Scope(source, context, {}, pure | region.pure)
        self.position: list[int | str] = [0]
        self.records: list[dict] = []
        self.region = (0, 0)
        self.clause: list[str] | None = None
        self.block: set[str] = set()  # names that the open block declares
        self.last: dict[str, str] = {}  # of iterators of the function: their last loop without its body, "" where it is nested
        self.tail: list[str] = []  # loops that leave an iterator's last value behind
        self.declarations = Declarations(self.scope, self.function, region.words)
        for node in region.tree.ext:
            self.declarations.visible(node, outer=True)
        self.arguments: list[Symbol] = []
        arguments = self.function.decl.type.args
        for node in arguments.params if arguments else ():
            if isinstance(node, c_ast.Decl) and node.name:
                self.arguments.append(self.declarations.declare(node, argument=True))

    # The region and what surrounds it

    def scop(self) -> Scop:
        if not self.enter(self.function.body):
            raise ScopError(f"{self.scope.source}: #pragma scop must stand between statements, got it elsewhere")
        if not self.records:
            raise ScopError(f"{self.scope.source}:{self.region[0]}: scop must hold a statement, got none")
        return assemble(self.scope, self.records, self.region, self.function, self.start, self.live_out, self.clause,
                        tuple(self.tail))

    def enter(self, node: c_ast.Node) -> bool:
        """Declares what is visible before the pragma, walks the region, and says whether it was below this node."""
        known, tags = dict(self.scope.symbols), dict(self.scope.tags)
        if isinstance(node, c_ast.Compound):
            items = node.block_items or []
            for at, item in enumerate(items):
                if isinstance(item, c_ast.Pragma) and item.string.split()[:1] == ["scop"]:
                    self.walk_region(item, items[at + 1:])
                    return True
                self.declarations.visible(item)
                if not isinstance(item, c_ast.Decl) and self.enter(item):
                    return True
        elif isinstance(node, c_ast.For) and isinstance(node.init, c_ast.DeclList):
            for item in node.init.decls:
                self.declarations.declare(item)
            if self.enter(node.stmt):
                return True
        else:
            bodies = [child for _, child in node.children() if isinstance(
                child, (c_ast.Compound, c_ast.For, c_ast.While, c_ast.DoWhile, c_ast.If, c_ast.Switch, c_ast.Case, c_ast.Default,
                        c_ast.Label))]
            if any(self.enter(body) for body in bodies):
                return True
        self.scope.symbols, self.scope.tags = known, tags
        return False

    def walk_region(self, pragma: c_ast.Pragma, rest: list[c_ast.Node]) -> None:
        scope = self.scope
        end = next((at for at, item in enumerate(rest) if isinstance(item, c_ast.Pragma) and
                    item.string.split()[:1] == ["endscop"]), None)
        if end is None:
            scope.refuse(pragma, "#pragma scop must end with #pragma endscop in the same block, got none")
        self.region = (pragma.coord.line, rest[end].coord.line)
        words = pragma.string.strip()[len("scop"):].strip()
        if words:
            match = re.fullmatch(r"live_out\s*\(([\w\s,]*)\)", words)
            if not match:
                scope.refuse(pragma, f"#pragma scop must have no clause but live_out(names), got {words}")
            self.clause = [name.strip() for name in match[1].split(",") if name.strip()]
        body = rest[:end]
        # Names that the region changes are data; integers that it does not change may be parameters.
        loops = {id(node) for item in body for node in loop_steps(item)}
        scope.written = {name for item in body for name, node in assigned(item) if id(node) not in loops}
        self.around = Surroundings(self.function, pragma, body)
        self.outside = dict(scope.symbols)
        scope.known = {symbol.key: symbol for symbol in (*self.arguments, *scope.symbols.values())}
        self.note_extents()
        self.block = set()
        for item in body:
            self.statement(item)
        for name in sorted(self.block & self.around.after):
            if id(scope.symbols[name].node) in self.around.inside and not scope.symbols[name].iterator:
                scope.refuse(scope.symbols[name].node, f"declaration in the scop must not be used after it, got {name}")
        for key, empty in sorted(self.last.items()):
            symbol = scope.known[key]
            name = symbol.name
            if symbol.key in scope.used | scope.touched:
                scope.refuse(pragma, f"loop iterator must not be read outside of its loop, got {name}")
            left = symbol.persistent or name in self.around.escaped or self.around.read_after(name)
            if left and not symbol.local:
                if not empty:
                    scope.refuse(pragma, f"loop iterator that is read after the scop must have its last loop outside of others, "
                                         f"got {name}")
                self.tail.append(empty)
        self.check_extents(pragma)
        self.check_pointers(pragma)

    def note_extents(self) -> None:
        """An array of variable extent has at least one element."""
        scope, used = self.scope, set(self.scope.used)
        for symbol in self.outside.values():
            for extent in symbol.shape:
                try:
                    form = scope.linear(extent) if extent is not None else {}
                except (NotAffine, ScopError):
                    continue
                if set(form) - {""} and self.steady(symbol):
                    scope.facts.append(scope.compare(form, ">=", {"": 1}))
        scope.used = used

    def steady(self, symbol: Symbol) -> bool:
        return all(self.scope.symbols.get(name) is known and
                   not self.around.change(name, known.node, known.persistent, symbol.node)
                   for name, known in symbol.names.items() if known is not None and known.value is None)

    def check_extents(self, pragma: c_ast.Pragma) -> None:
        """Extents are written out again in generated code: their names must still mean what they meant."""
        for symbol in [s for key, s in self.scope.known.items() if key in self.scope.touched]:
            for name, known in symbol.names.items():
                if known is not None and known.value is not None:
                    continue
                if symbol.local and (known is None or known.local or known.iterator or name in self.scope.written):
                    self.scope.refuse(symbol.node, f"extent of {symbol.name} must not change in the scop, got {name}")
                extent = f"extent of {symbol.name} must"
                if self.outside.get(name) is not known:
                    self.scope.refuse(pragma, f"{extent} name what is visible at the scop, got another {name}")
                if known is not None and (change := self.around.change(name, known.node, known.persistent, symbol.node)):
                    self.scope.refuse(change, f"{extent} not change after its declaration, got {show(change)}")

    def check_pointers(self, pragma: c_ast.Pragma) -> None:
        named = [symbol for symbol in self.outside.values() if symbol.key in self.scope.touched | self.scope.used]
        if both := mixed(named):
            self.scope.refuse(pragma, f"struct must be used as one or as elements of an array, got {both[0]} and {both[1]}")
        leads = {name for symbol in self.outside.values() for name in symbol.pointers}
        leads |= {root(symbol.name) for symbol in self.outside.values() if symbol.field}
        for symbol, pointer in [(user, pointer) for user in named for pointer in user.pointers]:
            if (known := self.outside.get(pointer)) is not None and known.argument:
                continue
            for name in sorted(self.around.sources(pointer, leads)):
                for other in named:
                    if other is not symbol and related(other.name, name) and (
                            other.shape or other.name != name or name in self.around.escaped):
                        rule = "pointer must not lead into what the scop uses by name"
                        self.scope.refuse(symbol.node, f"{rule}, got {symbol.name} and {other.name}")

    def local(self, node: c_ast.Decl) -> None:
        """A declaration inside the region."""
        if isinstance(node.type, (c_ast.FuncDecl, c_ast.Enum, c_ast.Struct, c_ast.Union)) or node.storage:
            self.scope.refuse(node, f"declaration in the scop must be of a variable of its block, got {show(node)}")
        if node.name in self.declarations.paths:
            self.scope.refuse(node, f"struct must be declared before the scop, got {show(node)}")
        if node.name in self.block:
            self.scope.refuse(node, f"{node.name} must be declared once, got a second declaration in the scop")
        self.block.add(node.name)
        symbol = self.declarations.declare(node, local=True)
        if node.init is None or symbol.value is not None:
            return
        if symbol.integer and node.name not in self.declarations.assigned and not symbol.volatile:
            try:
                form, reads = (self.scope.converted(*self.scope.typed(node.init), symbol.kind, node.init), symbol.kind), []
            except NotAffine:
                pass
            else:
                self.scope.expression(node.init, reads, ())
                text = statement_text(self.scope, node.init)
                self.scope.symbols[node.name] = self.scope.known[symbol.key] = replace(
                    symbol, form=form, reads=tuple(reads), text=f"(({symbol.ctype}) ({text}))")
                return
        self.assign(c_ast.Assignment("=", c_ast.ID(node.name, node.coord), node.init, node.coord))

    # Statements

    def statement(self, node: c_ast.Node) -> None:
        if isinstance(node, c_ast.Compound):
            known, block = dict(self.scope.symbols), self.block
            self.block = set()
            for item in node.block_items or ():
                self.statement(item)
            self.scope.symbols, self.block = known, block
        elif isinstance(node, c_ast.For):
            self.loop(node)
        elif isinstance(node, c_ast.If):
            self.branch(node)
        elif isinstance(node, c_ast.Decl):
            self.local(node)
        elif isinstance(node, c_ast.Assignment):
            self.assign(node)
        elif isinstance(node, c_ast.UnaryOp) and node.op in ("p++", "++", "p--", "--"):
            self.assign(step_assignment(node))
        elif isinstance(node, c_ast.ExprList):
            for item in node.exprs:
                self.statement(item)
        elif isinstance(node, c_ast.FuncCall) and show(node.name) in self.opaques:
            self.opaque(node)
        elif not isinstance(node, (c_ast.EmptyStatement, c_ast.Pragma)):
            got = KEYWORDS.get(type(node)) or show(node)
            self.scope.refuse(node, f"statement must be an assignment, a for loop or an if, got {got}")

    def branch(self, node: c_ast.If) -> None:
        try:
            condition = self.scope.condition(node.cond)
        except NotAffine:
            return data_branch(self, node)
        for branch, text in ((node.iftrue, condition), (node.iffalse, f"not ({condition})")):
            if branch is not None:
                self.scope.conditions.append(text)
                self.statement(branch)
                self.scope.conditions.pop()

    def loop(self, node: c_ast.For) -> None:
        with self.opened(node) as (signed, _):
            self.position += [signed, 0]
            block, self.block = self.block, set()
            self.statement(node.stmt)
            self.block = block
            del self.position[-2:]
        self.position[-1] += 1

    @contextmanager
    def opened(self, node: c_ast.For) -> Iterator[tuple[str, bool]]:
        """Inside of a loop: its iterator, after a minus where it counts down, and whether the loop declares it."""
        scope, outside = self.scope, dict(self.scope.symbols)
        name, start, kind, declared = self.loop_start(node)
        known = scope.symbols.get(name)
        if known is not None and known.iterator:
            scope.refuse(node, f"loop iterator must differ from those of the enclosing loops, got {name}")
        if name in scope.written:
            scope.refuse(node, f"loop iterator must not be assigned in the scop outside of its for, got {name}")
        if declared:  # another variable of that name, or one that isl does not read, stays apart
            key = self.declarations.fresh(name) if known is not None else self.declarations.key(name)
        else:
            if known is None:
                scope.refuse(node, f"loop iterator must be declared, got {name}")
            if known.shape or not known.integer or known.value is not None or known.volatile or known.field:
                scope.refuse(node, f"loop iterator must be an integer variable, got {name}")
            key, kind = known.key, known.kind
            head = "; ".join(statement_text(scope, part) for part in (node.init, node.cond, node.next) if part is not None)
            self.last[key] = f"for ({head});" if not scope.loops and not scope.conditions else ""
        step = self.loop_step(node, name)
        if node.cond is None:
            scope.refuse(node, f"loop condition must bound {name}, got none")
        scope.wrapping = False
        first = scope.affine(start, "loop bound", lambda n: scope.converted(*scope.typed(n), kind, n))
        first = scope.settled(first, kind, start)
        before, scope.known[key] = scope.known.get(key), Symbol(key, name, kind.text, kind=kind, iterator=True, node=node)
        scope.symbols[name] = scope.known[key]
        begin = scope.compare({key: 1}, ">=" if step > 0 else "<=", first)
        scope.loops.append(Loop(key, (begin,), kind))  # the condition may use the iterator
        conditions = [begin, *self.bounds(node.cond, name, step)]
        if abs(step) > 1:
            offset = add({key: 1}, first, -1) if step > 0 else add(first, {key: 1}, -1)
            conditions.append(scope.close(f"({isl_text(offset)}) mod {abs(step)} = 0", offset))
        scope.loops[-1] = Loop(key, tuple(conditions), kind)
        self.check_end(node, key, kind, step)
        scope.wrapping = True
        yield "-" + key if step < 0 else key, declared
        scope.loops.pop()
        scope.symbols = outside
        if before is not None:
            scope.known[key] = before

    def check_end(self, node: c_ast.For, key: str, kind: types.Integer, step: int) -> None:
        """An iterator that wraps around on its last step would run again where these conditions say that the loop ends.

        A loop that counts up by a power of two meets its condition again forever, and C lets such a loop be taken to end.
        """
        if kind.signed and kind.bits >= 32 or step > 0 and step & (step - 1) == 0:
            return
        if self.scope.possible(f"{key} + {step} < {kind.low} or {key} + {step} > {kind.high}"):
            self.scope.refuse(node, f"loop must end before its iterator of type {kind.text} wraps around, got {show(node.cond)}")

    def loop_start(self, node: c_ast.For) -> tuple[str, c_ast.Node, types.Integer, bool]:
        """The iterator, its first value, its type, and whether the loop declares it."""
        init = node.init
        if isinstance(init, c_ast.DeclList) and len(init.decls) == 1 and init.decls[0].init is not None:
            kind = types.integer(init.decls[0].type, self.scope.typedefs)
            if isinstance(init.decls[0].type, c_ast.TypeDecl) and kind and kind.bits > 1:
                return init.decls[0].name, init.decls[0].init, kind, True
        elif isinstance(init, c_ast.Assignment) and init.op == "=" and isinstance(init.lvalue, c_ast.ID):
            return init.lvalue.name, init.rvalue, types.INT, False
        self.scope.refuse(node, f"loop must start with one integer assignment, got {show(init) if init else 'none'}")

    def loop_step(self, node: c_ast.For, name: str) -> int:
        step, value = node.next, None

        def constant(part):
            evaluated = types.evaluate(part, self.scope.lookup, self.scope.typedefs)
            return evaluated[0] if evaluated else None

        if isinstance(step, c_ast.UnaryOp) and step.op in ("p++", "++", "p--", "--") and show(step.expr) == name:
            value = 1 if "+" in step.op else -1
        elif isinstance(step, c_ast.Assignment) and show(step.lvalue) == name:
            if step.op in ("+=", "-="):
                value = constant(step.rvalue)
                value = -value if value is not None and step.op == "-=" else value
            elif step.op == "=" and isinstance(step.rvalue, c_ast.BinaryOp) and step.rvalue.op in "+-":
                left, right = step.rvalue.left, step.rvalue.right
                if step.rvalue.op == "+" and show(right) == name:
                    left, right = right, left
                value = constant(right) if show(left) == name else None
                value = -value if value is not None and step.rvalue.op == "-" else value
        if not value or abs(value) >= 2**31:
            self.scope.refuse(node, f"loop step must be a constant other than 0, got {show(step) if step else 'none'}")
        return value

    def bounds(self, node: c_ast.Node, name: str, step: int) -> list[str]:
        """The parts of a loop condition; each must stay false once it is, so that the loop is the set of all that satisfy it."""
        if isinstance(node, c_ast.BinaryOp) and node.op == "&&":
            return self.bounds(node.left, name, step) + self.bounds(node.right, name, step)
        # A signed iterator that starts beyond the end of i != end would overflow, which C leaves undefined.
        kind, op = self.scope.loops[-1].kind, getattr(node, "op", "")
        unequal = isinstance(node, c_ast.BinaryOp) and op == "!=" and abs(step) == 1 and kind.signed and kind.bits >= 32
        if not unequal and (not isinstance(node, c_ast.BinaryOp) or op not in ("<", "<=", ">", ">=")):
            self.scope.refuse(node, f"loop condition must compare with <, <=, > or >=, got {show(node)}")
        try:
            left, right, _ = self.scope.operands(node.left, node.right)
        except NotAffine:
            for side in (node.left, node.right):
                self.scope.affine(side, "loop condition", self.scope.typed)
            raise
        key = self.scope.symbols[name].key
        room = add(right, left, -1) if op in ("<", "<=", "!=") else add(left, right, -1)
        if unequal and room.get(key, 0) * step > 0:
            room = add({}, room, -1)
        if self.scope.mentions(room, key) or room.get(key, 0) * step >= 0 or unequal and abs(room[key]) != 1:
            self.scope.refuse(node, f"loop condition must bound {name} in the direction of its step, got {show(node)}")
        return [self.scope.compare(room, ">" if op in ("<", ">", "!=") else ">=", {})]

    def assign(self, node: c_ast.Assignment) -> None:
        if isinstance(node.rvalue, c_ast.Assignment):  # a = b = c: the value of an assignment is what its target then holds
            self.assign(node.rvalue)
            node = c_ast.Assignment(node.op, node.lvalue, node.rvalue.lvalue, node.coord)
        reads, write = [], self.target(node.lvalue)
        if node.op != "=":
            reads.append(write)
        self.scope.expression(node.rvalue, reads, ())
        reduction = reduction_of(node)
        if reduction is not None and write in reads:
            reads = [write, *(read for read in reads if read != write)]
        self.record(node, list(dict.fromkeys(reads)), [write], statement_text(self.scope, node) + ";", reduction)

    def target(self, node: c_ast.Node) -> Touch:
        """The access of an assigned variable or element."""
        reads: list[Touch] = []
        if isinstance(node, c_ast.ID) and node.name in self.scope.symbols and not self.scope.symbols[node.name].shape:
            symbol = self.scope.symbols[node.name]
            if symbol.iterator:
                self.scope.refuse(node, f"loop iterator must not be assigned inside its loop, got {node.name}")
            return self.scope.touch(node, symbol, [])
        if isinstance(node, (c_ast.ID, c_ast.ArrayRef)):
            self.scope.expression(node, reads, ())
            return reads[0]
        self.scope.refuse(node, f"assignment must be to a variable or an element, got {show(node)}")

    def opaque(self, node: c_ast.FuncCall) -> None:
        """A call whose accesses are declared: (reads, writes, body), each access (array, indices, condition, may)."""
        scope, known = self.scope, self.scope.symbols
        reads, writes, body = self.opaques[show(node.name)]
        touches = []
        for group in (reads, writes):
            touches.append([])
            for array, indices, condition, may in group:
                symbol = known.get(array)
                if symbol is None:
                    scope.refuse(node, f"array must be declared, got {array}")
                if len(symbol.shape) != len(indices):
                    scope.refuse(node, f"{array} must have {len(symbol.shape)} indices, got {len(indices)}")
                names = set(re.findall(r"[A-Za-z_]\w*", " ".join([*indices, condition])))
                scope.used |= {known[n].key for n in names if n in known and known[n].integer and not known[n].iterator
                               and n not in scope.written}
                free = [(i, extent) for i, extent in zip(indices, symbol.shape) if i.isidentifier() and i not in known]
                inside = [f"0 <= {index} < {isl_text(scope.affine(extent, 'extent', scope.linear))}" for index, extent in free]
                scope.touched.add(symbol.key)
                touches[-1].append(Touch(symbol.key, tuple(indices), tuple(inside), condition, may))
        tree = c_parser.CParser().parse(f"void f() {{ {body}; }}").ext[0].body.block_items[0]
        self.record(node, *touches, statement_text(scope, tree, typed=False) + ";", None)

    def record(self, node, reads, writes, body, reduction) -> None:
        conditions = [condition for loop in self.scope.loops for condition in loop.conditions] + self.scope.conditions
        line = node.coord.line if node.coord and self.scope.source != "<python>" else 0
        self.records.append(Record(node, line, tuple(loop.name for loop in self.scope.loops), tuple(conditions), tuple(reads),
                                   tuple(writes), body, tuple(self.position), reduction))
        self.position[-1] += 1

    def live_out(self, key: str, written: bool) -> bool:
        """Whether a caller, another pointer or the rest of the function can see what the region leaves in an array."""
        symbol = self.scope.known[key]
        if symbol.field:  # of an object that others may see; there are no private copies of a part
            return written
        if self.clause is not None:
            return symbol.name in self.clause
        seen = symbol.shape and symbol.argument or symbol.persistent or symbol.pointers
        seen = seen or symbol.name in self.around.after or symbol.name in self.around.escaped
        seen = seen or symbol.shape and symbol.name in self.around.whole
        return written and not symbol.local and bool(seen)
