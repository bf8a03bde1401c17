"""index_heads against float64, and what it serves: an IndexHead whose projections are one product."""

import copy
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from npu_sparse import ops
from npu_sparse.indexer import IndexerConfig, IndexHead
from npu_sparse.models.index_head import FusedIndexHead
from npu_sparse.ops import dispatch
from npu_sparse.testing import DTYPES, assert_accurate, normal


@dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 37
    heads: int = 1
    Di: int = 64
    R: int = 64
    H: int = 40
    weighted: bool = False
    learned: bool = True
    batched_angles: bool = False
    start: int = 0
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu"):
        """`(queries, keys, weights, dots, hidden, cos, sin)` as parts of one product, and the keywords."""
        sizes = [self.heads * self.Di, self.Di, self.heads, 1, 3]
        mixed = normal(self.B, self.T, sum(sizes), dtype=self.dtype, device=device) * 2 + 0.5
        queries, keys, weights, dots, _ = mixed.split(sizes, -1)
        hidden = normal(self.B, self.T, self.H, dtype=self.dtype, device=device, seed=1)
        angles = normal(self.B if self.batched_angles else 1, self.T, self.R // 2, seed=2).repeat(1, 1, 2)
        cos, sin = (part.to(device, self.dtype) for part in (angles.cos(), angles.sin()))
        norm = normal(2, self.Di, dtype=self.dtype, device=device, seed=3)
        line = torch.tensor([0.3, 1.25], device=device).to(self.dtype) if self.learned else None
        keywords = dict(norm_weight=norm[0], norm_bias=norm[1], line=line, start=self.start)
        weights, dots = weights if self.weighted else None, dots[..., 0] if self.learned else None
        return (queries, keys, weights, dots, hidden, cos, sin), keywords


CASES = [
    Case(T=1),
    Case(),
    Case(B=2, T=65, heads=3, weighted=True, batched_angles=True),
    Case(B=2, T=33, Di=128, start=70),
    Case(T=20, Di=64, R=128, learned=False),  # more angles than the head has: thinned out
    Case(T=19, Di=256, R=32, H=300, heads=2),
    Case(T=40, Di=128, R=128, heads=4, weighted=True, H=129),
]


def impl_of(backend):
    """Its `impl`; the kernels of other devices are refused, and tested to be."""
    if backend.impl == "kernel" and dispatch._kernel("index_heads", backend.device) is None:
        inputs, keywords = backend.fit(Case()).inputs(backend.device)
        with pytest.raises(ops.KernelUnavailableError, match="index_heads has no kernel on .*: it has kernels for cuda only"):
            ops.index_heads(*inputs, **keywords, impl="kernel")
        return None
    return backend.impl


def angle_columns(R, D):
    """The column of the model's tables that each rotated dimension takes its angle from."""
    if R <= D:
        return list(range(R))
    return [i % (D // 2) * (R // 2) // (D // 2) for i in range(D)]


def turned(x, cos, sin):
    """`[..., T, D]` with its first dimensions rotated pair by pair, as complex numbers."""
    n = cos.shape[-1]
    pairs = torch.complex(x[..., : n // 2], x[..., n // 2 : n]) * torch.complex(cos, sin)[..., : n // 2]
    return torch.cat([pairs.real, pairs.imag, x[..., n:]], -1)


def exact(case, inputs, keywords):
    """qi, ki, w and c in float64, by the definition."""
    queries, keys, weights, dots, _, cos, sin = (None if x is None else x.double() for x in inputs)
    columns = angle_columns(case.R, case.Di)
    cos, sin = cos[..., columns], sin[..., columns]
    heads = torch.stack(queries.split(case.Di, -1), 1)  # [B, Hi, T, Di]
    mean = keys.mean(-1, keepdim=True)
    normed = (keys - mean) / (((keys - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * keywords["norm_weight"].double() + keywords["norm_bias"].double()
    w = None if weights is None else weights / case.heads**0.5
    c = None
    if dots is not None:
        seen = torch.arange(case.start + 1, case.start + case.T + 1, dtype=torch.float64, device=dots.device)
        bias, growth = keywords["line"].double()
        c = dots + bias + growth * seen.log()
    return turned(heads, cos[:, None], sin[:, None]), turned(normed, cos, sin), w, c


def naive(case, inputs, keywords):
    """The same in the dtype of the inputs, every step rounded to it, pair by pair; the mean and the variance are fp32's."""
    queries, keys, weights, dots, _, cos, sin = inputs
    columns = angle_columns(case.R, case.Di)
    n = len(columns)

    def turn(x, cos, sin):
        out = x.clone()
        for low in range(n // 2):
            a, b = x[..., low], x[..., low + n // 2]
            out[..., low] = a * cos[..., columns[low]] - b * sin[..., columns[low]]
            out[..., low + n // 2] = b * cos[..., columns[low]] + a * sin[..., columns[low]]
        return out

    wide = keys.float()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = (normed * keywords["norm_weight"].float() + keywords["norm_bias"].float()).to(case.dtype)
    heads = torch.stack([turn(part, cos, sin) for part in queries.split(case.Di, -1)], 1)
    w = None if weights is None else weights * case.heads**-0.5
    c = None
    if dots is not None:
        bias, growth = keywords["line"].float()
        c = dots.float() + (bias + growth * torch.arange(case.start + 1, case.start + case.T + 1, device=dots.device).log())
    return heads, turn(normed, cos, sin), w, c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_as_accurate_as_the_yardstick(backend, case, dtype):
    if not (impl := impl_of(backend)):
        return
    case = backend.fit(replace(case, dtype=dtype))
    inputs, keywords = case.inputs(backend.device)
    *results, finite = ops.index_heads(*inputs, **keywords, impl=impl)
    if impl == "reference":
        yardsticks = naive(case, inputs, keywords)
    else:
        *yardsticks, _ = ops.index_heads(*inputs, **keywords, impl="reference")
    for actual, truth, yardstick in zip(results, exact(case, inputs, keywords), yardsticks):
        assert (actual is None) == (truth is None)
        if truth is not None:
            assert_accurate(actual, truth, yardstick)
    assert finite.shape == (2, case.B, case.T) and bool(finite.all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["queries", "keys", "weights", "hidden"])
def test_tokens_that_are_not_finite_are_named(backend, part, value):
    if not (impl := impl_of(backend)):
        return
    case = backend.fit(Case(B=2, T=37, heads=3, weighted=True, H=300))
    inputs, keywords = case.inputs(backend.device)
    place = dict(queries=(0, 130), keys=(1, 63), weights=(2, 2), hidden=(4, 299))[part]
    inputs[place[0]][1, 20, place[1]] = value
    *_, finite = ops.index_heads(*inputs, **keywords, impl=impl)
    expected = torch.ones(2, 2, 37, dtype=torch.bool, device=finite.device)
    expected[0 if part == "hidden" else 1, 1, 20] = False
    assert torch.equal(finite, expected)


def test_finite_values_of_fp16_are_finite_however_large(backend):
    if not (impl := impl_of(backend)):
        return
    inputs, keywords = backend.fit(Case(dtype=torch.float16, H=300)).inputs(backend.device)
    inputs[4].fill_(60000.0)
    *_, finite = ops.index_heads(*inputs, **keywords, impl=impl)
    assert bool(finite.all())


@pytest.mark.parametrize("heads, partition", [(1, False), (1, True), (4, True), (3, False)])
def test_a_fused_head_makes_what_the_head_makes(backend, heads, partition):
    if not (impl := impl_of(backend)):
        return
    torch.manual_seed(0)
    head = IndexHead(IndexerConfig(48, (0,), 32, heads=heads, dim=64, partition=partition)).requires_grad_(False)
    if partition:
        head.partition.direction.copy_(torch.randn(48))
        head.partition.line.copy_(torch.tensor([0.25, 1.5]))
    head.k_norm.weight.copy_(torch.randn(64))
    head = head.to(backend.device, backend.dtype())
    angles = normal(1, 21, 16, seed=2).repeat(1, 1, 2)
    cos, sin = (part.to(backend.device, backend.dtype()) for part in (angles.cos(), angles.sin()))
    hidden = normal(2, 21, 48, dtype=backend.dtype(), device=backend.device)
    seen = torch.arange(8, 29, device=backend.device)[None]
    wide = copy.deepcopy(head).double()
    before, truth = [
        (*one(*(x.to(dtype) for x in (hidden, cos, sin))), one.partition and one.partition(hidden.to(dtype), seen))
        for one, dtype in ((head, backend.dtype()), (wide, torch.float64))
    ]
    names = set(head.state_dict())
    fused = FusedIndexHead(head, impl)
    made = fused(hidden, cos, sin, 7)
    for actual, reference, exact_one in zip((made.queries, made.keys, made.weights, made.partition), before, truth):
        assert (actual is None) == (exact_one is None)
        if exact_one is not None:
            assert_accurate(actual, exact_one, reference)
    assert [what for what, _ in made.finite] == ["hidden states", "index queries and keys"]
    assert all(bool(finite.all()) for _, finite in made.finite)
    again = head(hidden, cos, sin)  # the head itself is as it was, with weights that are parts of the matrix
    assert set(head.state_dict()) == names
    for actual, reference in zip(again, before):
        assert actual is reference is None or torch.equal(actual, reference)
    head.q_proj.weight.fill_(float("nan"))
    assert not bool(fused(hidden, cos, sin, 7).finite[1][1].any())


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(queries=torch.zeros(1, 37, 65)), "queries must hold whole heads of 64 dimensions, at least 2, got 65"),
        (dict(weights=torch.zeros(1, 37, 2)), r"weights must have shape \(1, 37, 1\), got \(1, 37, 2\)"),
        (dict(line=None), "line must be given with dots, got no line"),
        (dict(cos=torch.zeros(1, 37, 63)), r"cos must have shape \(1 or 1, 37, an even number\)"),
        (dict(sin=torch.zeros(1, 37, 32)), r"sin must have shape \(1 or 1, 37, an even number\) like cos, got \(1, 37, 32\)"),
        (dict(hidden=torch.zeros(1, 36, 40)), r"hidden must have shape \(1, 37, \*\)"),
        (dict(norm_bias=torch.zeros(63)), r"norm_bias must have shape \(64\), got \(63,\)"),
        (dict(keys=torch.zeros(1, 37, 64, dtype=torch.int32)), "keys must be float32 or"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, sentence):
    inputs, keywords = Case().inputs()
    names = ("queries", "keys", "weights", "dots", "hidden", "cos", "sin")
    with pytest.raises((ValueError, TypeError), match=sentence):
        ops.index_heads(**{**dict(zip(names, inputs)), **keywords, **change})


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from npu_sparse.ops.index_heads import triton as kernels

POINTERS = dict.fromkeys(("queries", "keys", "weights", "dots", "hidden", "cos", "sin", "norm_weight", "norm_bias", "line", "qi",
                          "ki", "w"), "*bf16") | dict(c="*fp32", finite="*u8", eps="fp32", factor="fp32")
for heads, R in ((1, 64), (4, 256)):
    constants = dict(HEADS=heads, HP=heads, D=128, DP=128, R=R, WEIGHTED=heads > 1, LEARNED=True, TOKENS=kernels.TOKENS,
                     HIDDEN=kernels.HIDDEN, h_d=1, c_d=1, s_d=1)
    names = list(inspect.signature(kernels._finish.fn).parameters)
    types = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    places = {(names.index(n),): value for n, value in constants.items()}
    made = triton.compile(ASTSource(kernels._finish, types, places), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    print(len(made.asm["cubin"]))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed: run `make test-triton`")
def test_the_interpreted_kernel_compiles_for_a_gpu_too():
    """In bf16, which the interpreter does not round; a compiler for it comes with Triton, and no GPU is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 2 and all(int(size) > 0 for size in done.stdout.split())
