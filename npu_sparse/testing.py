"""What tests of operators and models need: inputs, hostile data, exact answers, the accuracy assertion, tiny models.

The `naive_*` functions follow arXiv 2606.07703 line by line over whole `[Tq, Tk]` matrices and share no code with the
operators' references. In float64 they are the exact answer; in another dtype they are a yardstick for rounding.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .ops.dispatch import LIMITS, Limits, register_triton, require_kernels
from .support import Support

INT_MAX = torch.iinfo(torch.int32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = {
    "reference": ("reference", "cpu"),
    "reference-cuda": ("reference", "cuda"),
    "cuda": ("kernel", "cuda"),
    "npu": ("kernel", "npu"),
    "emulated": ("kernel", "cpu"),
    "interpreted": ("kernel", "cpu"),
}
INTERPRETED = Limits((torch.float16,), dim_multiple=1, most_dim=256, most_block=1 << 20, most_k=1 << 20)  # no bf16 products


@dataclass(frozen=True)
class Backend:
    """Where an operator's tests run: its name, the `impl` to pass, the device of the inputs, the limits of its kernels.

    Tests are written for any dtype and dimension; where a back-end has limits, `fit` and its parts give the nearest that it
    takes, and what it does not take is tested to be refused.
    """

    name: str
    impl: str
    device: str
    limits: Limits | None = None

    def dtype(self, wanted: torch.dtype = torch.float32) -> torch.dtype:
        """`wanted` where the kernels take it, else the last dtype that they do."""
        return wanted if self.limits is None or wanted in self.limits.dtypes else self.limits.dtypes[-1]

    def dim(self, wanted: int) -> int:
        """The next dimension from `wanted` on that the kernels take."""
        return wanted if self.limits is None else -(-wanted // self.limits.dim_multiple) * self.limits.dim_multiple

    def fit(self, case):
        """A test case, a dataclass, with its `dtype` and its dimensions `D`, `Dv`, `Di` made to fit."""
        changes = {field.name: self.dim(getattr(case, field.name)) for field in fields(case) if field.name in ("D", "Dv", "Di")}
        if hasattr(case, "dtype"):
            changes["dtype"] = self.dtype(case.dtype)
        return replace(case, **changes)


def open_backend(name: str) -> Backend:
    """The Backend of a name in BACKENDS. Raises what a user would get where this machine cannot run it.

    That is KernelUnavailableError for a kernel that is missing, and torch's own error for a device that is.
    """
    impl, device = BACKENDS[name]
    torch.empty(0, device=device)
    if impl == "reference":
        return Backend(name, impl, device)
    if name == "interpreted":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton interprets its kernels on the CPU only under TRITON_INTERPRET=1: run `make test-triton`")
        register_triton(device)
        require_kernels(device)
        return Backend(name, impl, device, INTERPRETED)
    require_kernels(device)
    return Backend(name, impl, device, LIMITS.get(device))


# Inputs


def normal(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0, strided: bool = False) -> Tensor:
    """Normally distributed values, the same on every device; `strided` gives a view whose every stride is odd-sized.

    A strided `[B, H, T, D]` is laid out as `[B, T, H, D]` inside a larger tensor, as models hand their heads over; what
    lies around it is NaN.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if not strided:
        return values
    swapped = (shape[0], shape[2], shape[1], shape[3]) if len(shape) == 4 else shape
    room = torch.full([size + 1 for size in swapped[:-1]] + [swapped[-1] + 3], float("nan"), dtype=dtype, device=device)
    view = room[tuple(slice(0, size) for size in swapped)]
    view = view.transpose(1, 2) if len(shape) == 4 else view
    return view.copy_(values)


