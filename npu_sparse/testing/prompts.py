"""Prompts of tiny models, with and without padding, and what a prefill through one of them is asked and read by."""

import torch


def tokens(B: int = 2, length: int = 75, seed: int = 0) -> torch.Tensor:
    """Random token ids `[B, length]` of every tiny model's vocabulary, none of which is special; the same for the same seed."""
    return torch.randint(1, 90, (B, length), generator=torch.Generator().manual_seed(seed))


def left_padding(ids: torch.Tensor, missing: int = 20) -> torch.Tensor:
    """An attention mask `[B, T]` whose first row begins with `missing` positions of padding."""
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    return mask


def right_padding(ids: torch.Tensor, missing: int = 9) -> torch.Tensor:
    """An attention mask `[B, T]` whose last row ends with `missing` positions of padding."""
    mask = torch.ones_like(ids)
    mask[-1, -missing:] = 0
    return mask


def greedy(model, ids: torch.Tensor, **options):
    """What the model generates after `ids` without sampling, six tokens where `options` do not say otherwise."""
    return model.generate(ids, **dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False) | options)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Asserts that two tensors agree within `tolerance`, relative and absolute."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tiny_selector(kind: str, model):
    """A selector by name: "dense", "oracle", "per_kv" (an oracle for every key head) or "indexer" (untrained)."""
    from npu_sparse import Indexer, selectors

    if kind == "indexer":
        return selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2))
    return {"dense": selectors.Dense(), "oracle": selectors.Oracle(), "per_kv": selectors.Oracle(per_kv=True)}[kind]


def recorder():
    """`(observe, seen)`: the list receives `(inputs, support, out)` of every sparse layer of a prefill."""
    seen = []
    return (lambda *what: seen.append(what)), seen
