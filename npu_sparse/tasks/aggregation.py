"""Aggregation tasks: the most common words of a numbered list, and of a stream of coded words."""

import math
from collections.abc import Iterator, Sequence
from random import Random
from string import ascii_lowercase

from npu_sparse.tasks.draft import Draft, Request
from npu_sparse.tasks.words import ADJECTIVES, NOUNS

COMMON = 10
COMMON_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

ALPHA = 2.0
ZETA = math.pi**2 / 6  # the zeta function at ALPHA
CODED_LETTERS = 6
FREQUENT = 3
LEAST_VOCABULARY = 20
FREQUENT_TASK = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def common_words(request: Request, source: None = None) -> Draft:
    """Ten words that appear often among many that do not, after one solved example; one unit is one rare word.

    Below 4096 tokens the frequencies and the example are smaller, as in RULER: 6 and 1 instead of 30 and 3.
    """
    short = request.length < 4096
    often, rarely = (6, 1) if short else (30, 3)
    words = _rare_last(request.random("words"))
    example_words = [next(words) for _ in range(20 if short else 40)]
    example_list = _shuffled(example_words, *((3, 1) if short else (10, 3)), request.random("example"))
    example = f"{COMMON_TASK.format(context=example_list)}{COMMON_PREFIX} {numbered(example_words[:COMMON])}"
    drawn: list[str] = []

    def body(n: int) -> str:
        while len(drawn) < COMMON + n:
            word = next(words)
            if not any(_confusable(word, common) for common in drawn[:COMMON]):
                drawn.append(word)
        context = _shuffled(drawn[: COMMON + n], often, rarely, request.random(f"order {n}"))
        return f"{example}\n{COMMON_TASK.format(context=context)}"

    body(1)
    return Draft(body, COMMON_PREFIX, answers=tuple(drawn[:COMMON]), least=1)


def frequent_words(request: Request, source: None = None) -> Draft:
    """Coded words with Zipf frequencies of exponent 2, the commonest being dots; one unit is one word."""
    rng = request.random()
    vocabulary = _coded_words(rng, max(request.length // 50, LEAST_VOCABULARY))
    vocabulary[0] = "..."

    def body(n: int) -> str:
        counts = [int(n * rank**-ALPHA / ZETA) for rank in range(1, len(vocabulary) + 1)]
        stream = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        request.random(f"order {n}").shuffle(stream)
        return FREQUENT_TASK.format(context=" ".join(stream))

    # From this many words on, the last answer is strictly more frequent than the first word that is none.
    last, runner_up = FREQUENT + 1, FREQUENT + 2
    least = math.ceil(ZETA / (last**-ALPHA - runner_up**-ALPHA))
    return Draft(body, FREQUENT_PREFIX, answers=tuple(vocabulary[1 : FREQUENT + 1]), least=least)


def numbered(words: Sequence[str]) -> str:
    """"1. a 2. b 3. c"."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _shuffled(words: list[str], often: int, rarely: int, rng: Random) -> str:
    entries = words[:COMMON] * often + words[COMMON:] * rarely
    rng.shuffle(entries)
    return numbered(entries)


def _rare_last(rng: Random) -> Iterator[str]:
    """Every word once in random order; when they are used up, new pairs of them."""
    words = sorted({*NOUNS, *ADJECTIVES})
    rng.shuffle(words)
    yield from words
    seen: set[str] = set()
    while True:
        pair = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def _confusable(word: str, common: str) -> bool:
    return word in common or common in word


def _coded_words(rng: Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(ascii_lowercase, k=CODED_LETTERS))] = None
    return list(words)
