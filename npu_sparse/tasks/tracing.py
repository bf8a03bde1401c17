"""Variable tracking: follow a chain of assignments hidden in noise."""

import itertools
from random import Random
from string import ascii_uppercase

from npu_sparse.tasks.draft import Draft, Request, insert_at
from npu_sparse.tasks.retrieval import NOISE

HOPS = 4
EXAMPLE_NOISE, SHORT_EXAMPLE_NOISE, SHORT_LENGTH = 10, 2, 1024

TASK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
# "assgined" is the benchmark's own spelling, which published scores were measured with. Its final space is not kept:
# where a space is part of the token that follows it, a prompt ending in one is like no text the model has seen.
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {value}, they are:"
)


def variable_tracking(request: Request, source: None = None) -> Draft:
    """One chain of four hops in noise, after one solved example; one unit is one repetition of the noise."""
    rng = request.random()
    example_value, value = map(str, rng.sample(range(10_000, 100_000), 2))
    example = _example(rng, example_value, EXAMPLE_NOISE if request.length >= SHORT_LENGTH else SHORT_EXAMPLE_NOISE)
    names, lines = _chain(rng, value, letters=5)
    depths = sorted(rng.random() for _ in lines)

    def body(n: int) -> str:
        context = "\n".join(insert_at([NOISE] * n, lines, depths))
        return f"{example}\n\n{TASK.format(context=context, value=value)}"

    return Draft(body, PREFIX.format(count=len(names), value=value), answers=tuple(names), least=1)


def _example(rng: Random, value: str, noise: int) -> str:
    names, lines = _chain(rng, value, letters=3)
    context = "\n".join(insert_at([NOISE] * noise, lines, sorted(rng.random() for _ in lines)))
    return (
        TASK.format(context=context, value=value) + f"{PREFIX.format(count=len(names), value=value)} {' '.join(names)}"
    )


def _chain(rng: Random, value: str, letters: int) -> tuple[list[str], list[str]]:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    return names, lines
