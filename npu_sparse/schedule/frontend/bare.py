"""A region outside of every function: a nest for experiments, whose names need no declarations."""

import re

from pycparser import c_ast, c_parser

from npu_sparse.schedule.frontend.syntax import nodes
from npu_sparse.schedule.scop import ScopError

NAME = "nest"  # of the function that is put around such a region
EXTENT = 1 << 20  # of the arrays that nothing declares; no memory is taken for them
PRAGMA = r"^[ \t]*#[ \t]*pragma[ \t]+{}\b[^\n]*$"


def enclosed(text: str, begin: int, typedefs: tuple[str, ...], source: str) -> str:
    """Preprocessed text with a function around the region whose pragma begins at `begin`; what follows the region is gone.

    What the file does not declare is an array of double where it has subscripts, a local integer where it counts a loop, a global
    double where it is assigned, and otherwise an integer that nothing changes. All arrays and what is assigned live after it.
    Lines keep their numbers.
    """
    line = text.count("\n", 0, begin) + 1
    end = re.compile(PRAGMA.format("endscop"), re.M).search(text, begin)
    if end is None:
        raise ScopError(f"{source}:{line}: #pragma scop must end with #pragma endscop, got none")
    again = re.compile(PRAGMA.format("scop"), re.M).search(text, end.end())
    if again:
        raise ScopError(f"{source}:{text.count(chr(10), 0, again.start()) + 1}: a file without functions must hold one region, "
                        "got a second")  # fmt: skip
    region = text[begin:end.end()]
    before = text[:begin]
    file = _parsed(before, typedefs)
    if file is None and _parsed(f"void {NAME}(void) {{\n{before}\n}}\n", typedefs) is not None:  # statements
        before, file = re.sub(r"[^\n]", " ", before), c_ast.FileAST([])
    whole = _parsed(f"void {NAME}(void) {{\n{region}\n}}\n", typedefs)
    body = c_ast.Compound([]) if whole is None else whole.ext[-1].body  # what is wrong is said where all of it is read
    known = {node.name for node in nodes(file, c_ast.Decl)} if file is not None else set()
    globals_, locals_ = _declarations(body, known)
    head = "".join(f"{declaration} " for declaration in globals_) + f"void {NAME}(void) {{ "
    return f'{before}{head}{"".join(f"{declaration} " for declaration in locals_)}\n#line {line} "text"\n{region}\n}}\n'


def _parsed(text: str, typedefs: tuple[str, ...]) -> c_ast.FileAST | None:
    try:
        return c_parser.CParser().parse("".join(f"typedef int {name}; " for name in typedefs) + "\n" + text)
    except c_parser.ParseError:
        return None


def _declarations(body: c_ast.Compound, known: set[str]) -> tuple[list[str], list[str]]:
    """Declarations of what a region uses: those of a file, and those of a function."""
    known = known | {node.name for node in nodes(body, c_ast.Decl)}
    called = {id(node.name) for node in nodes(body, c_ast.FuncCall)}
    counters = {node.init.lvalue.name for node in nodes(body, c_ast.For)
                if isinstance(node.init, c_ast.Assignment) and isinstance(node.init.lvalue, c_ast.ID)}  # fmt: skip
    depths: dict[str, int] = {}
    for node in nodes(body, c_ast.ArrayRef):
        depth, base = 0, node
        while isinstance(base, c_ast.ArrayRef):
            depth, base = depth + 1, base.name
        if isinstance(base, c_ast.ID):
            depths[base.name] = max(depth, depths.get(base.name, 0))
    changed = {node.lvalue.name for node in nodes(body, c_ast.Assignment) if isinstance(node.lvalue, c_ast.ID)}
    changed |= {node.expr.name for node in nodes(body, c_ast.UnaryOp)
                if node.op in ("p++", "++", "p--", "--") and isinstance(node.expr, c_ast.ID)}  # fmt: skip
    globals_, locals_ = [], []
    for name in dict.fromkeys(node.name for node in nodes(body, c_ast.ID) if id(node) not in called and node.name not in known):
        if name in depths:
            globals_.append(f"double {name}{f'[{EXTENT}]' * depths[name]};")
        elif name in counters:
            locals_.append(f"int {name};")
        else:
            globals_.append(f"{'double' if name in changed else 'int'} {name};")
    return globals_, locals_
