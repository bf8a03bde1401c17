"""sparse_attention_with_tail: sparse attention in which the keys outside a support are read as one."""

from torch import Tensor

from ...support import Support
from .. import dispatch
from ..checks import check_attention, check_valid
from ..sparse_attention.op import fake_gradients
from .reference import sparse_attention_with_tail as reference
from .reference import sparse_attention_with_tail_backward


def _fake(q, k, v, indices, count, block, scale, valid):
    B, Hq, Tq, _ = q.shape
    return q.new_empty((B, Tq, Hq, v.shape[-1])).transpose(1, 2)  # tokens outermost, as the model wants it next


dispatch.define(
    "sparse_attention_with_tail",
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor count, int block, float scale, Tensor? valid) -> Tensor",
    reference,
    _fake,
    devices=("cuda",),
)


dispatch.define(
    "sparse_attention_with_tail_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor count, int block, float scale, Tensor? valid) -> "
    "(Tensor, Tensor, Tensor)",
    sparse_attention_with_tail_backward,
    fake_gradients,
    folder="sparse_attention_with_tail",
    devices=(),
)


def _remember(ctx, inputs, output):
    *tensors, ctx.block, ctx.scale, valid = inputs
    ctx.save_for_backward(*tensors, *(() if valid is None else (valid,)))


def _backward_of(suffix: str):
    def backward(ctx, grad):
        q, k, v, indices, count, *valid = ctx.saved_tensors
        gradients = dispatch.call(
            "sparse_attention_with_tail_backward", "reference", grad.device.type, grad, q, k, v, indices, count, ctx.block,
            ctx.scale, *(valid or [None]),
        )  # fmt: skip
        return *gradients, None, None, None, None, None

    return backward


dispatch.differentiate("sparse_attention_with_tail", _remember, _backward_of)


def sparse_attention_with_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    *,
    scale: float,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention output over the support and one key that stands for the tail, `[B, Hq, Tq, Dv]` in q's dtype.

    The tail of a query t is what its support leaves out: of the keys up to f, the first query of t's block, the n that
    are not in the support. The softmax of `sparse_attention` has one more term for it, with score
    `<q[t], mean of k[0..f]> * scale + log n` and value `mean of v[0..f]`. (The mean value is an idea of arXiv 2312.04985;
    as exp is convex, a mean key weighs less than the keys that it is the mean of.) Running means serve all supports:
    this costs one key a query and O(T), and nothing is scored for it. Where the support holds all keys, n is 0 and this
    is `sparse_attention`. Differentiable as that is, through the means too; n is a constant.

    Args:
        q, k, v, support, scale: as in `sparse_attention`; but every valid key up to the last block's first query is read,
            for the means.
        valid: bool `[B, Tk]`, False for padding; None = all valid.
        impl: "auto", "reference" or "kernel"; kernels exist for cuda only.
    """
    check_attention(q, k, v, support)
    check_valid(valid, q.shape[0], k.shape[2], q.device)
    return dispatch.call(
        "sparse_attention_with_tail", impl, q.device.type, q, k, v, support.indices, support.count, support.block,
        float(scale), valid,
    )  # fmt: skip
