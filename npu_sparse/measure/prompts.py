"""Prompts of one length: of real text, or of random tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from .variants import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks.texts import Document


def prompt_ids(config, subject: Subject, length: int) -> Tensor:
    """The prompt of a length: int64 `[1, length]` on the host, the same for all variants."""
    import torch

    if config.prompt == "random":
        vocabulary = subject.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randint(vocabulary, (1, length), generator=generator)
    from ..tasks import texts

    ((_, ids),) = text_prompts(subject.tokenizer, texts.documents(config.texts), length=length, count=1, seed=config.seed)
    return ids[None]


def text_prompts(
    tokenizer, documents: Sequence[Document], *, length: int, count: int, seed: int
) -> list[tuple[str, Tensor]]:
    """`count` prompts of exactly `length` tokens, int64 `[length]`, with the names of the documents they come from.

    The seed decides the order of documents; the next one continues a document that is too short. Each prompt starts at the start
    of a document, unless there are too few documents: then prompts continue one another. All start with the tokenizer's
    beginning-of-sequence token, where it adds one. ValueError where the texts are too short.
    """
    import torch

    start = _leading_special_tokens(tokenizer)
    room = length - len(start)
    runs: list[tuple[str, list[int]]] = []
    for run in _runs(tokenizer, documents, room, seed):
        runs.append(run)
        if len(runs) == count:
            break
    longest = max((len(ids) for _, ids in runs), default=0)
    windows = [
        (name, ids[n * room : (n + 1) * room]) for n in range(longest // room) for name, ids in runs
        if (n + 1) * room <= len(ids)
    ]  # fmt: skip
    if len(windows) < count:
        raise ValueError(
            f"texts must hold {f'{count} prompts of ' if count > 1 else ''}{length} tokens, got enough for {len(windows)}: "
            "give more text, or ask for fewer or shorter prompts"
        )
    return [(name, torch.tensor(start + ids)) for name, ids in windows[:count]]


def _runs(tokenizer, documents: Sequence[Document], room: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    order = list(documents)
    Random(seed).shuffle(order)
    names: list[str] = []
    ids: list[int] = []
    for document in order:
        text = document.text if not ids else f"\n\n{document.text}"
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        names.append(document.name)
        if len(ids) >= room:
            yield " + ".join(names), ids
            names, ids = [], []


def _leading_special_tokens(tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []
