"""Index keys of the tokens that a KV cache already holds, which chunked and multi-turn prefill need from earlier forwards.

They live on the cache's own layer object, so beam search reorders, crops, resets and copies them together with it.
"""

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

PENDING_STEPS = 256  # dense steps whose hidden states are kept before they are turned into index keys


class KeyMaker(Protocol):
    """What makes index keys: the index head of a layer."""

    def keys(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, T, Di]` of hidden states `[B, T, hidden_size]` and the model's cos and sin `[B, T, rotary_dim]`."""


class IndexKeyCache:
    """Index keys `[B, T, Di]` of one layer, and hidden states whose index keys have not been needed yet.

    `maker` names the weights that the keys are made with: keys of two adapters are not comparable.
    """

    def __init__(self):
        self.maker: str | None = None
        self.keys: Tensor | None = None
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @staticmethod
    def of(cache, layer: int) -> "IndexKeyCache":
        """The IndexKeyCache of one layer of a transformers Cache, made on first use."""
        while len(cache.layers) <= layer:  # a cache made without a config grows as it is updated
            cache.layers.append(cache.layer_class_to_replicate())
        holder = cache.layers[layer]
        if not hasattr(holder, "index_keys"):
            holder.index_keys = IndexKeyCache()
            for name, method in _CARRYING.items():
                if hasattr(holder, name):
                    setattr(holder, name, _Carried(method, holder))
        return holder.index_keys

    def remember(self, hidden: Tensor, cos: Tensor, sin: Tensor, head: KeyMaker, maker: str | None = None) -> None:
        """Keeps the hidden states of a dense step, so that a later sparse prefill can make index keys of them.

        A step under another maker is not kept: its tokens are without index keys.
        """
        if not self._is_of(maker):
            return
        B = hidden.shape[0]
        self.pending.append((hidden.detach(), cos.expand(B, -1, -1), sin.expand(B, -1, -1)))
        if len(self.pending) > PENDING_STEPS:
            self.flush(head)

    def extend(self, keys: Tensor, seen: int, head: KeyMaker, maker: str | None = None) -> Tensor:
        """Appends the index keys of new tokens and returns those of all `seen` + new tokens.

        Raises ValueError where earlier tokens have no index keys, or those of another maker.
        """
        if not self._is_of(maker):
            raise ValueError(
                "cache must be continued with the adapter that made its index keys, got another adapter: prefill the "
                "conversation into a cache of its own"
            )
        self.flush(head)
        held = 0 if self.keys is None else self.keys.shape[1]
        if held != seen:
            raise ValueError(
                f"the cache holds {seen} tokens of which {held} have index keys: prefill the whole conversation attached"
            )
        self._append(keys)
        return self.keys

    def _is_of(self, maker: str | None) -> bool:
        """Whether this maker made what is held; an empty cache fits every maker."""
        if self.keys is None and not self.pending:
            self.maker = maker
        return self.maker == maker

    def flush(self, head: KeyMaker) -> None:
        """Turns remembered hidden states into index keys."""
        if not self.pending:
            return
        hidden, cos, sin = (torch.cat(parts, 1) for parts in zip(*self.pending))
        with torch.no_grad():
            self._append(head.keys(hidden, cos, sin))
        self.pending.clear()

    def _append(self, keys: Tensor) -> None:
        held = self.keys  # of one dtype, though autocast may begin or end between two forwards
        self.keys = keys if held is None else torch.cat([held, keys.to(held.dtype)], 1)

    def apply(self, change) -> None:
        """Replaces every tensor t by change(t); dimension 0 is the batch, dimension 1 the tokens."""
        if self.keys is not None:
            self.keys = change(self.keys)
        self.pending = [tuple(change(part) for part in parts) for parts in self.pending]

    def keep(self, tokens: int) -> None:
        """Forgets everything after the first `tokens` tokens."""
        held = 0
        if self.keys is not None:
            self.keys = self.keys[:, :tokens]
            held = self.keys.shape[1]
        kept = []
        for parts in self.pending:
            room = tokens - held
            if room <= 0:
                break
            kept.append(tuple(part[:, :room] for part in parts))
            held += kept[-1][0].shape[1]
        self.pending = kept


class _Carried:
    """A method of a cache layer that changes its batch or length, applied to its index keys as well.

    It is set on the layer object, so that transformers' classes stay as they are. It does not keep the layer alive, so a cache is
    freed with its last user and not by the garbage collector. A deep copy of the layer has its own.
    """

    def __init__(self, method: Callable, layer):
        self.method, self.layer = method, weakref.ref(layer)

    def __call__(self, *args, **kwargs):
        return self.method(self.layer(), *args, **kwargs)

    def __deepcopy__(self, memo):
        layer = self.layer()
        return _Carried(self.method, memo.get(id(layer), layer))

    def __reduce__(self):
        return _Carried, (self.method, self.layer())


def _reorder_cache(layer, beam_idx):
    type(layer).reorder_cache(layer, beam_idx)
    layer.index_keys.apply(lambda t: t.index_select(0, beam_idx.to(t.device)))


def _batch_repeat_interleave(layer, repeats):
    type(layer).batch_repeat_interleave(layer, repeats)
    layer.index_keys.apply(lambda t: t.repeat_interleave(repeats, 0))


def _batch_select_indices(layer, indices):
    type(layer).batch_select_indices(layer, indices)
    layer.index_keys.apply(lambda t: t[indices.to(t.device)])


def _crop(layer, *args, **kwargs):
    type(layer).crop(layer, *args, **kwargs)
    layer.index_keys.keep(int(layer.get_seq_length()))


def _reset(layer):
    type(layer).reset(layer)
    layer.index_keys = IndexKeyCache()


_CARRYING = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}
