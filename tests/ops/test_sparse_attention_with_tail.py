import math
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import Support, ops
from npu_sparse.ops import dispatch, workspace
from npu_sparse.testing import (
    DTYPES,
    attention_inputs,
    naive_sparse_attention,
    naive_sparse_attention_with_tail,
    over_seeds,
    padding,
    random_support,
)

reference = import_module("npu_sparse.ops.sparse_attention.reference")
tails = import_module("npu_sparse.ops.sparse_attention_with_tail.reference")


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hq: int = 4
    Hkv: int = 2
    Tq: int = 37
    Tk: int = 37
    D: int = 16
    Dv: int = 16
    k: int = 8
    block: int = 1
    per_kv: bool = False
    empty: bool = False
    side: str | None = None
    strided: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, device="cpu"):
        """q, k, v, a support of valid keys and the padding; scores are small, so that the tail weighs something."""
        q, k, v = attention_inputs(
            self.B, self.Hq, self.Hkv, self.Tq, self.Tk, self.D, self.Dv, dtype=self.dtype, device=device,
            strided=self.strided, seed=self.seed,
        )  # fmt: skip
        valid = padding(self.B, self.Tk, self.side, device=device) if self.side else None
        Hs = self.Hkv if self.per_kv else 1
        if valid is None:
            support = random_support(
                self.B, Hs, self.Tq, self.Tk, k=self.k, block=self.block, device=device, empty=self.empty, seed=self.seed
            )
        else:
            mass = ops.attention_mass(
                q, k, scale=0.5, reduce_block=self.block, per_kv=self.per_kv, valid=valid, impl="reference"
            )
            support = ops.select_tokens(
                mass.masked_fill(mass == 0, float("-inf")), k=self.k, block=self.block, queries=self.Tq, valid=valid,
                impl="reference",
            )  # fmt: skip
        return q.mul_(0.3), k, v, support, valid


CASES = [
    Case(Tq=1, Tk=1),
    Case(Tq=1, Tk=37, B=2),
    Case(),
    Case(B=3, Hq=2, Hkv=2, Dv=24),
    Case(B=2, per_kv=True, empty=True),
    Case(block=4, B=2, Tq=38, Tk=41),
    Case(block=16, Tq=17, Tk=53, B=2, per_kv=True, empty=True, Dv=24),
    Case(block=16, Tq=33, Tk=33, strided=True, side="left", B=2),
    Case(block=64, Tq=65, Tk=70, k=40, B=2, side="right"),
    Case(block=3, Tq=50, Tk=60, side="left", B=2, per_kv=True),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hq=st.just(4), Hkv=st.sampled_from([1, 2, 4]), Tq=st.integers(1, 20), Tk=st.integers(20, 26),
    D=st.just(8), Dv=st.sampled_from([8, 16]), k=st.integers(1, 26), block=st.sampled_from([1, 2, 3, 8, 16, 17]),
    per_kv=st.booleans(), empty=st.booleans(), side=st.sampled_from([None, "left", "right"]), strided=st.booleans(),
    seed=st.integers(0, 5),
)  # fmt: skip


@pytest.fixture
def at(backend):
    """The back-end, where it has this kernel, else its sentence; the reference as it is."""
    if backend.impl == "kernel" and dispatch._kernel("sparse_attention_with_tail", backend.device) is None:
        pytest.skip(str(dispatch._unavailable("sparse_attention_with_tail", backend.device)))
    return backend


def attend(inputs, case, impl):
    q, k, v, support, valid = inputs
    return ops.sparse_attention_with_tail(q, k, v, support, scale=case.D**-0.5, valid=valid, impl=impl)


def check(case, impl="reference", device="cpu", factor=2.0):
    over_seeds(lambda seed: computed(replace(case, seed=case.seed + seed), impl, device), device, factor)


def computed(case, impl, device):
    inputs = case.inputs(device)
    q, k, v, support, valid = inputs
    exact = naive_sparse_attention_with_tail(q, k, v, support, scale=case.D**-0.5, valid=valid)
    if impl == "reference":
        yardstick = naive_sparse_attention_with_tail(q, k, v, support, scale=case.D**-0.5, valid=valid, dtype=case.dtype)
    else:
        yardstick = attend(inputs, case, "reference")
    return attend(inputs, case, impl), exact, yardstick


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_as_accurate_as_the_yardstick(at, case):
    check(at.fit(case), at.impl, at.device)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_weighs_the_tail_precisely(at, dtype, block):
    """The tail is nearly all there is: a mask of low precision would be seen."""
    case = at.fit(Case(Tq=20, Tk=400, D=32, Dv=32, k=3, block=block, dtype=dtype))
    check(case, at.impl, at.device)


@given(case=SHAPES)
def test_attention_matches_the_definition_for_any_shape(case):
    check(case, factor=8)  # a handful of numbers: their RMS is a noisy estimate


@given(number=st.integers(0, 1 << 20), dtype=st.sampled_from(DTYPES))
def test_two_copies_weigh_what_they_stand_for(number, dtype):
    biases = reference.Tail(None, None, torch.tensor([[[float(number)]]])).biases(dtype)
    assert biases.dtype == dtype and not bool(biases.isnan().any())
    assert float(biases.double().exp().sum()) == pytest.approx(number, rel=2e-3)


