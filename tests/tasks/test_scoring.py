import dataclasses

import pytest

from npu_sparse.tasks import Example, reference_answer, score


def example(task: str, *answers: str) -> Example:
    return Example(task, 0, "", answers, length=1, max_new_tokens=1, seed=0, comparable=True)


@pytest.mark.parametrize(
    "task, answers, output, expected",
    [
        ("niah_single_1", ["1234567"], " 1234567.", 1.0),
        ("niah_single_1", ["1234567"], " 1234567. 1234567. 1234567. and so on", 1.0),
        ("niah_single_1", ["1234567"], " 123456", 0.0),
        ("niah_single_1", ["1234567"], "", 0.0),
        ("niah_multikey_3", ["ab12-cd"], "It is AB12-CD", 1.0),
        ("niah_multivalue", ["1", "2", "3", "4"], "2 and 4", 0.5),
        ("vt", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], "abcde FGHIJ KLMNO", 0.6),
        ("cwe", ["apple", "stone"], "1. Apple 2. stone", 1.0),
        ("fwe", ["aaaaaa", "bbbbbb", "cccccc"], "cccccc", 1 / 3),
        ("qa_1", ["Paris", "the city of Paris"], "paris, France", 1.0),
        ("qa_2", ["Paris", "the city of Paris"], "Rome", 0.0),
    ],
)
def test_score_is_rulers(task, answers, output, expected):
    assert score(example(task, *answers), output) == pytest.approx(expected)


def test_score_of_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task must be a known name"):
        score(example("niah", "1"), "1")


@pytest.mark.parametrize(
    "task, prompt, answers, expected",
    [
        ("niah_single_1", "", ["1234567"], " 1234567"),
        ("niah_multiquery", "c b a d", ["a", "b", "c", "d"], " a, b, c, and d"),  # in the order they were asked for
        ("niah_multivalue", "33 is x33, 11 and 4, 22.", ["22", "4", "33", "11"], " 33, 11, 4, and 22"),
        ("vt", "E D C", ["A", "B", "C"], " A B C"),
        ("cwe", "1. lamp 2. tree 3. seas 4. sea", ["sea", "tree"], " 1. tree 2. sea"),
        ("fwe", "bb aa cc", ["aa", "bb", "cc"], " aa, bb, and cc"),
        ("qa_1", "the city of Paris", ["Paris", "the city of Paris"], " Paris"),
    ],
)
def test_the_reference_answer_is_written_as_the_template_writes_it(task, prompt, answers, expected):
    reference = reference_answer(dataclasses.replace(example(task, *answers), prompt=prompt))
    assert reference.text == expected
    assert score(example(task, *answers), expected) == 1.0
    stand = [expected[start:end] for start, end in reference.spans]
    assert stand == answers[:1] if task == "qa_1" else sorted(stand) == sorted(answers)
