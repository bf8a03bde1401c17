"""SCoPs from C: the region between `#pragma scop` and `#pragma endscop` of a function, read with pycparser.

Handled: for loops with affine bounds in both directions and with constant strides, if with affine conditions, assignments
(also compound, ++ and --), scalars, conditional expressions, calls of functions without side effects, local declarations and
constants. Arrays are taken to be in bounds and not to alias. Everything else is refused with file, line and expression.
"""

import re
from dataclasses import replace
from pathlib import Path

import islpy as isl
from pycparser import c_ast, c_parser

from npu_sparse.schedule.frontend.expressions import Loop, NotAffine, Scope, Touch, add, isl_text
from npu_sparse.schedule.frontend.preprocess import constant, is_integer, run_cpp
from npu_sparse.schedule.frontend.regions import parse_function
from npu_sparse.schedule.frontend.syntax import assigned, first_use, loop_steps, nodes, reduction_of, show
from npu_sparse.schedule.scop import Access, Array, Scop, ScopError, Statement

KEYWORDS = {c_ast.While: "while", c_ast.DoWhile: "do", c_ast.Switch: "switch", c_ast.Goto: "goto", c_ast.Label: "label",
            c_ast.Return: "return", c_ast.Break: "break", c_ast.Continue: "continue"}
def parse_c(source: str | Path, function: str | None = None, cpp: tuple[str, ...] | None = None) -> Scop:
    """The SCoP of a C file, or of C text (a str of more than one line).

    Args:
        function: whose scop it is; needed where several functions hold one.
        cpp: options for `gcc -E`, such as ("-Iutilities", "-DN=100"), for files whose macros come from headers; None expands
            the macros of the file itself.
    """
    if isinstance(source, str) and "\n" in source:
        return parse_text(source, "<text>", function)
    path = Path(source)
    try:
        text = path.read_text() if cpp is None else run_cpp(path, tuple(cpp))
    except (OSError, UnicodeDecodeError) as error:
        raise ScopError(f"{path}: source must be a readable text file, got {error}") from error
    scop = parse_text(text, str(path), function)
    return replace(scop, name=path.stem)


def parse_text(text: str, source: str, function: str | None = None, opaques: dict | None = None, context: str = "") -> Scop:
    """The SCoP of C text; `opaques` gives the footprints of calls that are statements (see builder.py)."""
    try:
        tree, definition = parse_function(text, source, function)
        return Walk(source, tree, definition, opaques or {}, context).scop()
    except RecursionError as error:
        raise ScopError(f"{source}: code must be nested less deeply, got too many levels") from error


