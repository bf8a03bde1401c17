from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import ops
from npu_sparse.ops import workspace
from npu_sparse.testing import DTYPES, assert_accurate, attention_inputs, naive_attention_mass, padding


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hq: int = 4
    Hkv: int = 2
    Tq: int = 37
    Tk: int = 37
    D: int = 16
    block: int = 1
    reduce: str = "max"
    per_kv: bool = False
    side: str | None = None
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        q, k, _ = attention_inputs(
            self.B, self.Hq, self.Hkv, self.Tq, self.Tk, self.D, dtype=self.dtype, device=device, strided=self.strided
        )
        valid = padding(self.B, self.Tk, self.side, device=device) if self.side else None
        options = dict(scale=self.D**-0.5, reduce_block=self.block, reduce=self.reduce, per_kv=self.per_kv, valid=valid)
        return q, k, options


CASES = [
    Case(Tq=1, Tk=1),
    Case(Tq=1, Tk=37, B=2),
    Case(),
    Case(B=3, Hq=2, Hkv=2),
    Case(Hq=6, Hkv=1, D=24),
    Case(per_kv=True, B=2),
    Case(block=16, Tq=17, Tk=17),
    Case(block=16, Tq=17, Tk=53, per_kv=True),
    Case(block=16, reduce="mean", B=2, Tq=33, Tk=40),
    Case(block=64),
    Case(block=5, reduce="mean", side="left", B=2),
    Case(block=8, side="right", B=3, strided=True),
    Case(block=8, side="left", B=3, per_kv=True, strided=True),
    Case(side="left", B=2, Tq=9),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hq=st.just(4), Hkv=st.sampled_from([1, 2, 4]), Tq=st.integers(1, 9), Tk=st.integers(9, 21),
    D=st.just(8), block=st.sampled_from([1, 2, 3, 4, 8, 16]), reduce=st.sampled_from(["max", "mean"]),
    per_kv=st.booleans(), side=st.sampled_from([None, "left", "right"]), strided=st.booleans(),
)  # fmt: skip


