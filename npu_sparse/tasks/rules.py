"""Published scoring rules: each takes the answers and an output, and returns a score in [0, 1]."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher


def all_found(answers: Sequence[str], output: str) -> float:
    """RULER's: the fraction of answers that occur in the output, ignoring case. More output never lowers it."""
    lowered = output.lower()
    return sum(answer.lower() in lowered for answer in answers) / len(answers)


def any_found(answers: Sequence[str], output: str) -> float:
    """RULER's for question answering: 1 if any answer occurs in the output, ignoring case, else 0."""
    lowered = output.lower()
    return float(any(answer.lower() in lowered for answer in answers))


def set_f1(answers: Sequence[str], output: str) -> float:
    """GraphWalks': F1 of the answers and of the ids in the output's first line, both as sets."""
    listed = set(re.findall(r"\b[a-f][0-9a-f]{7}\b", first_line(output)))
    right = len(listed & set(answers))
    return 2 * right / (len(listed) + len(set(answers)))


def nearness(answers: Sequence[str], output: str) -> float:
    """OOLONG's for numbers: 0.75 to the power of the distance of the first number in the output; 0 without one."""
    match = re.search(r"-?\d{1,18}", output)
    return 0.0 if match is None else 0.75 ** abs(int(match[0]) - int(answers[0]))


def first_word(answers: Sequence[str], output: str) -> float:
    """1 if the output's first word is an answer, ignoring case, else 0."""
    match = re.search(r"[\w-]+", output)
    return float(match is not None and match[0].lower() in {answer.lower() for answer in answers})


def one_place(answers: Sequence[str], output: str) -> float:
    """BABILong's: 1 if the output's first sentence names the answer, which comes first, and none of the others, else 0."""
    sentence = re.split(r"[.\n]", output.strip(), maxsplit=1)[0].lower()
    named = [place for place in answers if re.search(rf"\b{re.escape(place.lower())}\b", sentence)]
    return float(named == [answers[0]])


def copied(answers: Sequence[str], output: str) -> float:
    """MRCR's: the similarity (`difflib`) of output and answer after the prefix, the answer's first word; 0 without the prefix."""
    prefix, _, text = answers[0].partition(" ")
    output = output.strip()
    if not output.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, output[len(prefix) :].strip()[: 2 * len(text)], text).ratio()


def similar(answers: Sequence[str], output: str) -> float:
    """Edit similarity (`difflib`) of the answer and as many lines of the output, as code completion is scored."""
    lines = output.strip("\n").split("\n")[: answers[0].count("\n") + 1]
    return SequenceMatcher(None, "\n".join(line.rstrip() for line in lines).strip(), answers[0].strip()).ratio()


def first_line(output: str) -> str:
    """The output's first line that is not empty."""
    return next((line for line in output.split("\n") if line.strip()), "")
