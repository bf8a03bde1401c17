from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import ops
from npu_sparse.testing import naive_select_tokens, padding, ragged_scores


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hs: int = 1
    Tq: int = 37
    Tk: int = 37
    k: int = 8
    sink: int = 0
    recent: int = 0
    block: int = 1
    side: str | None = None
    levels: int = 0
    seed: int = 0

    def inputs(self, device="cpu"):
        valid = padding(self.B, self.Tk, self.side, device=device) if self.side else None
        scores = ragged_scores(
            self.B, self.Hs, self.Tq, self.Tk, block=self.block, valid=valid, seed=self.seed, levels=self.levels
        )
        kept = self.sink + (self.recent + self.block - 1 if self.recent else 0)
        k = max(self.k, kept)  # a budget always holds what is always kept
        return scores.to(device), dict(
            k=k, sink=self.sink, recent=self.recent, block=self.block, queries=self.Tq, valid=valid
        )


CASES = [
    Case(Tq=1, Tk=1, k=1),
    Case(Tq=1, Tk=1, k=8, sink=2, recent=2),
    Case(),
    Case(B=2, Hs=3, levels=2),
    Case(levels=1, k=5, block=16),
    Case(Tq=17, Tk=17, block=16, k=20),
    Case(Tq=17, Tk=53, block=16, k=24, sink=3, recent=4, levels=2),
    Case(sink=4, recent=4, k=8),
    Case(sink=8, k=8),
    Case(recent=8, k=8, B=2, Hs=2),
    Case(k=64),
    Case(side="left", B=3, sink=3, recent=2, levels=2),
    Case(side="right", B=3, sink=3, recent=2, block=8, k=16),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hs=st.integers(1, 2), Tq=st.integers(1, 9), Tk=st.integers(9, 17), k=st.integers(1, 20),
    sink=st.integers(0, 3), recent=st.integers(0, 3), block=st.sampled_from([1, 2, 3, 4, 8]),
    side=st.sampled_from([None, "left", "right"]), levels=st.sampled_from([0, 1, 2]), seed=st.integers(0, 9),
)  # fmt: skip


def check(case, impl="reference", device="cpu"):
    scores, options = case.inputs(device)
    support = ops.select_tokens(scores, impl=impl, **options).check(case.Tq, case.Tk)
    expected = naive_select_tokens(scores, **options)
    assert support.width == min(options["k"], case.Tk)
    assert torch.equal(support.count, expected.count)
    used = expected.used()
    assert torch.equal(support.indices[used], expected.indices[used])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_support_is_the_sorted_top_k(backend, case):
    check(case, backend.impl, backend.device)


@given(case=SHAPES)
def test_support_is_the_sorted_top_k_for_any_shape(case):
    check(case)


def test_ties_go_to_the_smaller_position(backend):
    scores = torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 1.0]]], device=backend.device)
    support = ops.select_tokens(scores, k=4, queries=1, impl=backend.impl)
    assert support.indices.flatten().tolist() == [0, 1, 2, 3]


def test_all_equal_scores_select_the_first_keys(backend):
    scores = torch.zeros(1, 1, 5000, device=backend.device)
    support = ops.select_tokens(scores, k=700, queries=1, impl=backend.impl)
    assert torch.equal(support.indices.flatten().cpu(), torch.arange(700).int())


def test_a_row_with_fewer_visible_keys_gets_all_of_them(backend):
    scores = torch.full((1, 3, 8), float("-inf"), device=backend.device)
    scores[0, 1, 5] = scores[0, 2, [0, 4, 6]] = -1e30
    support = ops.select_tokens(scores, k=4, queries=3, impl=backend.impl)
    assert support.count.flatten().tolist() == [0, 1, 3]
    assert support.indices[0, 0, 1, :1].tolist() == [5]
    assert support.indices[0, 0, 2, :3].tolist() == [0, 4, 6]


def test_sinks_are_the_first_valid_keys(backend):
    valid = padding(2, 12, "left", device=backend.device)
    scores = ragged_scores(2, 1, 1, 12, block=1, valid=valid).to(backend.device)
    support = ops.select_tokens(scores, k=3, sink=3, queries=1, valid=valid, impl=backend.impl)
    first = valid.int().argmax(-1)
    assert torch.equal(support.indices[:, 0, 0].long(), first[:, None] + torch.arange(3, device=backend.device))


