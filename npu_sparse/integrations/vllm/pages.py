"""Keys and values of one request out of the pages of an attention backend's KV cache, and index keys out of theirs."""

import torch
from torch import Tensor

from . import ascend

TILE = 16  # tokens of keys, or channels of values, that lie together in pages for AMX


def read_kv(backend: str, kv_cache: Tensor, blocks: Tensor, length: int, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """`(k, v)`, `[1, Hkv, length, D]` each.

    backend: its name; kv_cache: `[pages, Hkv, tokens, 2 D]` as vLLM shapes it, in whatever order it lies in memory; blocks: the
    request's row of the block table; isa: on a CPU, what its pages are laid out for, one of INSTRUCTION_SETS. Of vLLM-Ascend
    kv_cache is two tensors, see `ascend.read_kv`.
    """
    if backend == ascend.NAME:
        return ascend.read_kv(kv_cache, blocks, length)
    blocks = blocks[: -(-length // kv_cache.shape[2])].long()
    return _cpu(kv_cache, blocks, length, isa) if backend == "CPU_ATTN" else _packed(kv_cache, blocks, length)


def _packed(kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """FLASH_ATTN and TRITON_ATTN: keys and values of a token side by side."""
    _, Hkv, _, D2 = kv_cache.shape
    rows = kv_cache.transpose(1, 2).index_select(0, blocks)  # [n, tokens, Hkv, 2 D]: one copy, also of pages that lie this way
    k, v = rows.view(-1, Hkv, D2)[:length].transpose(0, 1)[None].split(D2 // 2, -1)
    return k, v


def _cpu(kv_cache: Tensor, blocks: Tensor, length: int, isa: str) -> tuple[Tensor, Tensor]:
    """CPU_ATTN: the first half of a head's page holds keys, the second values, each in an order of its own."""
    _, Hkv, size, D2 = kv_cache.shape
    halves = kv_cache.index_select(0, blocks).reshape(-1, Hkv, 2, size * D2 // 2)
    k, v = INSTRUCTION_SETS[isa](*halves.unbind(2), size, D2 // 2)  # [pages, Hkv, tokens, D] each
    k, v = (one.transpose(0, 1).reshape(Hkv, -1, D2 // 2) for one in (k, v))
    return k[None, :, :length], v[None, :, :length]


def _vec(k: Tensor, v: Tensor, size: int, D: int) -> tuple[Tensor, Tensor]:
    """Keys as `[D, tokens]`, values as `[tokens, D]`."""
    return k.unflatten(-1, (D, size)).transpose(-1, -2), v.unflatten(-1, (size, D))


def _amx(k: Tensor, v: Tensor, size: int, D: int) -> tuple[Tensor, Tensor]:
    """Pairs of what a product sums over lie together: keys as `[tokens / 16, D / 2, 16, 2]`, values as
    `[D / 16, tokens / 2, 16, 2]`."""
    k = k.unflatten(-1, (size // TILE, D // 2, TILE, 2)).permute(0, 1, 2, 4, 3, 5).reshape(*k.shape[:2], size, D)
    v = v.unflatten(-1, (D // TILE, size // 2, TILE, 2)).permute(0, 1, 3, 5, 2, 4).reshape(*v.shape[:2], size, D)
    return k, v


INSTRUCTION_SETS = {"vec": _vec, "vec16": _vec, "amx": _amx}  # of a CPU, as vLLM names them: how pages are read


def read_keys(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Index keys `[1, length, Di]` of one request; pages: `[pages, tokens, Di]`."""
    used = blocks[: -(-length // pages.shape[1])].long()
    return pages.index_select(0, used).flatten(0, 1)[None, :length]


def write_keys(pages: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes index keys `[T, Di]` of a batch to its slots; tokens without a slot (-1, or after the last) are padding.

    Padding goes to page 0, which vLLM keeps as its null page, so that shapes stay those of a captured graph.
    """
    tokens = min(len(keys), len(slots))
    slots, size = slots[:tokens].clamp(min=0).long(), pages.shape[1]
    pages[torch.div(slots, size, rounding_mode="floor"), slots % size] = keys[:tokens].to(pages.dtype)
