"""The part of the C preprocessor that loop nests need: comments, #define, #undef, #if and its relatives, #pragma scop.

The text keeps its lines, so that the parser's positions are the file's. #include is skipped and every other pragma dropped;
a file whose macros come from headers goes through a real preprocessor (`run_cpp`).
"""

import re
import resource
import subprocess
import tempfile
from pathlib import Path

from pycparser import c_ast, c_parser

from npu_sparse.schedule.scop import ScopError

# Strings and characters first, so that nothing inside of them counts as a comment or a name.
TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|/\*.*?\*/|//[^\n]*|[A-Za-z_]\w*|\.?\d(?:[eEpP][+-]|[\w.])*', re.S)
EXPANDED = 2_000_000  # characters that macros may grow to: a few lines of them can ask for more than any memory holds
GCC_SECONDS, GCC_BYTES = 20, 2**26
EXTENSION = re.compile(r"\b(?:__attribute(?:__)?|__declspec|__extension__|__restrict(?:__)?|__inline(?:__)?|__const(?:__)?|"
                       r"__signed__|__volatile__|_Noreturn)\b")
KEPT_PRAGMA = re.compile(r"\s*#\s*pragma\s+(scop|endscop)\b")


def preprocess(text: str, source: str) -> str:
    """C text without comments and directives, macros expanded, every line where it was."""
    text = text.replace("\r\n", "\n").replace("\r", " ")
    if (start := _open_comment(text)) is not None:
        raise ScopError(f"{source}:{text.count(chr(10), 0, start) + 1}: comment must end with */, got the end of the file")
    text = TOKEN.sub(lambda m: " " + "\n" * m[0].count("\n") if m[0].startswith("/") else m[0], text)
    macros, taken, out = _Macros(), [], []  # taken: for every open #if, [is this branch taken, was any]
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at]
        at += 1
        while line.endswith("\\") and at < len(lines):
            line = line[:-1] + " " + lines[at]
            at += 1
        active = all(branch[0] for branch in taken)
        if line.lstrip().startswith("#"):
            if KEPT_PRAGMA.match(line):
                out.append(line if active else "")
            else:
                _directive(line.strip()[1:].strip(), macros, taken, f"{source}:{number}")
                out.append("")
        else:
            if active and any(isinstance(macros.get(name), tuple) for name in re.findall(r"\w+", line)):
                while line.count("(") > line.count(")") and at < len(lines):  # arguments of a macro on further lines
                    line += " " + lines[at]
                    at += 1
            out.append(_expand(line, macros, (), f"{source}:{number}") if active else "")
        out += [""] * (at - len(out))
    if taken:
        raise ScopError(f"{source}:{len(lines)}: #if must end with #endif, got the end of the file")
    return "\n".join(out)