@pytest.mark.parametrize("recent", [1, 3])
def test_recent_keys_of_every_query_of_the_block_are_kept(backend, recent):
    scores = ragged_scores(1, 1, 11, 20, block=4).to(backend.device)
    scores[..., 9:].clamp_(max=-100.0)  # the recent keys are the worst
    support = ops.select_tokens(scores, k=recent + 3 + 2, recent=recent, block=4, queries=11, impl=backend.impl)
    member = support.member_mask(20)[0, 0].cpu()
    for t in range(11):
        assert bool(member[t // 4, 9 + t - recent + 1 : 9 + t + 1].all())
    assert member.sum(-1).tolist() == [recent + 5] * 3


def test_kept_keys_never_come_from_the_future_or_the_padding(backend):
    valid = torch.arange(20, device=backend.device)[None] >= 17
    scores = ragged_scores(1, 1, 20, 20, block=1, valid=valid).to(backend.device)
    support = ops.select_tokens(scores, k=8, sink=4, recent=4, queries=20, valid=valid, impl=backend.impl)
    assert support.count.flatten().tolist() == [0] * 17 + [1, 2, 3]
    support.check(20, 20)


def test_a_budget_too_small_for_what_is_always_kept_is_refused():
    with pytest.raises(ValueError, match=r"k must hold .*sink 2 \+ recent 3 .* block of 4 = 8\), got 7"):
        ops.select_tokens(torch.zeros(1, 2, 8), k=7, sink=2, recent=3, block=4)


def test_three_dimensional_scores_are_one_head(backend):
    scores = ragged_scores(2, 1, 9, 9, block=1).to(backend.device)
    three = ops.select_tokens(scores[:, 0], k=4, impl=backend.impl)
    four = ops.select_tokens(scores, k=4, impl=backend.impl)
    assert torch.equal(three.indices, four.indices) and torch.equal(three.count, four.count)


def test_scores_are_not_changed(backend):
    scores = ragged_scores(1, 2, 9, 9, block=1).to(backend.device)
    before = scores.clone()
    ops.select_tokens(scores, k=4, sink=1, recent=1, impl=backend.impl)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scores": torch.zeros(4, 8)}, ValueError, r"scores must have shape \(B, Nq, Tk\) or .* got \(4, 8\)"),
        ({"scores": None}, ValueError, "got NoneType"),
        ({"scores": torch.zeros(1, 4, 8).half()}, TypeError, "scores must be float32, got torch.float16"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"sink": -1}, ValueError, "sink must be >= 0, got -1"),
        ({"recent": -1}, ValueError, "recent must be >= 0, got -1"),
        ({"block": 0}, ValueError, "block must be >= 1, got 0"),
        ({"queries": 5}, ValueError, "queries must fill 4 blocks of 1 and not exceed Tk = 8, got 5"),
        ({"block": 4, "queries": 16}, ValueError, "queries must fill 4 blocks of 4 and not exceed Tk = 8, got 16"),
        ({"valid": torch.ones(1, 7).bool()}, ValueError, r"valid must have shape \(1, 8\), got \(1, 7\)"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    arguments = {"scores": torch.zeros(1, 4, 8), "k": 2, **change}
    with pytest.raises(error, match=message):
        ops.select_tokens(arguments.pop("scores"), **arguments)


@pytest.mark.parametrize("k", [4, 7, 12])
def test_a_nan_is_chosen_only_where_it_is_always_kept(backend, k):
    scores = torch.arange(12.0, device=backend.device).expand(1, 1, 1, 12).clone()
    scores[..., [1, 5, 11]] = float("nan")  # a sink, some key, a recent one
    expected = [0, 1, *[2, 3, 4, 6, 7, 8, 9][-(k - 4) :], 10, 11] if k > 4 else [0, 1, 10, 11]
    support = ops.select_tokens(scores, k=k, sink=2, recent=2, queries=1, impl=backend.impl)
    assert support.count.flatten().tolist() == [len(expected)]
    assert support.indices.flatten()[: len(expected)].tolist() == expected


def test_one_nan_takes_no_other_key_of_its_row(backend):
    scores = ragged_scores(2, 1, 40, 40, block=4).to(backend.device)
    options = dict(k=8, block=4, impl=backend.impl)
    scores[..., 3] = -1e30
    clean = ops.select_tokens(scores, **options)
    scores[..., 3] = float("nan")
    support = ops.select_tokens(scores, **options)
    member, others = support.member_mask(40), torch.arange(40, device=backend.device) != 3
    assert not bool(member[..., 3].any())
    assert torch.equal(member[..., others], clean.member_mask(40)[..., others])


@pytest.mark.parametrize("n", [3, 40, 300])
def test_infinite_scores_do_not_push_out_what_is_always_kept(backend, n):
    scores = torch.zeros(1, 1, 1, 2 * n, device=backend.device)
    scores[..., 2:-2] = float("inf")
    support = ops.select_tokens(scores, k=5, sink=2, recent=2, queries=1, impl=backend.impl)
    assert support.indices.flatten().tolist() == [0, 1, 2, 2 * n - 2, 2 * n - 1]


@given(case=SHAPES, seed=st.integers(0, 9))
def test_non_finite_scores_follow_the_definition(case, seed):
    scores, options = case.inputs()
    kind = torch.randint(0, 6, scores.shape, generator=torch.Generator().manual_seed(seed))
    seen = scores > float("-inf")
    scores = scores.masked_fill(seen & (kind == 0), float("nan")).masked_fill(seen & (kind == 1), float("inf"))
    support = ops.select_tokens(scores, **options).check(case.Tq, case.Tk)
    expected = naive_select_tokens(scores, **options)
    assert torch.equal(support.member_mask(case.Tk), expected.member_mask(case.Tk))
