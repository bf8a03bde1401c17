from dataclasses import dataclass
from functools import cache
from importlib import import_module

import pytest
import torch

from npu_sparse import ops
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.testing import (
    DTYPES,
    attention_inputs,
    index_inputs,
    naive_attention_mass,
    naive_index_scores,
    over_seeds,
    plain_products,
)

reference = import_module("npu_sparse.ops.index_kl.reference")


@dataclass(frozen=True)
class Case:
    B: int = 1
    Hq: int = 4
    Hkv: int = 2
    T: int = 37
    D: int = 16
    Hi: int = 1
    Di: int = 64
    weighted: bool = True
    segments: tuple = ((0, 37),)
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device="cpu", seed=0):
        options = dict(dtype=self.dtype, device=device, strided=self.strided)
        q, k, _ = attention_inputs(self.B, self.Hq, self.Hkv, self.T, self.T, self.D, seed=seed, **options)
        qi, ki, w = index_inputs(self.B, self.Hi, self.T, self.T, self.Di, seed=7 + seed, **options)
        return q, k, qi, ki, w if self.weighted else None


CASES = [
    Case(T=1, segments=((0, 1),)),
    Case(),
    Case(B=2, Hq=3, Hkv=3, T=65, segments=((0, 65),), weighted=False),
    Case(Hq=6, Hkv=1, D=24, T=130, segments=((0, 3), (50, 67), (90, 130)), Hi=3),
    Case(B=3, T=131, segments=((5, 70), (128, 131)), Hi=4, Di=128, strided=True),
    Case(T=300, segments=((64, 128), (200, 300)), Hi=2, Di=128),
    Case(T=70, segments=((69, 70),), Hi=5, Di=256),
]


@pytest.fixture
def at(backend):
    """The back-end, where it has a kernel for training, else its sentence; the reference as it is."""
    if backend.impl == "kernel" and dispatch._kernel("index_kl", backend.device) is None:
        pytest.skip(str(dispatch._unavailable("index_kl", backend.device)))
    return backend


def losses(inputs, case, impl):
    """Losses `[B, rows]`, and gradients of their sum under uneven shares, by autograd."""
    q, k, *learned = inputs
    learned = [None if x is None else x.clone().requires_grad_() for x in learned]
    loss = ops.index_kl(q, k, *learned, segments=list(case.segments), scale=case.D**-0.5, impl=impl)
    (loss * shares(loss)).sum().backward()
    return loss.detach(), [None if x is None else x.grad for x in learned]


def naive(inputs, case, dtype=torch.float64, products=None):
    """The same by definition, over whole matrices in `dtype`: in float64 the exact answer."""
    q, k, *learned = [None if x is None else x.to(dtype) for x in inputs]
    learned = [None if x is None else x.clone().requires_grad_() for x in learned]
    mass = naive_attention_mass(q, k, scale=case.D**-0.5, dtype=dtype)[:, 0]
    z = naive_index_scores(*learned, dtype=dtype, products=products)
    rows = torch.cat([torch.arange(start, stop) for start, stop in case.segments])
    log_indexer = z.log_softmax(-1).masked_fill(z == float("-inf"), 0.0)
    loss = (torch.xlogy(mass, mass) - mass * log_indexer).sum(-1)[:, rows]
    (loss * shares(loss)).sum().backward()
    return loss.detach(), [None if x is None else x.grad for x in learned]


def shares(loss):
    return torch.linspace(0.2, 1.0, loss.numel()).view(loss.shape).to(loss)


def check(case, impl, device, factor=2.0):
    computed = cache(lambda seed: compute(case, impl, device, seed))
    for place in range(4):  # losses, and the gradients of qi, ki and w
        if computed(0)[0][place] is None:
            assert all(results[place] is None for results in computed(0))
        else:
            over_seeds(lambda seed, place=place: [results[place] for results in computed(seed)], device, factor)