def without_extensions(text: str) -> str:
    """Preprocessed text with the compiler's own words blanked or replaced by C's, every character where it was."""
    out, at = [], 0
    for match in re.finditer(r'"(?:\\.|[^"\\\n])*"|' + EXTENSION.pattern, text):
        if match.start() < at or match[0].startswith('"'):
            continue
        word, end = match[0].strip("_"), match.end()
        if word in ("attribute", "declspec"):
            word, end = "", _closing(text, end)
        elif word in ("extension", "Noreturn"):
            word = ""
        blank = "".join(c if c == "\n" else " " for c in text[match.start() + len(word):end])
        out += [text[at:match.start()], word, blank]
        at = end
    return "".join([*out, text[at:]])


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens next has its end, or the same place where none opens."""
    if not (match := re.compile(r"\s*\(").match(text, at)):
        return at
    depth = 0
    for position in range(match.end() - 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return at


def run_cpp(path: Path, options: tuple[str, ...], text: str | None = None) -> str:
    """The file after `gcc -E` with these options, its lines in their places.

    Of headers that are not the system's, the types that the file uses stand on the lines that include them; the rest is left out.
    `text`, where it is given, is taken for what the file holds.
    """
    def limited():
        resource.setrlimit(resource.RLIMIT_CPU, (GCC_SECONDS, GCC_SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (GCC_BYTES, GCC_BYTES))

    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "text.i"
        command = ["gcc", "-E", "-iquote", str(path.resolve().parent), *options, "-x", "c", "-", "-o", str(result)]
        try:
            done = subprocess.run(command, capture_output=True, input=path.read_bytes() if text is None else text.encode(),
                                  preexec_fn=limited, timeout=10 * GCC_SECONDS)
        except FileNotFoundError as error:
            raise ScopError(f"{path}: gcc must be installed to preprocess it, got none") from error
        except subprocess.TimeoutExpired as error:
            raise ScopError(f"{path}: preprocessor must end within {10 * GCC_SECONDS} s, and did not") from error
        if done.returncode:
            message = (done.stderr.decode(errors="replace").splitlines() or ["no message"])[0].replace("<stdin>:", "line ")
            raise ScopError(f"{path}: preprocessor must succeed, got {message}")
        text = result.read_text(errors="replace")
    out, headers, number, home, place = {}, {}, 1, 1, "<stdin>"
    for line in text.split("\n"):
        if marker := re.match(r'#\s+(\d+)\s+"((?:\\.|[^"\\])*)"([ \d]*)', line):
            if place == "<stdin>":
                home = number
            number, place = int(marker[1]), "<system>" if "3" in marker[3].split() else marker[2]
            continue
        directive = line.lstrip().startswith("#")
        if place == "<stdin>" and (not directive or KEPT_PRAGMA.match(line)):
            out[number] = out.get(number, "") + line
        elif not place.startswith("<") and not directive:
            headers[home] = f"{headers.get(home, '')}{line} "
        number += 1
    known = identifiers_of("\n".join(out.values()))
    for at, types in reversed(headers.items()):  # on the line that includes them
        kept, known = declared_types(types, known)
        out[at] = kept + out.get(at, "")
    return "\n".join(out.get(number, "") for number in range(1, max(out, default=0) + 1))


def identifiers_of(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def declared_types(text: str, used: set[str]) -> tuple[str, set[str]]:
    """The structs, enumerations and typedefs of a header whose names are used, and the names that are used with these."""
    depth, start, found = 0, 0, []
    for match in re.finditer(r"[{};]|" + TOKEN.pattern, text, re.S):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth and (match[0] == ";" or match[0] == "}" and "(" in text[start:match.start()]):  # or a function ends
            declaration, start = text[start:match.end()].strip(), match.end()
            if re.match(r"(typedef|struct|union|enum)\b", declaration) and "(" not in declaration:
                found.append(declaration)
    kept: list[str] = []
    for declaration in reversed(found):  # what uses a type stands behind it
        body = re.search(r"\{.*\}", declaration, re.S)
        outside = declaration.replace(body[0], " ") if body else declaration
        names = set(re.findall(r"(?:struct|union|enum)\s+([A-Za-z_]\w*)|([A-Za-z_]\w*)\s*(?:\[[^\]]*\]\s*)*[,;]", outside))
        names = {name for pair in names for name in pair if name}
        names |= identifiers_of(body[0]) if body and re.match(r"(typedef\s+)?enum\b", declaration) else set()
        if names & used:
            kept.insert(0, declaration)
            used = used | identifiers_of(declaration)
    return " ".join(kept), used


class _Macros(dict):
    """Macros by name - a body, or (arguments, body) - and how much their expansions came to so far."""

    spent = 0

    def spend(self, text: str, where: str) -> None:
        self.spent += len(text) + 1
        if self.spent > EXPANDED:
            raise ScopError(f"{where}: macros must expand to at most {EXPANDED} characters, got more")


def constant(node: c_ast.Node, values: dict[str, int]) -> int | None:
    """The value of an integer constant expression, with C's division; None where it is none."""
    if isinstance(node, c_ast.Constant) and "int" in node.type:
        digits = node.value.rstrip("uUlL")
        return int(digits, 8 if re.fullmatch(r"0\d+", digits) else 0)
    if isinstance(node, c_ast.ID):
        return values.get(node.name)
    if isinstance(node, c_ast.Cast):
        return constant(node.expr, values) if is_integer(node.to_type) else None
    if isinstance(node, c_ast.UnaryOp) and node.op in ("-", "+", "!"):
        value = constant(node.expr, values)
        return None if value is None else {"-": -value, "+": value, "!": int(not value)}[node.op]
    if isinstance(node, c_ast.BinaryOp):
        left, right = constant(node.left, values), constant(node.right, values)
        if left is None or right is None:
            return None
        if node.op in ("/", "%"):
            if not right:
                return None
            quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
            return quotient if node.op == "/" else left - quotient * right
        operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "<": int.__lt__, "<=": int.__le__, ">": int.__gt__,
                     ">=": int.__ge__, "==": int.__eq__, "!=": int.__ne__, "&&": lambda a, b: bool(a and b),
                     "||": lambda a, b: bool(a or b)}
        return int(operators[node.op](left, right)) if node.op in operators else None
    return None


