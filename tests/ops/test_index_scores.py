from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import ops
from npu_sparse.ops import workspace
from npu_sparse.testing import (
    DTYPES,
    index_inputs,
    naive_index_partition,
    naive_index_scores,
    normal,
    over_seeds,
    padding,
    plain_products,
)

reference = import_module("npu_sparse.ops.index_scores.reference")


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hi: int = 1
    Tq: int = 37
    Tk: int = 37
    Di: int = 64
    block: int = 1
    reduce: str = "max"
    weighted: bool = False
    side: str | None = None
    strided: bool = False
    given: bool = False  # the log-partition of softmax_max, far from the exact one
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu", seed=0):
        qi, ki, w = index_inputs(
            self.B, self.Hi, self.Tq, self.Tk, self.Di, dtype=self.dtype, device=device, strided=self.strided, seed=seed
        )
        valid = padding(self.B, self.Tk, self.side, device=device) if self.side else None
        given = normal(self.B, self.Tq, device=device, seed=5, strided=self.strided) * 3 if self.given else None
        return qi, ki, w if self.weighted else None, dict(
            block=self.block, reduce=self.reduce, valid=valid, partition=given
        )  # fmt: skip


CASES = [
    Case(Tq=1, Tk=1),
    Case(Tq=1, Tk=37, B=2),
    Case(),
    Case(Hi=4, weighted=True, B=2),
    Case(Hi=3),
    Case(weighted=True),
    Case(block=16, Tq=17, Tk=17),
    Case(block=16, Tq=17, Tk=53, Hi=2, weighted=True),
    Case(block=16, reduce="mean", B=2, Tq=33, Tk=40),
    Case(block=64, Di=128),
    Case(block=5, reduce="mean", side="left", B=2, Hi=2, weighted=True),
    Case(block=8, side="right", B=3, strided=True),
    Case(block=8, side="left", B=3, Hi=2, weighted=True, strided=True),
    Case(side="left", B=2, Tq=9),
    Case(reduce="softmax_max", B=2),
    Case(reduce="softmax_max", block=16, Tq=17, Tk=53, given=True),
    Case(reduce="softmax_max", block=64, Tq=70, Tk=90, Di=128, given=True, B=2),
    Case(reduce="softmax_max", block=16, Tq=33, Tk=40, Hi=2, weighted=True),
    Case(reduce="softmax_max", block=5, Hi=3, side="left", B=2, weighted=True, given=True, strided=True),
    Case(reduce="softmax_max", block=8, side="right", B=3, strided=True),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hi=st.integers(1, 3), Tq=st.integers(1, 9), Tk=st.integers(9, 21), Di=st.just(8),
    block=st.sampled_from([1, 2, 3, 4, 8, 16]), reduce=st.sampled_from(["max", "mean", "softmax_max"]), weighted=st.booleans(),
    side=st.sampled_from([None, "left", "right"]), strided=st.booleans(),
)  # fmt: skip


def check(case, impl="reference", device="cpu", factor=2.0):
    over_seeds(lambda seed: computed(case, impl, device, seed), device, factor)


def computed(case, impl, device, seed):
    qi, ki, w, options = case.inputs(device, seed)
    actual = ops.index_scores(qi, ki, w, impl=impl, **options)
    exact = naive_index_scores(qi, ki, w, **options)
    if impl == "reference":
        yardsticks = [naive_index_scores(qi, ki, w, dtype=case.dtype, **options)]
    else:
        yardsticks = [ops.index_scores(qi, ki, w, impl="reference", **options)]
    if device == "cuda":
        yardsticks.append(naive_index_scores(qi, ki, w, dtype=torch.float32, products=plain_products, **options))
    assert actual.dtype == torch.float32
    return actual, exact, *yardsticks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_as_accurate_as_the_yardstick(backend, case):
    check(backend.fit(case), backend.impl, backend.device)


