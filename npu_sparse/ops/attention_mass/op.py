"""attention_mass: how much softmax attention every key receives, averaged over heads."""

import torch
from torch import Tensor

from ...budget import MASS_REDUCTIONS
from .. import dispatch
from ..checks import FLOATS, check_heads, check_lengths, check_tensor, check_valid
from .reference import attention_mass as reference


def _fake(q, k, scale, block, reduce, per_kv, valid):
    Hs = k.shape[1] if per_kv else 1
    return q.new_empty((q.shape[0], Hs, (q.shape[2] + block - 1) // block, k.shape[2]), dtype=torch.float32)


dispatch.define(
    "attention_mass",
    "(Tensor q, Tensor k, float scale, int block, str reduce, bool per_kv, Tensor? valid) -> Tensor",
    reference,
    _fake,
)


def attention_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    reduce_block: int = 1,
    reduce: str = "max",
    per_kv: bool = False,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The attention mass of every key, float32 `[B, Hs, ceil(Tq / reduce_block), Tk]`.

    `P[t](s) = mean over heads of softmax_s(<q[t], k[s]> * scale)` over the keys s that query t sees (arXiv 2606.07703,
    "Oracle"); rows of one query sum to 1. With `reduce_block > 1` the rows of a block of queries become one by `reduce`:
    the maximum over its queries, or the mean over those that see anything. Keys nobody sees have mass 0. A padding query
    sees nothing, so it has no part in its block. A query with NaN among its scores makes all mass of its row NaN.

    Args:
        q: `[B, Hq, Tq, D]` queries after rotary embedding, the last Tq of Tk positions; fp16, bf16 or fp32.
        k: `[B, Hkv, Tk, D]` keys after rotary embedding.
        scale: the model's score scale, usually `D ** -0.5`.
        per_kv: average over each KV head's query group (`Hs = Hkv`) and not over all heads (`Hs = 1`).
        valid: bool `[B, Tk]`, False for padding; None = all valid.
        impl: "auto", "reference" or "kernel".

    The output holds all Tq rows: for a long context call it for slices, `q[:, :, a:b]` with `k[:, :, :b]`.
    Raises ValueError or TypeError for inputs that break a rule, KernelUnavailableError where a kernel is asked for and missing.
    """
    check_tensor("q", q, (None, None, None, None), FLOATS)
    B, Hq, Tq, D = q.shape
    check_tensor("k", k, (B, None, None, D), (q.dtype,), q.device)
    check_heads(Hq, k.shape[1])
    check_lengths(Tq, k.shape[2])
    if reduce_block < 1:
        raise ValueError(f"reduce_block must be >= 1, got {reduce_block}")
    if reduce not in MASS_REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(MASS_REDUCTIONS)}, got {reduce!r}")
    check_valid(valid, B, k.shape[2], q.device)
    return dispatch.call("attention_mass", impl, q.device.type, q, k, float(scale), reduce_block, reduce, per_kv, valid)
