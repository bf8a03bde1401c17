"""Aggregation over labelled items (after OOLONG, 2025): how many have a label, which label is the most common, and whose.

Every item counts, so that what a prefill leaves out is missing from the answer: the worst case of sparse attention.
"""

from npu_sparse.tasks.draft import Draft, Request

LABELS = ("harvest", "weather", "travel", "music", "repairs", "letters")
SHARES = (0.3, 0.2, 0.16, 0.14, 0.12, 0.08)  # shares of the labels; the most common one leads by half
USERS = 4
LEAST = 40
TASK = (
    "Below are notes, one a line, each with its writer and its subject. Read all of them; I will ask you about them afterwards.\n"
    "{items}\n{question}"
)
QUESTION = "Question: {question} Answer with {form} only."
QUESTIONS = {
    "count": ("How many of the notes are about {label}?", "a number", " Answer: The number of notes about {label} is"),
    "most": ("Which subject do most of the notes have?", "one word", " Answer: The most common subject is"),
    "user": ("Which subject do most of the notes of writer {user} have?", "one word", " Answer: The most common subject is"),
}


def tally(kind: str, request: Request, source: None = None) -> Draft:
    """One question about n labelled notes; one unit is one note."""
    rng = request.random("labels")
    labels = list(LABELS)
    rng.shuffle(labels)
    asked = rng.choice(labels[1:-1])
    user = 1 + rng.randrange(USERS)
    text, form, prefix = (part.format(label=asked, user=user) for part in QUESTIONS[kind])
    question = QUESTION.format(question=text, form=form)

    def notes(n: int) -> list[tuple[int, str]]:
        counts = [int(share * n) for share in SHARES]
        counts[0] += n - sum(counts)
        ordered = [label for label, count in zip(labels, counts) for _ in range(count)]
        request.random(f"order {n}").shuffle(ordered)
        writers = request.random(f"writers {n}")
        return [(1 + writers.randrange(USERS), label) for label in ordered]

    def body(n: int) -> str:
        lines = (f"Note {i}, writer {writer}: {label}" for i, (writer, label) in enumerate(notes(n), start=1))
        return TASK.format(items="\n".join(lines), question=question)

    def answers(n: int) -> tuple[str, ...]:
        counted = [label for writer, label in notes(n) if kind != "user" or writer == user]
        if kind == "count":
            return (str(counted.count(asked)),)
        most = max(counted.count(label) for label in labels)
        return tuple(label for label in labels if counted.count(label) == most)  # a tie has several

    return Draft(body, prefix, answers=answers, least=LEAST, question=question)
