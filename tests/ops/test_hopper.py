"""The CUDA C++ kernels: compiled wherever NVRTC is, run on Hopper. The operators' own tests run them too, at small sizes."""

from dataclasses import dataclass
from importlib import import_module
from itertools import product

import pytest
import torch

from npu_sparse import ops
from npu_sparse.ops import nvrtc, workspace
from npu_sparse.ops.dispatch import KernelUnavailableError
from npu_sparse.ops.hopper import is_hopper
from npu_sparse.testing import (
    assert_accurate,
    attention_inputs,
    hostile,
    index_inputs,
    naive_sparse_attention,
    naive_sparse_attention_with_tail,
    normal,
    poisoned,
    random_support,
)

attention = import_module("npu_sparse.ops.sparse_attention.hopper")
selection = import_module("npu_sparse.ops.index_scores.hopper")


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or not is_hopper(torch.device("cuda", 0)):
        pytest.skip("the Hopper kernels need a CUDA device of compute capability 9.0")
    return "cuda"


@pytest.fixture
def compiler():
    if not nvrtc.is_available():
        pytest.skip("CUDA C++ kernels need NVRTC: run `pip install nvidia-cuda-nvrtc`")


VERBOSE = ("--ptxas-options=-v", "--no-cache")  # NVRTC gives no log for a kernel from its own cache
COMMON = {"BF16": 1}
ATTEND = [
    COMMON | dict(DIM=dim, BN=steps[0], SLOTS=steps[1], STREAMS=streams, UNION=union, TAIL=tail, ARRIVING=1, PLANTED=0)
    for (dim, steps), (streams, union, tail) in product(attention.SHAPES.items(), ((1, 0, 0), (2, 0, 1), (1, 1, 0)))
]
SCORE = [
    COMMON | dict(
        STRIDE=selection._stride(block), DIM=dim, HEADS=heads, WEIGHTED=int(heads > 1), BSEL=block, SAMPLE=sample,
        COLUMNS=selection._columns(heads, dim, heads > 1, block), SLOTS=selection._slots(heads, dim, heads > 1, block),
        NORMAL=normal,
    )
    for heads, dim, block, sample, normal in (
        (1, 128, 64, 0, 0), (1, 128, 64, 1, 0), (1, 128, 16, 0, 0), (1, 256, 128, 0, 0), (1, 64, 32, 0, 0), (1, 128, 1, 0, 0),
        (1, 128, 1, 1, 0), (4, 128, 64, 0, 0), (4, 128, 1, 0, 0), (1, 128, 64, 0, 1), (1, 128, 64, 1, 1), (1, 128, 16, 0, 1),
        (1, 256, 128, 0, 1), (1, 64, 32, 0, 1), (4, 128, 64, 0, 1), (4, 128, 16, 1, 1),
    )
]  # fmt: skip
UNITE = [COMMON | {"STRIDE": 1, "THREADS": attention.UNITERS, "CHUNK": attention.CHUNK}]
AFTER = [COMMON | {"STRIDE": 16, "THREADS": selection.THREADS}]
SOURCES = {
    "sparse_attention/hopper.cu": ATTEND,
    "sparse_attention/union.cu": UNITE,
    "index_scores/hopper.cu": SCORE,
    "index_scores/candidates.cu": AFTER,
}


@pytest.mark.parametrize("source, macros", [(source, macros) for source, all_ in SOURCES.items() for macros in all_], ids=str)
def test_kernel_compiles_and_its_products_stay_asynchronous(compiler, source, macros):
    cubin, log = nvrtc.compile_source(source, macros, "sm_90a", VERBOSE)
    assert cubin.startswith(b"\x7fELF")
    assert "serialized" not in log  # ptxas waits for each product where it cannot follow the registers
    assert "bytes spill stores" in log


@pytest.mark.parametrize("macros", [macros for macros in SCORE if not macros["SAMPLE"]], ids=str)
def test_scoring_keeps_everything_in_registers(compiler, macros):
    _, log = nvrtc.compile_source("index_scores/hopper.cu", macros, "sm_90a", VERBOSE)
    assert "0 bytes spill stores, 0 bytes spill loads" in log


