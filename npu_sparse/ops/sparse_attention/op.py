"""sparse_attention: causal GQA attention over each block's support."""

import torch
from torch import Tensor

from ...support import Support
from .. import dispatch
from ..checks import check_attention
from .backward import sparse_attention_backward
from .reference import sparse_attention as reference


def _fake(q, k, v, indices, count, block, scale):
    B, Hq, Tq, _ = q.shape
    return q.new_empty((B, Tq, Hq, v.shape[-1])).transpose(1, 2)  # tokens outermost, as the model wants it next


dispatch.define(
    "sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor count, int block, float scale) -> Tensor",
    reference,
    _fake,
)


def fake_gradients(grad, q, k, v, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format), *(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)
    )


dispatch.define(
    "sparse_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor count, int block, float scale) -> "
    "(Tensor, Tensor, Tensor)",
    sparse_attention_backward,
    fake_gradients,
    folder="sparse_attention",
    devices=(),
)


def _remember(ctx, inputs, output):
    *tensors, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward_of(suffix: str):
    def backward(ctx, grad):
        gradients = dispatch.call(
            "sparse_attention_backward", "reference", grad.device.type, grad, *ctx.saved_tensors, ctx.block, ctx.scale
        )
        return *gradients, None, None, None, None

    return backward


dispatch.differentiate("sparse_attention", _remember, _backward_of)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, impl: str = "auto"
) -> Tensor:
    """Attention output over the support, `[B, Hq, Tq, Dv]` in q's dtype.

    `out[t] = softmax over {s in S(block of t), s <= t} of (<q[t], k[s]> * scale), times v` - the original queries, keys and
    values, renormalised over the support (arXiv 2606.07703, "Oracle"). A query whose support is empty gets zeros. Keys that
    no row selects are never read, and NaN or Inf in a key or value reaches only the queries that see it.

    Differentiable in q, k and v, on every back-end by the same eager PyTorch (backward.py): the gradients of dense attention
    under the support as a mask. The support is a constant.

    Args:
        q: `[B, Hq, Tq, D]`, the last Tq of Tk positions; fp16, bf16 or fp32.
        k: `[B, Hkv, Tk, D]`.
        v: `[B, Hkv, Tk, Dv]`.
        support: a Support for these queries; its contract is the caller's (`Support.check` reads every entry).
        scale: the model's score scale, usually `D ** -0.5`.
        impl: "auto", "reference" or "kernel".
    """
    check_attention(q, k, v, support)
    return dispatch.call(
        "sparse_attention", impl, q.device.type, q, k, v, support.indices, support.count, support.block, float(scale)
    )
