import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import Support, ops
from npu_sparse.ops import KernelUnavailableError, dispatch, workspace
from npu_sparse.ops.select_two_level.blocks import block_bounds, blocks_scored, sink_blocks
from npu_sparse.testing import (
    DTYPES,
    assert_accurate,
    index_inputs,
    naive_select_two_level,
    padding,
    plain_products,
    whole_index_inputs,
)

reference = import_module("npu_sparse.ops.select_two_level.reference")


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hi: int = 1
    Tq: int = 300
    Tk: int = 300
    Di: int = 16
    k: int = 20
    candidates: int = 32
    key_block: int = 16
    block: int = 64
    reduce: str = "max"
    sink: int = 0
    recent: int = 0
    weighted: bool = False
    side: str | None = None
    strided: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, device="cpu", make=whole_index_inputs):
        qi, ki, w = make(
            self.B, self.Hi, self.Tq, self.Tk, self.Di, dtype=self.dtype, device=device, seed=self.seed, strided=self.strided
        )
        return qi, ki, w if self.weighted else None

    def options(self, device="cpu"):
        names = ("k", "candidates", "key_block", "block", "reduce", "sink", "recent")
        valid = padding(self.B, self.Tk, self.side, device=device) if self.side else None
        own = None
        if self.reduce == "softmax_max":  # quarters are exact, like the scores
            own = torch.randint(-40, 40, (self.B, self.Tq), generator=torch.Generator().manual_seed(self.seed)) / 4
            own = own.to(device)
        return {**{name: getattr(self, name) for name in names}, "valid": valid, "partition": own}


CASES = [
    Case(),
    Case(Tq=37, Tk=300),
    Case(Tq=1, Tk=200, B=2),
    Case(Tq=17, block=1, k=9),
    Case(Tq=70, block=16, Hi=3, weighted=True, B=2, Di=64),
    Case(block=128, Tq=150, Tk=400, k=32),
    Case(Tq=70, block=8, side="left", B=2, Hi=2, weighted=True, strided=True),
    Case(block=64, side="right", B=3, strided=True, sink=3),
    Case(Tq=66, block=8, sink=4, recent=9, k=24, Tk=350),
    Case(block=64, sink=20, recent=30, k=120, candidates=120, side="left", B=2, Tk=400),
    Case(Tq=64, Tk=320, block=32, recent=2, k=40, candidates=40),
    Case(key_block=64, block=32, candidates=70, k=40, Tq=129, Tk=450),
    Case(key_block=32, candidates=64, k=64, Tk=333),
    Case(key_block=128, candidates=1, k=1, block=2, Tq=20, Tk=640),
    Case(reduce="softmax_max"),
    Case(reduce="softmax_max", Tq=17, block=1, k=9),
    Case(reduce="softmax_max", Tq=70, block=8, side="left", B=2, Hi=2, weighted=True, strided=True, sink=4, recent=9, k=24),
    Case(reduce="softmax_max", block=128, Tq=150, Tk=400, k=32, Hi=3),
]
SHAPES = st.builds(
    Case,
    B=st.integers(1, 2), Hi=st.integers(1, 2), Tq=st.integers(1, 130), Tk=st.integers(130, 260), Di=st.just(4),
    k=st.integers(1, 30), candidates=st.integers(30, 60), key_block=st.sampled_from([16, 32]),
    block=st.sampled_from([1, 8, 64, 128]), weighted=st.booleans(), side=st.sampled_from([None, "left", "right"]),
    reduce=st.sampled_from(["max", "softmax_max"]), seed=st.integers(0, 9),
)  # fmt: skip


@pytest.fixture
def two_level(backend):
    """The backend; skips where it has no kernel for this operator, with the sentence that a user gets."""
    if backend.impl == "kernel" and dispatch._kernel("select_two_level", backend.device) is None:
        with pytest.raises(KernelUnavailableError, match="select_two_level has no kernel on .*pass impl='reference'") as refusal:
            qi, ki, w = index_inputs(1, 1, 300, 300, 16, dtype=backend.dtype(), device=backend.device)
            ops.select_two_level(qi, ki, k=8, candidates=16, key_block=16, impl="kernel")
        pytest.skip(str(refusal.value))
    return backend


