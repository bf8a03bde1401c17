"""The operators of a fast hybrid layer against float64, and against transformers' own in the same dtype."""

import os
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu, softplus

from npu_sparse.models.architectures import DeltaNet, delta_net
from npu_sparse.models.hybrid import attach
from npu_sparse.ops import dispatch, hybrid
from npu_sparse.testing import DTYPES, assert_accurate, normal, rms_error

reference = import_module("npu_sparse.ops.hybrid.reference")


# 16-bit results round where transformers rounds; in fp32 the order of sums and the device's exp are rounding too
AS_ACCURATE = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 1.5}


@pytest.fixture(params=["reference", "interpreted", "cuda"])
def functions(request):
    """Every implementation of the operators, with the device of their inputs."""
    if request.param == "reference":
        return implementation("reference", "cpu")
    if request.param == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton interprets its kernels on the CPU only under TRITON_INTERPRET=1: run `make test-triton`")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    arguments = request.node.callspec.params
    dtypes = arguments.get("dtype"), getattr(arguments.get("case"), "dtype", None)
    if request.param == "interpreted" and torch.bfloat16 in dtypes:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    device = "cuda" if request.param == "cuda" else "cpu"
    dispatch.register_triton(device)
    return implementation("kernel", device)


def implementation(impl: str, device: str) -> SimpleNamespace:
    return SimpleNamespace(device=device, **{op: partial(getattr(hybrid, op), impl=impl) for op in hybrid.__all__})


def heads(net: DeltaNet) -> dict[str, int]:
    return dict(key_heads=net.key_heads, value_heads=net.value_heads, key_dim=net.key_dim, value_dim=net.value_dim)


def layout(kind: str, Hk: int, Hv: int, K: int, V: int, W: int = 4) -> DeltaNet:
    module = SimpleNamespace(num_k_heads=Hk, num_v_heads=Hv, head_k_dim=K, head_v_dim=V, conv_kernel_size=W)
    if kind == "next":
        module.in_proj_qkvz = None
    return delta_net(module)


@dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 37
    Hk: int = 2
    Hv: int = 2
    K: int = 16
    V: int = 16
    W: int = 4
    kind: str = "separate"
    state: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def net(self) -> DeltaNet:
        return layout(self.kind, self.Hk, self.Hv, self.K, self.V, self.W)

    def tables(self, device):
        return attach._tables(self.net, device)

    def mixed(self, device, seed=0):
        width = 2 * self.Hk * self.K + (2 if self.kind == "next" else 1) * self.Hv * self.V
        return normal(self.B, self.T, width, dtype=self.dtype, device=device, seed=seed)


CASES = [
    Case(T=1),
    Case(T=3, state=True),
    Case(),
    Case(B=2, T=65, state=True),
    Case(B=3, T=33, Hk=2, Hv=4, V=24, state=True),
    Case(B=2, T=64, Hk=2, Hv=6, K=24, V=40, kind="next"),
    Case(T=70, Hk=1, Hv=1, W=3, state=True, kind="next"),
    *[Case(B=2, T=67, Hk=2, Hv=4, state=True, dtype=dtype) for dtype in DTYPES[1:]],
    Case(T=40, K=128, V=128, dtype=torch.bfloat16),
]