def compute(case, impl, device, seed):
    """Losses and gradients: as found, exact, and of the yardsticks."""
    inputs = case.inputs(device, seed)
    actual = losses(inputs, case, impl)
    assert actual[0].dtype == torch.float32
    yardsticks = [naive(inputs, case, torch.float32) if impl == "reference" else losses(inputs, case, "reference")]
    if device == "cuda":
        yardsticks.append(naive(inputs, case, torch.float32, plain_products))
    return [(loss, *gradients) for loss, gradients in (actual, naive(inputs, case), *yardsticks)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_as_accurate_as_the_yardstick(at, case):
    check(at.fit(case), at.impl, at.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_accumulates_in_fp32(at, dtype):
    check(at.fit(Case(B=2, T=129, D=64, Hi=2, segments=((60, 129),), dtype=dtype)), at.impl, at.device)


def test_fp32_index_heads_may_learn_from_a_half_precision_teacher(at):
    case = at.fit(Case(T=66, segments=((0, 66),)))
    q, k, qi, ki, w = case.inputs(at.device)
    inputs = q.half(), k.half(), qi, ki, w
    actual, gradients = losses(inputs, case, at.impl)
    wanted, true = naive(inputs, case)
    torch.testing.assert_close(actual, wanted.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], true[0].to(qi.dtype), rtol=1e-2, atol=1e-4)


def test_gradients_of_a_mean_over_many_rows_do_not_vanish_in_half_precision(at):
    case = at.fit(Case(T=80, segments=((0, 80),), dtype=torch.float16))
    q, k, qi, ki, w = case.inputs(at.device)
    ki.requires_grad_()
    small = ops.index_kl(q, k, qi, ki, w, segments=[(0, 80)], scale=0.25, impl=at.impl).sum() * 2.0**-10
    small.backward()
    tiny = ki.grad.clone()
    ki.grad = None
    ops.index_kl(q, k, qi, ki, w, segments=[(0, 80)], scale=0.25, impl=at.impl).sum().backward()
    normal = ki.grad.abs() * 2.0**-10 > 2.0**-14  # gradients that fp16 holds at full precision
    assert bool(normal.any())
    torch.testing.assert_close(tiny[normal] * 2.0**10, ki.grad[normal])


def test_a_row_alone_has_the_loss_it_has_among_others(at):
    case = at.fit(Case(T=70, segments=((0, 70),), Hi=2))
    inputs = case.inputs(at.device)
    whole = ops.index_kl(*inputs, segments=[(0, 70)], scale=0.25, impl=at.impl)
    for row in (0, 1, 63, 64, 69):
        alone = ops.index_kl(*inputs, segments=[(row, row + 1)], scale=0.25, impl=at.impl)
        torch.testing.assert_close(alone[:, 0], whole[:, row])


def test_gradients_are_the_same_on_every_run(at):
    case = at.fit(Case(B=2, T=300, segments=((0, 90), (280, 300)), Hi=3))
    inputs = case.inputs(at.device)
    first, second = losses(inputs, case, at.impl), losses(inputs, case, at.impl)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def test_queries_that_are_not_supervised_get_no_gradient_and_are_not_read(at):
    case = at.fit(Case(T=70, segments=((60, 64),), Hi=2))
    q, k, qi, ki, w = case.inputs(at.device)
    clean, gradients = losses((q, k, qi, ki, w), case, at.impl)
    supervised = torch.zeros(70, dtype=torch.bool, device=at.device)
    supervised[60:64] = True
    hostile = [
        x.masked_fill(~supervised.view(shape), float("nan")) for x, shape in ((q, (-1, 1)), (qi, (-1, 1)), (w, (-1, 1)))
    ]
    future = torch.arange(70, device=at.device)[:, None] >= 64
    keys = [x.masked_fill(future, float("nan")) for x in (k, ki)]
    actual, hostile_gradients = losses((hostile[0], keys[0], hostile[1], keys[1], hostile[2]), case, at.impl)
    assert torch.equal(actual, clean)
    for clean_gradient, gradient in zip(gradients, hostile_gradients):
        assert torch.equal(gradient, clean_gradient)
    assert not bool(gradients[0][:, :, ~supervised].any()) and not bool(gradients[1][:, 64:].any())


def test_the_loss_is_zero_where_the_indexer_is_the_teacher(at):
    """With one head whose products are positive, z can equal the teacher's scores."""
    case = at.fit(Case(Hq=1, Hkv=1, T=40, D=64, segments=((0, 40),)))
    q, k, *_ = case.inputs(at.device)
    q, k = q.abs(), k.abs()
    loss = ops.index_kl(q, k, q, k[:, 0], segments=[(0, 40)], scale=64**-0.5, impl=at.impl)
    assert float(loss.abs().max()) < 1e-4


def test_sharing_out_the_keys_of_few_rows_changes_nothing(at, monkeypatch):
    if at.impl == "reference":
        pytest.skip("the reference has no shares")
    case = at.fit(Case(T=300, segments=((30, 60), (199, 300)), Hi=2))
    inputs = case.inputs(at.device)
    whole = losses(inputs, case, at.impl)
    monkeypatch.setattr(import_module("npu_sparse.ops.index_kl.triton"), "SHARE", 64)
    torch.testing.assert_close(losses(inputs, case, at.impl), whole)
    check(case, at.impl, at.device)


@pytest.mark.parametrize("case", [c for c in CASES if c.T > 1], ids=str)
def test_tiling_does_not_change_the_reference(case, monkeypatch):
    inputs = case.inputs()
    whole = losses(inputs, case, "reference")
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1)  # one query at a time
    torch.testing.assert_close(losses(inputs, case, "reference"), whole)