class Walk:
    """The walk over one function. What changes on the way - open loops, conditions, counters - is in the attributes."""

    def __init__(self, source: str, tree: c_ast.FileAST, function: c_ast.FuncDef, opaques: dict, context: str):
        self.function, self.opaques = function, opaques
        self.scope = Scope(source, context, {name for name, _ in assigned(function)})
        self.position: list[int | str] = [0]
        self.records: list[dict] = []
        self.region = (0, 0)
        self.clause: list[str] | None = None
        for node in tree.ext:
            if isinstance(node, c_ast.Decl) and not isinstance(node.type, c_ast.FuncDecl):
                self.scope.declare(node)
        arguments = function.decl.type.args
        for node in arguments.params if arguments else ():
            if isinstance(node, c_ast.Decl) and node.name:
                self.scope.declare(node, argument=True)
        self.arguments = [name for name, symbol in self.scope.symbols.items() if symbol.argument]
        self.globals = {node.name for node in tree.ext if isinstance(node, c_ast.Decl)}

    # The region and what surrounds it

    def scop(self) -> Scop:
        if not self.enter(self.function.body):
            raise ScopError(f"{self.scope.source}: #pragma scop must stand between statements, got it elsewhere")
        if not self.records:
            raise ScopError(f"{self.scope.source}:{self.region[0]}: scop must hold a statement, got none")
        return self.finish()

    def enter(self, node: c_ast.Node) -> bool:
        """Declares what is visible before the pragma, walks the region, and says whether it was below this node."""
        if isinstance(node, c_ast.Compound):
            items, known = node.block_items or [], dict(self.scope.symbols)
            for at, item in enumerate(items):
                if isinstance(item, c_ast.Pragma) and item.string.strip().startswith("scop"):
                    self.walk_region(item, items[at + 1:])
                    return True
                if isinstance(item, c_ast.Decl) and not isinstance(item.type, c_ast.FuncDecl):
                    self.scope.declare(item)
                elif self.enter(item):
                    return True
            self.scope.symbols = known
            return False
        if isinstance(node, c_ast.For) and isinstance(node.init, c_ast.DeclList):
            known = dict(self.scope.symbols)
            for item in node.init.decls:
                self.scope.declare(item)
            if self.enter(node.stmt):
                return True
            self.scope.symbols = known
            return False
        bodies = (node.stmt,) if isinstance(node, (c_ast.For, c_ast.While, c_ast.DoWhile)) else \
            (node.iftrue, node.iffalse) if isinstance(node, c_ast.If) else ()
        return any(self.enter(body) for body in bodies if body is not None)

    def walk_region(self, pragma: c_ast.Pragma, rest: list[c_ast.Node]) -> None:
        end = next((at for at, item in enumerate(rest) if isinstance(item, c_ast.Pragma) and
                    item.string.split()[:1] == ["endscop"]), None)
        if end is None:
            self.scope.refuse(pragma, "#pragma scop must end with #pragma endscop in the same block, got none")
        self.region = (pragma.coord.line, rest[end].coord.line)
        words = pragma.string.strip()[len("scop"):].strip()
        if words:
            match = re.fullmatch(r"live_out\s*\(([\w\s,]*)\)", words)
            if not match:
                self.scope.refuse(pragma, f"#pragma scop must have no clause but live_out(names), got {words}")
            self.clause = [name.strip() for name in match[1].split(",") if name.strip()]
        body = rest[:end]
        # Names that the region changes are data; integers that it does not change may be parameters.
        loops = {id(node) for item in body for node in loop_steps(item)}
        self.scope.written = {name for item in body for name, node in assigned(item) if id(node) not in loops}
        self.after = {node.name for item in rest[end + 1:] for node in nodes(item, c_ast.ID)}
        if any(isinstance(node, (c_ast.For, c_ast.While, c_ast.DoWhile)) and pragma in list(nodes(node, c_ast.Pragma))
               for node in nodes(self.function.body)):  # the region repeats: what it wrote may be read before it too
            self.after |= {node.name for node in nodes(self.function.body, c_ast.ID)}
        for item in body:
            self.statement(item)
        iterators = {name for record in self.records for name in record["iterators"]} & set(self.scope.symbols)
        for name in sorted(iterators):  # generated code does not leave their last values behind
            if name in self.scope.used | self.scope.touched:
                self.scope.refuse(pragma, f"loop iterator must not be read outside of its loop, got {name}")
            if first_use(c_ast.Compound(rest[end + 1:]), name) == "read":
                self.scope.refuse(pragma, f"loop iterator must not be read after the scop, got {name}")

    # Statements

    def statement(self, node: c_ast.Node) -> None:
        if isinstance(node, c_ast.Compound):
            for item in node.block_items or ():
                self.statement(item)
        elif isinstance(node, c_ast.For):
            self.loop(node)
        elif isinstance(node, c_ast.If):
            condition = self.scope.affine(node.cond, "condition", self.scope.condition)
            for branch, text in ((node.iftrue, condition), (node.iffalse, f"not ({condition})")):
                if branch is not None:
                    self.scope.conditions.append(text)
                    self.statement(branch)
                    self.scope.conditions.pop()
        elif isinstance(node, c_ast.Decl):
            self.scope.declare(node, local=True)
            if node.init is not None and self.scope.symbols[node.name].value is None:
                self.assign(c_ast.Assignment("=", c_ast.ID(node.name, node.coord), node.init, node.coord))
        elif isinstance(node, c_ast.Assignment):
            self.assign(node)
        elif isinstance(node, c_ast.UnaryOp) and node.op in ("p++", "++", "p--", "--"):
            one = c_ast.Constant("int", "1", node.coord)
            self.assign(c_ast.Assignment(f"{node.op[-1]}=", node.expr, one, node.coord))
        elif isinstance(node, c_ast.FuncCall) and show(node.name) in self.opaques:
            self.opaque(node)
        elif not isinstance(node, (c_ast.EmptyStatement, c_ast.Pragma)):
            got = KEYWORDS.get(type(node)) or show(node)
            self.scope.refuse(node, f"statement must be an assignment, a for loop or an if, got {got}")

    def loop(self, node: c_ast.For) -> None:
        name, start = self.loop_start(node)
        self.scope.check_name(node, name)
        if any(loop.name == name for loop in self.scope.loops):
            self.scope.refuse(node, f"loop iterator must differ from those of the enclosing loops, got {name}")
        if name in self.scope.written:
            self.scope.refuse(node, f"loop iterator must not be assigned in the scop outside of its for, got {name}")
        known = self.scope.symbols.get(name)
        if not isinstance(node.init, c_ast.DeclList) and known is None:
            self.scope.refuse(node, f"loop iterator must be declared, got {name}")
        if known is not None and (known.shape or not known.integer or known.value is not None):
            self.scope.refuse(node, f"loop iterator must be an integer variable, got {name}")
        step = self.loop_step(node, name)
        first = self.scope.affine(start, "loop bound", self.scope.linear)
        if node.cond is None:
            self.scope.refuse(node, f"loop condition must bound {name}, got none")
        self.scope.loops.append(Loop(name, ()))  # the condition may use the iterator
        bounds = self.bounds(node.cond, name, step)
        text, offset = isl_text(first), isl_text(add({name: 1}, first, -1) if step > 0 else add(first, {name: 1}, -1))
        conditions = [f"{name} >= {text}" if step > 0 else f"{name} <= {text}", *bounds]
        if abs(step) > 1:
            conditions.append(f"({offset}) mod {abs(step)} = 0")
        self.scope.loops[-1] = Loop(name, tuple(conditions))
        self.position += ["-" + name if step < 0 else name, 0]
        self.statement(node.stmt)
        del self.position[-2:]
        self.position[-1] += 1
        self.scope.loops.pop()

    def loop_start(self, node: c_ast.For) -> tuple[str, c_ast.Node]:
        init = node.init
        if isinstance(init, c_ast.DeclList) and len(init.decls) == 1 and init.decls[0].init is not None:
            if is_integer(init.decls[0].type):
                return init.decls[0].name, init.decls[0].init
        elif isinstance(init, c_ast.Assignment) and init.op == "=" and isinstance(init.lvalue, c_ast.ID):
            return init.lvalue.name, init.rvalue
        self.scope.refuse(node, f"loop must start with one integer assignment, got {show(init) if init else 'none'}")

    def loop_step(self, node: c_ast.For, name: str) -> int:
        step, values = node.next, {n: s.value for n, s in self.scope.symbols.items() if s.value is not None}
        value = None
        if isinstance(step, c_ast.UnaryOp) and step.op in ("p++", "++", "p--", "--") and show(step.expr) == name:
            value = 1 if "+" in step.op else -1
        elif isinstance(step, c_ast.Assignment) and show(step.lvalue) == name:
            if step.op in ("+=", "-="):
                value = constant(step.rvalue, values)
                value = -value if value is not None and step.op == "-=" else value
            elif step.op == "=" and isinstance(step.rvalue, c_ast.BinaryOp) and step.rvalue.op in "+-":
                left, right = step.rvalue.left, step.rvalue.right
                if step.rvalue.op == "+" and show(right) == name:
                    left, right = right, left
                value = constant(right, values) if show(left) == name else None
                value = -value if value is not None and step.rvalue.op == "-" else value
        if not value:
            self.scope.refuse(node, f"loop step must be a constant other than 0, got {show(step) if step else 'none'}")
        return value

    def bounds(self, node: c_ast.Node, name: str, step: int) -> list[str]:
        """The parts of a loop condition; each must stay false once it is, so that the loop is the set of all that satisfy it."""
        if isinstance(node, c_ast.BinaryOp) and node.op == "&&":
            return self.bounds(node.left, name, step) + self.bounds(node.right, name, step)
        if not isinstance(node, c_ast.BinaryOp) or node.op not in ("<", "<=", ">", ">="):
            self.scope.refuse(node, f"loop condition must compare with <, <=, > or >=, got {show(node)}")
        left, right = (self.scope.affine(side, "loop condition", self.scope.linear) for side in (node.left, node.right))
        room = add(right, left, -1) if node.op in ("<", "<=") else add(left, right, -1)
        if any(name in re.findall(r"\w+", key) for key in room if key != name) or room.get(name, 0) * step >= 0:
            self.scope.refuse(node, f"loop condition must bound {name} in the direction of its step, got {show(node)}")
        return [f"{isl_text(room)} {'>' if node.op in ('<', '>') else '>='} 0"]

    def assign(self, node: c_ast.Assignment) -> None:
        reads, write = [], self.target(node.lvalue)
        if node.op != "=":
            reads.append(write)
        self.scope.expression(node.rvalue, reads, ())
        reduction = reduction_of(node)
        if reduction is not None and write in reads:
            reads = [write, *(read for read in reads if read != write)]
        self.record(node, list(dict.fromkeys(reads)), [write], self.scope.body(node) + ";", reduction)

    def target(self, node: c_ast.Node) -> Touch:
        """The access of an assigned variable or element."""
        reads: list[Touch] = []
        if isinstance(node, c_ast.ID) and node.name in self.scope.symbols and not self.scope.symbols[node.name].shape:
            symbol = self.scope.symbols[node.name]
            if any(loop.name == node.name for loop in self.scope.loops):
                self.scope.refuse(node, f"loop iterator must not be assigned inside its loop, got {node.name}")
            self.scope.check_name(node, symbol.name)
            self.scope.touched.add(node.name)
            return Touch(node.name, ())
        if isinstance(node, (c_ast.ID, c_ast.ArrayRef)):
            self.scope.expression(node, reads, ())
            return reads[0]
        self.scope.refuse(node, f"assignment must be to a variable or an element, got {show(node)}")

    def opaque(self, node: c_ast.FuncCall) -> None:
        """A call whose accesses are declared: (reads, writes, body), each access (array, indices, condition, may)."""
        name = show(node.name)
        reads, writes, body = self.opaques[name]
        touches = []
        for group in (reads, writes):
            touches.append([])
            for array, indices, condition, may in group:
                symbol = self.scope.symbols.get(array)
                if symbol is None:
                    self.scope.refuse(node, f"array must be declared, got {array}")
                if len(symbol.shape) != len(indices):
                    self.scope.refuse(node, f"{array} must have {len(symbol.shape)} indices, got {len(indices)}")
                names = set(re.findall(r"[A-Za-z_]\w*", " ".join([*indices, condition])))
                known = self.scope.symbols
                self.scope.used |= {n for n in names if n in known and known[n].integer and n not in self.scope.written}
                free = [(i, extent) for i, extent in zip(indices, symbol.shape) if i.isidentifier() and i not in known
                        and all(loop.name != i for loop in self.scope.loops)]
                inside = [f"0 <= {index} < {isl_text(self.scope.affine(extent, 'extent', self.scope.linear))}"
                          for index, extent in free]
                self.scope.touched.add(array)
                touches[-1].append(Touch(array, tuple(indices), tuple(inside), condition, may))
        tree = c_parser.CParser().parse(f"void f() {{ {body}; }}").ext[0].body.block_items[0]
        self.record(node, *touches, self.scope.body(tree) + ";", None)

    def record(self, node, reads, writes, body, reduction) -> None:
        conditions = [condition for loop in self.scope.loops for condition in loop.conditions] + self.scope.conditions
        line = node.coord.line if node.coord and self.scope.source != "<python>" else 0
        self.records.append({"line": line, "iterators": [loop.name for loop in self.scope.loops],
                             "conditions": conditions, "reads": reads, "writes": writes, "body": body,
                             "position": tuple(self.position), "reduction": reduction, "node": node})
        self.position[-1] += 1

    # isl objects

    def finish(self) -> Scop:
        known = []
        # An array of variable extent has at least one element; its extents are parameters too.
        for name in [name for name in self.scope.symbols if name in self.scope.touched]:
            for extent in self.scope.symbols[name].shape:
                try:
                    form = self.scope.linear(extent) if extent is not None else {}
                except (NotAffine, ScopError):  # such as n / 2
                    continue
                if set(form) - {""}:
                    known.append(f"{isl_text(form)} >= 1")
        parameters = tuple(name for name in self.scope.symbols if name in self.scope.used)
        touched = [name for name in self.scope.symbols if name in self.scope.touched and name not in self.scope.used]
        prefix = f"[{', '.join(parameters)}] -> "
        known = list(dict.fromkeys(known + ([self.scope.context] if self.scope.context else [])))
        context = isl.Set(prefix + "{ : " + " and ".join(known or ["true"]) + " }")
        statements = []
        for record in self.records:
            name = f"S{len(statements)}"
            tuple_text = f"{name}[{', '.join(record['iterators'])}]"
            conditions = " and ".join(f"({text})" for text in record["conditions"]) or "true"
            domain = isl.Set(f"{prefix}{{ {tuple_text} : {conditions} }}").coalesce()
            if domain.intersect_params(context).is_empty():  # never executed
                continue
            reads, writes = ([self.access(prefix, tuple_text, touch, domain) for touch in record[kind]
                              if touch.array not in parameters] for kind in ("reads", "writes"))
            reduction = record["reduction"]
            if reduction and any(not read.relation.intersect(writes[0].relation).is_empty()
                                 for read in reads[1:] if read.array == writes[0].array):
                reduction = None
            statements.append(Statement(name, len(statements), domain, tuple(record["iterators"]), tuple(reads), tuple(writes),
                                        record["body"], record["position"], reduction, record["line"]))
        if not statements:
            where = f"{self.scope.source}:{self.region[0]}"
            raise ScopError(f"{where}: scop must execute a statement, got conditions that never hold")
        arrays = {name: self.array(name) for name in touched}
        if unknown := [name for name in self.clause or () if name not in arrays]:
            raise ScopError(f"{self.scope.source}:{self.region[0]}: live_out must name arrays of the scop, got {unknown[0]}")
        function = self.function.decl.name
        region = self.region if self.scope.source != "<python>" else (0, 0)
        return Scop(function, parameters, context, arrays, tuple(statements), self.scope.source, function,
                    tuple(self.array(name) for name in self.arguments), region)

    def access(self, prefix: str, statement: str, touch: Touch, domain: isl.Set) -> Access:
        guards = [*touch.guards, *([touch.footprint] if touch.footprint else [])]
        text = f"{prefix}{{ {statement} -> {touch.array}[{', '.join(touch.subscripts)}]"
        try:
            relation = isl.Map(text + (" : " + " and ".join(f"({g})" for g in guards) if guards else "") + " }")
        except isl.Error as error:  # only declared footprints come unchecked to here
            got = f"{touch.array}[{', '.join(touch.subscripts)}] : {touch.footprint}"
            raise ScopError(f"{self.scope.source}: footprint must be affine in iterators and parameters, got {got}") from error
        return Access(touch.array, relation.intersect_domain(domain), touch.may)

    def array(self, name: str) -> Array:
        symbol = self.scope.symbols[name]
        written = name in {touch.array for record in self.records for touch in record["writes"]}
        if self.clause is not None:
            live_out = name in self.clause
        else:  # what a caller or the rest of the function can see
            live_out = written and not symbol.local and (bool(symbol.shape) and symbol.argument or name in self.after or
                                                         name in self.globals)
        shape = tuple("" if extent is None else self.scope.body(extent) for extent in symbol.shape)
        return Array(name, shape, symbol.ctype, live_out, symbol.local)


