"""Keys and values are read out of pages as they were written, whatever the pages' order, and whatever else lies in them."""

import pytest
import torch

from npu_sparse.integrations.vllm.pages import read_keys, read_kv, write_keys

HKV, D, SIZE, BLOCKS = 2, 8, 4, 9


def written(backend: str, length: int, physical: str):
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
            if backend == "CPU_ATTN":  # keys [D, tokens], then values [tokens, D], in one page of a head
                flat = page[h].view(-1)
                flat[: SIZE * D].view(D, SIZE)[:, slot] = k[h, t]
                flat[SIZE * D :].view(SIZE, D)[slot] = v[h, t]
            else:
                page[h, slot, :D], page[h, slot, D:] = k[h, t], v[h, t]
    return pages, table, k[None], v[None]


@pytest.mark.parametrize("length", [1, SIZE, SIZE + 1, 5 * SIZE - 1])
@pytest.mark.parametrize(
    "backend, physical",
    [
        ("CPU_ATTN", "heads first"),
        ("FLASH_ATTN", "heads first"),
        ("FLASH_ATTN", "tokens first"),
        ("TRITON_ATTN", "tokens first"),
    ],
)
def test_keys_and_values_of_a_request(backend, physical, length):
    pages, table, k, v = written(backend, length, physical)
    got_k, got_v = read_kv(backend, pages, table, length)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_a_token_first_cache_is_copied_once():
    """What is read are views of one gathered tensor, not a copy of it for each head order."""
    pages, table, _, _ = written("FLASH_ATTN", 10, "tokens first")
    k, v = read_kv("FLASH_ATTN", pages, table, 10)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.stride(-1) == v.stride(-1) == 1


def test_index_keys_come_back_and_padding_goes_to_the_null_page():
    pages = torch.full((6, SIZE, 3), float("nan"), dtype=torch.float64)
    keys = torch.randn(7, 3)
    table = torch.tensor([4, 2, 0], dtype=torch.int32)
    slots = torch.tensor([16, 17, 18, 19, 8, -1, -1])  # page 4, then page 2; the last two are padding
    write_keys(pages, keys, slots)
    assert torch.equal(read_keys(pages, table, 5), keys[None, :5].double())
    others = [page for page in range(6) if page not in (0, 2, 4)]
    assert pages[others].isnan().all() and pages[2, 1:].isnan().all(), "padding wrote to no page but the null page"


def test_slots_may_be_fewer_than_padded_tokens():
    pages = torch.zeros(3, SIZE, 2)
    write_keys(pages, torch.ones(5, 2), torch.tensor([4, 5]))
    assert pages[1, :2].eq(1).all() and pages.sum() == 4