def test_a_mistake_in_a_kernel_is_shown_with_the_compilers_words(compiler, tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken() { nonsense(); }')
    for header in nvrtc.HEADERS:
        (tmp_path / header).write_text("")
    monkeypatch.setattr(nvrtc, "_FOLDER", tmp_path)
    with pytest.raises(nvrtc.CudaError, match="nonsense"):
        nvrtc.compiled("broken.cu", {}, "sm_90a")


def test_a_compiled_kernel_is_kept(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "cache_dir", lambda: tmp_path)
    first = nvrtc.compiled("sparse_attention/union.cu", UNITE[0], "sm_90a")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: pytest.fail("compiled twice"))
    assert nvrtc.compiled("sparse_attention/union.cu", UNITE[0], "sm_90a") == first


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    nvrtc._nvrtc.cache_clear()
    try:
        with pytest.raises(KernelUnavailableError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc._nvrtc()
    finally:
        nvrtc._nvrtc.cache_clear()


@dataclass(frozen=True)
class Attention:
    Hq: int = 8
    Hkv: int = 2
    Tq: int = 300
    Tk: int = 300
    D: int = 256
    k: int = 70
    block: int = 64
    B: int = 1
    per_kv: bool = False
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device):
        q, k, v = attention_inputs(self.B, self.Hq, self.Hkv, self.Tq, self.Tk, self.D, dtype=self.dtype, device=device)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # the memory layout that models use
        Hs = self.Hkv if self.per_kv else 1
        support = random_support(self.B, Hs, self.Tq, self.Tk, k=self.k, block=self.block, device=device, empty=True)
        return q, k, v, support