def run(case, impl="reference", device="cpu", make=whole_index_inputs):
    """The operator itself, without the public function's detour where every block would belong."""
    qi, ki, w = case.inputs(device, make)
    o = case.options(device)
    indices, count = dispatch.call(
        "select_two_level", impl, device, qi, ki, w, o["k"], o["candidates"], o["key_block"], o["block"], o["reduce"],
        o["sink"], o["recent"], o["valid"], o["partition"],
    )  # fmt: skip
    return Support(indices, count, case.block).check(case.Tq, case.Tk)


def assert_same(actual, expected):
    assert torch.equal(actual.count.cpu(), expected.count.cpu())
    used = expected.used().cpu()
    assert torch.equal(actual.indices.cpu()[used], expected.indices.cpu()[used])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_support_is_that_of_the_definition(two_level, case):
    case = two_level.fit(case)
    actual = run(case, two_level.impl, two_level.device)
    qi, ki, w = case.inputs(two_level.device)
    assert actual.width == min(case.k, case.Tk)
    assert_same(actual, naive_select_two_level(qi, ki, w, **case.options(two_level.device)))


@given(case=SHAPES)
def test_support_is_that_of_the_definition_for_any_shape(case):
    qi, ki, w = case.inputs()
    assert_same(run(case), naive_select_two_level(qi, ki, w, **case.options()))


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_with_every_key_a_candidate_it_is_select_by_index(two_level, case):
    case = replace(two_level.fit(case), candidates=case.Tk)
    options = case.options(two_level.device)
    qi, ki, w = case.inputs(two_level.device)
    public = ops.select_two_level(qi, ki, w, impl=two_level.impl, **options)
    del options["candidates"], options["key_block"]
    one_level = ops.select_by_index(qi, ki, w, impl=two_level.impl, **options)
    assert_same(run(case, two_level.impl, two_level.device), one_level)
    assert_same(public, one_level)


@given(case=SHAPES)
def test_with_every_key_a_candidate_it_is_select_by_index_for_any_shape(case):
    qi, ki, w = case.inputs()
    options = case.options()
    del options["candidates"], options["key_block"]
    assert_same(run(replace(case, candidates=case.Tk)), ops.select_by_index(qi, ki, w, **options))


# The scores of both levels, on data that is not exact


def scores_of(backend):
    """The module with the back-end's scoring functions."""
    return reference if backend.impl == "reference" else import_module("npu_sparse.ops.select_two_level.triton")


