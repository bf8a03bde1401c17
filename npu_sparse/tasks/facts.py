"""Facts tracked through background text (after BABILong's qa1 to qa3, 2024): who is where, and where things are and were."""

from random import Random

from npu_sparse.tasks.draft import Draft, Request, insert_at
from npu_sparse.tasks.retrieval import Passage, sentences

PERSONS = ("Alma", "Boris", "Clara", "Edgar")
PLACES = ("cellar", "garden", "kitchen", "attic", "stable", "library")
THINGS = ("lantern", "basket", "whistle")
EVENTS = 12
TASK = (
    "Some facts about persons and things are hidden in the following text, in the order in which they happened. Memorize them; I "
    "will ask you about them afterwards.\n{context}\n{question}"
)
QUESTION = "Question: {question} Answer with one word."
PREFIX = " Answer: The"


def tracked(facts: int, request: Request, texts: list[str]) -> Draft:
    """One question that takes 1, 2 or 3 of the facts together; one unit is one word of background.

    The answers are the place that is right, and then all others: an output is wrong that names several.
    """
    rng = request.random("facts")
    told = None
    while told is None:  # until a story has such a question
        told = _story(rng, facts)
    events, asked, answer = told
    question = QUESTION.format(question=asked)
    depths = sorted(rng.random() for _ in events)
    passage = Passage(texts, request.random("passage"))

    def body(n: int) -> str:
        context = " ".join(insert_at(sentences(passage.first(n)), events, depths))
        return TASK.format(context=context, question=question)

    return Draft(body, PREFIX, answers=(answer, *(place for place in PLACES if place != answer)), least=1, question=question)


def _story(rng: Random, facts: int) -> tuple[list[str], str, str] | None:
    """`(sentences, question, answer)`, or None where nothing that takes so many facts can be asked."""
    at: dict[str, str] = {}
    held: dict[str, str] = {}
    been: dict[str, list[str]] = {thing: [] for thing in THINGS}
    events = []
    for _ in range(EVENTS):
        person = rng.choice(PERSONS)
        mine = [thing for thing, holder in held.items() if holder == person]
        free = [thing for thing in THINGS if thing not in held and (not been[thing] or been[thing][-1] == at.get(person))]
        choice = rng.random() if facts > 1 else 0.0
        if person not in at or choice < 0.6 or not (mine or free):
            at[person] = rng.choice([place for place in PLACES if place != at.get(person)])
            events.append(f"{person} walked to the {at[person]}.")
            for thing in mine:
                been[thing].append(at[person])
        elif free and (choice < 0.9 or not mine):
            thing = rng.choice(free)
            held[thing] = person
            if not been[thing]:
                been[thing].append(at[person])
            events.append(f"{person} picked up the {thing}.")
        else:
            thing = rng.choice(mine)
            del held[thing]
            events.append(f"{person} put down the {thing}.")
    if facts == 1:
        person = rng.choice(sorted(at))
        return events, f"Where is {person}?", at[person]
    moved = [thing for thing in THINGS if len(been[thing]) >= facts]
    if not moved:
        return None
    thing = rng.choice(moved)
    if facts == 2:
        return events, f"Where is the {thing}?", been[thing][-1]
    if been[thing][:-1].count(been[thing][-1]):
        return None  # "before" would not say which time
    return events, f"Where was the {thing} before it came to the {been[thing][-1]}?", been[thing][-2]