def naive_convolution(case, mixed, weight, state, order, dtype, rounded):
    """q, k and v through torch's own convolution in `dtype`; `rounded` to case.dtype after SiLU and at the end."""
    x = mixed.to(dtype)[..., order].transpose(1, 2)
    x = pad(x, (case.W - 1, 0)) if state is None else torch.cat([state[..., 1:].to(dtype), x], -1)
    y = silu(conv1d(x, weight.to(dtype)[:, None], groups=weight.shape[0])).transpose(1, 2)
    y = y.to(case.dtype).to(dtype) if rounded else y
    q, k, v = y.split([case.Hk * case.K] * 2 + [case.Hv * case.V], -1)
    q, k = (part.unflatten(-1, (case.Hk, case.K)) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    parts = q, k, v.unflatten(-1, (case.Hv, case.V))
    return [part.to(case.dtype) for part in parts] if rounded else parts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_is_as_accurate_as_rounding_once(functions, case):
    mixed = case.mixed(functions.device)
    columns, *_, order = case.tables(functions.device)
    C = len(order)
    weight = normal(C, case.W, dtype=case.dtype, device=functions.device, seed=1)
    state = normal(case.B, C, case.W, dtype=case.dtype, device=functions.device, seed=2) if case.state else None
    if state is not None:
        state[..., 0] = float("nan")  # W taps read W - 1 earlier tokens
    actual = functions.short_convolution(mixed, weight, state, columns, **heads(case.net))
    exact = naive_convolution(case, mixed, weight, state, order, torch.float64, rounded=False)
    naive = naive_convolution(case, mixed, weight, state, order, torch.float32, rounded=True)
    for part, whole, yardstick in zip(actual, exact, naive):
        assert part.is_contiguous() and part.dtype == case.dtype
        assert_accurate(part, whole, yardstick)


def test_pieces_of_a_convolution_are_the_whole(functions):
    case = Case(B=2, T=50)
    mixed, (columns, *_, order) = case.mixed(functions.device), case.tables(functions.device)
    weight = normal(len(order), 4, device=functions.device, seed=1)
    whole = functions.short_convolution(mixed, weight, None, columns, **heads(case.net))
    parts, state = [], None
    for start, stop in ((0, 1), (1, 3), (3, 40), (40, 50)):
        piece = mixed[:, start:stop]
        parts.append(functions.short_convolution(piece, weight, state, columns, **heads(case.net)))
        seen = pad(mixed[:, :stop, order].transpose(1, 2), (4, 0))
        state = seen[..., -4:]
    for n in range(3):
        torch.testing.assert_close(torch.cat([part[n] for part in parts], 1), whole[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, Hk, Hv", [("separate", 2, 6), ("next", 2, 6), ("separate", 1, 1)])
def test_gates_are_exact_to_their_dtype_over_the_whole_range(functions, kind, Hk, Hv, dtype):
    case = Case(B=2, T=130, Hk=Hk, Hv=Hv, kind=kind, dtype=dtype)
    raw = normal(2, 130, 2 * Hv, dtype=dtype, device=functions.device)
    raw *= 12.0  # far into both ends of softplus
    A_log, dt_bias = normal(Hv, device=functions.device, seed=1), normal(Hv, device=functions.device, seed=2)
    _, _, columns, _ = case.tables(functions.device)
    g, beta = functions.delta_gates(raw, columns, A_log, dt_bias)
    b, a = raw[..., list(case.net.beta)].double(), raw[..., list(case.net.decay)].double()
    assert (g.dtype, beta.dtype) == (torch.float32, dtype)
    exact = -A_log.double().exp() * softplus(a + dt_bias.double())
    torch.testing.assert_close(g, exact.float(), rtol=1e-5, atol=1e-12)
    assert_accurate(beta, b.sigmoid(), b.float().sigmoid().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, Hv, V, kind", [(1, 1, 1, 16, "separate"), (2, 37, 3, 24, "separate"), (2, 20, 4, 32, "next")])
def test_gated_norm_is_as_accurate_as_transformers(functions, B, T, Hv, V, kind, dtype):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    case = Case(B=B, T=T, Hk=1 if Hv < 4 else 2, Hv=Hv, V=V, kind=kind, dtype=dtype)
    x = normal(B, T, Hv, V, dtype=dtype, device=functions.device, seed=1)
    gate = case.mixed(functions.device) if kind == "next" else normal(B, T, Hv * V, dtype=dtype, device=functions.device)
    z = torch.stack([gate[..., start : start + V] for start in case.net.gate], -2)
    theirs = Qwen3_5RMSNormGated(V, eps=1e-5).to(functions.device, dtype)
    theirs.weight.data = normal(V, dtype=dtype, device=functions.device, seed=2)
    _, columns, _, _ = case.tables(functions.device)
    actual = functions.gated_norm(x, gate, columns, theirs.weight.data, 1e-5)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * theirs.weight.data.double() * silu(z.double())
    with torch.no_grad():
        expected = theirs(x, z).flatten(-2)
    assert_accurate(actual, exact.flatten(-2), expected, factor=AS_ACCURATE[dtype])
    if dtype != torch.float32:  # it rounds where theirs rounds, and only the order of a sum may differ
        assert (actual == expected).float().mean() > 0.97


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 37, 96), (2, 5, 3, 24), (1, 3, 5000)], ids=str)
def test_norm_is_as_accurate_as_transformers(functions, shape, dtype):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

    x = normal(*shape, dtype=dtype, device=functions.device)
    theirs = Qwen3_5RMSNorm(shape[-1], eps=1e-5).to(functions.device, dtype)
    theirs.weight.data = normal(shape[-1], dtype=dtype, device=functions.device, seed=2)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + theirs.weight.data.double())
    with torch.no_grad():
        assert_accurate(functions.rms_norm(x, theirs.weight.data, 1e-5), exact, theirs(x), factor=AS_ACCURATE[dtype])


