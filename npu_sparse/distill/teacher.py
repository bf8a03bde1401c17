"""The teacher: a frozen model's own dense attention, tapped layer by layer through transformers' attention seam."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..models.architectures import attention_modules, attention_selection, text_config
from ..models.attention import register_around


@dataclass(frozen=True)
class Tap:
    """The inputs of one full-attention layer in one forward.

    hidden `[B, T, H]`, cos and sin `[B or 1, T, R]`, q `[B, Hq, T, D]`, k `[B, Hkv, T, D]`.
    """

    layer: int
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    q: Tensor
    k: Tensor
    scale: float


@torch.no_grad()
def tap(model, ids: Tensor, receive: Callable[[Tap], None]) -> None:
    """Runs the decoder densely over `ids` `[B, T]` and calls `receive` at every full-attention layer, in order."""

    def attend(dense, seen: Tap, value):
        receive(seen)
        return dense()

    with tapped(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)


@contextmanager
def tapped(model, attend: Callable[[Callable, Tap, Tensor], tuple]):
    """While it is open, every full-attention layer attends as `attend(dense, tap, v)` says, where `dense()` is its own way.

    Both return `(out [B, T, Hq, Dv], weights or None)`, as attention functions of transformers do.
    """
    implementation = text_config(model)._attn_implementation

    def around(dense, module, query, key, value, mask, *, scaling, npu_sparse_tap=None, **kwargs):
        own = partial(dense, module, query, key, value, mask, scaling=scaling, **kwargs)
        return own() if npu_sparse_tap is None else attend(own, Tap(*npu_sparse_tap, query, key, scaling), value)

    def before_attention(layer):
        def hook(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            return args, {**kwargs, "npu_sparse_tap": (layer, hidden, cos, sin)}

        return hook

    name = register_around(implementation, "tap", around)
    modules = attention_modules(model)
    handles = []
    try:
        model.set_attn_implementation(attention_selection(model, name))
        for layer, module in modules.items():
            handles.append(module.register_forward_pre_hook(before_attention(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(attention_selection(model, implementation))
