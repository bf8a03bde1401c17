from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from npu_sparse import Support, ops
from npu_sparse.support import block_ends
from npu_sparse.testing import (
    DTYPES,
    assert_accurate,
    attention_inputs,
    hostile,
    naive_sparse_attention,
    poisoned,
    random_support,
)

reference = import_module("npu_sparse.ops.sparse_attention.reference")


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
    strided: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, device="cpu"):
        q, k, v = attention_inputs(
            self.B, self.Hq, self.Hkv, self.Tq, self.Tk, self.D, self.Dv, dtype=self.dtype, device=device,
            strided=self.strided, seed=self.seed,
        )  # fmt: skip
        Hs = self.Hkv if self.per_kv else 1
        support = random_support(
            self.B, Hs, self.Tq, self.Tk, k=self.k, block=self.block, device=device, empty=self.empty, seed=self.seed
        )
        return q, k, v, support


CASES = [
    Case(Tq=1, Tk=1),
    Case(Tq=1, Tk=37, B=2),
    Case(),
    Case(B=3, Hq=2, Hkv=2, Dv=24),
    Case(B=2, per_kv=True, empty=True),
    Case(Hq=6, Hkv=1, Tq=20, Tk=53, empty=True),
    Case(block=4, B=2, Tq=38, Tk=41),
    Case(block=16, Tq=17, Tk=17, strided=True),
    Case(block=16, Tq=17, Tk=53, B=2, per_kv=True, empty=True, Dv=24),
    Case(block=64, Tq=65, Tk=70, k=40, B=2, strided=True),
    Case(block=64, k=64, Hq=2, Hkv=2, per_kv=True),
    Case(Tq=150, Tk=170, block=3, k=12),
    Case(Tq=150, Tk=150, block=12, k=12, per_kv=True),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hq=st.just(4), Hkv=st.sampled_from([1, 2, 4]), Tq=st.integers(1, 20), Tk=st.integers(20, 26),
    D=st.just(8), Dv=st.sampled_from([8, 16]), k=st.integers(1, 26), block=st.sampled_from([1, 2, 3, 8, 16, 17]),
    per_kv=st.booleans(), empty=st.booleans(), strided=st.booleans(), seed=st.integers(0, 5),
)  # fmt: skip


