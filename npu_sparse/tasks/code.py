"""Code retrieval over the standard library's own sources: which function holds a line, and a body seen before."""

import ast
import sysconfig
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from npu_sparse.tasks.draft import Draft, Request, insert_at

LINES = range(5, 26)  # length of a function
TOLD_LINES, TOLD_CHARACTERS = 5, 300  # limits of a body that the prompt asks to repeat
LEAST_LINE = 20  # characters that a line needs to be asked for
HOLDER = (
    "Below are functions of a library. Memorize them; I will ask you about them afterwards.\n\n{context}\n\n"
    "Question: Which of these functions contains the following line? Answer with its name only.\n{line}\n"
)
BODY = (
    "Below is a file of a library.\n\n{context}\n\n# The following function occurs above; here it is again, unchanged.\n"
    "{signature}"
)


@dataclass(frozen=True)
class Function:
    """A function of the library: its name, its text, and its signature, which is its first line."""

    name: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")


def holder(request: Request, source: None = None) -> Draft:
    """The name of the function with a line that no other has; one unit is another function."""
    functions, lines = library()
    rng = request.random("function")
    while True:
        asked = functions[rng.randrange(len(functions))]
        told = [line.strip() for line in asked.lines[1:] if len(line.strip()) >= LEAST_LINE and lines[line.strip()] == 1]
        told = [line for line in told if asked.name not in line]
        if told:
            break
    line = rng.choice(told)
    return _draft(request, asked, lambda context: HOLDER.format(context=context, line=line), " Answer:", asked.name)


def body(request: Request, source: None = None) -> Draft:
    """The first lines of a function's body, after its signature; one unit is another function."""
    functions, _ = library()
    rng = request.random("function")
    while True:
        asked = functions[rng.randrange(len(functions))]
        answer = "\n".join(asked.lines[1 : 1 + TOLD_LINES])
        if asked.lines[0].endswith(":") and len(answer) <= TOLD_CHARACTERS and '"""' not in answer:
            break
    signature = asked.lines[0]
    return _draft(request, asked, lambda context: BODY.format(context=context, signature=signature), "", answer)


def _draft(request: Request, asked: Function, fill, prefix: str, answer: str) -> Draft:
    functions, _ = library()
    others = [function for function in functions if function is not asked]
    request.random("others").shuffle(others)
    depth = request.random("depth").random()

    def text(n: int) -> str:
        return fill("\n\n".join(insert_at([other.text for other in others[:n]], [asked.text], [depth])))

    return Draft(text, prefix, answers=(answer,), least=1, most=len(others))


@cache
def library() -> tuple[tuple[Function, ...], Counter]:
    """The functions of the running Python's library of unique names and a length in LINES; how often a line occurs."""
    functions: list[Function] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 in LINES:
                lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
                functions.append(Function(node.name, textwrap.dedent("\n".join(lines))))
    names = Counter(function.name for function in functions)
    kept = tuple(sorted((f for f in functions if names[f.name] == 1), key=lambda f: f.name))
    return kept, Counter(line.strip() for function in kept for line in function.lines)
