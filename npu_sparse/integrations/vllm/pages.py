"""Keys and values of one request out of the pages of an attention backend's KV cache, and index keys out of theirs."""

import torch
from torch import Tensor

from . import ascend


def read_kv(backend: str, kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`(k, v)`, `[1, Hkv, length, D]` each.

    backend: its name; kv_cache: `[pages, Hkv, tokens, 2 D]` as vLLM shapes it, in whatever order it lies in memory; blocks: the
    request's row of the block table. Of vLLM-Ascend kv_cache is two tensors, see `ascend.read_kv`.
    """
    if backend == ascend.NAME:
        return ascend.read_kv(kv_cache, blocks, length)
    return _READERS[backend](kv_cache, blocks[: -(-length // kv_cache.shape[2])].long(), length)


def _packed(kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """FLASH_ATTN and TRITON_ATTN: keys and values of a token side by side."""
    _, Hkv, _, D2 = kv_cache.shape
    rows = kv_cache.transpose(1, 2).index_select(0, blocks)  # [n, tokens, Hkv, 2 D]: one copy, also of pages that lie this way
    k, v = rows.view(-1, Hkv, D2)[:length].transpose(0, 1)[None].split(D2 // 2, -1)
    return k, v


def _cpu(kv_cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """CPU_ATTN with "vec" pages: the first half of a head's page holds keys as `[D, tokens]`, the second values `[tokens, D]`."""
    _, Hkv, size, D2 = kv_cache.shape
    D = D2 // 2
    k, v = kv_cache.index_select(0, blocks).reshape(-1, Hkv, 2, size * D).unbind(2)
    k = k.unflatten(-1, (D, size)).permute(1, 0, 3, 2).reshape(Hkv, -1, D)
    v = v.unflatten(-1, (size, D)).transpose(0, 1).reshape(Hkv, -1, D)
    return k[None, :, :length], v[None, :, :length]


_READERS = {"CPU_ATTN": _cpu, "FLASH_ATTN": _packed, "TRITON_ATTN": _packed}


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
