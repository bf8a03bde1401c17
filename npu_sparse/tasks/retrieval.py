"""Needle-in-a-haystack tasks: keys with magic values hidden in noise, in other needles, or in text."""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from npu_sparse.tasks.draft import Draft, Request, insert_at
from npu_sparse.tasks.words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
)
ONE_QUESTION = "What is the special magic {kind} for {query} mentioned in the provided text?"
ONE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
SEVERAL = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
)
SEVERAL_QUESTION = "What are all the special magic {kind}s for {query} mentioned in the provided text?"
SEVERAL_PREFIX = " The special magic {kind}s for {query} mentioned in the provided text are"

SENTENCE_END = (".", "!", "?", '."', '!"', '?"', ".'", ".)")
LONGEST_SENTENCE = 60


@dataclass(frozen=True)
class Needles:
    """How many keys are hidden, how many values each has, how many keys are asked for, and what they look like."""

    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "word"
    value: str = "number"


def in_noise(needles: Needles, request: Request, source: None = None) -> Draft:
    """Needles between repetitions of five short sentences; one unit is one repetition."""
    hidden, depths, finish = _hide(needles, request, lambda value: False)
    return finish(lambda n: "\n".join(insert_at([NOISE] * n, hidden, depths)))


def in_needles(needles: Needles, request: Request, source: None = None) -> Draft:
    """Needles among other needles with other keys and values; one unit is one other needle."""
    hidden, depths, finish = _hide(needles, request, lambda value: False)
    rng = request.random("haystack")
    seen = set(hidden)
    others: list[str] = []

    def first(n: int) -> list[str]:
        while len(others) < n:
            key = _draw(rng, needles.key, lambda key: any(f" for {key} is: " in needle for needle in hidden))
            value = _draw(rng, needles.value, lambda value: any(f": {value}." in needle for needle in hidden))
            needle = NEEDLE.format(kind=needles.value, key=key, value=value)
            if needle not in seen:
                seen.add(needle)
                others.append(needle)
        return others[:n]

    return finish(lambda n: "\n".join(insert_at(first(n), hidden, depths)))


def in_text(needles: Needles, request: Request, texts: list[str]) -> Draft:
    """Needles between the sentences of a passage that starts at a random place of `texts`; one unit is one word."""
    passage = Passage(texts, request.random("passage"))
    window = " ".join(passage.first(request.room))
    hidden, depths, finish = _hide(needles, request, lambda value: value in window)
    return finish(lambda n: " ".join(insert_at(sentences(passage.first(n)), hidden, depths)))


def _hide(
    needles: Needles, request: Request, taken: Callable[[str], bool]
) -> tuple[list[str], list[float], Callable[[Callable[[int], str]], Draft]]:
    rng = request.random("needles")
    keys = _distinct(rng, needles.keys, needles.key, taken)
    values = _distinct(rng, needles.keys * needles.values, needles.value, taken)
    per_key = {key: values[i * needles.values : (i + 1) * needles.values] for i, key in enumerate(keys)}
    hidden = [NEEDLE.format(kind=needles.value, key=key, value=value) for key in keys for value in per_key[key]]
    depths = [rng.random() for _ in hidden]
    asked = keys[: needles.queries]
    answers = tuple(value for key in asked for value in per_key[key])
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    parts = (ONE, ONE_QUESTION, ONE_PREFIX) if len(answers) == 1 else (SEVERAL, SEVERAL_QUESTION, SEVERAL_PREFIX)
    fill, question, prefix = (partial(part.format, kind=needles.value, query=query) for part in parts)

    def finish(context: Callable[[int], str]) -> Draft:
        return Draft(
            body=lambda n: fill(context=context(n)) + question(),
            prefix=prefix(),
            answers=answers,
            least=1,
            question=question(),
        )

    return hidden, depths, finish


def _distinct(rng: Random, count: int, kind: str, taken: Callable[[str], bool]) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        drawn.append(_draw(rng, kind, lambda one: one in drawn or taken(one)))
    return drawn


def _draw(rng: Random, kind: str, refused: Callable[[str], bool]) -> str:
    while True:
        if kind == "word":
            drawn = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        elif kind == "number":
            drawn = str(rng.randrange(1_000_000, 10_000_000))
        else:
            drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if not refused(drawn):
            return drawn


class Passage:
    """The words of `texts` from a random sentence start on, read only as far as asked, starting over at the end."""

    def __init__(self, texts: list[str], rng: Random):
        place = int(rng.random() * sum(map(len, texts)))
        document = 0
        while place >= len(texts[document]):
            place -= len(texts[document])
            document += 1
        self._more = self._read(texts, document, place)
        self._words: list[str] = []

    @staticmethod
    def _read(texts: list[str], document: int, place: int) -> Iterator[list[str]]:
        words = texts[document][place:].split()[1:]
        ends = (i + 1 for i, word in enumerate(words[:LONGEST_SENTENCE]) if word.endswith(SENTENCE_END))
        yield words[next(ends, 0) :]
        while True:
            document = (document + 1) % len(texts)
            yield texts[document].split()

    def first(self, n: int) -> list[str]:
        while len(self._words) < n:
            self._words += next(self._more)
        return self._words[:n]


def sentences(words: Iterable[str]) -> list[str]:
    sentences: list[str] = []
    current: list[str] = []
    for word in words:
        current.append(word)
        if word.endswith(SENTENCE_END) or len(current) == LONGEST_SENTENCE:
            sentences.append(" ".join(current))
            current = []
    if current:
        sentences.append(" ".join(current))
    return sentences
