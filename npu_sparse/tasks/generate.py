"""Examples of a task at a length: prompts as long as the room allows, the same on every machine."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from npu_sparse.tasks.answering import question_drafts, read_questions
from npu_sparse.tasks.catalogue import task_named
from npu_sparse.tasks.draft import Draft, Request, placed

from ..errors import USER_ERROR, ActionableError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from npu_sparse.tasks.texts import Document

USER_TEXT = "the text of the user"
QUESTIONS = ("end", "front", "middle")
PLAIN_PREFIX = "\nAnswer:"
PROBE_UNITS = 16
SECANT_STEPS = 8


@dataclass(frozen=True)
class Example:
    """A prompt that ends with the beginning of its answer, and the answers that a right output contains.

    `length` counts the tokens that `encode` gives; `comparable` is False where the haystack is a substitute.
    """

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    length: int
    max_new_tokens: int
    seed: int
    comparable: bool
    chat: bool = False


class PromptTooLongError(ActionableError, ValueError):
    """Even the smallest haystack leaves the prompt longer than its room."""

    exit_status = USER_ERROR


def generate(
    task: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    count: int,
    seed: int,
    haystack: "Iterable[str | Document] | str | None" = None,
    qa_file: str | Path | None = None,
    chat: bool | None = None,
    max_new_tokens: int | None = None,
    question: str = "end",
) -> list[Example]:
    """`count` examples whose prompts take at most `length - max_new_tokens` tokens, within one haystack unit of that.

    Example i depends on task, tokenizer, length, seed, i and the text given, never on count. Key, values and depths do
    not depend on length, so that lengths can be compared pairwise.
    `chat=True` puts the question in a user turn and begins the assistant's turn with the answer prefix; otherwise the
    prompt is raw text, as base models get it. `max_new_tokens` defaults to RULER's for the task.
    `question` is where the question stands, one of QUESTIONS: away from the end nothing after the text repeats it, and the answer
    begins with "Answer:" alone; key, values and depths are the same.
    Raises ValueError for an unknown task, a length that is too short (the message says how long it must be), a missing
    haystack or question file, or a task whose question cannot stand elsewhere.
    """
    known = task_named(task)
    check_question(question)
    for name, value, floor in (("length", length, 1), ("count", count, 0)):
        if value < floor:
            raise ValueError(f"{name} must be >= {floor}, got {value}")
    new_tokens = known.max_new_tokens if max_new_tokens is None else max_new_tokens
    if new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {new_tokens}")
    if known.needs == "haystack" and haystack is None:
        raise ValueError(f"{task} needs haystack: documents or strings, for example texts.documents('builtin')")
    if known.needs == "qa_file" and qa_file is None:
        form = "SQuAD v2" if task == "qa_1" else "HotpotQA"
        raise ValueError(f"{task} needs qa_file: the path of a JSON file in {form} form")

    wrap = _chat_turns(tokenizer) if chat else str.__add__
    room = length - new_tokens

    def fitted(draft: Draft, index: int) -> Example:
        draft = _asked_at(question, task, draft)
        try:
            prompt, tokens, units = _fill(draft, wrap, lambda text: len(_token_ids(tokenizer, text, bool(chat))), room)
        except PromptTooLongError as error:
            raise PromptTooLongError(
                f"length must be >= {error.args[0] + new_tokens} for {task} example {index} with this tokenizer "
                f"({new_tokens} of it for new tokens), got {length}"
            ) from None
        return Example(
            task=task,
            index=index,
            prompt=prompt,
            answers=draft.answers(units) if callable(draft.answers) else draft.answers,
            length=tokens,
            max_new_tokens=new_tokens,
            seed=seed,
            comparable=known.comparable_with_published,
            chat=bool(chat),
        )

    if known.needs == "qa_file":
        return _questions_that_fit(task, seed, count, length, Path(qa_file), fitted)
    texts = _texts(haystack) if known.needs == "haystack" else None
    return [fitted(known.draft(Request(task, index, seed, length, room), texts), index) for index in range(count)]


def check_question(where: str) -> None:
    """Raises ValueError unless a question can stand there."""
    if where not in QUESTIONS:
        raise ValueError(f"question must be one of {', '.join(QUESTIONS)}, got {where!r}")


def _asked_at(where: str, task: str, draft: Draft) -> Draft:
    if where == "end":
        return draft
    if not draft.question:
        raise ValueError(f"question must be at the end for {task}, got {where!r}")
    return replace(draft, body=lambda n: placed(draft.body(n), draft.question, where), prefix=PLAIN_PREFIX)


def encode(tokenizer: "PreTrainedTokenizerBase", example: Example) -> list[int]:
    """The token ids of an example's prompt: `example.length` of them.

    A chat template writes its own special tokens, so the tokenizer adds them to raw prompts only.
    """
    return _token_ids(tokenizer, example.prompt, example.chat)


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]


def _questions_that_fit(
    task: str, seed: int, count: int, length: int, path: Path, fitted: Callable[[Draft, int], Example]
) -> list[Example]:
    source = read_questions(task, path)
    examples: list[Example] = []
    for draft in question_drafts(task, seed, source):
        if len(examples) == count:
            return examples
        try:
            examples.append(fitted(draft, len(examples)))
        except PromptTooLongError:
            continue
    if len(examples) < count:
        raise ValueError(
            f"count must be <= {len(examples)}, the questions of {str(path)!r} whose documents fit in length {length}, "
            f"got {count}"
        )
    return examples


def _texts(haystack: "Iterable[str | Document] | str") -> list[str]:
    pieces = [haystack] if isinstance(haystack, str) else haystack
    texts = [text for text in (piece if isinstance(piece, str) else piece.text for piece in pieces) if text.strip()]
    if not texts:
        raise ValueError("haystack must hold text, got none")
    return texts


def _chat_turns(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str, str], str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat must be False for a tokenizer without a chat template, got True")
    # Models that reason before they answer leave out their reasoning with this; other templates ignore it.
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": USER_TEXT}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, after = turns.split(USER_TEXT)
    return lambda question, prefix: before + question + after + prefix.lstrip()


def _fill(
    draft: Draft, wrap: Callable[[str, str], str], count_tokens: Callable[[str], int], room: int
) -> tuple[str, int, int]:
    """The prompt with the largest haystack that fits in `room` tokens, its number of tokens, and of units.

    Tokens grow almost linearly with units: a secant brackets the size in few tokenizations, bisection bounds the rest.
    """

    def sized(n: int) -> tuple[str, int]:
        prompt = wrap(draft.body(n), draft.prefix)
        return prompt, count_tokens(prompt)

    fits, best = draft.least, sized(draft.least)
    if best[1] > room:
        raise PromptTooLongError(best[1])
    # A unit takes a token or so at the very least: with no limit of its own, a draft stops at twice the room.
    over = 1 + (draft.least + 2 * room if draft.most is None else draft.most)
    step = PROBE_UNITS
    for attempt in itertools.count():
        if over - fits == 1:
            return *best, fits
        n = min(fits + step, over - 1)
        sample = sized(n)
        per_unit = (sample[1] - best[1]) / (n - fits)
        if sample[1] <= room:
            fits, best = n, sample
        else:
            over = n
        secant = int((room - best[1]) / max(per_unit, 1e-3))
        step = max(1, secant if attempt < SECANT_STEPS else (over - fits) // 2)
