"""SCoPs from C: the region between `#pragma scop` and `#pragma endscop` of a function, read with pycparser.

Handled: for loops with affine bounds in both directions and with constant strides, if with affine conditions, assignments
(also compound, ++ and --), scalars, conditional expressions, calls of functions without side effects, local declarations and
constants. Arrays are taken to be in bounds and not to alias. Everything else is refused with file, line and expression.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import islpy as isl
from pycparser import c_ast, c_generator, c_parser

from .preprocess import TOKEN, constant, is_integer, preprocess, run_cpp
from .scop import Access, Array, Scop, ScopError, Statement

# Names that C programs use and headers define; only what a loop nest may mention.
TYPES = "size_t ssize_t ptrdiff_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t bool FILE".split()
CONSTANTS = set("INFINITY NAN HUGE_VAL M_PI M_E M_SQRT2 FLT_MAX FLT_MIN FLT_EPSILON DBL_MAX DBL_MIN DBL_EPSILON INT_MAX INT_MIN "
                "true false".split())
RESERVED = set("and or not exists mod floor ceil floord ceild min max implies true false infty infinity nan rat".split())
KEYWORDS = {c_ast.While: "while", c_ast.DoWhile: "do", c_ast.Switch: "switch", c_ast.Goto: "goto", c_ast.Label: "label",
            c_ast.Return: "return", c_ast.Break: "break", c_ast.Continue: "continue"}
COMPARISONS = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "==": "=", "!=": "!="}
SCOP, ENDSCOP = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+scop\b", re.M), re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+endscop\b", re.M)
Linear = dict[str, int]  # coefficients by name; "" is the constant, "floor((i)/2)" and "((i) mod 2)" are names too


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
        return _Extractor(source, tree, definition, opaques or {}, context).scop()
    except RecursionError as error:
        raise ScopError(f"{source}: code must be nested less deeply, got too many levels") from error


def parse_function(text: str, source: str, function: str | None = None) -> tuple[c_ast.FileAST, c_ast.FuncDef]:
    """The file's declarations and the function that holds the scop."""
    tree = _parse(_relevant(preprocess(text, source), source, function), source)
    return tree, next(node for node in tree.ext if isinstance(node, c_ast.FuncDef))


def _relevant(text: str, source: str, function: str | None) -> str:
    """The text with every function blanked but the one that holds the scop: headers are not read, so others may not parse."""
    def number(position):
        return text.count("\n", 0, position) + 1

    starts, ends = ([m.start() for m in pattern.finditer(text)] for pattern in (SCOP, ENDSCOP))
    if not starts:
        where = f"{source}:{number(ends[0])}: #pragma endscop must follow #pragma scop" if ends else \
            f"{source}: source must hold #pragma scop"
        raise ScopError(f"{where}, got none")
    found, out = {}, list(text)
    for begin, end, header in _definitions(text, source):
        inside = [at for at in starts if begin <= at < end]
        name = ([n for n in re.findall(r"([A-Za-z_]\w*)\s*\(", header) if n != "__attribute__"] or [""])[0]
        if inside:
            found[name] = (begin, end, inside, [at for at in ends if begin <= at < end])
    if not found:
        raise ScopError(f"{source}:{number(starts[0])}: #pragma scop must stand in a function, got it outside")
    if function is None and len(found) > 1:
        raise ScopError(f"{source}: function must be named where several hold a scop, got {', '.join(found)}")
    if function is not None and function not in found:
        raise ScopError(f"{source}: function must hold a scop ({', '.join(found)}), got {function}")
    name = function or next(iter(found))
    begin, end, inside, closing = found[name]
    if len(inside) > 1:
        raise ScopError(f"{source}:{number(inside[1])}: function must hold one scop, got a second in {name}")
    if not closing or closing[0] < inside[0]:
        raise ScopError(f"{source}:{number(inside[0])}: #pragma scop must end with #pragma endscop in {name}, got none")
    for other, stop, _ in _definitions(text, source):
        if other != begin:
            out[other:stop] = [c if c == "\n" else " " for c in text[other:stop]]
    return "".join(out)


