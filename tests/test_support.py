import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import Support
from npu_sparse.support import block_ends, concatenate
from npu_sparse.testing import INT_MAX, hostile, random_support


def support(rows, count=None, block=1):
    indices = torch.tensor(rows, dtype=torch.int32)[None, None]
    count = [len(row) for row in rows] if count is None else count
    return Support(indices, torch.tensor(count, dtype=torch.int32)[None, None], block)


SHAPES = st.fixed_dictionaries({
    "B": st.integers(1, 2), "Hs": st.integers(1, 2), "Tq": st.integers(1, 9), "Tk": st.integers(9, 15),
    "k": st.integers(1, 15), "block": st.sampled_from([1, 2, 3, 8, 16]), "seed": st.integers(0, 9),
    "empty": st.booleans(),
})  # fmt: skip


@given(shape=SHAPES)
def test_hostile_slots_are_accepted_and_never_members(shape):
    made = random_support(**shape)
    assert made.check(shape["Tq"], shape["Tk"]) is made
    mask = made.member_mask(shape["Tk"])
    assert torch.equal(mask.sum(-1, dtype=torch.int32), made.count)
    for b, h, n in torch.ones_like(made.count).nonzero().tolist():
        held = made.indices[b, h, n, : made.count[b, h, n]].long()
        assert bool(mask[b, h, n, held].all())


@given(shape=SHAPES)
def test_a_used_entry_beyond_its_block_is_refused(shape):
    made = random_support(**shape)
    b, h, n = 0, 0, made.count.shape[2] - 1
    made.count[b, h, n] = 1
    made.indices[b, h, n, 0] = shape["Tk"]
    with pytest.raises(ValueError, match="beyond the last query of their block"):
        made.check(shape["Tq"], shape["Tk"])


@given(shape=SHAPES, cut=st.integers(1, 8))
def test_concatenated_parts_have_the_rows_of_the_whole(shape, cut):
    whole = random_support(**shape)
    rows = whole.count.shape[2]
    cut = min(cut, rows)
    width = max(1, int(whole.count[:, :, :cut].max()))
    parts = [
        Support(whole.indices[:, :, :cut, :width], whole.count[:, :, :cut], whole.block),
        Support(whole.indices[:, :, cut:], whole.count[:, :, cut:], whole.block),
    ]
    joined = concatenate(parts if cut < rows else parts[:1]).check(shape["Tq"], shape["Tk"])
    assert torch.equal(joined.count, whole.count)
    assert torch.equal(joined.member_mask(shape["Tk"]), whole.member_mask(shape["Tk"]))
    assert joined.block == whole.block


@pytest.mark.parametrize(
    "made, message",
    [
        (support([[0], [1]]), "indices must have Nq = 3 rows for 3 queries, got 2"),
        (support([[0], [1], [2]], count=[1, 2, 1]), r"count must lie in \[0, 1\], got 1..2"),
        (support([[0], [1], [2]], count=[1, -1, 1]), r"count must lie in \[0, 1\], got -1..1"),
        (support([[0], [-1], [2]]), "indices must be >= 0, got -1"),
        (support([[0], [2], [2]]), "must not lie beyond the last query"),
        (support([[0], [1], [INT_MAX]]), "must not lie beyond the last query"),
        (support([[0, 9], [1, 0], [2, 9]], count=[1, 2, 1]), "must ascend strictly"),
        (support([[0, 9], [0, 0], [2, 9]], count=[1, 2, 1]), r"must ascend strictly \(no duplicates\)"),
    ],
)
def test_a_broken_rule_is_named(made, message):
    with pytest.raises(ValueError, match=message):
        made.check(3, 3)


def test_queries_are_the_last_of_the_keys():
    support([[5], [6]]).check(2, 7)
    with pytest.raises(ValueError, match="beyond the last query"):
        support([[5], [6]]).check(2, 6)


def test_what_lies_beyond_count_is_not_checked():
    hostile(support([[0, 0, 0], [0, 1, 0], [0, 1, 2]], count=[1, 2, 3])).check(3, 3)


@pytest.mark.parametrize("queries, keys, block, ends", [
    (1, 1, 1, [0]), (5, 5, 2, [1, 3, 4]), (5, 9, 2, [5, 7, 8]), (3, 9, 64, [8]), (4, 4, 4, [3]),
])  # fmt: skip
def test_block_ends(queries, keys, block, ends):
    assert block_ends(queries, keys, block).tolist() == ends


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2).int()), TypeError, "indices must be int32, got torch.float32"),
        (
            (torch.zeros(1, 1, 2, 3).int(), torch.zeros(1, 1, 2).long()),
            TypeError,
            "count must be int32, got torch.int64",
        ),
        ((torch.zeros(1, 2, 3).int(), torch.zeros(1, 2).int()), ValueError, "indices must have 4 dimensions"),
        ((torch.zeros(1, 1, 2, 3).int(), torch.zeros(1, 1, 3).int()), ValueError, r"count must have shape \(1, 1, 2\)"),
        (
            (torch.zeros(1, 1, 2, 3).int(), torch.zeros(1, 1, 2).int(), 0),
            ValueError,
            "block must be a positive integer, got 0",
        ),
        ((torch.zeros(1, 1, 2, 3).int(), torch.zeros(1, 1, 2).int(), 1.0), ValueError, "block must be .* got 1.0"),
    ],
)
def test_a_malformed_support_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Support(*arguments)
