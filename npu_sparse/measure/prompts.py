"""Prompts of one length, from text or from random tokens."""

import random

from .variants import (
    Subject,
)


def prompt_ids(config, subject: Subject, length: int):
    """The prompt of a length: int64 `[1, length]` on the host, the same for all variants."""
    import torch

    if config.prompt == "random":
        vocabulary = subject.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randint(vocabulary, (1, length), generator=generator)
    from ..tasks import texts

    documents = texts.documents(config.texts)
    start = random.Random(config.seed).randrange(len(documents))
    ids: list[int] = []
    for document in documents[start:] + documents[:start]:
        ids += subject.tokenizer(document.text, add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= length:
            return torch.tensor([ids[:length]])
    raise ValueError(f"texts must hold {length} tokens for a prompt of that length, got {len(ids)}")