def is_integer(kind: c_ast.Node) -> bool:
    """Whether a declared type is an integer, or one of the usual typedefs of one."""
    while isinstance(kind, c_ast.Typename):
        kind = kind.type
    names = set(getattr(getattr(kind, "type", None), "names", ())) - {"const"}
    usual = {"int", "long", "short", "unsigned", "signed", "size_t", "ptrdiff_t"}
    return bool(names) and all(name in usual or re.fullmatch(r"u?int\d+_t", name) for name in names)


def _open_comment(text: str) -> int | None:
    start = TOKEN.sub(lambda m: " " * len(m[0]), text).find("/*")
    return None if start < 0 else start


def _directive(line: str, macros: dict, taken: list, where: str) -> None:
    word, _, rest = line.partition(" ") if " " in line else (line, "", "")
    if match := re.match(r"(\w+)(.*)", line):
        word, rest = match[1], match[2].strip()
    active = all(branch[0] for branch in taken)
    if word in ("ifdef", "ifndef", "if"):
        holds = active and (_holds(rest, macros, where) if word == "if" else (rest in macros) == (word == "ifdef"))
        taken.append([holds, holds])
    elif word in ("else", "elif", "endif"):
        if not taken:
            raise ScopError(f"{where}: #{word} must follow #if, got none")
        if word == "endif":
            taken.pop()
            return
        enclosing = all(branch[0] for branch in taken[:-1])
        holds = enclosing and not taken[-1][1] and (word == "else" or _holds(rest, macros, where))
        taken[-1] = [holds, taken[-1][1] or holds]
    elif active and word == "define":
        match = re.match(r"([A-Za-z_]\w*)(?:\(([\w\s,]*)\))?(.*)", rest)
        if not match:
            raise ScopError(f"{where}: #define must name a macro, got {rest!r}")
        name, arguments, body = match[1], match[2], match[3].strip()
        macros[name] = body if arguments is None else ([a.strip() for a in arguments.split(",") if a.strip()], body)
    elif active and word == "undef":
        macros.pop(rest, None)
    elif active and word == "error":
        raise ScopError(f"{where}: #error must not be reached, got {rest!r}")


def _holds(text: str, macros: dict, where: str) -> bool:
    text = re.sub(r"defined\s*(?:\(\s*(\w+)\s*\)|(\w+))", lambda m: str(int((m[1] or m[2]) in macros)), text)
    text = re.sub(r"\b[A-Za-z_]\w*", "0", _expand(text, macros, (), where))
    try:
        declaration = c_parser.CParser().parse(f"int x = {text};").ext[0]
        value = constant(declaration.init, {})
    except (c_parser.ParseError, AttributeError):
        value = None
    if value is None:
        raise ScopError(f"{where}: condition of #if must be an integer constant, got {text!r}")
    return bool(value)


def _expand(line: str, macros: dict, hidden: tuple[str, ...], where: str) -> str:
    out, at = [], 0
    for match in TOKEN.finditer(line):
        if match.start() < at:  # inside the arguments of a call that is expanded already
            continue
        out.append(line[at:match.start()])
        at = match.end()
        name = match[0]
        body = macros.get(name) if name not in hidden else None
        if isinstance(body, str):
            macros.spend(body, where)
            out.append(_expand(body, macros, (*hidden, name), where))
        elif body is not None and (call := _arguments(line, at)):
            formal, text = body
            actual, at = call
            if len(actual) != len(formal):
                raise ScopError(f"{where}: {name} must have {len(formal)} arguments, got {len(actual)}")
            values = dict(zip(formal, (_expand(value, macros, hidden, where) for value in actual)))
            text = TOKEN.sub(lambda m: values.get(m[0], m[0]), text)  # noqa: B023 - used at once
            macros.spend(text, where)
            out.append(_expand(text, macros, (*hidden, name), where))
        else:
            out.append(name)
    return "".join([*out, line[at:]])


def _arguments(line: str, at: int) -> tuple[list[str], int] | None:
    match = re.compile(r"\s*\(").match(line, at)
    if not match:
        return None
    depth, start, arguments = 1, match.end(), []
    for position in range(match.end(), len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0 or (depth == 1 and line[position] == ","):
            arguments.append(line[start:position].strip())
            start = position + 1
        if depth == 0:
            return ([] if arguments == [""] else arguments), position + 1
    return None
