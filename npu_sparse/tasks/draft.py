"""Draft: a prompt whose haystack can grow one unit at a time until it fills the length asked for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Draft:
    """A task's text before its haystack is sized.

    `body(n)` is the user's text with n haystack units, `least <= n <= most`; `prefix` begins the answer. `answers` may depend on
    n. The same n always gives the same text. `question` is the part of every body that asks, word for word, where it can stand
    elsewhere; "" where it cannot.
    """

    body: Callable[[int], str]
    prefix: str
    answers: tuple[str, ...] | Callable[[int], tuple[str, ...]]
    least: int
    most: int | None = None
    question: str = ""


@dataclass(frozen=True)
class Request:
    """What a task's drafting function is told: `room` is the number of tokens that the prompt may take."""

    task: str
    index: int
    seed: int
    length: int
    room: int

    def random(self, purpose: str = "") -> Random:
        """A generator that depends on task, seed and index only; its seeding is stable across processes."""
        return Random(f"{self.task}/{self.seed}/{self.index}/{purpose}")


def placed(text: str, question: str, where: str) -> str:
    """`text` with its last `question` on a line of its own at the "front", or in the "middle", after a line or a sentence."""
    before, _, after = text.rpartition(question)
    rest = f"{before.rstrip()}{after}"
    if where == "front":
        return f"{question}\n{rest}"
    half = len(rest) // 2
    sentence_end = re.compile(r"\n|[.!?]['\")]*\s").search(rest, half)
    place = sentence_end.end() if sentence_end else half
    return f"{rest[:place].rstrip()}\n{question}\n{rest[place:]}"


def insert_at(units: list[str], inserts: list[str], depths: list[float]) -> list[str]:
    """`units` with each insert at its depth (0 = before all, towards 1 = after all), in order of depth."""
    merged: list[str] = []
    taken = 0
    for depth, insert in sorted(zip(depths, inserts, strict=True), key=lambda pair: pair[0]):
        place = int(depth * (len(units) + 1))
        merged += units[taken:place]
        merged.append(insert)
        taken = place
    return merged + units[taken:]


def listed(items: Sequence[str]) -> str:
    """"a", "a and b", or "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]


def first(items: Sequence[str]) -> str:
    """The first of several answers that are as good as each other."""
    return items[0]
