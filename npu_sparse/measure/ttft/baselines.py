"""Dense attention to measure against, each as an attention implementation of transformers under a short name.

fa2 and cudnn are PyTorch's own kernels, forced; fa3 is FlashAttention-3 from the package `fa3-fwd` or from its sources. All serve
causal prefill with grouped heads and no padding; queries are the last Tq of Tk tokens.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import torch

from ...models.architectures import attention_selection, text_config
from ...models.attention import register_dense

FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


def register(name: str) -> str:
    """`name`, as `model.set_attn_implementation` takes it from now on; transformers' own names pass through.

    Raises ImportError where fa3 is asked for and not installed.
    """
    if name not in DENSE:
        return name
    return register_dense(name, DENSE[name]())


@contextmanager
def running(model, name: str):
    """The model's dense attention is implementation `name`, until the end of a with block. ImportError as in `register`."""
    native = text_config(model)._attn_implementation
    model.set_attn_implementation(attention_selection(model, register(name)))
    try:
        yield
    finally:
        model.set_attn_implementation(attention_selection(model, native))


def available(names: tuple[str, ...] = ("fa2", "cudnn", "fa3")) -> list[str]:
    """Those of `names` that are installed."""
    return [name for name in names if name != "fa3" or fa3_module() is not None]


def fa3_module() -> str | None:
    """The installed module that has FlashAttention-3's functions."""
    return next((name for name in FA3_MODULES if importlib.util.find_spec(name) is not None), None)


def _fa2() -> Callable:
    from torch.nn.attention import SDPBackend

    return _sdpa(SDPBackend.FLASH_ATTENTION, "fa2")


def _cudnn() -> Callable:
    from torch.nn.attention import SDPBackend

    return _sdpa(SDPBackend.CUDNN_ATTENTION, "cudnn")


def _sdpa(backend, name: str) -> Callable:
    """PyTorch's scaled_dot_product_attention with one backend and no other."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    @cache
    def groups(device, dtype, D: int, G: int) -> bool:
        """Whether this backend takes fewer KV heads; asked once, with a tile of zeros."""
        q, k = (torch.zeros(1, heads, 128, D, device=device, dtype=dtype) for heads in (G, 1))
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        except RuntimeError:
            return False
        return True

    def attend(q, k, v, scale):
        Tq, Tk, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        grouped = G > 1 and groups(q.device, q.dtype, q.shape[3], G)
        if G > 1 and not grouped:
            k, v = (part.repeat_interleave(G, 1) for part in (k, v))
        options = dict(scale=scale, enable_gqa=grouped)
        with sdpa_kernel(backend):
            if Tq == Tk or Tq == 1:
                out = scaled_dot_product_attention(q, k, v, is_causal=Tq > 1, **options)
            elif name == "fa2":
                out = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(Tq, Tk), **options)
            else:
                raise ValueError(f"dense {name} must have as many queries as keys (no chunks), got {Tq} and {Tk}: use fa2 or fa3")
        return out.transpose(1, 2).contiguous()  # [B, Tq, Hq, D]

    return attend


def _fa3() -> Callable:
    module = fa3_module()
    if module is None:
        raise ImportError("dense fa3 must have FlashAttention-3: run `pip install fa3-fwd` (Hopper, bf16), or use fa2")
    flash_attn_func = importlib.import_module(module).flash_attn_func

    def attend(q, k, v, scale):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)  # aligned at the last key
        return out[0] if isinstance(out, tuple) else out

    return attend


DENSE: dict[str, Callable] = {"fa2": _fa2, "cudnn": _cudnn, "fa3": _fa3}
