"""Checks of operators' inputs. Each raises TypeError or ValueError with the rule and the value that breaks it."""

import torch
from torch import Tensor

from ..budget import REDUCTIONS
from ..support import Support

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor, shape: tuple, dtypes: tuple, device=None) -> None:
    """Raises TypeError or ValueError unless `tensor` has this shape (None = any), one of the dtypes and the device."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in dtypes and (device is None or tensor.device == device):
        sizes = tensor.shape
        if len(sizes) == len(shape):
            for want, got in zip(shape, sizes):
                if want is not None and want != got:
                    break
            else:
                return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if tensor.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {tensor.device}")


def check_heads(Hq: int, Hkv: int) -> None:
    if Hkv < 1 or Hq % Hkv:
        raise ValueError(f"query heads must be a multiple of KV heads, got {Hq} and {Hkv}")


def check_lengths(Tq: int, Tk: int) -> None:
    if Tq < 1 or Tk < Tq:
        raise ValueError(f"queries must be the last Tq of Tk keys with 1 <= Tq <= Tk, got Tq = {Tq}, Tk = {Tk}")


def check_valid(valid: Tensor | None, B: int, Tk: int, device) -> None:
    if valid is not None:
        check_tensor("valid", valid, (B, Tk), (torch.bool,), device)


def check_counts(k: int, sink: int, recent: int, block: int, Tk: int) -> None:
    for name, value, least in (("k", k, 1), ("sink", sink, 0), ("recent", recent, 0), ("block", block, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    kept = sink + (recent + block - 1 if recent else 0)
    if k < min(kept, Tk):
        raise ValueError(
            f"k must hold the keys that are always kept (sink {sink} + recent {recent} of every query of a block of {block} = "
            f"{kept}), got {k}"
        )


def check_attention(q: Tensor, k: Tensor, v: Tensor, support: Support) -> None:
    """Raises TypeError or ValueError where inputs of attention over a support break a rule."""
    check_tensor("q", q, (None, None, None, None), FLOATS)
    B, Hq, Tq, D = q.shape
    check_tensor("k", k, (B, None, None, D), (q.dtype,), q.device)
    Hkv, Tk = k.shape[1], k.shape[2]
    check_tensor("v", v, (B, Hkv, Tk, None), (q.dtype,), q.device)
    check_heads(Hq, Hkv)
    check_lengths(Tq, Tk)
    if not isinstance(support, Support):
        raise TypeError(f"support must be a Support, got {type(support).__name__}")
    Nq = -(-Tq // support.block)
    check_tensor("support.indices", support.indices, (B, None, Nq, None), (torch.int32,), q.device)
    if support.indices.shape[1] not in (1, Hkv):
        raise ValueError(f"support must have 1 or Hkv = {Hkv} heads, got {support.indices.shape[1]}")


def check_scoring(qi, ki, w, block, reduce, valid, partition):
    """Raises TypeError or ValueError where the inputs of index scores break a rule."""
    check_tensor("qi", qi, (None, None, None, None), FLOATS)
    B, Hi, Tq, Di = qi.shape
    check_tensor("ki", ki, (B, None, Di), (qi.dtype,), qi.device)
    check_lengths(Tq, ki.shape[1])
    if w is not None:
        check_tensor("w", w, (B, Tq, Hi), (qi.dtype,), qi.device)
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    check_valid(valid, B, ki.shape[1], qi.device)
    if partition is not None:
        if reduce != "softmax_max":
            raise ValueError(f"partition must be None unless reduce is softmax_max, got a tensor for {reduce}")
        check_tensor("partition", partition, (B, Tq), (torch.float32,), qi.device)
