"""Keys and values are read out of pages as they were written, whatever the pages' order, and whatever else lies in them."""

import pytest
import torch

from npu_sparse.integrations.vllm.pages import read_keys, read_kv, write_keys

HKV, D, SIZE, BLOCKS = 2, 32, 32, 9


def places(isa: str, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a CPU's half of a page for keys, and its half for values, has the D channels of a token."""
    d = torch.arange(D)
    if isa == "amx":
        return t // 16 * 16 * D + d // 2 * 32 + t % 16 * 2 + d % 2, d // 16 * 16 * SIZE + t // 2 * 32 + d % 16 * 2 + t % 2
    return d * SIZE + t, t * D + d


def written(backend: str, length: int, physical: str, isa: str | None = None):
    """Pages that hold `length` tokens in blocks 5, 2, 7, ..., NaN elsewhere; and what they hold."""
    k, v = torch.randn(2, HKV, length, D).unbind(0)
    table = torch.tensor([5, 2, 7, 1, 8, 0, 0], dtype=torch.int32)
    if physical == "tokens first":
        pages = torch.full((BLOCKS, SIZE, HKV, 2 * D), float("nan")).transpose(1, 2)
    else:
        pages = torch.full((BLOCKS, HKV, SIZE, 2 * D), float("nan"))
    for t in range(length):
        page, slot = pages[table[t // SIZE]], t % SIZE
        for h in range(HKV):
            if backend == "CPU_ATTN":  # keys, then values, in one page of a head
                for half, row, at in zip(page[h].view(2, -1), (k[h, t], v[h, t]), places(isa, slot)):
                    half[at] = row
            else:
                page[h, slot, :D], page[h, slot, D:] = k[h, t], v[h, t]
    return pages, table, k[None], v[None]


@pytest.mark.parametrize("length", [1, SIZE, SIZE + 1, 5 * SIZE - 1])
@pytest.mark.parametrize(
    "backend, physical, isa",
    [
        ("CPU_ATTN", "heads first", "vec"),
        ("CPU_ATTN", "heads first", "vec16"),
        ("CPU_ATTN", "heads first", "amx"),
        ("FLASH_ATTN", "heads first", None),
        ("FLASH_ATTN", "tokens first", None),
        ("TRITON_ATTN", "tokens first", None),
    ],
)
def test_keys_and_values_of_a_request(backend, physical, isa, length):
    pages, table, k, v = written(backend, length, physical, isa)
    got_k, got_v = read_kv(backend, pages, table, length, isa)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_a_token_first_cache_is_copied_once():
    """What is read are views of one gathered tensor, not a copy of it for each head order."""
    pages, table, _, _ = written("FLASH_ATTN", 10, "tokens first")
    k, v = read_kv("FLASH_ATTN", pages, table, 10)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.stride(-1) == v.stride(-1) == 1


def test_index_keys_come_back_and_padding_goes_to_the_null_page():
    pages = torch.full((6, 4, 3), float("nan"), dtype=torch.float64)
    keys = torch.randn(7, 3)
    table = torch.tensor([4, 2, 0], dtype=torch.int32)
    slots = torch.tensor([16, 17, 18, 19, 8, -1, -1])  # page 4, then page 2; the last two are padding
    write_keys(pages, keys, slots)
    assert torch.equal(read_keys(pages, table, 5), keys[None, :5].double())
    others = [page for page in range(6) if page not in (0, 2, 4)]
    assert pages[others].isnan().all() and pages[2, 1:].isnan().all(), "padding wrote to no page but the null page"


def test_slots_may_be_fewer_than_padded_tokens():
    pages = torch.zeros(3, 4, 2)
    write_keys(pages, torch.ones(5, 2), torch.tensor([4, 5]))
    assert pages[1, :2].eq(1).all() and pages.sum() == 4


@pytest.mark.vllm
@pytest.mark.parametrize(
    "isa, head_dim, tokens",
    [
        ("vec", 32, 32), ("vec", 128, 64), ("vec16", 80, 32), ("vec16", 64, 48), ("amx", 32, 32), ("amx", 64, 128),
        ("amx", 128, 96),
    ],
)  # fmt: skip
def test_pages_are_read_as_vllm_writes_them(vllm, isa, head_dim, tokens):
    from vllm import _custom_ops

    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    k, v = torch.randn(2, tokens + 3, HKV, head_dim, dtype=torch.bfloat16).unbind(0)
    pages = torch.zeros(4, HKV, tokens, 2 * head_dim, dtype=torch.bfloat16)
    halves = pages.view(4, HKV, 2 * tokens, head_dim).chunk(2, dim=2)
    table = torch.tensor([2, 1], dtype=torch.int32)
    at = torch.arange(tokens + 3)
    slots = table[at // tokens].long() * tokens + at % tokens
    _custom_ops.cpu_attn_reshape_and_cache(k, v, *halves, slots, isa)
    got_k, got_v = read_kv("CPU_ATTN", pages, table, tokens + 3, isa)
    assert torch.equal(got_k[0], k.transpose(0, 1)) and torch.equal(got_v[0], v.transpose(0, 1))
