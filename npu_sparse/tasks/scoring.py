"""RULER's scores: whether an output contains the answers, ignoring case. More output never lowers a score."""

from typing import TYPE_CHECKING

from npu_sparse.tasks.catalogue import task_named

if TYPE_CHECKING:
    from npu_sparse.tasks.generate import Example


def score(example: "Example", output_text: str) -> float:
    """The score in [0, 1]: for question answering 1 if any answer is found, otherwise the fraction of answers found."""
    if task_named(example.task).needs == "qa_file":
        return string_match_part(output_text, example.answers)
    return string_match_all(output_text, example.answers)


def string_match_all(output_text: str, answers: tuple[str, ...]) -> float:
    """The fraction of answers that occur in the output, ignoring case."""
    lowered = output_text.lower()
    return sum(answer.lower() in lowered for answer in answers) / len(answers)


def string_match_part(output_text: str, answers: tuple[str, ...]) -> float:
    """1 if any answer occurs in the output, ignoring case, else 0."""
    lowered = output_text.lower()
    return float(any(answer.lower() in lowered for answer in answers))