def check(case, impl="reference", device="cpu", factor=2.0):
    q, k, options = case.inputs(device)
    actual = ops.attention_mass(q, k, impl=impl, **options)
    exact = naive_attention_mass(q, k, **options)
    if impl == "reference":
        yardstick = naive_attention_mass(q, k, dtype=torch.float32, **options)  # products of any input dtype, in fp32
    else:
        yardstick = ops.attention_mass(q, k, impl="reference", **options)
    assert actual.dtype == torch.float32
    assert_accurate(actual, exact, yardstick, factor=factor)
    return actual


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mass_is_as_accurate_as_the_yardstick(backend, case):
    check(backend.fit(case), backend.impl, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_accumulates_in_fp32(backend, dtype):
    check(backend.fit(Case(B=2, Tq=33, Tk=65, D=64, block=16, dtype=dtype)), backend.impl, backend.device)


@given(case=SHAPES)
def test_mass_matches_the_definition_for_any_shape(case):
    check(case, factor=8)  # a handful of numbers: their RMS is a noisy estimate


@given(case=SHAPES)
def test_rows_of_one_query_sum_to_one_or_to_nothing(case):
    q, k, options = replace(case, block=1).inputs()
    mass = ops.attention_mass(q, k, **options)
    sums = mass.sum(-1)
    assert bool((mass >= 0).all())
    assert bool((((sums - 1).abs() < 1e-5) | (sums == 0)).all())


def test_mean_ignores_queries_that_see_nothing(backend):
    q, k, options = backend.fit(Case(Tq=4, Tk=4, block=4, reduce="mean")).inputs(backend.device)
    valid = torch.tensor([[False, False, False, True]], device=backend.device)
    mass = ops.attention_mass(q, k, impl=backend.impl, **options | {"valid": valid})
    assert mass.flatten().tolist() == [0, 0, 0, 1]


def test_padding_queries_do_not_speak_for_their_block(backend):
    case = Case(Tq=24, Tk=24, block=8)
    q, k, options = backend.fit(case).inputs(backend.device)
    valid = torch.arange(24, device=backend.device)[None] < 19
    for reduce in ("max", "mean"):
        options["reduce"] = reduce
        padded = ops.attention_mass(q, k, impl=backend.impl, **options | {"valid": valid})
        alone = ops.attention_mass(q[:, :, :19], k[:, :, :19], impl=backend.impl, **options)
        torch.testing.assert_close(padded[..., :19], alone)


def test_nan_in_invisible_keys_does_not_leak(backend):
    q, k, options = backend.fit(Case(B=2, side="left")).inputs(backend.device)
    clean = ops.attention_mass(q, k, impl=backend.impl, **options)
    k = k.masked_fill(~options["valid"][:, None, :, None], float("nan"))
    assert torch.equal(ops.attention_mass(q, k, impl=backend.impl, **options), clean)


def test_a_slice_of_queries_has_the_mass_of_the_whole(backend):
    q, k, options = backend.fit(Case(B=2, Tq=48, Tk=48, block=16)).inputs(backend.device)
    whole = ops.attention_mass(q, k, impl=backend.impl, **options)
    part = ops.attention_mass(q[:, :, 16:32], k[:, :, :32], impl=backend.impl, **options)
    torch.testing.assert_close(part[:, :, 0], whole[:, :, 1, :32])


@pytest.mark.parametrize("case", [c for c in CASES if c.Tq > 16], ids=str)
def test_tiling_does_not_change_the_reference(case, monkeypatch):
    q, k, options = case.inputs()
    whole = ops.attention_mass(q, k, **options)
    monkeypatch.setattr(workspace, "SIZE", 4)  # one block of queries at a time
    torch.testing.assert_close(ops.attention_mass(q, k, **options), whole)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(2, 4, 37)}, ValueError, r"q must have shape \(\*, \*, \*, \*\), got \(2, 4, 37\)"),
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": torch.zeros(1, 4, 37, 16).int()}, TypeError, "q must be float32 or bfloat16 .*, got torch.int32"),
        ({"k": torch.zeros(1, 2, 37, 8)}, ValueError, r"k must have shape \(1, \*, \*, 16\), got \(1, 2, 37, 8\)"),
        ({"k": torch.zeros(1, 2, 37, 16).half()}, TypeError, "k must be float32, got torch.float16"),
        (
            {"k": torch.zeros(1, 2, 37, 16, device="meta")},
            ValueError,
            "k must be on cpu like the other inputs, got meta",
        ),
        ({"k": torch.zeros(1, 3, 37, 16)}, ValueError, "query heads must be a multiple of KV heads, got 4 and 3"),
        ({"k": torch.zeros(1, 2, 36, 16)}, ValueError, "the last Tq of Tk keys .* got Tq = 37, Tk = 36"),
        ({"q": torch.zeros(1, 4, 0, 16)}, ValueError, "got Tq = 0, Tk = 37"),
        ({"reduce_block": 0}, ValueError, "reduce_block must be >= 1, got 0"),
        ({"reduce": "median"}, ValueError, "reduce must be one of max, mean, got 'median'"),
        ({"valid": torch.ones(1, 36).bool()}, ValueError, r"valid must have shape \(1, 37\), got \(1, 36\)"),
        ({"valid": torch.ones(1, 37)}, TypeError, "valid must be bool, got torch.float32"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    q, k, _ = attention_inputs(1, 4, 2, 37, 37, 16)
    arguments = {"q": q, "k": k, "scale": 0.25, **change}
    with pytest.raises(error, match=message):
        ops.attention_mass(arguments.pop("q"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_nan_is_in_the_mass_of_every_key_that_its_queries_see(backend, where, reduce):
    case = backend.fit(Case(B=2, Tq=24, Tk=40, block=8, reduce=reduce))
    q, k, options = case.inputs(backend.device)
    clean = ops.attention_mass(q, k, impl=backend.impl, **options)
    {"query": q[1, 1, 10], "key": k[1, 0, 27]}[where].fill_(float("nan"))
    mass = ops.attention_mass(q, k, impl=backend.impl, **options)
    position = torch.arange(24) + 16
    reached = position == 26 if where == "query" else position >= 27
    touched = torch.zeros(mass.shape, dtype=torch.bool)
    touched[1, 0] = (reached[:, None] & (torch.arange(40) <= position[:, None])).unflatten(0, (3, 8)).any(1)
    mass, clean = mass.cpu(), clean.cpu()
    assert bool(mass.isnan()[touched].all())
    row = touched.any(-1, keepdim=True)  # keys of the block that the query does not see may be NaN, too
    assert torch.equal(mass[~row.expand_as(mass)], clean[~row.expand_as(mass)])
    assert bool((mass.isnan() | (mass == clean))[~touched].all())
