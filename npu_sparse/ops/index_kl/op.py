"""index_kl: the loss that distils an indexer, with its gradients, computed without a matrix over all queries and keys."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import FLOATS, check_heads, check_tensor
from . import reference

INPUTS = "Tensor q, Tensor k, Tensor qi, Tensor ki, Tensor? w, int[] starts, int[] stops, float scale"
DEVICES = ("cuda",)


def _fake(q, k, qi, ki, w, starts, stops, scale):
    B, R = q.shape[0], sum(stops) - sum(starts)
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in ((B, R), (B, q.shape[1], R), (B, R)))


def _fake_backward(grad, teacher_norm, index_norm, q, k, qi, ki, w, starts, stops, scale):
    B, Hi, T, _ = qi.shape
    return (
        qi.new_empty(qi.shape, dtype=qi.dtype), ki.new_empty(ki.shape, dtype=ki.dtype),
        qi.new_empty((B, T, 0 if w is None else Hi), dtype=qi.dtype),
    )  # fmt: skip


dispatch.define("index_kl", f"({INPUTS}) -> (Tensor, Tensor, Tensor)", reference.index_kl, _fake, devices=DEVICES)
dispatch.define(
    "index_kl_backward",
    f"(Tensor grad, Tensor teacher_norm, Tensor index_norm, {INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference.index_kl_backward,
    _fake_backward,
    folder="index_kl",
    devices=DEVICES,
)


def _remember(ctx, inputs, output):
    q, k, qi, ki, w, ctx.starts, ctx.stops, ctx.scale = inputs
    _, teacher_norm, index_norm = output
    ctx.mark_non_differentiable(teacher_norm, index_norm)
    ctx.save_for_backward(teacher_norm, index_norm, q, k, qi, ki, *(() if w is None else (w,)))


def _backward_of(suffix: str):
    entry = f"index_kl_backward{suffix}"

    def backward(ctx, grad, _teacher_norm, _index_norm):
        teacher_norm, index_norm, q, k, qi, ki, *weights = ctx.saved_tensors
        w = weights[0] if weights else None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            raise RuntimeError("q and k must not require gradients: the teacher of index_kl is frozen")
        d_qi, d_ki, d_w = getattr(torch.ops.npu_sparse, entry)(
            grad.float().contiguous(), teacher_norm, index_norm, q, k, qi, ki, w, ctx.starts, ctx.stops, ctx.scale
        )
        return None, None, d_qi, d_ki, None if w is None else d_w, None, None, None

    return backward


dispatch.differentiate("index_kl", _remember, _backward_of)


def index_kl(
    q: Tensor,
    k: Tensor,
    qi: Tensor,
    ki: Tensor,
    w: Tensor | None = None,
    *,
    segments: list[tuple[int, int]],
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """`KL(P[t] || softmax_{s <= t}(z[t]))` of every supervised query t in nats, float32 `[B, rows]`; differentiable in qi, ki, w.

    P is the attention mass of `attention_mass`, the mean over all heads of `softmax_{s <= t}(<q[t], k[s]> * scale)`, and
    `z[t, s] = sum_h w[t, h] ReLU(<qi[t, h], ki[s]> / sqrt(Di))` as in `index_scores` (arXiv 2606.07703, "Indexer"). Neither
    is kept: the kernel streams over keys and needs O(T) memory beside inputs and gradients, and computes both again for
    the gradients, which are the same on every run.

    Args:
        q: `[B, Hq, T, D]` the teacher's queries after rotary embedding; fp16, bf16 or fp32. Gets no gradient.
        k: `[B, Hkv, T, D]` the teacher's keys. Gets no gradient.
        qi: `[B, Hi, T, Di]` index queries after rotary embedding.
        ki: `[B, T, Di]` index keys, one head.
        w: `[B, T, Hi]` head weights, or None for ones.
        segments: `[(start, stop), ...]` ascending and disjoint ranges of supervised queries; the rows of the result are
            theirs in order.
        scale: the teacher's score scale.
        impl: "auto" (the kernel on cuda, the reference elsewhere), "reference" or "kernel".

    There is no padding: contexts are cut to one length. Raises ValueError or TypeError for inputs that break a rule,
    KernelUnavailableError where a kernel is asked for and missing.
    """
    check_tensor("q", q, (None, None, None, None), FLOATS)
    B, Hq, T, D = q.shape
    check_tensor("k", k, (B, None, T, D), (q.dtype,), q.device)
    check_heads(Hq, k.shape[1])
    check_tensor("qi", qi, (B, None, T, None), FLOATS, q.device)
    Hi, Di = qi.shape[1], qi.shape[3]
    check_tensor("ki", ki, (B, T, Di), (qi.dtype,), q.device)
    if w is not None:
        check_tensor("w", w, (B, T, Hi), (qi.dtype,), q.device)
    _check_segments(segments, T)
    device_type = q.device.type
    if impl == "auto" and not dispatch.has_kernels_for("index_kl", device_type):
        impl = "reference"
    starts, stops = [start for start, _ in segments], [stop for _, stop in segments]
    return dispatch.call("index_kl", impl, device_type, q, k, qi, ki, w, starts, stops, float(scale))[0]


def _check_segments(segments, T: int) -> None:
    done = 0
    for start, stop in segments:
        if not done <= start < stop <= T:
            raise ValueError(f"segments must be ascending, disjoint and within {T} queries, got {segments}")
        done = stop
    if not done:
        raise ValueError("segments must hold at least one query, got none")
