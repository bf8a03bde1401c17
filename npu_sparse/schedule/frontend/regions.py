"""Where the region between `#pragma scop` and `#pragma endscop` stands in a file, and the tree of the function around it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pycparser import c_ast, c_parser

from npu_sparse.schedule.frontend.bare import enclosed
from npu_sparse.schedule.frontend.calls import declared_pure
from npu_sparse.schedule.frontend.preprocess import TOKEN, preprocess, without_extensions
from npu_sparse.schedule.scop import ScopError

# Names of types that C programs use and headers define; only what a loop nest may mention.
TYPES = """bool size_t ssize_t ptrdiff_t intptr_t uintptr_t intmax_t uintmax_t off_t uint ulong FILE va_list
int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t""".split()
SCOP, ENDSCOP = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+scop\b", re.M), re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+endscop\b", re.M)


@dataclass(frozen=True)
class Region:
    """A file's declarations and the function that holds the region.

    Attributes:
        start: the line on which the function's definition begins, 0 where something else stands before it in that line.
        pure: the functions that the file declares with the attribute const.
        bare: whether the function is not in the file: it was put around a region outside of functions.
        words: the identifiers of the file, those of macros included.
    """

    tree: c_ast.FileAST
    function: c_ast.FuncDef
    start: int
    pure: frozenset[str]
    bare: bool = False
    words: frozenset[str] = frozenset()


def count_regions(text: str, source: str, function: str | None = None) -> int:
    """How many regions the function of that name has, or the only function with any."""
    expanded, _ = _in_function(preprocess(text, source), source, function)
    _, _, count = _relevant(without_extensions(expanded), source, function, 1)
    return count


def find_region(text: str, source: str, function: str | None = None, number: int | None = None) -> Region:
    """The region of a C text, or of its function of that name; `number`, from 1, where that has several."""
    expanded, bare = _in_function(preprocess(text, source), source, function)
    relevant, begin, _ = _relevant(without_extensions(expanded), source, function, number)
    tree = _parse(relevant, source)
    definition = next((node for node in tree.ext if isinstance(node, c_ast.FuncDef)), None)
    if definition is None:
        raise ScopError(f"{source}: #pragma scop must stand in a function that C can define, got it elsewhere")
    first = len(expanded) - len(expanded[begin:].lstrip())
    alone = not expanded[expanded.rfind("\n", 0, first) + 1:first].strip()
    start = expanded.count("\n", 0, first) + 1 if alone and not bare else 0
    return Region(tree, definition, start, frozenset(declared_pure(expanded)), bare, frozenset(re.findall(r"[A-Za-z_]\w*", text)))


def _in_function(expanded: str, source: str, function: str | None) -> tuple[str, bool]:
    """Preprocessed text with a function around its region where no function holds one, and whether that was so."""
    starts = [match.start() for match in SCOP.finditer(expanded)]
    inside = [at for begin, end, _ in _definitions(expanded, source) for at in starts if begin <= at < end]
    if not starts or inside or function is not None:
        return expanded, False
    region = ENDSCOP.search(expanded, starts[0])
    if region and not expanded[expanded.find("\n", starts[0]):region.start()].strip():
        return expanded, False
    blanked = list(expanded[:starts[0]])
    for begin, end, _ in _definitions(expanded[:starts[0]], source):
        blanked[begin:end] = [c if c == "\n" else " " for c in blanked[begin:end]]
    return enclosed("".join(blanked) + expanded[starts[0]:], starts[0], tuple(TYPES), source), True


def parse_function(text: str, source: str, function: str | None = None) -> tuple[c_ast.FileAST, c_ast.FuncDef]:
    """The file's declarations and the function that holds the scop."""
    region = find_region(text, source, function)
    return region.tree, region.function


def _relevant(text: str, source: str, function: str | None, number_of_region: int | None) -> tuple[str, int, int]:
    """The text with all but one function and one region's pragmas blanked, where that function begins, and its regions.

    Headers are not read, so the others may not parse.
    """
    def number(position):
        return text.count("\n", 0, position) + 1

    starts, ends = ([m.start() for m in pattern.finditer(text)] for pattern in (SCOP, ENDSCOP))
    if not starts:
        where = f"{source}:{number(ends[0])}: #pragma endscop must follow #pragma scop" if ends else \
            f"{source}: source must hold #pragma scop"
        raise ScopError(f"{where}, got none")
    definitions = list(_definitions(text, source))
    functions, out = {}, list(text)
    for begin, end, header in definitions:
        inside = [at for at in starts if begin <= at < end]
        name = (re.findall(r"([A-Za-z_]\w*)\s*\(", header) or [""])[0]
        if inside:
            functions[name] = (begin, end, inside, [at for at in ends if begin <= at < end])
    if not functions:
        raise ScopError(f"{source}:{number(starts[0])}: #pragma scop must stand in a function, got it outside")
    if function is None and len(functions) > 1:
        raise ScopError(f"{source}: function must be named where several hold a scop, got {', '.join(functions)}")
    if function is not None and function not in functions:
        raise ScopError(f"{source}: function must hold a scop ({', '.join(functions)}), got {function}")
    name = function or next(iter(functions))
    begin, end, inside, closing = functions[name]
    if number_of_region is None and len(inside) > 1:
        raise ScopError(f"{source}:{number(inside[1])}: function must hold one scop, got a second in {name}")
    opened = None
    for at in [*sorted([*inside, *closing]), None]:
        if (at is None or at in inside) and opened is not None:
            raise ScopError(f"{source}:{number(opened)}: #pragma scop must end with #pragma endscop in {name}, got none")
        if at in closing and opened is None:
            raise ScopError(f"{source}:{number(at)}: #pragma endscop must follow #pragma scop, got none")
        opened = at if at in inside else None
    chosen = (number_of_region or 1) - 1
    if chosen >= len(inside):
        raise ScopError(f"{source}: region must be one of {len(inside)} of {name}, got {number_of_region}")
    for at in {*inside, *closing} - {inside[chosen], closing[chosen]}:
        stop = text.find("\n", at)
        out[at:stop] = " " * (stop - at)
    for other, stop, _ in definitions:
        if other != begin:
            out[other:stop] = [c if c == "\n" else " " for c in text[other:stop]]
    return "".join(out), begin, len(inside)


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
        tree = parser.parse(prelude + '#line 1 "text"\n' + text, "text")  # the file's own name may hold a quote
    except c_parser.ParseError as error:
        match = re.match(r"text:(\d+)(?::\d+)?: (.*)", str(error), re.S)
        message = match[2] if match else str(error).rpartition(": ")[2]
        # Where the parser does not say, it stopped where the lexer is; pycparser 3 has no public name for that.
        line = match[1] if match else getattr(parser.clex, "_lineno", None)
        where = f"{source}:{line}" if line else source
        raise ScopError(f"{where}: source must be C, got {message[:1].lower() + message[1:]}") from error
    return c_ast.FileAST(tree.ext[len(TYPES):])
