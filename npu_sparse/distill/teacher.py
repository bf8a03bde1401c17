"""The teacher: a frozen model's own dense attention, tapped layer by layer through transformers' attention seam."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import attention_modules, attention_selection, text_config
from ..prefill import dense_attention


@dataclass(frozen=True)
class Tap:
    """What one full-attention layer showed.

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
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    native = text_config(model)._attn_implementation
    name = f"npu_sparse_tap_{native}"

    def attention(module, query, key, value, attention_mask, *, scaling=None, tapped=None, **kwargs):
        if tapped is not None:
            receive(Tap(*tapped, query, key, scaling))
        dense = dense_attention(native, module)
        return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def before_attention(layer):
        def hook(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            return args, {**kwargs, "tapped": (layer, hidden, cos, sin)}

        return hook

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[native])
    modules = attention_modules(model)
    handles = []
    try:
        model.set_attn_implementation(attention_selection(model, name))
        for layer, module in modules.items():
            handles.append(module.register_forward_pre_hook(before_attention(layer), with_kwargs=True))
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(attention_selection(model, native))