ATTENTION = [
    *(Attention(block=block) for block in (1, 2, 8, 16, 32, 128)),
    *(Attention(Hq=9, Hkv=3, D=64, block=block, k=130) for block in (1, 16, 64)),
    *(Attention(Hq=16, Hkv=4, D=128, block=block, k=130, dtype=torch.float16) for block in (1, 16, 64)),
    Attention(B=2, Tq=77, Tk=400, per_kv=True),
    Attention(B=2, Tq=77, Tk=400, per_kv=True, block=1, dtype=torch.float16),
    Attention(Hq=4, Hkv=4, Tq=130, Tk=130),  # one head a group
    Attention(Hq=16, Hkv=1, Tq=130, Tk=130, block=16),
    Attention(Hq=32, Hkv=1, Tq=70, Tk=90, block=1),
    *(Attention(Tq=T, Tk=T, k=min(T, 40)) for T in (1, 63, 64, 65)),
    *(Attention(Tq=T, Tk=T, k=min(T, 40), block=1) for T in (1, 63, 64, 65)),
    Attention(Tq=40, Tk=100003, k=2048, block=16),
    Attention(Tq=40, Tk=100003, k=512, block=1),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_is_as_accurate_as_the_reference(hopper, case):
    q, k, v, support = case.inputs(hopper)
    scale = case.D**-0.5
    assert attention.serves(q, k, v, case.block, scale)
    actual = ops.sparse_attention(q, k, v, support, scale=scale, impl="kernel")
    exact = naive_sparse_attention(q, k, v, support, scale=scale)
    assert_accurate(actual, exact, ops.sparse_attention(q, k, v, support, scale=scale, impl="reference"))


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_with_a_tail_is_as_accurate_as_the_reference(hopper, case):
    q, k, v, support = case.inputs(hopper)
    scale = case.D**-0.5
    actual = ops.sparse_attention_with_tail(q, k, v, support, scale=scale, impl="kernel")
    exact = naive_sparse_attention_with_tail(q, k, v, support, scale=scale)
    assert_accurate(actual, exact, ops.sparse_attention_with_tail(q, k, v, support, scale=scale, impl="reference"))


@pytest.mark.parametrize("block", [1, 16, 64])
def test_attention_reads_no_key_that_nobody_selects(hopper, block):
    q, k, v, support = Attention(block=block).inputs(hopper)
    selected = support.member_mask(k.shape[2]).any(2)
    poison = (poisoned(k, selected), poisoned(v, selected))
    assert torch.equal(
        ops.sparse_attention(q, *poison, support, scale=0.1, impl="kernel"),
        ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel"),
    )


@pytest.mark.parametrize("block", [1, 16, 64])
def test_attention_writes_every_output_and_is_deterministic(hopper, block, monkeypatch):
    q, k, v, support = Attention(block=block, Tq=1000, Tk=1000, k=200).inputs(hopper)
    first = ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel")
    made = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: made(x, *a, **k).fill_(float("nan")))
    for _ in range(3):
        assert torch.equal(ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel"), first)


def test_unions_in_several_launches_give_the_same(hopper, monkeypatch):
    q, k, v, support = Attention(block=1, Tq=1000, Tk=1000, k=200, B=2).inputs(hopper)
    whole = ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel")
    monkeypatch.setattr(workspace, "SIZE", 1 << 17)
    assert torch.equal(ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel"), whole)


def test_tensors_that_wide_copies_cannot_read_are_tritons(hopper):
    q, k, v, support = Attention().inputs(hopper)
    shifted = torch.zeros(k.numel() + 1, dtype=k.dtype, device=hopper)[1:].view(k.shape).copy_(k)
    assert not attention.serves(q, shifted, v, 64, 0.1)
    exact = naive_sparse_attention(q, k, v, support, scale=0.1)
    yardstick = ops.sparse_attention(q, k, v, support, scale=0.1, impl="reference")
    assert_accurate(ops.sparse_attention(q, shifted, v, support, scale=0.1, impl="kernel"), exact, yardstick)


@dataclass(frozen=True)
class Selection:
    Tq: int = 4096
    Tk: int = 4096
    Di: int = 128
    Hi: int = 1
    k: int = 128
    block: int = 64
    sink: int = 0
    recent: int = 0
    B: int = 1
    weighted: bool = False
    levels: int = 0  # most scores tie
    shift: float | None = None  # softmax_max: how far log-partitions differ from query to query
    loud: float = 0.0  # this one of eight queries scores 50 times what the others do
    opposed: bool = False  # no query agrees with any key: all scores are floors
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device):
        qi, ki, w = index_inputs(self.B, self.Hi, self.Tq, self.Tk, self.Di)
        if self.levels:
            qi, ki = qi.sign() * (qi.abs() > 2), (ki * self.levels / 2).round()
        if self.loud:
            qi[:, :, ::8] *= self.loud
        if self.opposed:
            qi, ki = -qi.abs(), ki.abs()
        qi, ki, w = (x.to(device, self.dtype) for x in (qi, ki, w))
        return qi, ki, w if self.weighted else None

    def options(self, device="cuda"):
        options = dict(k=self.k, block=self.block, sink=self.sink, recent=self.recent)
        if self.shift is None:
            return options
        own = normal(self.B, self.Tq, seed=11, device=device) * self.shift
        return options | dict(reduce="softmax_max", partition=(own * 4).round() / 4)  # times sqrt(Di) of 64 or 256 it is exact


SELECTION = [
    *(Selection(block=block) for block in (1, 16, 32, 64, 128)),
    *(Selection(block=block, sink=4, recent=40, k=200, B=2, Tq=1001, Tk=4500) for block in (1, 16, 64)),
    *(Selection(block=block, Hi=4, weighted=True, Tq=2000) for block in (1, 16, 64)),
    *(Selection(block=block, Hi=2, Tq=1000) for block in (1, 64)),
    *(Selection(block=block, Di=256) for block in (1, 64)),
    *(Selection(block=block, Di=64, Hi=8, weighted=True, Tq=1000, dtype=torch.float16) for block in (1, 64)),
    *(Selection(block=block, levels=1) for block in (1, 16, 64)),
    *(Selection(Tq=T, Tk=T, k=2048) for T in (1, 63, 64, 65)),
    *(Selection(Tq=T, Tk=T, k=2048, block=1) for T in (1, 63, 64, 65)),
    Selection(Tq=65, Tk=100003, k=2048, sink=4, recent=64),
    Selection(Tq=65, Tk=100003, k=2048, sink=4, recent=64, block=1),
    Selection(Tq=200, Tk=20000, k=8192),
    # each query's scores less its own log-partition
    *(Selection(block=block, shift=3.0) for block in (16, 32, 64, 128)),
    *(Selection(block=block, shift=3.0, Tq=77, Tk=77, k=16) for block in (16, 64, 128)),  # all tiles are causal
    *(Selection(block=block, shift=3.0, sink=4, recent=40, k=200, B=2, Tq=1001, Tk=4500) for block in (16, 64)),
    *(Selection(block=block, shift=3.0, Hi=4, weighted=True, Tq=2000) for block in (16, 64)),
    *(Selection(block=block, shift=3.0, Hi=2, Tq=1000) for block in (16, 64)),
    *(Selection(block=block, shift=3.0, Di=256) for block in (16, 64, 128)),
    *(Selection(block=block, shift=3.0, Di=64, Hi=1, Tq=1000, dtype=torch.float16) for block in (16, 32, 64)),
    *(Selection(block=block, shift=2.0, Di=256, levels=1) for block in (16, 64)),
    *(Selection(block=block, shift=2.0, Di=64, levels=1, Tq=1001, Tk=3000) for block in (16, 64)),
    *(Selection(block=block, shift=2.0, opposed=True, Di=64, Tq=1001, Tk=3000) for block in (16, 64, 128)),  # floors alone
    *(Selection(block=block, shift=300.0, levels=1, Di=64, Tq=1001, Tk=3000) for block in (16, 64)),  # one query owns each block
    *(Selection(block=block, shift=40.0, levels=1, loud=50.0, Di=256, Tq=1001, Tk=3000) for block in (16, 64)),
    *(Selection(Tq=T, Tk=T, k=2048, shift=3.0) for T in (1, 63, 64, 65)),
    Selection(Tq=65, Tk=100003, k=2048, sink=4, recent=64, shift=3.0),
]


def exact_scores(qi, ki, w, block, partition=None):
    """Unscaled scores in float64 `[B, Nq, Tk]`, reduced by maximum; the kernels leave the common factor out too."""
    B, Hi, Tq, Di = qi.shape
    Tk = ki.shape[1]
    z = sum(
        (qi[:, h].double() @ ki.double().transpose(1, 2)).relu() * (1 if w is None else w[:, :, h, None].double())
        for h in range(Hi)
    )
    if partition is not None:
        z -= partition[..., None].double() * Di**0.5
    position = torch.arange(Tk - Tq, Tk, device=qi.device)
    z.masked_fill_(torch.arange(Tk, device=qi.device) > position[:, None], float("-inf"))
    return torch.nn.functional.pad(z, (0, 0, 0, -Tq % block), value=float("-inf")).unflatten(1, (-1, block)).amax(2)


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_selection_is_the_top_k_of_exact_scores(hopper, case):
    qi, ki, w = case.inputs(hopper)
    options = case.options(hopper)
    assert selection.serves(qi, ki, w, case.k, case.block, options.get("reduce", "max"), case.sink, case.recent, None)
    support = ops.select_by_index(qi, ki, w, **options, impl="kernel").check(case.Tq, case.Tk)
    scores = exact_scores(qi, ki, w, case.block, options.get("partition"))
    best = ops.select_tokens(
        scores.float(), k=case.k, sink=case.sink, recent=case.recent, block=case.block, queries=case.Tq, impl="reference"
    )
    assert torch.equal(support.count, best.count)
    chosen, wanted = support.member_mask(case.Tk)[:, 0], best.member_mask(case.Tk)[:, 0]
    differ = (chosen != wanted).any(-1)
    if case.levels or case.opposed:
        assert not differ.any()  # small integers and floors are exact: ties go to the smaller position
    # scores less a shift round like the shift, so the last two candidates of more rows are within rounding
    assert differ.float().mean() < (0.01 if case.shift is None else 0.05)
    rounding = 0.0 if case.shift is None else 2e-6 * float(options["partition"].abs().max()) * case.Di**0.5
    worst = scores.masked_fill(~chosen, float("inf")).amin(-1)[differ]
    least = scores.masked_fill(~wanted, float("inf")).amin(-1)[differ]
    assert (worst >= least - 1e-5 * least.abs() - rounding).all()  # the keys taken instead are as good within rounding


@pytest.mark.parametrize("block, shift", [(1, None), (64, None), (16, 3.0), (64, 3.0)])
@pytest.mark.parametrize("place", [1, 10**6], ids=["too few candidates", "too many"])
def test_rows_with_an_unlucky_threshold_are_selected_all_the_same(hopper, monkeypatch, block, shift, place):
    case = Selection(Tq=512, Tk=8192, block=block, k=100, sink=2, recent=5, shift=shift)
    qi, ki, w = case.inputs(hopper)
    expected = ops.select_by_index(qi, ki, w, **case.options(), impl="kernel")
    capacity = selection._capacity(case.k, case.sink, case.recent, case.block)
    monkeypatch.setattr(selection, "_capacity", lambda *_: capacity)
    monkeypatch.setattr(selection, "_place", lambda *_: place)
    rescued = ops.select_by_index(qi, ki, w, **case.options(), impl="kernel")
    assert (rescued.indices == expected.indices).float().mean() > 0.999  # another order of additions
    assert torch.equal(rescued.count, expected.count)


@pytest.mark.parametrize("block, shift", [(1, None), (64, None), (64, 3.0), (16, 3.0)])
def test_selection_by_pieces_gives_the_same(hopper, monkeypatch, block, shift):
    case = Selection(block=block, Tq=3000, Tk=5000, shift=shift)
    qi, ki, w = case.inputs(hopper)
    whole = ops.select_by_index(qi, ki, w, **case.options(), impl="kernel")
    monkeypatch.setattr(workspace, "SIZE", 1 << 18)
    pieces = ops.select_by_index(qi, ki, w, **case.options(), impl="kernel")
    assert torch.equal(pieces.indices, whole.indices) and torch.equal(pieces.count, whole.count)


@pytest.mark.parametrize("block, shift", [(1, None), (64, None), (64, 3.0)])
def test_selection_is_deterministic(hopper, block, shift):
    case = Selection(block=block, levels=1, shift=shift)
    qi, ki, w = case.inputs(hopper)
    first = ops.select_by_index(qi, ki, w, **case.options(), impl="kernel").indices
    assert all(torch.equal(ops.select_by_index(qi, ki, w, **case.options(), impl="kernel").indices, first) for _ in range(3))


def test_what_the_kernels_do_not_take_is_selected_by_slices(hopper):
    qi, ki, _ = Selection(Tq=100, Tk=100).inputs(hopper)
    valid = torch.ones(1, 100, dtype=torch.bool, device=hopper)
    assert not selection.serves(qi, ki, None, 10, 64, "mean", 0, 0, None)
    assert not selection.serves(qi, ki, None, 10, 64, "max", 0, 0, valid)
    assert not selection.serves(qi, ki, None, 10, 8, "max", 0, 0, None)
    assert not selection.serves(qi, ki, None, 10, 1, "softmax_max", 0, 0, None)  # which is "max"
    assert not selection.serves(qi, ki, None, 10, 8, "softmax_max", 0, 0, None)
    for options in (dict(reduce="mean"), dict(valid=valid), dict(block=8), dict(reduce="softmax_max", valid=valid)):
        ops.select_by_index(qi, ki, k=10, **{"block": 64, **options}, impl="kernel").check(100, 100)


def test_hostile_slots_are_never_read(hopper):
    q, k, v, support = Attention(block=16).inputs(hopper)
    other = hostile(type(support)(support.indices.flip(-1).where(~support.used(), support.indices), support.count, support.block))
    assert torch.equal(
        ops.sparse_attention(q, k, v, support, scale=0.1, impl="kernel"),
        ops.sparse_attention(q, k, v, other, scale=0.1, impl="kernel"),
    )
