"""dense_rows: dense causal GQA attention of a few queries, wherever they stand."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import FLOATS, check_heads, check_tensor, check_valid
from ..sparse_attention.op import fake_gradients
from .reference import dense_rows as reference
from .reference import dense_rows_backward


def _fake(q, k, v, positions, scale, valid):
    B, Hq, R, _ = q.shape
    return q.new_empty((B, R, Hq, v.shape[-1])).transpose(1, 2)  # tokens outermost, as the model wants it next


dispatch.define(
    "dense_rows",
    "(Tensor q, Tensor k, Tensor v, Tensor positions, float scale, Tensor? valid) -> Tensor",
    reference,
    _fake,
)


dispatch.define(
    "dense_rows_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor positions, float scale, Tensor? valid) -> (Tensor, Tensor, Tensor)",
    dense_rows_backward,
    fake_gradients,
    folder="dense_rows",
    devices=(),
)


def _remember(ctx, inputs, output):
    *tensors, ctx.scale, valid = inputs
    ctx.save_for_backward(*tensors, *(() if valid is None else (valid,)))


def _backward_of(suffix: str):
    def backward(ctx, grad):
        *tensors, positions = ctx.saved_tensors[:4]
        valid = ctx.saved_tensors[4] if len(ctx.saved_tensors) > 4 else None
        gradients = dispatch.call(
            "dense_rows_backward", "reference", grad.device.type, grad, *tensors, positions, ctx.scale, valid
        )
        return *gradients, None, None, None

    return backward


dispatch.differentiate("dense_rows", _remember, _backward_of)


def dense_rows(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, scale: float, valid: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Dense attention output of the given rows, `[B, Hq, R, Dv]` in q's dtype.

    `out[r] = softmax over {s <= positions[r], s valid} of (<q[r], k[s]> * scale), times v`. A row that sees no key gets zeros; a
    position of -1 asks for that. The rows need not be neighbours, and each sequence of a batch has its own. Where they are few,
    kernels split the keys between programs and join the parts (flash-decoding: Dao et al., 2023), as a few rows do not fill a
    card. Differentiable in q, k and v, on every back-end by the same eager PyTorch.

    Args:
        q: `[B, Hq, R, D]`, the queries of these rows alone; fp16, bf16 or fp32.
        k: `[B, Hkv, Tk, D]`, v: `[B, Hkv, Tk, Dv]`. Invalid keys may hold anything, and so may those beyond every row's position.
        positions: int32 `[B, R]`, each less than Tk: what a row sees ends there.
        valid: bool `[B, Tk]`, False for padding; None = all valid.
        impl: "auto", "reference" or "kernel". On an NPU, and emulated, the kernel is sparse attention's.
    """
    check_tensor("q", q, (None, None, None, None), FLOATS)
    B, Hq, R, D = q.shape
    check_tensor("k", k, (B, None, None, D), (q.dtype,), q.device)
    Hkv, Tk = k.shape[1], k.shape[2]
    check_tensor("v", v, (B, Hkv, Tk, None), (q.dtype,), q.device)
    check_heads(Hq, Hkv)
    check_tensor("positions", positions, (B, R), (torch.int32,), q.device)
    check_valid(valid, B, Tk, q.device)
    if R < 1 or Tk < 1:
        raise ValueError(f"q and k must hold at least one row each, got {R} and {Tk}")
    return dispatch.call("dense_rows", impl, q.device.type, q, k, v, positions, float(scale), valid)
