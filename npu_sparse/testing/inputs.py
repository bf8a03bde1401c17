"""Inputs of operators: normal, whole, padded, strided and hostile."""

import torch
from torch import Tensor

from ..support import Support

INT_MAX = torch.iinfo(torch.int32).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
