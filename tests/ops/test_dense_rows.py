from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import ops
from npu_sparse.ops import workspace
from npu_sparse.support import Support
from npu_sparse.testing import (
    DTYPES,
    attention_inputs,
    naive_sparse_attention,
    over_seeds,
    padding,
    plain_products,
)


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hq: int = 4
    Hkv: int = 2
    R: int = 5
    Tk: int = 37
    D: int = 16
    Dv: int = 16
    side: str | None = None
    strided: bool = False
    scattered: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, device="cpu"):
        """q, k, v, positions, valid: the last R positions, or R anywhere with a blind row among them."""
        q, k, v = attention_inputs(
            self.B, self.Hq, self.Hkv, self.R, max(self.Tk, self.R), self.D, self.Dv, dtype=self.dtype, device=device,
            strided=self.strided, seed=self.seed,
        )  # fmt: skip
        k, v = k[:, :, : self.Tk], v[:, :, : self.Tk]
        generator = torch.Generator().manual_seed(self.seed)
        if self.scattered:
            positions = torch.randint(-1, self.Tk, (self.B, self.R), generator=generator, dtype=torch.int32)
        else:
            positions = (torch.arange(self.R, dtype=torch.int32) + self.Tk - self.R).expand(self.B, -1)
        valid = None if self.side is None else padding(self.B, self.Tk, self.side, device=device)
        return q, k, v, positions.to(device), valid


CASES = [
    Case(R=1, Tk=1, scattered=False),
    Case(R=1, Tk=37, B=2),
    Case(),
    Case(R=37, scattered=False),
    Case(B=3, Hq=2, Hkv=2, Dv=24, side="left"),
    Case(B=2, Hq=6, Hkv=1, R=20, Tk=53, side="right"),
    Case(B=2, Hq=14, Hkv=2, R=9, Tk=300, D=64, Dv=64, scattered=False),
    Case(B=2, R=40, Tk=70, strided=True, side="left"),
    Case(R=3, Tk=600, D=128, Dv=128, strided=True, scattered=False),
    Case(R=33, Tk=520, D=256, Dv=256, scattered=False),
    Case(R=130, Tk=1100, Hq=2, Hkv=1, scattered=False),
    Case(B=2, R=70, Tk=40, side="right"),
]


def naive(q, k, v, positions, valid, scale, dtype=torch.float64):
    """Each row on its own, in `dtype`: softmax over the keys it sees; zeros where it sees none."""
    B, Hq, R, _ = q.shape
    G = Hq // k.shape[1]
    out = torch.zeros(B, Hq, R, v.shape[-1], dtype=dtype, device=q.device)
    for b in range(B):
        for r in range(R):
            seen = [s for s in range(int(positions[b, r]) + 1) if valid is None or bool(valid[b, s])]
            if not seen:
                continue
            keys, values = (x[b, :, seen].to(dtype).repeat_interleave(G, 0) for x in (k, v))  # [Hq, n, D]
            scores = (keys @ q[b, :, r, :, None].to(dtype))[..., 0] * scale
            weights = (scores if dtype == torch.float64 else scores.float()).softmax(-1).to(dtype)
            out[b, :, r] = (weights[:, None] @ values)[:, 0]
    return out


