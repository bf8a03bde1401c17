"""Question answering over many documents, from the user's own SQuAD v2 or HotpotQA file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from npu_sparse.tasks.draft import Draft

TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
PREFIX = " Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, the documents it needs, and related documents that do not answer it."""

    query: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    related: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    path: Path
    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def read_questions(task: str, path: str | Path) -> QuestionSet:
    """The answerable questions of a SQuAD v2 (`qa_1`) or HotpotQA (`qa_2`) JSON file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"qa_file must be an existing file, got {str(path)!r}")
    read, form = (_squad, "SQuAD v2") if task == "qa_1" else (_hotpot, "HotpotQA")
    try:
        questions = tuple(read(json.loads(path.read_text(encoding="utf-8"))))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"qa_file for {task} must be JSON in {form} form, got {str(path)!r}: {error!r}") from error
    if not questions:
        raise ValueError(f"qa_file must hold at least one answerable question, got none in {str(path)!r}")
    documents = dict.fromkeys(text for question in questions for text in (*question.needed, *question.related))
    return QuestionSet(path, questions, tuple(documents))


def question_drafts(task: str, seed: int, source: QuestionSet) -> Iterator[Draft]:
    """One draft per question, in an order that depends on the seed; one unit is one document."""
    order = list(range(len(source.questions)))
    Random(f"{task}/{seed}").shuffle(order)
    for number in order:
        yield _draft(source.questions[number], source.documents, f"{task}/{seed}/{number}")


def _draft(question: Question, documents: tuple[str, ...], key: str) -> Draft:
    others = [text for text in documents if text not in question.needed and text not in question.related]
    Random(key).shuffle(others)
    ranked = [*question.needed, *question.related, *others]

    def body(n: int) -> str:
        shown = ranked[:n]
        Random(f"{key}/{n}").shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, start=1))
        return TASK.format(context=context, query=question.query)

    return Draft(body, PREFIX, question.answers, least=len(question.needed), most=len(ranked))


def _squad(content: dict[str, Any]) -> Iterator[Question]:
    for article in content["data"]:
        contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            related = tuple(dict.fromkeys(text for text in contexts if text != context))
            for entry in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                if answers:  # questions marked impossible have none
                    yield Question(entry["question"], answers, (context,), related)


def _hotpot(content: list[dict[str, Any]]) -> Iterator[Question]:
    for entry in content:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]}
        titles = {title for title, _ in entry.get("supporting_facts", ())} & texts.keys() or texts.keys()
        needed = tuple(text for title, text in texts.items() if title in titles)
        related = tuple(text for title, text in texts.items() if title not in titles)
        yield Question(entry["question"], (entry["answer"],), needed, related)