def masked_attention(q, k, v, support, scale):
    """PyTorch's attention under the support as a mask: the rounding of the device's own kernel, which the reference uses too."""
    Tq, Tk = q.shape[2], k.shape[2]
    member = support.member_mask(Tk).repeat_interleave(support.block, 2)[:, :, :Tq]
    sees = member & torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    sees = sees.repeat_interleave(q.shape[1] // sees.shape[1], 1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
    return torch.where(sees.any(-1, keepdim=True), out, 0.0)


def check(case, impl="reference", device="cpu", factor=2.0):
    q, k, v, support = case.inputs(device)
    scale = case.D**-0.5
    support.check(case.Tq, case.Tk)
    actual = ops.sparse_attention(q, k, v, support, scale=scale, impl=impl)
    exact = naive_sparse_attention(q, k, v, support, scale=scale)
    if impl == "reference" and device == "cuda":
        yardstick = masked_attention(q, k, v, support, scale)
    elif impl == "reference":
        yardstick = naive_sparse_attention(q, k, v, support, scale=scale, dtype=case.dtype)
    else:
        yardstick = ops.sparse_attention(q, k, v, support, scale=scale, impl="reference")
    assert actual.dtype == case.dtype
    assert_accurate(actual, exact, yardstick, factor=factor)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_as_accurate_as_the_yardstick(backend, case):
    check(backend.fit(case), backend.impl, backend.device)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_as_accurate_as_the_yardstick(backend, dtype, block):
    case = Case(B=2, Tq=33, Tk=65, D=64, Dv=64, k=24, block=block, dtype=dtype, empty=True)
    check(backend.fit(case), backend.impl, backend.device)


@given(case=SHAPES)
def test_output_matches_the_definition_for_any_shape(case):
    check(case, factor=8)  # a handful of numbers: their RMS is a noisy estimate


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_full_support_is_dense_attention(backend, block):
    q, k, v = attention_inputs(2, 4, 2, 37, 50, 16, dtype=backend.dtype(), device=backend.device)
    ends = block_ends(37, 50, block, backend.device)
    indices = torch.arange(50, device=backend.device).int().expand(2, 1, len(ends), -1).contiguous()
    support = hostile(Support(indices, (ends + 1).int().expand(2, 1, -1).contiguous(), block))
    out = ops.sparse_attention(q, k, v, support, scale=0.3, impl=backend.impl)
    options = dict(attn_mask=torch.ones(37, 50, dtype=torch.bool).tril(13), scale=0.3, enable_gqa=True)
    q, k, v = q.cpu(), k.cpu(), v.cpu()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    assert_accurate(out, exact, scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_empty_support_returns_zeros(backend, block):
    q, k, v = attention_inputs(2, 4, 2, 37, 37, 16, dtype=backend.dtype(), device=backend.device)
    rows = -(-37 // block)
    count = torch.zeros(2, 1, rows, dtype=torch.int32, device=backend.device)
    for width in (0, 5):
        indices = torch.full(
            (2, 1, rows, width), torch.iinfo(torch.int32).max, dtype=torch.int32, device=backend.device
        )
        out = ops.sparse_attention(q, k, v, Support(indices, count, block), scale=1.0, impl=backend.impl)
        assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("block", [4, 16])
def test_a_query_before_all_keys_of_its_block_gets_zeros(backend, block):
    q, k, v = attention_inputs(1, 4, 2, block, block, 16, dtype=backend.dtype(), device=backend.device)
    indices = torch.tensor([[[[2, 3]]]], dtype=torch.int32, device=backend.device)
    count = torch.tensor([[[2]]], dtype=torch.int32, device=backend.device)
    out = ops.sparse_attention(q, k, v, Support(indices, count, block), scale=1.0, impl=backend.impl)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    torch.testing.assert_close(out[:, :, 2], v[:, :, 2].repeat_interleave(2, 1))


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("per_kv", [False, True])
def test_nan_in_keys_that_no_row_selects_does_not_leak(backend, block, per_kv):
    q, k, v, support = backend.fit(Case(B=3, k=3, block=block, per_kv=per_kv, empty=True)).inputs(backend.device)
    clean = ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl)
    selected = support.member_mask(37).any(2)  # [B, Hs, Tk]
    assert not bool(selected.all())
    out = ops.sparse_attention(q, poisoned(k, selected), poisoned(v, selected), support, scale=0.25, impl=backend.impl)
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("block", [1, 16])
def test_hostile_slots_are_never_read(backend, block):
    q, k, v, support = backend.fit(Case(B=2, block=block, empty=True)).inputs(backend.device)
    tame = Support(torch.where(support.used(), support.indices, 0), support.count, block)
    expected = ops.sparse_attention(q, k, v, tame, scale=0.25, impl=backend.impl)
    assert torch.equal(ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.Tq > 16], ids=str)
def test_tiling_does_not_change_the_reference(case, monkeypatch):
    q, k, v, support = case.inputs()
    whole = ops.sparse_attention(q, k, v, support, scale=0.25)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(reference, "UNION_ROWS", 16)
    torch.testing.assert_close(ops.sparse_attention(q, k, v, support, scale=0.25), whole)


@pytest.mark.parametrize("case", [c for c in CASES if c.Tq > 16], ids=str)
def test_gathered_blocks_and_unions_agree(case):
    q, k, v, support = case.inputs()
    arguments = (q, k, v, support.indices, support.count, support.block, 0.25)
    torch.testing.assert_close(reference.gather_blocks(*arguments), reference.gather_unions(*arguments))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 37, 16)}, ValueError, r"q must have shape \(\*, \*, \*, \*\), got \(1, 37, 16\)"),
        ({"k": torch.zeros(1, 2, 37, 8)}, ValueError, r"k must have shape \(1, \*, \*, 16\), got \(1, 2, 37, 8\)"),
        ({"v": torch.zeros(1, 2, 36, 16)}, ValueError, r"v must have shape \(1, 2, 37, \*\), got \(1, 2, 36, 16\)"),
        ({"v": torch.zeros(1, 2, 37, 16).half()}, TypeError, "v must be float32, got torch.float16"),
        ({"k": torch.zeros(1, 3, 37, 16), "v": torch.zeros(1, 3, 37, 16)}, ValueError, "got 4 and 3"),
        ({"support": None}, TypeError, "support must be a Support, got NoneType"),
        (
            {"support": random_support(1, 1, 36, 37, k=4)},
            ValueError,
            r"support.indices must have shape \(1, \*, 37, \*\), got \(1, 1, 36, 4\)",
        ),
        ({"support": random_support(2, 1, 37, 37, k=4)}, ValueError, r"got \(2, 1, 37, 4\)"),
        ({"support": random_support(1, 4, 37, 37, k=4)}, ValueError, "support must have 1 or Hkv = 2 heads, got 4"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    q, k, v = attention_inputs(1, 4, 2, 37, 37, 16)
    arguments = {"q": q, "k": k, "v": v, "support": random_support(1, 1, 37, 37, k=4), **change}
    with pytest.raises(error, match=message):
        ops.sparse_attention(*arguments.values(), scale=0.25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("block, per_kv", [(1, False), (1, True), (4, False), (16, True), (64, False)])
def test_what_is_not_finite_reaches_only_the_queries_that_see_it(backend, block, per_kv, what, value):
    case = backend.fit(Case(B=2, Tq=70, Tk=90, k=24, block=block, per_kv=per_kv))
    q, k, v, support = case.inputs(backend.device)
    clean = ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl)
    exact = naive_sparse_attention(q, k, v, support, scale=0.25)
    member = support.member_mask(90).repeat_interleave(block, 2)[:, :, :70]
    sees = member & torch.ones(70, 90, dtype=torch.bool, device=backend.device).tril(20)  # [B, Hs, Tq, Tk]
    some = sees.any(2) & ~sees.all(2)  # keys that some queries see and others do not
    touched = some.nonzero()[::17]
    assert len(touched) > 1
    for b, h, s in touched.tolist():
        heads = slice(h, h + 1) if per_kv else slice(None)
        (k if what == "keys" else v)[b, heads, s, 3] = value
    hit = torch.zeros_like(sees)
    for b, h, s in touched.tolist():
        hit[b, h, :, s] = sees[b, h, :, s]
    hit = hit.any(-1).repeat_interleave(q.shape[1] // hit.shape[1], 1)  # [B, Hq, Tq]
    out = ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl)
    assert_accurate(out[~hit], exact[~hit], clean[~hit])
    if what == "values":
        assert not bool(out[..., 3][hit].isfinite().any())
    elif value != value:
        assert bool(out[hit].isnan().all())


@pytest.mark.parametrize("block", [1, 16])
def test_a_query_that_is_nan_gets_nan_and_no_other(backend, block):
    q, k, v, support = backend.fit(Case(B=2, Tq=40, Tk=40, block=block)).inputs(backend.device)
    clean = ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl)
    exact = naive_sparse_attention(q, k, v, support, scale=0.25)
    q[1, 2, 21, 5] = float("nan")
    out = ops.sparse_attention(q, k, v, support, scale=0.25, impl=backend.impl)
    member = support.member_mask(40).repeat_interleave(block, 2)[1, :, 21, :22]
    assert bool(member.any())
    assert bool(out[1, 2, 21].isnan().all())
    out[1, 2, 21] = clean[1, 2, 21]
    assert_accurate(out, exact, clean)


@pytest.mark.parametrize("tokens", [5, 24])
def test_heads_may_lie_as_a_model_hands_them_over(tokens):
    """Tokens outermost: PyTorch's attention then gives results whose heads and sequences do not merge."""
    q, k, v, support = Case(Tq=tokens, Tk=tokens, block=4, per_kv=True).inputs()
    expected = ops.sparse_attention(q, k, v, support, scale=0.25)
    swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(ops.sparse_attention(*swapped, support, scale=0.25), expected)