def plainly_added(q, k, v, positions, valid, scale):
    """The same in fp32, all rows at once, products added as `plain_products` does; a row that sees no key is zero."""
    B, Hq, R, _ = q.shape
    k, v = (x.repeat_interleave(Hq // k.shape[1], 1).flatten(0, 1) for x in (k, v))  # [B Hq, Tk, D]
    sees = torch.arange(k.shape[1], device=q.device) <= positions[:, :, None]
    sees = (sees if valid is None else sees & valid[:, None]).repeat_interleave(Hq, 0)  # [B Hq, R, Tk]
    scores = (plain_products(q.flatten(0, 1), k) * scale).masked_fill(~sees, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype)
    return plain_products(weights, v.mT).unflatten(0, (B, Hq)).to(q.dtype)


def check(case, impl="reference", device="cpu", factor=2.0):
    over_seeds(lambda seed: computed(replace(case, seed=case.seed + seed), impl, device), device, factor)


def computed(case, impl, device):
    q, k, v, positions, valid = case.inputs(device)
    scale = case.D**-0.5
    actual = ops.dense_rows(q, k, v, positions, scale=scale, valid=valid, impl=impl)
    exact = naive(q, k, v, positions, valid, scale)
    if impl == "reference":
        yardsticks = [naive(q, k, v, positions, valid, scale, case.dtype)]
    else:
        yardsticks = [ops.dense_rows(q, k, v, positions, scale=scale, valid=valid, impl="reference")]
    if device == "cuda":
        yardsticks.append(plainly_added(q, k, v, positions, valid, scale))
    assert actual.dtype == case.dtype
    return actual, exact, *yardsticks


def test_the_plain_yardstick_is_the_same_attention():
    for case in (Case(), Case(B=2, Hq=6, Hkv=1, R=20, Tk=53, side="right")):
        inputs = (*case.inputs("cpu"), case.D**-0.5)
        torch.testing.assert_close(plainly_added(*inputs), naive(*inputs).float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_as_accurate_as_the_yardstick(backend, case):
    check(backend.fit(case), backend.impl, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_as_accurate_as_the_yardstick(backend, dtype):
    check(backend.fit(Case(B=2, R=17, Tk=300, D=64, Dv=64, side="left", dtype=dtype)), backend.impl, backend.device)


@given(
    case=st.builds(
        Case, B=st.integers(1, 2), Hkv=st.sampled_from([1, 2, 4]), R=st.integers(1, 20), Tk=st.integers(1, 26), D=st.just(8),
        Dv=st.sampled_from([8, 16]), side=st.sampled_from([None, "left", "right"]), strided=st.booleans(), seed=st.integers(0, 9),
    )  # fmt: skip
)
def test_rows_match_the_definition_for_any_shape(case):
    check(case, factor=8)  # a handful of numbers: their RMS is a noisy estimate


def test_the_last_rows_are_those_of_a_support_that_holds_every_key():
    q, k, v, positions, _ = Case(B=2, R=9, scattered=False).inputs()
    every = torch.arange(37, dtype=torch.int32).expand(2, 1, 9, -1).contiguous()
    expected = naive_sparse_attention(q, k, v, Support(every, positions[:, None] + 1), scale=0.25)
    actual = ops.dense_rows(q, k, v, positions, scale=0.25, impl="reference")
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_in_slices_are_the_same(monkeypatch):
    q, k, v, positions, valid = Case(B=2, R=23, Tk=61, side="left").inputs()
    whole = ops.dense_rows(q, k, v, positions, scale=0.25, valid=valid, impl="reference")
    monkeypatch.setattr(workspace, "SIZE", 4 * 2 * 4 * 61 * 3)  # three rows at a time
    sliced = ops.dense_rows(q, k, v, positions, scale=0.25, valid=valid, impl="reference")
    torch.testing.assert_close(sliced, whole, atol=1e-6, rtol=1e-5)


def test_keys_that_no_row_sees_may_hold_anything(backend):
    case = backend.fit(Case(B=2, R=6, Tk=80, side="left"))
    q, k, v, _, valid = case.inputs(backend.device)
    positions = torch.tensor([[50, 40, 3, -1, 51, 52], [70, 60, 1, 66, -1, 71]], dtype=torch.int32, device=backend.device)
    expected = ops.dense_rows(q, k, v, positions, scale=0.25, valid=valid, impl=backend.impl)
    unseen = ~valid | (torch.arange(80, device=backend.device) > positions.amax(1, keepdim=True))
    k, v = (x.masked_fill(unseen[:, None, :, None], float("nan")) for x in (k, v))
    actual = ops.dense_rows(q, k, v, positions, scale=0.25, valid=valid, impl=backend.impl)
    assert torch.equal(actual, expected) and bool(actual.isfinite().all())


def test_a_row_that_sees_no_key_is_zero(backend):
    q, k, v, positions, _ = backend.fit(Case(R=5)).inputs(backend.device)
    positions = torch.tensor([[-1, 9, 10, 30, -1]], dtype=torch.int32, device=backend.device)
    valid = torch.arange(37, device=backend.device)[None] >= 10  # row 1 sees padding only
    actual = ops.dense_rows(q, k, v, positions, scale=0.25, valid=valid, impl=backend.impl)
    blank = (actual == 0).all(-1).all(1)[0]
    assert blank.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(positions=torch.zeros(1, 4, dtype=torch.int32)), r"positions must have shape \(1, 5\), got \(1, 4\)"),
        (dict(positions=torch.zeros(1, 5)), "positions must be int32, got torch.float32"),
        (dict(valid=torch.ones(1, 36, dtype=torch.bool)), r"valid must have shape \(1, 37\), got \(1, 36\)"),
        (dict(v=torch.zeros(1, 2, 36, 16)), r"v must have shape \(1, 2, 37, \*\)"),
        (dict(k=torch.zeros(1, 3, 37, 16), v=torch.zeros(1, 3, 37, 16)), "query heads must be a multiple of KV heads"),
        (dict(q=torch.zeros(1, 4, 0, 16), positions=torch.zeros(1, 0, dtype=torch.int32)), "q and k must hold at least one row"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, sentence):
    q, k, v, positions, valid = Case().inputs()
    arguments = dict(q=q, k=k, v=v, positions=positions, valid=valid) | change
    with pytest.raises((ValueError, TypeError), match=sentence):
        ops.dense_rows(**arguments, scale=0.25)