def test_auto_is_the_reference_where_there_is_no_kernel_for_training(monkeypatch):
    case = Case()
    expected = ops.index_kl(*case.inputs(), segments=[(0, 37)], scale=0.25, impl="reference")
    assert torch.equal(ops.index_kl(*case.inputs(), segments=[(0, 37)], scale=0.25), expected)
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    with pytest.raises(KernelUnavailableError, match="index_kl has no kernel on 'cpu': it has kernels for cuda only"):
        ops.index_kl(*case.inputs(), segments=[(0, 37)], scale=0.25, impl="kernel")


def test_a_teacher_that_wants_gradients_is_refused():
    q, k, qi, ki, w = Case().inputs()
    loss = ops.index_kl(q.requires_grad_(), k, qi.requires_grad_(), ki, w, segments=[(0, 37)], scale=0.25, impl="reference")
    with pytest.raises(RuntimeError, match="q and k must not require gradients"):
        loss.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 4, 37)}, ValueError, r"q must have shape \(\*, \*, \*, \*\), got \(1, 4, 37\)"),
        ({"k": torch.zeros(1, 2, 36, 16)}, ValueError, r"k must have shape \(1, \*, 37, 16\), got \(1, 2, 36, 16\)"),
        ({"k": torch.zeros(1, 3, 37, 16)}, ValueError, "query heads must be a multiple of KV heads, got 4 and 3"),
        ({"qi": torch.zeros(1, 1, 30, 64)}, ValueError, r"qi must have shape \(1, \*, 37, \*\), got"),
        ({"ki": torch.zeros(1, 37, 64).half()}, TypeError, "ki must be float32, got torch.float16"),
        ({"w": torch.zeros(1, 37, 2)}, ValueError, r"w must have shape \(1, 37, 1\), got \(1, 37, 2\)"),
        ({"segments": []}, ValueError, "segments must hold at least one query, got none"),
        ({"segments": [(3, 3)]}, ValueError, r"segments must be ascending, disjoint and within 37 queries, got \[\(3, 3\)\]"),
        ({"segments": [(0, 5), (4, 9)]}, ValueError, "segments must be ascending, disjoint"),
        ({"segments": [(30, 38)]}, ValueError, "segments must be ascending, disjoint and within 37 queries"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
    ],
)
def test_bad_inputs_are_refused_with_the_rule(change, error, message):
    arguments = dict(zip(("q", "k", "qi", "ki", "w"), Case().inputs())) | {"segments": [(0, 37)]} | change
    segments, impl = arguments.pop("segments"), arguments.pop("impl", "auto")
    with pytest.raises(error, match=message):
        ops.index_kl(**arguments, segments=segments, scale=0.25, impl=impl)