def naive_block_scores(case, device, dtype, products=None):
    """Ranks of the blocks that lie before a group, by definition, in `dtype`; NaN for all others. `products` as for scores."""
    qi, ki, w = case.inputs(device, index_inputs)
    options = case.options(device)
    bounds = block_bounds(ki, case.key_block, options["valid"])
    group, Nc = max(case.block, 64), bounds.shape[1]
    out = torch.full((case.B, -(-case.Tq // group), Nc), float("nan"), dtype=dtype, device=device)
    for n in range(out.shape[1]):
        before = (case.Tk - case.Tq + n * group) // case.key_block
        rows = slice(n * group, (n + 1) * group)
        z = 0
        for h in range(case.Hi):
            if products is not None:
                q = qi[:, h, rows]
                part = products(torch.cat([q.clamp(min=0), q.clamp(max=0)], -1), bounds[:, :before].flatten(2)).clamp(min=0)
            else:
                q = qi[:, h, rows].to(dtype)[:, :, None]  # [B, R, 1, Di]
                high, low = bounds[:, None, :before].to(dtype).unbind(3)
                part = torch.where(q > 0, q * high, q * low).sum(-1).clamp(min=0)
            z = z + (part if w is None else part * w[:, rows, h, None].to(dtype))
        out[:, n, :before] = z.amax(1)
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_are_of_the_valid_keys_of_a_block(two_level, dtype, padded):
    ki = index_inputs(2, 1, 1, 53, 24, dtype=two_level.dtype(dtype), device=two_level.device, strided=True)[1]
    position = torch.arange(53, device=ki.device)
    valid = ((position % 7 > 2) & (position // 16 != 1)).expand(2, -1) if padded else None
    hidden = torch.zeros_like(position, dtype=torch.bool) if valid is None else ~valid[0]
    ki.masked_fill_(hidden[:, None], float("nan"))
    bounds = scores_of(two_level).block_bounds(ki, 16, valid)
    exact, naive = torch.zeros(2, 2, 4, 2, 24, dtype=torch.float64, device=ki.device)
    for into, precision in ((exact, torch.float64), (naive, torch.float32)):
        for n in range(4):
            keys = ki[:, 16 * n : 16 * n + 16][:, ~hidden[16 * n : 16 * n + 16]].to(precision)
            if keys.shape[1]:
                mean = keys.mean(1)
                into[:, n] = torch.stack([(mean + keys.amax(1)) / 2, (mean + keys.amin(1)) / 2], 1).to(precision)
    assert bounds.dtype == ki.dtype
    assert_accurate(bounds, exact, naive.to(ki.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_ranked_as_accurately_as_the_yardstick(two_level, dtype):
    case = two_level.fit(Case(B=2, Hi=3, Tq=130, Tk=400, Di=64, block=16, weighted=True, dtype=dtype))
    device = two_level.device
    qi, ki, w = case.inputs(device, index_inputs)
    bounds, sinks = block_bounds(ki, 16, None), sink_blocks(2, 400, 16, 0, None, device)
    actual = scores_of(two_level).block_scores(qi, bounds, w, sinks, 270, 16, 64, 0, None)
    exact, *naive = (naive_block_scores(case, device, dtype) for dtype in (torch.float64, torch.float32))
    if device == "cuda":
        naive.append(naive_block_scores(case, device, torch.float32, plain_products))
    competing = ~exact.isnan() & ~sinks[:, None]
    assert int(competing.sum()) == 2 * (15 + 19 + 23)
    assert_accurate(actual[competing], exact[competing], *(each[competing] for each in naive))
    rest = actual[~competing]  # blocks of the first keys, of the group and ahead of it
    assert set(rest[rest.isfinite()].tolist()) == {torch.finfo(torch.float32).max}
    assert bool((actual[:, :, -1] == torch.tensor([float("-inf")] + [float("inf")] * 2, device=device)).all())


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("dtype, side", list(zip(DTYPES, (None, "left", None))), ids=str)
def test_candidates_are_scored_as_accurately_as_the_yardstick(two_level, dtype, side, reduce):
    case = two_level.fit(
        Case(B=2, Hi=3, Tq=100, Tk=300, Di=64, block=16, weighted=True, reduce=reduce, side=side, dtype=dtype)
    )
    device = two_level.device
    qi, ki, w = case.inputs(device, index_inputs)
    valid = case.options(device)["valid"]
    chosen = torch.tensor([[[0, 3, 8, 15, 16], [1, 2, 17, 18, 9]]] * 2, dtype=torch.int32, device=device)
    held = torch.tensor([[5, 4]] * 2, dtype=torch.int32, device=device)
    actual = scores_of(two_level).candidate_scores(
        qi, ki, w, chosen, held, 200, 16, 16, 64, reduce, 0, 0, valid
    )  # [2, 7, 80]
    valid = torch.ones(2, 300, dtype=torch.bool, device=device) if valid is None else valid
    naive = [torch.cat([
        naive_candidate_scores(qi[:, :, rows], ki, w[:, rows], chosen[0, n, : held[0, n]], 200 + rows.start, reduce, valid, dtype)
        for n, rows in enumerate((slice(0, 64), slice(64, 100)))
    ], 1) for dtype in (torch.float64, dtype)]  # fmt: skip
    assert_accurate(actual, *naive)


def naive_candidate_scores(qi, ki, w, blocks, position, reduce, valid, dtype):
    """The scores of five blocks' keys for one group, in rows of 16 queries, by definition: `[B, Nq, 80]`."""
    B, Hi, R, Di = qi.shape
    key = (blocks[:, None] * 16 + torch.arange(16, device=qi.device)).flatten().long()
    inside, key = key < ki.shape[1], key.clamp(max=ki.shape[1] - 1)
    sees = (key <= position + torch.arange(R, device=qi.device)[:, None]) & inside & valid[:, None, key]
    sees = sees & valid[:, position : position + R, None]
    z = 0
    for h in range(Hi):
        z = z + (qi[:, h].to(dtype) @ ki[:, key].to(dtype).mT / Di**0.5).clamp(min=0) * w[:, :, h, None].to(dtype)
    if reduce == "mean":
        z = (z if dtype == torch.float64 else z.float()).masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0)
    out = torch.full((B, -(-R // 16), 80), float("-inf"), dtype=z.dtype, device=qi.device)
    for n in range(out.shape[1]):
        part, seen = z[:, n * 16 : (n + 1) * 16], sees[:, n * 16 : (n + 1) * 16]
        if reduce == "mean":
            row = part.sum(1) / seen.any(-1).sum(-1, keepdim=True).clamp(min=1)
        else:
            row = part.masked_fill(~seen, float("-inf")).amax(1)
        out[:, n, : len(key)] = row.masked_fill(~seen.any(1), float("-inf"))
    return out


def test_the_mean_chooses_among_the_same_candidates(two_level):
    case = two_level.fit(Case(Tq=70, block=16, k=200, candidates=32, Hi=2))  # more slots than candidates: all of them
    assert_same(run(replace(case, reduce="mean"), two_level.impl, two_level.device), run(case, two_level.impl, two_level.device))


def test_nan_in_padding_does_not_leak(two_level):
    case = two_level.fit(Case(B=2, side="left", reduce="mean", Tq=100, sink=2, recent=3, k=80, candidates=80))
    qi, ki, w = case.inputs(two_level.device)
    options = case.options(two_level.device)
    clean = ops.select_two_level(qi, ki, w, impl=two_level.impl, **options)
    valid = options["valid"]
    ki = ki.masked_fill(~valid[..., None], float("nan"))
    qi = qi.masked_fill(~valid[:, None, -100:, None], float("nan"))
    assert_same(ops.select_two_level(qi, ki, w, impl=two_level.impl, **options), clean)


def test_a_padded_prompt_selects_what_it_selects_alone(two_level):
    case = two_level.fit(Case(Tq=240, Tk=240, key_block=16, sink=1, k=24))
    qi, ki, _ = case.inputs(two_level.device)
    options = case.options(two_level.device)
    alone = ops.select_two_level(qi, ki, impl=two_level.impl, **options)
    qi, ki = (torch.nn.functional.pad(x, (0, 0, 0, 64), value=float("nan")) for x in (qi, ki))
    options["valid"] = torch.arange(304, device=two_level.device)[None] < 240
    padded = ops.select_two_level(qi, ki, impl=two_level.impl, **options)
    assert torch.equal(padded.count[:, :, :4], alone.count)
    assert torch.equal(padded.member_mask(304)[:, :, :4, :240], alone.member_mask(240))
    assert not bool(padded.count[:, :, 4:].any())


def test_the_last_chunk_of_a_prompt_selects_what_the_whole_prompt_does(two_level):
    case = two_level.fit(Case(Tq=300, Tk=300, block=32, Hi=2, weighted=True))
    qi, ki, w = case.inputs(two_level.device)
    options = case.options(two_level.device)
    whole = ops.select_two_level(qi, ki, w, impl=two_level.impl, **options)
    chunk = ops.select_two_level(qi[:, :, 192:], ki, w[:, 192:], impl=two_level.impl, **options)
    assert_same(chunk, Support(whole.indices[:, :, 6:], whole.count[:, :, 6:], 32))


def test_slices_of_queries_do_not_change_the_support(two_level, monkeypatch):
    case = two_level.fit(Case(Tq=130, Tk=200, B=2, block=32, Hi=2, weighted=True, side="right"))
    whole = run(case, two_level.impl, two_level.device)
    monkeypatch.setattr(workspace, "SIZE", 4)  # one group at a time
    assert_same(run(case, two_level.impl, two_level.device), whole)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_tiling_does_not_change_the_reference(case, monkeypatch):
    whole = run(case)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)
    assert_same(run(case), whole)


def test_slots_that_nobody_means_may_hold_anything(two_level):
    scoring, device = scores_of(two_level), two_level.device
    case = two_level.fit(Case(Tq=64, Tk=200))
    qi, ki, _ = case.inputs(device)
    chosen = torch.tensor([[[0, 8, 12, 5, 6]]], dtype=torch.int32, device=device)
    held = torch.tensor([[3]], dtype=torch.int32, device=device)
    hostile = chosen.clone()
    hostile[..., 3:] = torch.tensor([-1, torch.iinfo(torch.int32).max], device=device)
    scores = [
        scoring.candidate_scores(qi, ki, None, blocks, held, 136, 16, 64, 64, "max", 0, 0, None) for blocks in (chosen, hostile)
    ]
    assert torch.equal(*scores) and bool((scores[0][..., 48:] == float("-inf")).all())
    slots = torch.tensor([[[1, 16, 47, -1], [0, torch.iinfo(torch.int32).max, 3, 4]]], dtype=torch.int32, device=device)
    count = torch.tensor([[[3, 1]]], dtype=torch.int32, device=device)
    keys = scoring.keys_of_slots(slots, count, hostile, 16, 2)
    assert keys[0, 0, :3].tolist() == [1, 128, 207] and keys[0, 1, 0] == 0


def test_the_group_itself_is_scored_even_where_padding_scatters_the_sinks(two_level):
    """Every fourth block holds one valid key only, so that eight sinks lie in eight blocks: more than have room."""
    case = two_level.fit(Case(Tq=64, Tk=640, k=72, candidates=72, sink=8, recent=1, block=4))
    qi, ki, _ = case.inputs(two_level.device)
    position = torch.arange(640, device=two_level.device)
    valid = ((position % 64 == 5) | (position >= 560))[None]
    options = {**case.options(two_level.device), "valid": valid}
    support = ops.select_two_level(qi, ki, impl=two_level.impl, **options).check(64, 640)
    member = support.member_mask(640)[0, 0].cpu()
    assert all(bool(member[t // 4, 576 + t]) for t in range(64))  # the recent key of every query
    assert bool(member[:, 5].all())


def test_a_support_fills_up_where_candidates_equal_k(two_level):
    case = two_level.fit(Case(Tq=300, Tk=300, k=64, candidates=64, key_block=32))
    support = run(case, two_level.impl, two_level.device)
    assert support.count.flatten().tolist() == [64] * 5


def test_every_block_belongs_where_there_are_few():
    assert blocks_scored(100, 64, 64, 64, 0, 0) == 2
    assert blocks_scored(6400, 640, 64, 64, 0, 0) == 10 + 1 + 2  # one block of the first key; the group may touch two
    assert blocks_scored(6400, 641, 64, 16, 65, 66) == 11 + 2 + 3
    assert blocks_scored(6400, 640, 16, 128, 0, 0) == 40 + 1 + 9


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"qi": torch.zeros(1, 200, 16)}, ValueError, r"qi must have shape \(\*, \*, \*, \*\), got \(1, 200, 16\)"),
        ({"ki": torch.zeros(1, 200, 16).half()}, TypeError, "ki must be float32, got torch.float16"),
        ({"ki": torch.zeros(1, 199, 16)}, ValueError, "got Tq = 200, Tk = 199"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": 8, "sink": 9}, ValueError, "k must hold the keys that are always kept"),
        ({"candidates": 15}, ValueError, r"candidates must hold the k keys chosen of them \(16\), got 15"),
        ({"key_block": 48}, ValueError, "key_block must be one of 16, 32, 64, 128, got 48"),
        ({"block": 3}, ValueError, "block must be one of 1, 2, 4, 8, 16, 32, 64, 128, got 3"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of max, mean, softmax_max, got 'sum'"),
        ({"reduce": "softmax_max"}, ValueError, "partition must be given for softmax_max in two levels, got None"),
        ({"valid": torch.ones(2, 200).bool()}, ValueError, r"valid must have shape \(1, 200\), got \(2, 200\)"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    qi, ki, _ = index_inputs(1, 2, 200, 200, 16)
    arguments = {"qi": qi, "ki": ki, "k": 16, "candidates": 32, "key_block": 16, **change}
    with pytest.raises(error, match=message):
        ops.select_two_level(arguments.pop("qi"), arguments.pop("ki"), **arguments)


def test_the_operator_is_one_stage():
    names = []

    def stage(name):
        names.append(name)
        return torch.inference_mode()

    qi, ki, _ = index_inputs(1, 1, 300, 300, 16)
    ops.select_two_level(qi, ki, k=8, candidates=16, key_block=16, stage=stage)
    assert names == ["scoring"]
    ops.select_two_level(qi, ki, k=8, candidates=300, key_block=16, stage=stage)
    assert names == ["scoring", "scoring", "top-k"]  # one level


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from npu_sparse.ops.select_two_level import triton as kernels

POINTERS = dict(qi="*bf16", ki="*bf16", w="*bf16", bounds="*bf16", kinds="*u8", valid="*u8", chosen="*i32", held="*i32",
                ends="*i32", norm="*fp32", out="*fp32", slots="*i32", count="*i32")

def compile(kernel, **constants):
    names = list(inspect.signature(kernel.fn).parameters)
    pointers = dict(POINTERS, out={kernels._place: "*i32", kernels._bound: "*bf16"}.get(kernel, "*fp32"))
    types = {n: "constexpr" if n in constants else pointers.get(n, "fp32" if n == "scale" else "i32") for n in names}
    places = {(names.index(n),): value for n, value in constants.items()}
    made = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    print(kernel.fn.__name__, len(made.asm["cubin"]), made.metadata.shared)

for HI, PADDED, MEAN, NORMAL in ((1, False, False, True), (4, True, True, False)):
    common = dict(HI=HI, D=128, DP=128, WEIGHTED=HI > 1, PADDED=PADDED, PRECISION="tf32", q_d=1, w_h=1, v_t=1)
    compile(kernels._bound, C=64, D=128, DP=128, PADDED=PADDED, k_d=1, v_t=1)
    compile(kernels._rank, ROWS=64, COLS=64, NORMAL=NORMAL, **common)
    common.update(ROWS=64, C=64, k_d=1)
    compile(kernels._score, SPLIT=16, MEAN=MEAN, NORMAL=NORMAL, SINK=4, RECENT=64, **common)
    if MEAN:
        compile(kernels._normalise, **common)
compile(kernels._place, BN=2048)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed: run `make test-triton`")
def test_interpreted_kernels_compile_for_a_gpu_too():
    """In bf16, which the interpreter cannot multiply; a compiler for it comes with Triton, and no GPU is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in compiled] == [
        "_bound", "_rank", "_score", "_bound", "_rank", "_score", "_normalise", "_place"
    ]  # fmt: skip
    assert all(int(size) > 0 and int(shared) <= 232448 for _, size, shared in compiled)


@pytest.mark.parametrize("block", [1, 16])
def test_what_is_not_finite_pushes_out_nothing_that_is_always_kept(two_level, block):
    case = two_level.fit(Case(Tq=200, Tk=300, k=40, candidates=64, key_block=16, block=block, sink=3, recent=5, weighted=True))
    qi, ki, w = case.inputs(two_level.device)
    o = case.options(two_level.device)
    clean = ops.select_two_level(qi, ki, w, impl=two_level.impl, **o).member_mask(300)
    ki[:, 1], ki[:, 150], w[:, 120] = float("nan"), float("nan"), float("inf")
    member = ops.select_two_level(qi, ki, w, impl=two_level.impl, **o).check(200, 300).member_mask(300)[0, 0].cpu()
    reference = ops.select_two_level(qi.cpu(), ki.cpu(), w.cpu(), impl="reference", **o).member_mask(300)[0, 0]
    assert torch.equal(member, reference) and bool(clean.any())
    first = torch.arange(100, 300, block)
    position = torch.arange(300)
    recent = (position > first[:, None] - 5) & (position < first[:, None] + block)
    assert bool(member[:, :3].all()) and bool(member[recent].all())
    assert not bool(member[~recent[:, 150], 150].any())