@pytest.mark.parametrize("block", [1, 16])
def test_a_support_of_all_keys_leaves_no_tail(at, block):
    case = at.fit(Case(block=block, k=37))
    q, k, v, _, _ = case.inputs(at.device)
    scores = torch.zeros(1, -(-37 // block), 37, device=at.device)
    ends = torch.arange(1, scores.shape[1] + 1, device=at.device) * block
    scores = scores.masked_fill(torch.arange(37, device=at.device) >= ends[:, None], float("-inf"))
    support = ops.select_tokens(scores, k=37, block=block, queries=37, impl="reference")
    with_tail = ops.sparse_attention_with_tail(q, k, v, support, scale=0.25, impl=at.impl)
    torch.testing.assert_close(with_tail, ops.sparse_attention(q, k, v, support, scale=0.25, impl=at.impl))


@pytest.mark.parametrize("block", [1, 16])
def test_a_tail_of_equal_keys_is_read_exactly(at, block):
    """Where all keys but the support's last are the same, their mean is each of them: nothing is lost."""
    case = at.fit(Case(Tq=40, Tk=40, block=block))
    q, k, v, _, _ = case.inputs(at.device)
    k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    starts = torch.arange(0, 40, block, device=at.device)
    own = (starts[:, None] + torch.arange(block, device=at.device)).clamp(max=39)  # each block's own queries
    indices = torch.full((1, 1, len(starts), block), -1, dtype=torch.int32, device=at.device)
    indices[0, 0] = own.int()
    count = (40 - starts).clamp(max=block).int()[None, None]
    with_tail = ops.sparse_attention_with_tail(q, k, v, Support(indices, count, block), scale=0.25, impl=at.impl)
    torch.testing.assert_close(with_tail, v[:, :, :1].repeat_interleave(2, 1).expand_as(with_tail))


def test_the_tail_keeps_one_heavy_key_from_taking_the_share_of_many_light_ones():
    """A first key with a fifth of the mass, 399 nearly equal ones with the rest: renormalised over 16, it has nearly all."""
    q, k, v = attention_inputs(1, 1, 1, 1, 400, 16)
    k[:, :, 1:] *= 0.1
    k[:, :, 0] = q[:, :, 0] * math.log(100) / q.square().sum() * 4
    mass = ops.attention_mass(q, k, scale=0.25)
    support, everything = (ops.select_tokens(mass, k=n, queries=1) for n in (16, 400))
    dense = naive_sparse_attention(q, k, v, everything, scale=0.25)
    dropped = (ops.sparse_attention(q, k, v, support, scale=0.25) - dense).norm()
    tail = (ops.sparse_attention_with_tail(q, k, v, support, scale=0.25) - dense).norm()
    assert tail < 0.2 * dropped


def test_keys_ahead_and_padding_are_not_read(at):
    case = at.fit(Case(B=2, Tq=30, Tk=40, block=4, k=4, side="left"))
    q, k, v, support, valid = case.inputs(at.device)
    clean = attend((q, k, v, support, valid), case, at.impl)
    last_block = torch.arange(40, device=at.device) > 38  # 40 keys, blocks of 4 from key 10 on: the last begins with 38
    ahead = last_block & ~support.member_mask(40).any(2)[:, 0]
    assert bool(ahead.any())
    hostile = ~valid | ahead
    k, v = (x.masked_fill(hostile[:, None, :, None], float("nan")) for x in (k, v))
    assert torch.equal(attend((q, k, v, support, valid), case, at.impl), clean)


def test_a_query_without_a_support_gets_zeros(at):
    case = at.fit(Case(B=2, empty=True))
    inputs = case.inputs(at.device)
    out = attend(inputs, case, at.impl)
    nothing = inputs[3].count[:, 0] == 0
    assert bool(nothing.any())
    assert not bool(out.transpose(1, 2)[nothing].any())


@pytest.mark.parametrize("case", [c for c in CASES if c.Tq > 16], ids=str)
def test_slices_do_not_change_the_reference(case, monkeypatch):
    inputs = case.inputs()
    whole = attend(inputs, case, "reference")
    monkeypatch.setattr(workspace, "SIZE", 4)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(reference, "UNION_ROWS", 1)
    torch.testing.assert_close(attend(inputs, case, "reference"), whole)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.zeros(1, 2, 36, 16)}, ValueError, r"v must have shape \(1, 2, 36, \*\), got \(1, 2, 37, 16\)"),
        ({"valid": torch.ones(1, 36).bool()}, ValueError, r"valid must have shape \(1, 37\), got \(1, 36\)"),
        ({"support": None}, TypeError, "support must be a Support, got NoneType"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    q, k, v, support, _ = replace(Case()).inputs()
    arguments = {"q": q, "k": k, "v": v, "support": support, **change}
    with pytest.raises(error, match=message):
        ops.sparse_attention_with_tail(**{**arguments, "scale": 0.25})