def test_norm_of_a_view_is_that_of_its_copy(functions):
    """The query norm gets one half of every head of a projection."""
    halves = normal(2, 9, 3, 64, device=functions.device)
    weight = normal(32, device=functions.device, seed=1)
    for view in (halves[..., :32], halves[..., 32:], halves[:, :, 1:, :32], halves.transpose(1, 2)[..., ::2]):
        actual = functions.rms_norm(view, weight, 1e-6)
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, functions.rms_norm(view.contiguous(), weight, 1e-6), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 96), (1, 3, 5001)], ids=str)
def test_swiglu_rounds_like_transformers(functions, shape, dtype):
    gate = normal(*shape, dtype=dtype, device=functions.device)
    gate *= 4
    up = normal(*shape, dtype=dtype, device=functions.device, seed=1)
    theirs, exact = silu(gate) * up, silu(gate.double()) * up.double()
    assert_accurate(functions.swiglu(gate.clone(), up), exact, theirs, factor=AS_ACCURATE[dtype])


@pytest.mark.parametrize("case", [Case(T=1), Case(B=2, T=70, Hv=4, V=24, state=True), Case(T=130, state=True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_delta_rule_is_that_of_transformers(case, dtype):
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    case = replace(case, dtype=dtype)
    q, k, v = (normal(case.B, case.T, H, D, dtype=dtype, seed=n) for n, (H, D) in
               enumerate(((case.Hk, case.K), (case.Hk, case.K), (case.Hv, case.V))))  # fmt: skip
    q, k = reference._unit(q), reference._unit(k)
    g = -normal(case.B, case.T, case.Hv, seed=3).abs()
    beta = normal(case.B, case.T, case.Hv, dtype=dtype, seed=4).sigmoid()
    state = normal(case.B, case.Hv, case.K, case.V, seed=5) if case.state else None
    out, last = hybrid.delta_rule(q, k, v, g, beta, state, True, impl="reference")
    groups = case.Hv // case.Hk
    theirs, their_last = torch_chunk_gated_delta_rule(
        q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v, g=g, beta=beta, initial_state=state,
        output_final_state=True,
    )  # fmt: skip
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last, their_last.float(), rtol=2e-5, atol=2e-5)
    assert hybrid.delta_rule(q, k, v, g, beta, state, False, impl="reference")[1] is None


@pytest.mark.parametrize("case", [Case(T=1, K=32, V=32), Case(B=2, T=70, Hv=4, K=32, V=64, state=True), Case(T=200, K=64, V=64)],
                         ids=str)  # fmt: skip
def test_the_cuda_delta_rule_is_within_the_rounding_of_its_intermediates(case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("fla")
    dtype = torch.bfloat16
    shapes = ((case.Hk, case.K), (case.Hk, case.K), (case.Hv, case.V))
    q, k, v = (normal(case.B, case.T, H, D, dtype=dtype, device="cuda", seed=n) for n, (H, D) in enumerate(shapes))
    q, k = reference._unit(q), reference._unit(k)
    g = -normal(case.B, case.T, case.Hv, device="cuda", seed=3).abs()
    beta = normal(case.B, case.T, case.Hv, dtype=dtype, device="cuda", seed=4).sigmoid()
    state = normal(case.B, case.Hv, case.K, case.V, device="cuda", seed=5) if case.state else None
    exact, last = hybrid.delta_rule(q.float(), k.float(), v.float(), g, beta.float(), state, True, impl="reference")
    out, final = hybrid.delta_rule(q, k, v, g, beta, state, True, impl="kernel")
    for mine, theirs in ((out, exact), (final, last)):  # it keeps what passes between its kernels in bf16, 2 ** -8 each
        assert rms_error(mine, theirs) <= 1e-2 * float(theirs.double().square().mean().sqrt())


def test_swiglu_needs_no_third_tensor_and_leaves_a_view_alone(functions):
    gate, up = normal(2, 5, 24, device=functions.device), normal(2, 5, 24, device=functions.device, seed=1)
    assert functions.swiglu(gate, up).data_ptr() == gate.data_ptr()
    halves = normal(2, 5, 48, device=functions.device)
    before = halves.clone()
    torch.testing.assert_close(functions.swiglu(halves[..., :24], up), silu(before[..., :24]) * up)
    assert torch.equal(halves, before)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


INDICES = dict(dtype=torch.int32)
CONVOLUTION = zeros(1, 5, 64), zeros(64, 4), zeros(1, 64, 4), zeros(3, **INDICES)
RULE = zeros(1, 5, 2, 16), zeros(1, 5, 2, 16), zeros(1, 5, 4, 8), zeros(1, 5, 4), zeros(1, 5, 4), zeros(1, 4, 16, 8)
NORM = zeros(1, 5, 2, 8), zeros(1, 5, 16), zeros(2, **INDICES), zeros(8)


@pytest.mark.parametrize(
    "op, inputs, place, wrong, sentence",
    [
        ("short_convolution", CONVOLUTION, 0, zeros(1, 5, 64, **INDICES), "mixed must be float32 or"),
        ("short_convolution", CONVOLUTION, 1, zeros(63, 4), r"weight must have shape \(64, \*\), got \(63, 4\)"),
        ("short_convolution", CONVOLUTION, 2, zeros(1, 64, 3), r"state must have shape \(1, 64, 4\), got \(1, 64, 3\)"),
        ("short_convolution", CONVOLUTION, 3, zeros(4, **INDICES), r"columns must have shape \(3\), got \(4,\)"),
        ("delta_gates", (zeros(1, 5, 4), zeros(4, **INDICES), zeros(2), zeros(2)), 3, zeros(3), r"dt_bias must have shape \(2\)"),
        ("delta_gates", (zeros(1, 5, 4), zeros(4, **INDICES), zeros(2), zeros(2)), 1, zeros(4), "columns must be int32"),
        ("delta_rule", RULE, 1, zeros(1, 4, 2, 16), r"k must have shape \(1, 5, 2, 16\)"),
        ("delta_rule", RULE, 2, zeros(1, 5, 3, 8), "value heads must be a multiple of key heads, got 3 and 2"),
        ("delta_rule", RULE, 3, zeros(1, 5, 4, dtype=torch.bfloat16), "g must be float32, got torch.bfloat16"),
        ("delta_rule", RULE, 5, zeros(1, 4, 8, 16), r"state must have shape \(1, 4, 16, 8\)"),
        ("gated_norm", NORM, 1, zeros(1, 4, 16), r"gate must have shape \(1, 5, \*\)"),
        ("gated_norm", NORM, 3, zeros(9), r"weight must have shape \(8\), got \(9,\)"),
        ("rms_norm", (zeros(3, 8), zeros(8)), 1, zeros(7), r"weight must have shape \(8\), got \(7,\)"),
        ("swiglu", (zeros(3, 8), zeros(3, 8)), 1, zeros(3, 7), r"up must have shape \(3, 8\), got \(3, 7\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(op, inputs, place, wrong, sentence):
    more = {
        "short_convolution": dict(key_heads=1, value_heads=1, key_dim=16, value_dim=32), "delta_rule": dict(keep=True),
        "gated_norm": dict(eps=1e-6), "rms_norm": dict(eps=1e-6),
    }.get(op, {})  # fmt: skip
    with torch.no_grad():
        getattr(hybrid, op)(*inputs, **more, impl="reference")
    with pytest.raises((ValueError, TypeError), match=sentence):
        getattr(hybrid, op)(*inputs[:place], wrong, *inputs[place + 1 :], **more)


def test_kernels_elsewhere_and_without_their_package_are_refused(monkeypatch):
    gate = zeros(3, 8)
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    with pytest.raises(dispatch.KernelUnavailableError, match="swiglu has no kernel on 'cpu': it has kernels for cuda only"):
        hybrid.swiglu(gate, gate, impl="kernel")
    sentence = "delta_rule has no kernel on 'cuda': its kernel needs triton and fla"
    with pytest.raises(dispatch.KernelUnavailableError, match=sentence):
        raise dispatch._unavailable("delta_rule", "cuda")
    kernels = {(op, "cuda"): print for op in dispatch.OPERATORS if op != "delta_rule"}
    monkeypatch.setattr(dispatch, "_KERNELS", kernels)
    dispatch.require_kernels("cuda")  # sparse prefill does without
