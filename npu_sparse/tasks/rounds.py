"""Multi-round co-reference (after OpenAI's MRCR, 2025): one of several answers to the same request, word for word."""

from random import Random

from npu_sparse.tasks.draft import Draft, Request, insert_at
from npu_sparse.tasks.words import ADJECTIVES, NOUNS

FORMS = ("verse", "riddle", "toast", "motto")
VERBS = ("follows", "forgets", "carries", "answers", "mends", "paints", "guards", "borrows")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
ROUND = "User: Write a {form} about the {topic}.\nAssistant: {text}"
TASK = (
    "Below is a conversation. Memorize it; I will ask you to repeat a part of it afterwards.\n{rounds}\n{question}"
)
QUESTION = (
    "Question: Repeat the {ordinal} {form} about the {topic}, word for word. Begin with the code {code} and write nothing else."
)
PREFIX = " Answer:"


def repeated(needles: int, request: Request, source: None = None) -> Draft:
    """The i-th of `needles` texts that one request was answered with; one unit is one round of another request."""
    rng = request.random("needles")
    asked = rng.choice(FORMS), rng.choice(NOUNS)
    texts: dict[str, None] = {}
    while len(texts) < needles:
        texts[_text(rng)] = None
    hidden = [ROUND.format(form=asked[0], topic=asked[1], text=text) for text in texts]
    depths = sorted(rng.random() for _ in hidden)
    which, code = rng.randrange(needles), "".join(rng.choices("bcdfghjkmnpqrstvwxz", k=5))
    question = QUESTION.format(ordinal=ORDINALS[which], form=asked[0], topic=asked[1], code=code)
    others, noise = request.random("noise"), []

    def body(n: int) -> str:
        while len(noise) < n:
            form, topic = others.choice(FORMS), others.choice(NOUNS)
            if (form, topic) != asked:
                noise.append(ROUND.format(form=form, topic=topic, text=_text(others)))
        shown = "\n".join(insert_at(noise[:n], hidden, depths))
        return TASK.format(rounds=shown, question=question)

    return Draft(body, PREFIX, answers=(f"{code} {list(texts)[which]}",), least=1, question=question)


def _text(rng: Random) -> str:
    lines = (
        f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        for _ in range(3)
    )
    return ", ".join(lines) + "."