@pytest.mark.parametrize("reduce", ["max", "mean", "softmax_max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_as_accurate_as_the_yardstick(backend, dtype, reduce):
    case = Case(B=2, Hi=4, Tq=33, Tk=65, Di=128, block=16, weighted=True, reduce=reduce, given=True, dtype=dtype)
    if reduce != "softmax_max":
        case = replace(case, given=False)
    check(backend.fit(case), backend.impl, backend.device)


@given(case=SHAPES)
def test_scores_match_the_definition_for_any_shape(case):
    check(case, factor=8)  # a handful of numbers: their RMS is a noisy estimate


def test_keys_that_no_query_of_the_block_sees_score_minus_infinity(backend):
    qi, ki, w, options = backend.fit(Case(B=2, Tq=20, Tk=24, block=8, side="left")).inputs(backend.device)
    scores = ops.index_scores(qi, ki, w, impl=backend.impl, **options).cpu()
    last = torch.tensor([11, 19, 23])
    visible = (torch.arange(24) <= last[:, None]) & options["valid"].cpu()[:, None]
    assert torch.equal(scores > float("-inf"), visible)


def test_negative_weights_make_negative_scores(backend):
    qi, ki, _, _ = backend.fit(Case()).inputs(backend.device)
    scores = ops.index_scores(qi, ki, -torch.ones(1, 37, 1, dtype=qi.dtype, device=backend.device), impl=backend.impl)
    assert float(scores[scores > float("-inf")].min()) < 0
    assert float(scores.max()) <= 0


def test_padding_queries_do_not_speak_for_their_block(backend):
    qi, ki, w, options = backend.fit(Case(Tq=24, Tk=24, block=8, Hi=2, weighted=True)).inputs(backend.device)
    valid = torch.arange(24, device=backend.device)[None] < 19
    for reduce in ("max", "mean"):
        options["reduce"] = reduce
        padded = ops.index_scores(qi, ki, w, impl=backend.impl, **options | {"valid": valid})
        alone = ops.index_scores(qi[:, :, :19], ki[:, :19], w[:, :19], impl=backend.impl, **options)
        torch.testing.assert_close(padded[..., :19], alone)


def test_nan_in_invisible_keys_does_not_leak(backend):
    qi, ki, w, options = backend.fit(Case(B=2, side="left", block=8)).inputs(backend.device)
    clean = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    ki = ki.masked_fill(~options["valid"][..., None], float("nan"))
    assert torch.equal(ops.index_scores(qi, ki, w, impl=backend.impl, **options), clean)


@pytest.mark.parametrize("case", [c for c in CASES if c.Tq > 16], ids=str)
def test_tiling_does_not_change_the_reference(case, monkeypatch):
    qi, ki, w, options = case.inputs()
    whole = ops.index_scores(qi, ki, w, **options)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)
    torch.testing.assert_close(ops.index_scores(qi, ki, w, **options), whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_by_index_selects_what_the_two_operators_select(backend, case, monkeypatch):
    monkeypatch.setattr(workspace, "SIZE", 4 * 2 * case.B * case.Tk)  # two blocks of queries at a time
    qi, ki, w, options = backend.fit(case).inputs(backend.device)
    scores = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    kept = dict(k=case.block + 6, sink=2, recent=3, block=case.block)
    whole = ops.select_tokens(scores, queries=case.Tq, valid=options["valid"], impl=backend.impl, **kept)
    sliced = ops.select_by_index(
        qi, ki, w, reduce=case.reduce, valid=options["valid"], partition=options["partition"], impl=backend.impl, **kept
    ).check(case.Tq, case.Tk)
    assert torch.equal(sliced.count, whole.count)
    assert torch.equal(sliced.member_mask(case.Tk), whole.member_mask(case.Tk))


# Each query's scores less its own log-partition


def loud_inputs(backend, **changes):
    """A block of 8 queries of which the first scores a hundred times what the others do, about the same keys for all of them."""
    qi, ki, _, options = backend.fit(Case(Tq=8, Tk=64, block=8, reduce="softmax_max", given=True, **changes)).inputs(
        backend.device
    )
    qi[:, :, 0] *= 100
    return qi, ki, options


def test_a_loud_query_does_not_own_its_block(backend):
    qi, ki, options = loud_inputs(backend)
    options["partition"] = naive_index_partition(qi, ki).float()
    kept = dict(k=8, block=8, impl=backend.impl)
    raw = ops.select_by_index(qi, ki, reduce="max", **kept).member_mask(64)[0, 0, 0].cpu()
    fair = ops.select_by_index(qi, ki, reduce="softmax_max", partition=options["partition"], **kept)
    fair = fair.member_mask(64)[0, 0, 0].cpu()
    weights = naive_index_scores(qi, ki, block=8, reduce="softmax_max").exp()[0, 0].cpu()  # every key's largest softmax weight
    z = naive_index_scores(qi, ki)[0].cpu()
    assert set(z[0].topk(7).indices.tolist()) <= set(raw.nonzero()[:, 0].tolist())  # all but one key are the loud query's
    assert set(weights.topk(8).indices.tolist()) == set(fair.nonzero()[:, 0].tolist())
    assert not torch.equal(raw, fair)


def test_scores_are_logarithms_of_the_largest_softmax_weights(backend):
    case = backend.fit(Case(B=2, Tq=20, Tk=24, block=8, Hi=2, weighted=True, side="left", reduce="softmax_max"))
    qi, ki, w, options = case.inputs(backend.device)
    scores = ops.index_scores(qi, ki, w, impl=backend.impl, **options).cpu()
    single = naive_index_scores(qi, ki, w, reduce="mean", valid=options["valid"]).cpu()  # softmax weights of every query
    for n, queries in enumerate((range(8), range(8, 16), range(16, 20))):
        largest = single[:, queries].amax(1)
        torch.testing.assert_close(scores[:, n], largest.clamp(min=0).log().where(largest > float("-inf"), largest).float())


@pytest.mark.parametrize("case", [c for c in CASES if not c.given], ids=str)
def test_partitions_are_as_accurate_as_the_yardstick(backend, case):
    case, impl = backend.fit(case), backend.impl

    def partitions_of(seed):
        qi, ki, w, options = case.inputs(backend.device, seed)
        valid = options["valid"]
        actual, exact = ops.index_partition(qi, ki, w, valid=valid, impl=impl), naive_index_partition(qi, ki, w, valid=valid)
        if impl == "reference":
            yardsticks = [naive_index_partition(qi, ki, w, valid=valid, dtype=case.dtype)]
        else:
            yardsticks = [ops.index_partition(qi, ki, w, valid=valid, impl="reference")]
        if backend.device == "cuda":
            plain = naive_index_partition(qi, ki, w, valid=valid, dtype=torch.float32, products=plain_products)
            yardsticks.append(plain)
        assert actual.dtype == torch.float32 and actual.shape == (case.B, case.Tq)
        return actual, exact, *yardsticks

    over_seeds(partitions_of, backend.device)


def test_partitions_in_float64_are_exact():
    qi, ki, w, options = Case(B=2, Tq=40, Tk=60, Hi=3, weighted=True, side="left", dtype=torch.float64).inputs()
    actual = ops.index_partition(qi, ki, w, valid=options["valid"])
    assert torch.equal(actual, naive_index_partition(qi, ki, w, valid=options["valid"]).float())


def test_tiling_does_not_change_the_partitions(monkeypatch):
    qi, ki, w, options = Case(B=2, Hi=2, weighted=True, side="right").inputs()
    whole = ops.index_partition(qi, ki, w, valid=options["valid"])
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)
    torch.testing.assert_close(ops.index_partition(qi, ki, w, valid=options["valid"]), whole)


def test_given_the_exact_partition_nothing_changes(backend):
    case = backend.fit(Case(B=2, Tq=20, Tk=24, block=8, Hi=2, weighted=True, side="left", reduce="softmax_max"))
    qi, ki, w, options = case.inputs(backend.device)
    exact = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    options["partition"] = ops.index_partition(qi, ki, w, valid=options["valid"], impl=backend.impl)
    assert torch.equal(ops.index_scores(qi, ki, w, impl=backend.impl, **options), exact)


def test_one_number_for_all_queries_changes_no_choice(backend):
    case = backend.fit(Case(B=2, Tq=40, Tk=90, block=8, Hi=2, weighted=True, reduce="softmax_max", given=True))
    qi, ki, w, _ = case.inputs(backend.device)
    kept = dict(k=20, block=8, sink=2, recent=3, impl=backend.impl)
    same = torch.full((2, 40), 2.0, device=backend.device)
    less = ops.select_by_index(qi, ki, w, reduce="softmax_max", partition=same, **kept)
    assert torch.equal(less.member_mask(90), ops.select_by_index(qi, ki, w, **kept).member_mask(90))


def test_where_every_query_selects_for_itself_no_partition_is_read(backend):
    qi, ki, w, _ = backend.fit(Case(B=2, Hi=2, weighted=True)).inputs(backend.device)
    unread = torch.full((2, 37), float("nan"), device=backend.device)
    plain = ops.select_by_index(qi, ki, w, k=9, impl=backend.impl)
    for partition in (None, unread):
        support = ops.select_by_index(qi, ki, w, k=9, reduce="softmax_max", partition=partition, impl=backend.impl)
        assert torch.equal(support.member_mask(37), plain.member_mask(37))


def test_hostile_partitions_of_padding_do_not_leak(backend):
    case = backend.fit(Case(B=2, Tq=30, Tk=37, block=8, side="left", reduce="softmax_max", given=True))
    qi, ki, w, options = case.inputs(backend.device)
    clean = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    speaks = options["valid"][:, 7:]
    assert not speaks.all()
    for hostile in (float("nan"), float("inf"), float("-inf")):
        options["partition"] = options["partition"].where(speaks, hostile)
        assert torch.equal(ops.index_scores(qi, ki, w, impl=backend.impl, **options), clean)


def test_select_by_index_names_its_stages():
    names = []

    def stage(name):
        names.append(name)
        return torch.inference_mode()

    qi, ki, w, _ = Case().inputs()
    ops.select_by_index(qi, ki, w, k=4, stage=stage)
    assert names == ["scoring", "top-k"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"qi": torch.zeros(1, 37, 64)}, ValueError, r"qi must have shape \(\*, \*, \*, \*\), got \(1, 37, 64\)"),
        ({"ki": torch.zeros(1, 1, 37, 64)}, ValueError, r"ki must have shape \(1, \*, 64\), got \(1, 1, 37, 64\)"),
        ({"ki": torch.zeros(1, 37, 64).bfloat16()}, TypeError, "ki must be float32, got torch.bfloat16"),
        ({"ki": torch.zeros(1, 36, 64)}, ValueError, "got Tq = 37, Tk = 36"),
        ({"w": torch.zeros(1, 2, 37)}, ValueError, r"w must have shape \(1, 37, 2\), got \(1, 2, 37\)"),
        ({"block": 0}, ValueError, "block must be >= 1, got 0"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of max, mean, softmax_max, got 'sum'"),
        ({"partition": torch.zeros(1, 37)}, ValueError, "partition must be None unless reduce is softmax_max, got a tensor"),
        (
            {"partition": torch.zeros(1, 36), "reduce": "softmax_max"}, ValueError,
            r"partition must have shape \(1, 37\), got \(1, 36\)",
        ),
        (
            {"partition": torch.zeros(1, 37).half(), "reduce": "softmax_max"}, TypeError,
            "partition must be float32, got torch.float16",
        ),
        ({"valid": torch.ones(2, 37).bool()}, ValueError, r"valid must have shape \(1, 37\), got \(2, 37\)"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    qi, ki, w = index_inputs(1, 2, 37, 37, 64)
    arguments = {"qi": qi, "ki": ki, "w": w, **change}
    with pytest.raises(error, match=message):
        ops.index_scores(arguments.pop("qi"), arguments.pop("ki"), arguments.pop("w"), **arguments)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("where", ["query", "key", "weight"])
def test_a_nan_is_in_every_score_made_of_it_and_in_no_other(backend, where, reduce):
    case = backend.fit(Case(B=2, Hi=2, Tq=24, Tk=40, block=8, weighted=True, reduce=reduce))
    qi, ki, w, options = case.inputs(backend.device)
    clean = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    {"query": qi[1, 0, 10], "key": ki[1, 20], "weight": w[1, 10]}[where].fill_(float("nan"))
    scores = ops.index_scores(qi, ki, w, impl=backend.impl, **options)
    touched = torch.zeros_like(scores, dtype=torch.bool)
    if where == "key":
        touched[1, :, 20] = True
        if reduce == "mean":  # a softmax over it
            touched[1] |= clean[1].isfinite() & (torch.arange(3, device=backend.device) >= 0)[:, None]
    else:
        touched[1, 1] = torch.arange(40, device=backend.device) <= 26
    touched &= clean > float("-inf")
    assert torch.equal(scores.isnan(), touched)
    assert torch.equal(scores[~touched], clean[~touched])


def test_select_by_index_keeps_its_sinks_and_recent_keys_whatever_the_scores(backend):
    qi, ki, w, options = backend.fit(Case(Tq=64, Tk=96, block=16)).inputs(backend.device)
    kept = dict(k=24, sink=2, recent=4, block=16, impl=backend.impl)
    clean = ops.select_by_index(qi, ki, w, **kept).member_mask(96)
    ki[:, [0, 7, 50, 95]] = float("nan")
    member = ops.select_by_index(qi, ki, w, **kept).check(64, 96).member_mask(96)[0, 0].cpu()
    seen = torch.arange(96) < torch.arange(48, 97, 16)[:, None]
    recent = (torch.arange(96) > torch.arange(32, 96, 16)[:, None] - 4) & seen
    assert bool(member[:, :2].all()) and bool(member[recent].all())
    assert not bool(member[:, 7].any()) and not bool(member[~recent[:, 50], 50].any())
    assert (member.sum(-1) == 24).all() and clean.any()