def attention_inputs(
    B: int, Hq: int, Hkv: int, Tq: int, Tk: int, D: int, Dv: int | None = None, *,
    dtype=torch.float32, device="cpu", seed: int = 0, strided: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv])`, peaked enough for every mask to matter."""
    options = {"dtype": dtype, "device": device, "strided": strided}
    q = normal(B, Hq, Tq, D, seed=3 * seed, **options)
    k = normal(B, Hkv, Tk, D, seed=3 * seed + 1, **options)
    return q.mul_(2), k, normal(B, Hkv, Tk, Dv or D, seed=3 * seed + 2, **options)


def index_inputs(
    B: int,
    Hi: int,
    Tq: int,
    Tk: int,
    Di: int,
    *,
    dtype=torch.float32,
    device="cpu",
    seed: int = 0,
    strided: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(qi [B, Hi, Tq, Di], ki [B, Tk, Di], w [B, Tq, Hi])`."""
    options = {"dtype": dtype, "device": device, "strided": strided}
    qi = normal(B, Hi, Tq, Di, seed=3 * seed, **options)
    ki = normal(B, Tk, Di, seed=3 * seed + 1, **options)
    return qi, ki, normal(B, Tq, Hi, seed=3 * seed + 2, **options)


def whole_index_inputs(
    B: int, Hi: int, Tq: int, Tk: int, Di: int, *, dtype=torch.float32, device="cpu", seed: int = 0, strided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`index_inputs` of whole numbers, so small and with Di a power of 4 that every product, mean of a power of two and sum is
    exact in fp32 and fp16, in whatever order: results can be compared bit by bit. Most scores tie."""
    qi, ki, w = index_inputs(B, Hi, Tq, Tk, Di, dtype=dtype, device=device, seed=seed, strided=strided)
    for x in (qi, ki):
        x.copy_((x * 0.9).round().clamp(-2, 2))
    return qi, ki, w.copy_(w.round().clamp(-1, 2))


