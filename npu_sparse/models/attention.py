"""The seam to transformers: every attention and mask function that this package registers, and when each of them runs.

`set_attn_implementation` tells a model the name of a registered pair. transformers hands the state of a forward and of a layer
down as keywords: a ForwardContext, and a SparseLayer, of which this file only calls its one method.
"""

import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..ops.slices import upto
from .forward import ForwardContext, is_capturing, is_sparse

LAYER = "npu_sparse_layer"  # the keyword under which an attention function receives its SparseLayer
PREFIX = "npu_sparse"  # the names of registered attention and mask functions begin with it
_UNHOOKED = object()


class SparseLayer(Protocol):
    """One full-attention layer in one forward."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`[B, Tq, Hq, Dv]` of q `[B, Hq, Tq, D]`, k `[B, Hkv, Tk, D]`, v `[B, Hkv, Tk, Dv]`; mask: bool `[B, Tk]` padding."""


def register_sparse(implementation: str, dense_below: int) -> str:
    """Registers the attention and mask functions that fall back to `implementation`; returns their name.

    The functions hold no model: their name says all they need to know, so that torch.compile can trace them.
    """
    name = f"{PREFIX}_{implementation}_from_{dense_below}"

    def attention(
        module, query, key, value, attention_mask, *, scaling=None, npu_sparse_layer=_UNHOOKED, npu_sparse_forward=None, **kwargs
    ):
        if npu_sparse_layer is _UNHOOKED and kwargs.get("sliding_window") is None:
            raise ValueError("model shares its config with one that is attached: make it with copy.deepcopy(config)")
        forward = npu_sparse_forward
        dense = dense_attention(implementation, module)
        if npu_sparse_layer is _UNHOOKED or not forward.is_masked_sparse:
            return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if kwargs.get("dropout"):
            raise ValueError(f"attention_dropout must be 0 in a sparse prefill, got {kwargs['dropout']}: call model.eval()")
        first, parts = forward.sparse_queries, []
        if first:
            q, k, v = upto(query, first, 2), upto(key, forward.end, 2), upto(value, forward.end, 2)  # a static cache is longer
            parts.append(npu_sparse_layer.attend(q, k, v, attention_mask, scaling))
        if first < query.shape[2]:
            mask = _late_mask(implementation, module, forward, query, key, attention_mask)
            parts.append(dense(module, query[:, :, first:], key, value, mask, scaling=scaling, **kwargs)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), None

    def mask(**kwargs):
        return _mask(implementation, dense_below, **kwargs)

    _register(name, attention, mask)
    return name


def register_around(implementation: str, label: str, around: Callable) -> str:
    """Registers `implementation` wrapped in `around`; returns its name. Masks are those of `implementation`.

    around: called as `around(dense, module, q, k, v, mask, **kwargs)`, where `dense(module, q, k, v, mask, **kwargs)` is the
    model's own attention; returns what that returns.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = f"{PREFIX}_{label}_{implementation}"

    def attention(module, *args, **kwargs):
        return around(dense_attention(implementation, module), module, *args, **kwargs)

    _register(name, attention, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def register_dense(name: str, function: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """Registers `function(q, k, v, scale)` -> `[B, Tq, Hq, Dv]` as causal attention without padding; returns its name."""

    def attention(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
        if attention_mask is not None:
            raise ValueError(f"dense {name} must have prompts without padding, got a mask of {tuple(attention_mask.shape)}")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return function(query, key, value, scale), None

    _register(name, attention, _only_padding)
    return name


def dense_attention(implementation: str, module) -> Callable:
    """transformers' attention function of `implementation` for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _register(name: str, attention: Callable, mask: Callable) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def _mask(implementation: str, dense_below: int, **kwargs):
    """The mask of one forward: `implementation`'s where it runs dense, else 2-D `[B, length]` bool where padded, or None."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    queries, offset = kwargs["q_length"], kwargs["q_offset"]
    length = queries if queries == 1 else int(offset) + queries
    windowed = kwargs.get("local_size") is not None
    if windowed or not is_sparse(queries, length, dense_below):
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        raise ValueError(
            "sparse prefill takes one causal sequence per row; packed or custom masks are not supported "
            "(a compiled prefill without a cache needs an attention_mask, if only of ones, to show that nothing is packed)"
        )
    padding = kwargs["attention_mask"]
    if padding is None:
        return None
    if padding.shape[1] < length:
        raise ValueError(
            f"attention_mask must cover all {length} tokens, those in the cache too, got {tuple(padding.shape)}"
        )
    padding = padding[:, :length].bool()
    if not torch.compiler.is_compiling() and not is_capturing(padding.device) and bool(padding.all()):
        return None
    return padding


def _late_mask(implementation: str, module, forward: ForwardContext, query: Tensor, key: Tensor, padding: Tensor | None):
    """The mask that `implementation` takes for the queries after the prompt's end, where `_mask` left only the padding.

    It is made once, because it is the same for all layers of a forward.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    first, held = forward.sparse_queries, key.shape[2]
    if padding is not None and padding.ndim == 4:
        return padding[:, :, first:]
    if held not in forward.masks:
        forward.masks[held] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=query.shape[0], q_length=forward.queries - first, kv_length=held, q_offset=forward.start + first,
            kv_offset=0, mask_function=causal_mask_function, attention_mask=padding, allow_is_causal_skip=True,
            dtype=query.dtype, device=query.device, config=module.config, use_vmap=False,
        )  # fmt: skip
    return forward.masks[held]


def _only_padding(**kwargs):
    """The 2-D padding mask, or None where nothing is padded; no mask is ever Tq x Tk."""
    padding = kwargs.get("attention_mask")
    return None if padding is None or bool(padding.all()) else padding