def _definitions(text: str, source: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and header of every function definition, and of every declaration of a function."""
    depth, start, header, opened = 0, 0, None, 0
    for match in re.finditer(r"^[ \t]*#[^\n]*|[{};]|" + TOKEN.pattern, text, re.M | re.S):
        token = match[0]
        if token == "{":
            if depth == 0:
                header, opened = text[start:match.start()], match.start()
            depth += 1
        elif token == "}":
            depth -= 1
            if depth < 0:
                raise ScopError(f"{source}:{text.count(chr(10), 0, match.start()) + 1}: braces must match, got an extra }}")
            if depth == 0 and header is not None and "(" in header and "=" not in header:
                yield start, match.end(), header
                start, header = match.end(), None
        elif token == ";" and depth == 0:
            declared = text[start:match.start()]
            if declared.rstrip().endswith(")") and "=" not in declared:
                yield start, match.end(), ""
            start, header = match.end(), None
    if depth:
        raise ScopError(f"{source}:{text.count(chr(10), 0, opened) + 1}: braces must match, got {{ without an end")


def _parse(text: str, source: str) -> c_ast.FileAST:
    prelude = "".join(f"typedef int {name}; " for name in TYPES) + "\n"
    parser = c_parser.CParser()
    try:
        tree = parser.parse(prelude + f'#line 1 "{source}"\n' + text, source)
    except c_parser.ParseError as error:
        match = re.match(r"(.+?:\d+)(?::\d+)?: (.*)", str(error))
        message = match[2] if match else str(error).rpartition(": ")[2]
        # Where the parser does not say, it stopped where the lexer is; pycparser 3 has no public name for that.
        line = getattr(parser.clex, "_lineno", None)
        where = match[1] if match else f"{source}:{line}" if line else source
        raise ScopError(f"{where}: source must be C, got {message[:1].lower() + message[1:]}") from error
    return c_ast.FileAST([node for node in tree.ext if not (isinstance(node, c_ast.Typedef) and node.name in TYPES)])


@dataclass(frozen=True)
class _Symbol:
    """A declared name. shape: extents, () for scalars; value: of an integer that never changes."""

    name: str
    ctype: str
    shape: tuple[c_ast.Node | None, ...]
    integer: bool
    value: int | None = None
    argument: bool = False
    local: bool = False


@dataclass(frozen=True)
class _Loop:
    name: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class _Touch:
    """An access before the parameters are known: subscripts as isl text, under the guards of conditional expressions."""

    array: str
    subscripts: tuple[str, ...]
    guards: tuple[str, ...] = ()
    footprint: str = ""  # condition on further dimensions, of opaque statements
    may: bool = False


class _NotAffine(Exception):
    pass


class _Printer(c_generator.CGenerator):
    """C text; names may be replaced."""

    def __init__(self, names: Callable[[str], str] = str):
        super().__init__()
        self.names = names

    def visit_ID(self, node):
        return self.names(node.name)

    def visit_FuncCall(self, node):  # the function's own name stays
        arguments = ", ".join(self.visit(argument) for argument in node.args.exprs) if node.args else ""
        return f"{node.name.name if isinstance(node.name, c_ast.ID) else self.visit(node.name)}({arguments})"


def show(node: c_ast.Node) -> str:
    """The first line of a node's C text."""
    return _Printer().visit(node).strip().split("\n")[0]


class _Extractor:
    """The walk over one function. What changes on the way - open loops, conditions, counters - is in the attributes."""

    def __init__(self, source: str, tree: c_ast.FileAST, function: c_ast.FuncDef, opaques: dict, context: str):
        self.source, self.function, self.opaques, self.context = source, function, opaques, context
        self.symbols: dict[str, _Symbol] = {}
        self.loops: list[_Loop] = []
        self.conditions: list[str] = []
        self.position: list[int | str] = [0]
        self.used: set[str] = set()  # integers in affine expressions: the parameters
        self.touched: set[str] = set()
        self.records: list[dict] = []
        self.region = (0, 0)
        self.clause: list[str] | None = None
        self.assigned = {name for name, _ in _assigned(function)}
        for node in tree.ext:
            if isinstance(node, c_ast.Decl) and not isinstance(node.type, c_ast.FuncDecl):
                self.declare(node)
        arguments = function.decl.type.args
        for node in arguments.params if arguments else ():
            if isinstance(node, c_ast.Decl) and node.name:
                self.declare(node, argument=True)
        self.arguments = [name for name, symbol in self.symbols.items() if symbol.argument]
        self.globals = {node.name for node in tree.ext if isinstance(node, c_ast.Decl)}

    # The region and what surrounds it

    def scop(self) -> Scop:
        if not self.enter(self.function.body):
            raise ScopError(f"{self.source}: #pragma scop must stand between statements, got it elsewhere")
        if not self.records:
            raise ScopError(f"{self.source}:{self.region[0]}: scop must hold a statement, got none")
        return self.finish()

    def enter(self, node: c_ast.Node) -> bool:
        """Declares what is visible before the pragma, walks the region, and says whether it was below this node."""
        if isinstance(node, c_ast.Compound):
            items, known = node.block_items or [], dict(self.symbols)
            for at, item in enumerate(items):
                if isinstance(item, c_ast.Pragma) and item.string.strip().startswith("scop"):
                    self.walk_region(item, items[at + 1:])
                    return True
                if isinstance(item, c_ast.Decl) and not isinstance(item.type, c_ast.FuncDecl):
                    self.declare(item)
                elif self.enter(item):
                    return True
            self.symbols = known
            return False
        if isinstance(node, c_ast.For) and isinstance(node.init, c_ast.DeclList):
            known = dict(self.symbols)
            for item in node.init.decls:
                self.declare(item)
            if self.enter(node.stmt):
                return True
            self.symbols = known
            return False
        bodies = (node.stmt,) if isinstance(node, (c_ast.For, c_ast.While, c_ast.DoWhile)) else \
            (node.iftrue, node.iffalse) if isinstance(node, c_ast.If) else ()
        return any(self.enter(body) for body in bodies if body is not None)

    def walk_region(self, pragma: c_ast.Pragma, rest: list[c_ast.Node]) -> None:
        end = next((at for at, item in enumerate(rest) if isinstance(item, c_ast.Pragma) and
                    item.string.split()[:1] == ["endscop"]), None)
        if end is None:
            self.refuse(pragma, "#pragma scop must end with #pragma endscop in the same block, got none")
        self.region = (pragma.coord.line, rest[end].coord.line)
        words = pragma.string.strip()[len("scop"):].strip()
        if words:
            match = re.fullmatch(r"live_out\s*\(([\w\s,]*)\)", words)
            if not match:
                self.refuse(pragma, f"#pragma scop must have no clause but live_out(names), got {words}")
            self.clause = [name.strip() for name in match[1].split(",") if name.strip()]
        body = rest[:end]
        # Names that the region changes are data; integers that it does not change may be parameters.
        loops = {id(node) for item in body for node in _loop_steps(item)}
        self.written = {name for item in body for name, node in _assigned(item) if id(node) not in loops}
        self.after = {node.name for item in rest[end + 1:] for node in _nodes(item, c_ast.ID)}
        if any(isinstance(node, (c_ast.For, c_ast.While, c_ast.DoWhile)) and pragma in list(_nodes(node, c_ast.Pragma))
               for node in _nodes(self.function.body)):  # the region repeats: what it wrote may be read before it too
            self.after |= {node.name for node in _nodes(self.function.body, c_ast.ID)}
        for item in body:
            self.statement(item)
        iterators = {name for record in self.records for name in record["iterators"]} & set(self.symbols)
        for name in sorted(iterators):  # generated code does not leave their last values behind
            if name in self.used | self.touched:
                self.refuse(pragma, f"loop iterator must not be read outside of its loop, got {name}")
            if _first_use(c_ast.Compound(rest[end + 1:]), name) == "read":
                self.refuse(pragma, f"loop iterator must not be read after the scop, got {name}")

    def declare(self, node: c_ast.Decl, argument: bool = False, local: bool = False) -> None:
        if node.name in self.symbols and local:
            self.refuse(node, f"{node.name} must be declared once, got a second declaration in the scop")
        kind, shape = node.type, []
        while isinstance(kind, (c_ast.ArrayDecl, c_ast.PtrDecl)):
            shape.append(kind.dim if isinstance(kind, c_ast.ArrayDecl) else None)
            kind = kind.type
        names = getattr(getattr(kind, "type", None), "names", None)
        ctype = " ".join(names) if names else "struct"
        integer = not shape and is_integer(kind)
        # An initialised integer that the whole function never changes is its value.
        value = None
        if integer and node.init is not None and node.name not in self.assigned and not argument:
            value = constant(node.init, {name: s.value for name, s in self.symbols.items() if s.value is not None})
        self.symbols[node.name] = _Symbol(node.name, ctype, tuple(shape), integer, value, argument, local)

    # Statements

    def statement(self, node: c_ast.Node) -> None:
        if isinstance(node, c_ast.Compound):
            for item in node.block_items or ():
                self.statement(item)
        elif isinstance(node, c_ast.For):
            self.loop(node)
        elif isinstance(node, c_ast.If):
            condition = self.affine(node.cond, "condition", self.condition)
            for branch, text in ((node.iftrue, condition), (node.iffalse, f"not ({condition})")):
                if branch is not None:
                    self.conditions.append(text)
                    self.statement(branch)
                    self.conditions.pop()
        elif isinstance(node, c_ast.Decl):
            self.declare(node, local=True)
            if node.init is not None and self.symbols[node.name].value is None:
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
            self.refuse(node, f"statement must be an assignment, a for loop or an if, got {got}")

    def loop(self, node: c_ast.For) -> None:
        name, start = self.loop_start(node)
        self.check_name(node, name)
        if any(loop.name == name for loop in self.loops):
            self.refuse(node, f"loop iterator must differ from those of the enclosing loops, got {name}")
        if name in self.written:
            self.refuse(node, f"loop iterator must not be assigned in the scop outside of its for, got {name}")
        known = self.symbols.get(name)
        if not isinstance(node.init, c_ast.DeclList) and known is None:
            self.refuse(node, f"loop iterator must be declared, got {name}")
        if known is not None and (known.shape or not known.integer or known.value is not None):
            self.refuse(node, f"loop iterator must be an integer variable, got {name}")
        step = self.loop_step(node, name)
        first = self.affine(start, "loop bound", self.linear)
        if node.cond is None:
            self.refuse(node, f"loop condition must bound {name}, got none")
        self.loops.append(_Loop(name, ()))  # the condition may use the iterator
        bounds = self.bounds(node.cond, name, step)
        text, offset = _text(first), _text(_add({name: 1}, first, -1) if step > 0 else _add(first, {name: 1}, -1))
        conditions = [f"{name} >= {text}" if step > 0 else f"{name} <= {text}", *bounds]
        if abs(step) > 1:
            conditions.append(f"({offset}) mod {abs(step)} = 0")
        self.loops[-1] = _Loop(name, tuple(conditions))
        self.position += ["-" + name if step < 0 else name, 0]
        self.statement(node.stmt)
        del self.position[-2:]
        self.position[-1] += 1
        self.loops.pop()

    def loop_start(self, node: c_ast.For) -> tuple[str, c_ast.Node]:
        init = node.init
        if isinstance(init, c_ast.DeclList) and len(init.decls) == 1 and init.decls[0].init is not None:
            if is_integer(init.decls[0].type):
                return init.decls[0].name, init.decls[0].init
        elif isinstance(init, c_ast.Assignment) and init.op == "=" and isinstance(init.lvalue, c_ast.ID):
            return init.lvalue.name, init.rvalue
        self.refuse(node, f"loop must start with one integer assignment, got {show(init) if init else 'none'}")

    def loop_step(self, node: c_ast.For, name: str) -> int:
        step, values = node.next, {n: s.value for n, s in self.symbols.items() if s.value is not None}
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
            self.refuse(node, f"loop step must be a constant other than 0, got {show(step) if step else 'none'}")
        return value

    def bounds(self, node: c_ast.Node, name: str, step: int) -> list[str]:
        """The parts of a loop condition; each must stay false once it is, so that the loop is the set of all that satisfy it."""
        if isinstance(node, c_ast.BinaryOp) and node.op == "&&":
            return self.bounds(node.left, name, step) + self.bounds(node.right, name, step)
        if not isinstance(node, c_ast.BinaryOp) or node.op not in ("<", "<=", ">", ">="):
            self.refuse(node, f"loop condition must compare with <, <=, > or >=, got {show(node)}")
        left, right = (self.affine(side, "loop condition", self.linear) for side in (node.left, node.right))
        room = _add(right, left, -1) if node.op in ("<", "<=") else _add(left, right, -1)
        if any(name in re.findall(r"\w+", key) for key in room if key != name) or room.get(name, 0) * step >= 0:
            self.refuse(node, f"loop condition must bound {name} in the direction of its step, got {show(node)}")
        return [f"{_text(room)} {'>' if node.op in ('<', '>') else '>='} 0"]

    def assign(self, node: c_ast.Assignment) -> None:
        reads, write = [], self.target(node.lvalue)
        if node.op != "=":
            reads.append(write)
        self.expression(node.rvalue, reads, ())
        reduction = _reduction(node)
        if reduction is not None and write in reads:
            reads = [write, *(read for read in reads if read != write)]
        self.record(node, list(dict.fromkeys(reads)), [write], self.body(node) + ";", reduction)

    def target(self, node: c_ast.Node) -> _Touch:
        """The access of an assigned variable or element."""
        reads: list[_Touch] = []
        if isinstance(node, c_ast.ID) and node.name in self.symbols and not self.symbols[node.name].shape:
            symbol = self.symbols[node.name]
            if any(loop.name == node.name for loop in self.loops):
                self.refuse(node, f"loop iterator must not be assigned inside its loop, got {node.name}")
            self.check_name(node, symbol.name)
            self.touched.add(node.name)
            return _Touch(node.name, ())
        if isinstance(node, (c_ast.ID, c_ast.ArrayRef)):
            self.expression(node, reads, ())
            return reads[0]
        self.refuse(node, f"assignment must be to a variable or an element, got {show(node)}")

    def opaque(self, node: c_ast.FuncCall) -> None:
        """A call whose accesses are declared: (reads, writes, body), each access (array, indices, condition, may)."""
        name = show(node.name)
        reads, writes, body = self.opaques[name]
        touches = []
        for group in (reads, writes):
            touches.append([])
            for array, indices, condition, may in group:
                symbol = self.symbols.get(array)
                if symbol is None:
                    self.refuse(node, f"array must be declared, got {array}")
                if len(symbol.shape) != len(indices):
                    self.refuse(node, f"{array} must have {len(symbol.shape)} indices, got {len(indices)}")
                names = set(re.findall(r"[A-Za-z_]\w*", " ".join([*indices, condition])))
                self.used |= {n for n in names if n in self.symbols and self.symbols[n].integer and n not in self.written}
                free = [(i, extent) for i, extent in zip(indices, symbol.shape) if i.isidentifier() and i not in self.symbols
                        and all(loop.name != i for loop in self.loops)]
                inside = [f"0 <= {index} < {_text(self.affine(extent, 'extent', self.linear))}" for index, extent in free]
                self.touched.add(array)
                touches[-1].append(_Touch(array, tuple(indices), tuple(inside), condition, may))
        tree = c_parser.CParser().parse(f"void f() {{ {body}; }}").ext[0].body.block_items[0]
        self.record(node, *touches, self.body(tree) + ";", None)

    def record(self, node, reads, writes, body, reduction) -> None:
        conditions = [condition for loop in self.loops for condition in loop.conditions] + self.conditions
        line = node.coord.line if node.coord and self.source != "<python>" else 0
        self.records.append({"line": line, "iterators": [loop.name for loop in self.loops],
                             "conditions": conditions, "reads": reads, "writes": writes, "body": body,
                             "position": tuple(self.position), "reduction": reduction, "node": node})
        self.position[-1] += 1

    def body(self, node: c_ast.Node) -> str:
        iterators = {loop.name for loop in self.loops}

        def name(text):
            if text in iterators:
                return f"({text})"
            symbol = self.symbols.get(text)
            return str(symbol.value) if symbol and symbol.value is not None and not symbol.shape else text
        return _Printer(name).visit(node)

    # Expressions

    def expression(self, node: c_ast.Node, reads: list[_Touch], guards: tuple[str, ...]) -> None:
        """Appends what the expression reads; an affine condition of ?: restricts the reads of its branches."""
        if isinstance(node, c_ast.ID):
            symbol = self.symbols.get(node.name)
            if any(loop.name == node.name for loop in self.loops) or symbol and symbol.value is not None:
                return
            if symbol is None and node.name in CONSTANTS:
                return
            if symbol is None:
                self.refuse(node, f"name must be declared, got {node.name}")
            if symbol.shape:
                self.refuse(node, f"array must have {len(symbol.shape)} subscripts, got {node.name}")
            self.check_name(node, node.name)
            self.touched.add(node.name)
            reads.append(_Touch(node.name, (), guards))
        elif isinstance(node, c_ast.ArrayRef):
            base, subscripts = node, []
            while isinstance(base, c_ast.ArrayRef):
                subscripts.insert(0, base.subscript)
                base = base.name
            symbol = self.symbols.get(base.name) if isinstance(base, c_ast.ID) else None
            if symbol is None:
                self.refuse(node, f"array must be declared, got {show(node)}")
            if None in symbol.shape[1:]:
                self.refuse(node, f"array must have extents, got pointers to pointers in {show(node)}")
            if len(symbol.shape) != len(subscripts):
                self.refuse(node, f"{base.name} must have {len(symbol.shape)} subscripts, got {show(node)}")
            self.check_name(node, base.name)
            self.touched.add(base.name)
            indices = tuple(_text(self.affine(subscript, "subscript", self.linear)) for subscript in subscripts)
            reads.append(_Touch(base.name, indices, guards))
        elif isinstance(node, c_ast.BinaryOp):
            self.expression(node.left, reads, guards)
            self.expression(node.right, reads, guards)
        elif isinstance(node, c_ast.UnaryOp) and node.op in ("-", "+", "!", "~"):
            self.expression(node.expr, reads, guards)
        elif isinstance(node, c_ast.Cast):
            self.expression(node.expr, reads, guards)
        elif isinstance(node, c_ast.TernaryOp):
            try:
                condition = self.condition(node.cond)
            except _NotAffine:
                self.expression(node.cond, reads, guards)
                self.expression(node.iftrue, reads, guards)
                self.expression(node.iffalse, reads, guards)
            else:
                self.expression(node.iftrue, reads, (*guards, condition))
                self.expression(node.iffalse, reads, (*guards, f"not ({condition})"))
        elif isinstance(node, c_ast.FuncCall) and isinstance(node.name, c_ast.ID):
            if re.fullmatch(r"S\d+", node.name.name):
                self.refuse(node, f"function must not have the name of a statement, got {show(node)}")
            for argument in node.args.exprs if node.args else ():
                self.expression(argument, reads, guards)
        elif not isinstance(node, c_ast.Constant):
            self.refuse(node, f"expression must have no side effects and no pointers, got {show(node)}")

    def linear(self, node: c_ast.Node) -> Linear:
        """An affine form over iterators and parameters; raises _NotAffine."""
        value = constant(node, {name: s.value for name, s in self.symbols.items() if s.value is not None})
        if value is not None:
            return {"": value} if value else {}
        if isinstance(node, c_ast.ID):
            if any(loop.name == node.name for loop in self.loops):
                return {node.name: 1}
            symbol = self.symbols.get(node.name)
            if symbol and symbol.integer and not symbol.local and node.name not in self.written:
                self.check_name(node, node.name)
                self.used.add(node.name)
                return {node.name: 1}
        elif isinstance(node, c_ast.UnaryOp) and node.op in "+-":
            return _add({}, self.linear(node.expr), 1 if node.op == "+" else -1)
        elif isinstance(node, c_ast.Cast) and is_integer(node.to_type):
            return self.linear(node.expr)
        elif isinstance(node, c_ast.BinaryOp) and node.op in "+-":
            return _add(self.linear(node.left), self.linear(node.right), 1 if node.op == "+" else -1)
        elif isinstance(node, c_ast.BinaryOp) and node.op == "*":
            left, right = self.linear(node.left), self.linear(node.right)
            if not set(left) - {""} or not set(right) - {""}:
                factor, form = (left, right) if not set(left) - {""} else (right, left)
                return _add({}, form, factor.get("", 0))
        elif isinstance(node, c_ast.BinaryOp) and node.op in "/%":
            form, divisor = self.linear(node.left), self.linear(node.right)
            if set(divisor) == {""} and divisor[""] > 0:
                if self.possible(f"{_text(form)} < 0"):  # C truncates towards zero, floor does not
                    self.refuse(node, f"operand of {node.op} must not be negative, got {show(node)}")
                text, d = _text(form), divisor[""]
                return {f"floor(({text})/{d})" if node.op == "/" else f"(({text}) mod {d})": 1}
        raise _NotAffine(show(node))

    def condition(self, node: c_ast.Node) -> str:
        """An affine condition as isl text; raises _NotAffine."""
        if isinstance(node, c_ast.BinaryOp) and node.op in ("&&", "||"):
            return f"(({self.condition(node.left)}) {'and' if node.op == '&&' else 'or'} ({self.condition(node.right)}))"
        if isinstance(node, c_ast.UnaryOp) and node.op == "!":
            return f"not ({self.condition(node.expr)})"
        if isinstance(node, c_ast.BinaryOp) and node.op in COMPARISONS:
            return f"{_text(self.linear(node.left))} {COMPARISONS[node.op]} {_text(self.linear(node.right))}"
        return f"{_text(self.linear(node))} != 0"

    def affine(self, node: c_ast.Node, what: str, form: Callable):
        try:
            return form(node)
        except _NotAffine as error:
            got = show(node) if str(error) == show(node) else f"{error} in {show(node)}"
            self.refuse(node, f"{what} must be affine in loop iterators and parameters, got {got}")

    def possible(self, condition: str) -> bool:
        """Whether a statement at this place may see the condition hold."""
        conditions = [text for loop in self.loops for text in loop.conditions] + self.conditions
        parameters = [name for name, s in self.symbols.items() if s.integer]
        extra = [self.context] if self.context else []
        names = [loop.name for loop in self.loops]
        text = f"[{', '.join(p for p in parameters if p not in names)}] -> {{ [{', '.join(names)}] : "
        return not isl.Set(text + " and ".join(f"({c})" for c in [*conditions, *extra, condition]) + " }").is_empty()

    def check_name(self, node: c_ast.Node, name: str) -> None:
        if name.lower() in RESERVED:
            self.refuse(node, f"name must not be a keyword of isl, got {name}")

    def refuse(self, node: c_ast.Node, sentence: str):
        line = f":{node.coord.line}" if getattr(node, "coord", None) and self.source != "<python>" else ""
        raise ScopError(f"{self.source}{line}: {sentence}")

    # isl objects

    def finish(self) -> Scop:
        known = []
        # An array of variable extent has at least one element; its extents are parameters too.
        for name in [name for name in self.symbols if name in self.touched]:
            for extent in self.symbols[name].shape:
                try:
                    form = self.linear(extent) if extent is not None else {}
                except (_NotAffine, ScopError):  # such as n / 2
                    continue
                if set(form) - {""}:
                    known.append(f"{_text(form)} >= 1")
        parameters = tuple(name for name in self.symbols if name in self.used)
        touched = [name for name in self.symbols if name in self.touched and name not in self.used]
        prefix = f"[{', '.join(parameters)}] -> "
        known = list(dict.fromkeys(known + ([self.context] if self.context else [])))
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
            raise ScopError(f"{self.source}:{self.region[0]}: scop must execute a statement, got conditions that never hold")
        arrays = {name: self.array(name) for name in touched}
        if unknown := [name for name in self.clause or () if name not in arrays]:
            raise ScopError(f"{self.source}:{self.region[0]}: live_out must name arrays of the scop, got {unknown[0]}")
        function = self.function.decl.name
        return Scop(function, parameters, context, arrays, tuple(statements), self.source, function,
                    tuple(self.array(name) for name in self.arguments), self.region if self.source != "<python>" else (0, 0))

    def access(self, prefix: str, statement: str, touch: _Touch, domain: isl.Set) -> Access:
        guards = [*touch.guards, *([touch.footprint] if touch.footprint else [])]
        text = f"{prefix}{{ {statement} -> {touch.array}[{', '.join(touch.subscripts)}]"
        try:
            relation = isl.Map(text + (" : " + " and ".join(f"({g})" for g in guards) if guards else "") + " }")
        except isl.Error as error:  # only declared footprints come unchecked to here
            got = f"{touch.array}[{', '.join(touch.subscripts)}] : {touch.footprint}"
            raise ScopError(f"{self.source}: footprint must be affine in iterators and parameters, got {got}") from error
        return Access(touch.array, relation.intersect_domain(domain), touch.may)

    def array(self, name: str) -> Array:
        symbol = self.symbols[name]
        written = name in {touch.array for record in self.records for touch in record["writes"]}
        if self.clause is not None:
            live_out = name in self.clause
        else:  # what a caller or the rest of the function can see
            live_out = written and not symbol.local and (bool(symbol.shape) and symbol.argument or name in self.after or
                                                         name in self.globals)
        shape = tuple("" if extent is None else self.body(extent) for extent in symbol.shape)
        return Array(name, shape, symbol.ctype, live_out, symbol.local)


def _nodes(node: c_ast.Node, kind: type | tuple = c_ast.Node) -> Iterator[c_ast.Node]:
    if isinstance(node, kind):
        yield node
    for _, child in node.children():
        yield from _nodes(child, kind)


def _loop_steps(node: c_ast.Node) -> Iterator[c_ast.Node]:
    for loop in _nodes(node, c_ast.For):
        yield from (part for part in (loop.init, loop.next) if part is not None)


def _assigned(node: c_ast.Node) -> Iterator[tuple[str, c_ast.Node]]:
    """Names that are assigned, incremented or have their address taken, with the node that does so."""
    for item in _nodes(node, (c_ast.Assignment, c_ast.UnaryOp)):
        target = item.lvalue if isinstance(item, c_ast.Assignment) else \
            item.expr if item.op in ("p++", "++", "p--", "--", "&") else None
        if isinstance(target, c_ast.ID):
            yield target.name, item


def _first_use(node: c_ast.Node, name: str) -> str | None:
    """Whether code first reads or first writes a variable; None where it does neither."""
    if isinstance(node, c_ast.Assignment) and node.op == "=" and isinstance(node.lvalue, c_ast.ID) and node.lvalue.name == name:
        return _first_use(node.rvalue, name) or "write"
    if isinstance(node, c_ast.ID) and node.name == name:
        return "read"
    return next((use for _, child in node.children() if (use := _first_use(child, name))), None)


def _add(left: Linear, right: Linear, factor: int) -> Linear:
    total = dict(left)
    for name, value in right.items():
        total[name] = total.get(name, 0) + factor * value
    return {name: value for name, value in total.items() if value}


def _text(form: Linear) -> str:
    terms = [f"{value}" if not name else name if value == 1 else f"{value}*{name}" for name, value in form.items()]
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _reduction(node: c_ast.Assignment) -> str | None:
    """The operator of x op= e, x = x op e or x = fmax(x, e), where x is written as on the left and only once."""
    x = show(node.lvalue)
    uses = [show(part) for part in _nodes(node.rvalue, (c_ast.ID, c_ast.ArrayRef))]
    if node.op != "=":
        return {"+=": "+", "-=": "+", "*=": "*", "/=": "*"}.get(node.op) if x not in uses else None
    value = node.rvalue
    if uses.count(x) != 1:
        return None
    if isinstance(value, c_ast.FuncCall) and value.args and len(value.args.exprs) == 2:
        operator = {"fmax": "max", "fmaxf": "max", "max": "max", "fmin": "min", "fminf": "min", "min": "min"}
        return operator.get(show(value.name)) if x in map(show, value.args.exprs) else None
    for operator, others in (("+", "+-"), ("*", "*/")):
        part = value
        while isinstance(part, c_ast.BinaryOp) and part.op in others:
            if show(part.left) == x or part.op == operator and show(part.right) == x:
                return operator
            part = part.left
    return None
