"""Scores of outputs by each task's rule, and the reference answer that teacher forcing reads.

There is one reference answer per prompt, because it has to be fixed before any model has answered.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npu_sparse.tasks.catalogue import task_named
from npu_sparse.tasks.rules import all_found, any_found

if TYPE_CHECKING:
    from npu_sparse.tasks.generate import Example


def score(example: "Example", output_text: str) -> float:
    """The score in [0, 1] by the rule of the example's task, see `rules`."""
    return task_named(example.task).rule(example.answers, output_text)


def never_falls(example: "Example") -> bool:
    """Whether more output never lowers the score, so that generating may stop as soon as it is 1."""
    return task_named(example.task).rule in (all_found, any_found)


@dataclass(frozen=True)
class Reference:
    """The text that follows a prompt in a right answer, and where in it the answers themselves stand: `(start, end)` each.

    What lies between them is form ("a, b, and c"), which models choose differently: they go on with one that has begun, but may
    begin another.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def reference_answer(example: "Example") -> Reference:
    """All answers as the task's template writes them, after a space (code: a line end).

    Several values are "a, b, and c"; chains of variables "A B C" and common words "1. a 2. b", as in the solved example that the
    prompt begins with; of a question's accepted answers, the first. Answers that have no order of their own (the values of one
    key, common words) are in the order in which they first occur in the prompt.
    """
    task = task_named(example.task)
    answers = example.answers if task.ordered else sorted(example.answers, key=lambda answer: _place(answer, example.prompt))
    text = task.lead + task.write(answers)
    spans, end = [], 0
    for answer in answers:
        start = text.find(answer, end)
        if start < 0:  # one of several accepted answers
            continue
        end = start + len(answer)
        spans.append((start, end))
    return Reference(text, tuple(spans))


def _place(answer: str, prompt: str) -> int:
    match = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt)
    return match.start() if match else len(prompt)