def padding(B: int, T: int, side: str, *, device="cpu") -> Tensor:
    """bool `[B, T]`: row b has about `(b + 1) T / (B + 2)` padding tokens on this side, but not all of it."""
    missing = torch.tensor([min((b + 1) * T // (B + 2), T - 1) for b in range(B)])[:, None]
    position = torch.arange(T)
    return (position >= missing if side == "left" else position < T - missing).to(device)


def random_support(
    B: int, Hs: int, Tq: int, Tk: int, *, k: int, block: int = 1, device="cpu", seed: int = 0, empty: bool = False
) -> Support:
    """A Support of random visible keys, hostile in its unused slots; with `empty` some rows hold nothing."""
    generator = torch.Generator().manual_seed(seed)
    Nq = -(-Tq // block)
    indices = torch.zeros(B, Hs, Nq, k, dtype=torch.int32)
    count = torch.zeros(B, Hs, Nq, dtype=torch.int32)
    for b in range(B):
        for h in range(Hs):
            for n in range(Nq):
                last = Tk - Tq + min((n + 1) * block, Tq) - 1
                most = min(k, last + 1)
                fewest = 0 if empty else 1
                held = int(torch.randint(fewest, most + 1, (), generator=generator))
                if empty and (b + h + n) % 5 == 0:
                    held = 0
                chosen = torch.randperm(last + 1, generator=generator)[:held].sort().values
                indices[b, h, n, :held], count[b, h, n] = chosen.int(), held
    return hostile(Support(indices.to(device), count.to(device), block))


def hostile(support: Support) -> Support:
    """The same Support with -1 and INT_MAX, in turn, in the slots that nobody may read."""
    poison = torch.full_like(support.indices, -1)
    poison[..., ::2] = INT_MAX
    return Support(torch.where(support.used(), support.indices, poison), support.count, support.block)


def poisoned(x: Tensor, selected: Tensor) -> Tensor:
    """x `[B, Hkv, Tk, D]` with NaN wherever `selected` (bool `[B, Hs, Tk]`) is False."""
    return x.masked_fill(~selected[..., None], float("nan"))


def ragged_scores(
    B: int, Hs: int, Tq: int, Tk: int, *, block: int, valid: Tensor | None = None, seed=0, levels=0
) -> Tensor:
    """float32 scores `[B, Hs, ceil(Tq / block), Tk]`, -inf beyond each block's last query and at padding.

    With `levels` the scores take only so many values, so that most of them tie.
    """
    Nq = -(-Tq // block)
    scores = torch.randn(B, Hs, Nq, Tk, generator=torch.Generator().manual_seed(seed))
    if levels:
        scores = (scores * levels / 2).round() / levels
    for n in range(Nq):
        scores[:, :, n, Tk - Tq + min((n + 1) * block, Tq) :] = float("-inf")
    return scores if valid is None else scores.masked_fill(~valid.cpu()[:, None, None], float("-inf"))


# Exact answers


def naive_attention_mass(
    q: Tensor, k: Tensor, *, scale: float, reduce_block: int = 1, reduce: str = "max", per_kv: bool = False,
    valid: Tensor | None = None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """Attention mass by definition, in `dtype`: `A = softmax(q k)`, `P = mean over heads`, then one row per block."""
    Hq, Hkv = q.shape[1], k.shape[1]
    sees = _sees(q.shape[0], q.shape[2], k.shape[2], valid, q.device)
    weights = _weights(q, k, scale, sees[:, None].expand(-1, Hq, -1, -1), dtype)  # [B, Hq, Tq, Tk]
    groups = [range(h * Hq // Hkv, (h + 1) * Hq // Hkv) for h in range(Hkv)] if per_kv else [range(Hq)]
    mass = torch.stack([sum(weights[:, h] for h in group) / len(group) for group in groups], 1)
    return _over_blocks(mass, sees[:, None], reduce_block, reduce, nothing=0.0)


def naive_index_scores(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, block: int = 1, reduce: str = "max",
    valid: Tensor | None = None, partition: Tensor | None = None, dtype=torch.float64, products: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Index scores by definition, in `dtype`: `z = sum_h w ReLU(q k / sqrt(Di))`, then one row per block.

    products: `products(a [B, M, D], b [B, N, D])` -> `a b^T` in place of torch's, such as `plain_products`.
    """
    z, sees = _index_scores_of_queries(qi, ki, w, valid, dtype, products)
    wide = z if dtype == torch.float64 else z.float()
    if reduce == "mean":
        z = _normalised(wide, sees)
    if reduce == "softmax_max":
        own = _log_sum_exp(wide, sees) if partition is None else partition.to(wide.dtype)
        z, reduce = wide - own[..., None], "max"
    return _over_blocks(z, sees, block, reduce, nothing=float("-inf"))


def naive_index_partition(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, valid: Tensor | None = None, dtype=torch.float64,
    products: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Every query's log-partition of its index scores by definition, in `dtype`."""
    z, sees = _index_scores_of_queries(qi, ki, w, valid, dtype, products)
    return _log_sum_exp(z if dtype == torch.float64 else z.float(), sees)


def _index_scores_of_queries(qi, ki, w, valid, dtype, products) -> tuple[Tensor, Tensor]:
    """`z [B, Tq, Tk]`, and who sees whom."""
    sees = _sees(qi.shape[0], qi.shape[2], ki.shape[1], valid, qi.device)
    z = torch.zeros(sees.shape, dtype=dtype, device=qi.device)  # [B, Tq, Tk]
    for h in range(qi.shape[1]):
        product = qi[:, h].to(dtype) @ ki.to(dtype).mT if products is None else products(qi[:, h], ki)
        product = product / qi.shape[-1] ** 0.5
        weight = 1.0 if w is None else w[:, :, h, None].to(dtype)
        z = z + weight * torch.where(product <= 0, 0.0, product)
    return z, sees


def naive_select_tokens(
    scores: Tensor, *, k: int, sink: int = 0, recent: int = 0, block: int = 1, queries: int | None = None,
    valid: Tensor | None = None,
) -> Support:  # fmt: skip
    """The top-k by sorting each row in Python, `(score, then smaller position)`, kept keys first."""
    scores = scores[:, None] if scores.ndim == 3 else scores
    B, Hs, Nq, Tk = scores.shape
    Tq = min(Nq * block, Tk) if queries is None else queries
    indices = torch.full((B, Hs, Nq, min(k, Tk)), -1, dtype=torch.int32)
    count = torch.zeros(B, Hs, Nq, dtype=torch.int32)
    for b in range(B):
        real = [s for s in range(Tk) if valid is None or bool(valid[b, s])]
        for h in range(Hs):
            for n in range(Nq):
                row = scores[b, h, n].tolist()
                positions = [Tk - Tq + t for t in range(n * block, min((n + 1) * block, Tq))]
                kept = {s for t in positions for s in range(t - recent + 1, t + 1)} | set(real[:sink])
                visible = [s for s in range(Tk) if row[s] > float("-inf") or (math.isnan(row[s]) and s in kept)]
                order = sorted(visible, key=lambda s: (s not in kept, -row[s] if s not in kept else 0.0, s))
                chosen = sorted(order[: min(k, Tk)])
                indices[b, h, n, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                count[b, h, n] = len(chosen)
    return Support(indices.to(scores.device), count.to(scores.device), block)


def naive_select_two_level(
    qi: Tensor, ki: Tensor, w: Tensor | None = None, *, k: int, candidates: int, key_block: int = 64, block: int = 1,
    reduce: str = "max", sink: int = 0, recent: int = 0, valid: Tensor | None = None, partition: Tensor | None = None,
    dtype=torch.float64,
) -> Support:  # fmt: skip
    """Two-level selection by definition, group by group and block by block: exact in float64 but for the rounding of the blocks'
    bounds to the input dtype. `valid` has its padding on one side."""
    B, Hi, Tq, Di = qi.shape
    Tk, group = ki.shape[1], max(block, 64)
    starts = range(0, Tk, key_block)
    touched = [(n + key_block - 2) // key_block + 1 for n in (max(sink, 1), group + max(recent, 1) - 1)]
    most = -(-candidates // key_block) + sum(touched)
    real = torch.ones(B, Tk, dtype=torch.bool) if valid is None else valid.cpu()
    scored = torch.full((B, -(-Tq // block), Tk), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for first in range(0, Tq, group):
            queries = [t for t in range(first, min(first + group, Tq)) if real[b, Tk - Tq + t]]
            ahead = Tk - Tq + min(first + group, Tq)
            begins = Tk - Tq + first
            sinks = real[b].nonzero()[: max(sink, 1), 0].tolist()
            ranked = {}
            for s in starts:
                keys = [i for i in range(s, min(s + key_block, Tk)) if real[b, i]]
                if s >= ahead or not keys:
                    continue
                if s + key_block > begins - max(recent, 1) + 1:
                    ranked[s] = (2, 0.0)
                elif set(keys) & set(sinks):
                    ranked[s] = (1, 0.0)
                elif queries:
                    rows = ki[b, keys].cpu()
                    mean = rows.double().mean(0)
                    high, low = (((mean + rows.double().amax(0)) / 2), ((mean + rows.double().amin(0)) / 2))
                    high, low = high.to(ki.dtype).to(dtype), low.to(ki.dtype).to(dtype)
                    score = torch.zeros(len(queries), dtype=dtype)
                    for h in range(Hi):
                        q = qi[b, h, queries].cpu().to(dtype)
                        z = (torch.where(q > 0, high, low) * q).sum(-1).clamp(min=0)
                        score += z if w is None else z * w[b, queries, h].cpu().to(dtype)
                    if partition is not None:
                        score -= partition[b, queries].cpu().to(dtype)
                    ranked[s] = (0, float(score.max()))
            best = sorted(ranked, key=lambda s: (-ranked[s][0], -ranked[s][1], s))[:most]
            keys = torch.tensor([i for s in sorted(best) for i in range(s, min(s + key_block, ahead))])
            seen = real.clone()
            seen[b, [i for i in range(Tk) if i not in set(keys.tolist())]] = False
            seen[b, begins:ahead] = real[b, begins:ahead]
            part = naive_index_scores(
                qi[b : b + 1, :, first : first + group], ki[b : b + 1, :ahead],
                None if w is None else w[b : b + 1, first : first + group], block=block, reduce=reduce,
                partition=None if partition is None else partition[b : b + 1, first : first + group],
                valid=seen[b : b + 1, :ahead].to(qi.device), dtype=dtype,
            )  # fmt: skip
            scored[b, first // block : first // block + part.shape[1], :ahead] = part[0].double().cpu()
    return naive_select_tokens(
        scored.to(qi.device), k=k, sink=sink, recent=recent, block=block, queries=Tq, valid=valid
    )


def naive_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, dtype=torch.float64
) -> Tensor:
    """Dense attention in `dtype` under the mask that support and causality leave; zeros where they leave nothing."""
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    Hs = support.indices.shape[1]
    allowed = torch.zeros(B, Hq, Tq, Tk, dtype=torch.bool)
    for b in range(B):
        for h in range(Hq):
            row = 0 if Hs == 1 else h * Hkv // Hq
            for t in range(Tq):
                held = int(support.count[b, row, t // support.block])
                for s in support.indices[b, row, t // support.block, :held].tolist():
                    allowed[b, h, t, s] = s <= Tk - Tq + t
    allowed = allowed.to(q.device)
    selected = allowed.any(2).unflatten(1, (Hkv, -1)).any(2)[..., None]  # what nobody selects may hold anything
    k, v = k.where(selected, 0.0), v.where(selected, 0.0)
    weights = _weights(q, k, scale, allowed, dtype)
    return (weights.to(dtype) @ v.to(dtype).repeat_interleave(Hq // Hkv, 1)).to(dtype)


def naive_sparse_attention_with_tail(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, valid: Tensor | None = None, dtype=torch.float64
) -> Tensor:
    """Sparse attention and its tail by definition, in `dtype`, query by query."""
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    Hs = support.indices.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = torch.zeros(B, Hq, Tq, v.shape[-1], dtype=dtype, device=q.device)
    for b in range(B):
        for h in range(Hq):
            group, row = h * Hkv // Hq, (0 if Hs == 1 else h * Hkv // Hq)
            for t in range(Tq):
                held = int(support.count[b, row, t // support.block])
                chosen = support.indices[b, row, t // support.block, :held].tolist()
                first = Tk - Tq + t // support.block * support.block
                before = [s for s in range(first + 1) if valid is None or bool(valid[b, s])]
                left = len(before) - sum(s <= first for s in chosen)
                keys = [k[b, group, s] for s in chosen if s <= Tk - Tq + t]
                values = [v[b, group, s] for s in chosen if s <= Tk - Tq + t]
                scores = [(q[b, h, t] * key).sum() * scale for key in keys]
                if held and left > 0:
                    mean = k[b, group, before].mean(0)
                    scores.append((q[b, h, t] * mean).sum() * scale + math.log(left))
                    values.append(v[b, group, before].mean(0))
                if scores:
                    out[b, h, t] = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
    return out


def _sees(B: int, Tq: int, Tk: int, valid: Tensor | None, device) -> Tensor:
    """Bool `[B, Tq, Tk]`: query t, at position Tk - Tq + t, sees key s; padding sees nothing and is not seen."""
    sees = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq).expand(B, -1, -1)
    return sees if valid is None else sees & valid[:, None] & valid[:, Tk - Tq :, None]


def _weights(q: Tensor, k: Tensor, scale: float, sees: Tensor, dtype) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(dtype) @ k.to(dtype).mT * scale  # [B, Hq, Tq, Tk]
    return _normalised(scores if dtype == torch.float64 else scores.float(), sees)


def _normalised(scores: Tensor, sees: Tensor) -> Tensor:
    """Softmax over the keys that are seen; a row that sees nothing is zero."""
    highest = scores.masked_fill(~sees, -1e30).amax(-1, keepdim=True)
    shares = torch.where(sees, (scores - highest).exp(), 0.0)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)


def _log_sum_exp(scores: Tensor, sees: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials over the keys that are seen; -inf where none is."""
    highest = scores.masked_fill(~sees, -1e30).amax(-1, keepdim=True)
    return torch.where(sees, (scores - highest).exp(), 0.0).sum(-1).log() + highest[..., 0]


def _over_blocks(rows: Tensor, sees: Tensor, block: int, reduce: str, nothing: float) -> Tensor:
    """One row per block of queries (dimension -2); `nothing` where no query of the block sees the key."""
    out = []
    for first in range(0, rows.shape[-2], block):
        part, seen = rows[..., first : first + block, :], sees[..., first : first + block, :]
        if reduce == "max":
            row = part.masked_fill(~seen, float("-inf")).amax(-2)
        else:
            live = seen.any(-1, keepdim=True).sum(-2).clamp(min=1)  # queries that see anything at all
            row = part.masked_fill(~seen, 0.0).sum(-2) / live
        out.append(row.masked_fill(~seen.any(-2), nothing))
    return torch.stack(out, -2)


# Accuracy


def plain_products(a: Tensor, b: Tensor) -> Tensor:
    """`a [B, M, D] @ b [B, N, D]^T` in fp32 `[B, M, N]`, added as the plainest kernel of the device adds.

    fp32: one accumulator, a rounding after each of the D terms, as fused multiply-adds do; libraries add in trees and are two to
    three times as accurate. fp16 and bf16 on CUDA: the tensor cores' own product, which cuts off where IEEE arithmetic rounds.
    Both measured against float64 on an H200: no kernel of full precision is asked to beat them, one of lower precision (tf32,
    half-precision sums) is a thousand times off.
    """
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    total = torch.zeros(*a.shape[:2], b.shape[1], device=a.device)
    for left, right in zip(a.double().unbind(-1), b.double().unbind(-1)):
        total = (total.double() + left[:, :, None] * right[:, None]).float()
    return total


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of `actual - exact` in float64; equal infinities count as no error, NaN as infinite error."""
    actual, exact = actual.double().cpu(), exact.double().cpu()
    if actual.shape != exact.shape:
        raise ValueError(f"actual must have shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    error = torch.where(actual == exact, 0.0, actual - exact).nan_to_num(nan=float("inf"))
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def assert_accurate(actual: Tensor, exact: Tensor, *yardsticks: Tensor, factor: float = 2.0) -> None:
    """Asserts that the RMS error of `actual` is at most `factor` times that of the yardsticks' worst, all against `exact`.

    A yardstick is another computation in the same dtype: the reference for a kernel, a naive one for the reference, and where
    the order of additions decides (a GPU), one by `plain_products`. Nobody is asked to do better than `exact` rounded once to
    actual's dtype.
    """
    error, theirs = rms_error(actual, exact), max(rms_error(yardstick, exact) for yardstick in yardsticks)
    rounding = rms_error(exact.to(actual.dtype), exact)
    limit = factor * max(theirs, rounding)
    assert error <= limit, (
        f"RMS error must be at most {limit:.3e} ({factor} x {theirs:.3e} of the yardstick or {rounding:.3e} "
        f"of rounding), got {error:.3e}"
    )


def over_seeds(compute: Callable, device: str, factor: float = 2.0) -> None:
    """`assert_accurate` of what `compute(seed)` gives, `(actual, exact, *yardsticks)`, over eight seeds together on CUDA.

    An RMS of a few dozen numbers is noise, and so is one of many numbers that share one softmax: the same correct kernel was
    between 0.6 and 4.6 times its yardstick by seed. A CPU's order of additions is the same for both sides; one seed does there.
    """
    found = [compute(seed) for seed in range(8 if device == "cuda" else 1)]
    assert_accurate(*(torch.cat([x.flatten() for x in each]) for each in zip(*found)), factor=factor)


# Tiny models


def tiny_model(name: str, *, seed: int = 0, dtype=torch.float32, **changes):
    """A randomly initialised model of a supported architecture, in eval mode; the same weights for the same seed.

    Small enough for a test, with at least two full-attention layers, and with weights large enough for attention to be
    peaked: with the usual small ones a wrong mask hardly shows.

    Args:
        name: one of TINY_MODELS.
        changes: fields of the text config to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TINY_MODELS[name](changes).to(dtype).eval()


_COMMON = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
_HYBRID = _COMMON | dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, head_dim=32, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_MROPE = _ROPE | {"mrope_section": [3, 3, 2]}


def _llama(changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON | changes))


def _qwen2(changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_COMMON | changes))


def _qwen3(changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_COMMON | {"head_dim": 16} | changes))


def _qwen3_next(changes):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_HYBRID | experts | {"rope_parameters": dict(_ROPE)} | changes))


def _qwen3_5(changes):
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_HYBRID | {"rope_parameters": dict(_MROPE)} | changes))


def _qwen3_5_wrapper(changes):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64, num_position_embeddings=16
    )
    text = _HYBRID | {"rope_parameters": dict(_MROPE)} | changes
    tokens = dict(image_token_id=96, video_token_id=97, vision_start_token_id=98, vision_end_token_id=99)
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **tokens))


def _gemma3(changes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    geometry = dict(num_hidden_layers=4, layer_types=kinds, num_key_value_heads=1, head_dim=16, sliding_window=16)
    return Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON | geometry | {"query_pre_attn_scalar": 16} | changes))


TINY_MODELS: dict[str, Callable] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_wrapper": _qwen3_5_wrapper,
    "gemma3": _gemma3,
}


def tiny_tokenizer(lines: list[str], *, size: int = 600, special: tuple[str, ...] = ("<bos>",), begins: bool = True, **roles):
    """A byte-level BPE of `size` tokens, trained on a few lines.

    `special`: tokens of their own. `begins`: the first of them stands before raw text, as with Gemma and Llama. `roles`: what
    `PreTrainedTokenizerFast` takes, for example `eos_token="<bos>"`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    if begins:
        first = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
