"""What every operator owes the PyTorch dispatcher, and the back-end policy."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from npu_sparse import ascendc, ops
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.support import Support
from npu_sparse.testing import Backend, attention_inputs, index_inputs, normal, padding, ragged_scores, random_support

CPU = Backend("reference", "reference", "cpu")


def mass_arguments(at, block=8):
    q, k, _ = attention_inputs(2, 4, 2, 21, 30, 16, dtype=at.dtype(), device=at.device)
    return q, k, 0.25, block, "max", True, padding(2, 30, "left", device=at.device)


def index_arguments(at, block=8):
    qi, ki, w = index_inputs(2, 3, 21, 30, 64, dtype=at.dtype(), device=at.device)
    own = normal(2, 21, device=at.device)
    return qi, ki, w, block, "softmax_max", padding(2, 30, "right", device=at.device), own


def partition_arguments(at, block=8):
    qi, ki, w, _, _, valid, _ = index_arguments(at)
    return qi, ki, w, valid


def selection_arguments(at, block=8):
    qi, ki, w, _, reduce, valid, own = index_arguments(at)
    return qi, ki, w, 20, block, reduce, 2, 1, valid, own


def select_arguments(at, block=8):
    return ragged_scores(2, 2, 21, 30, block=block).to(at.device), 20, 2, 1, block, 21, None


def two_level_arguments(at, block=8):
    qi, ki, w = index_inputs(2, 3, 21, 200, 64, dtype=at.dtype(), device=at.device)
    own = normal(2, 21, device=at.device)
    return qi, ki, w, 20, 32, 16, block, "softmax_max", 2, 1, padding(2, 200, "right", device=at.device), own


def sparse_arguments(at, block=8):
    q, k, v = attention_inputs(2, 4, 2, 21, 30, 16, at.dim(24), dtype=at.dtype(), device=at.device, strided=True)
    support = random_support(2, 2, 21, 30, k=7, block=block, device=at.device)
    return q, k, v, support.indices, support.count, block, 0.25


def kl_arguments(at, block=8):
    q, k, _ = attention_inputs(2, 4, 2, 30, 30, 16, dtype=at.dtype(), device=at.device)
    qi, ki, w = index_inputs(2, 3, 30, 30, 64, dtype=at.dtype(), device=at.device)
    return q, k, qi, ki, w, [3, 20], [8, 30], 0.25


def kl_backward_arguments(at, block=8):
    inputs = kl_arguments(at)
    loss, *norms = dispatch.call("index_kl", impl_for(at, "index_kl"), at.device, *inputs)
    return loss, *norms, *inputs


def tail_arguments(at, block=8):
    return *sparse_arguments(at, block), padding(2, 30, "left", device=at.device)


def sparse_backward_arguments(at, block=8):
    inputs = sparse_arguments(at, block)
    return dispatch.call("sparse_attention", at.impl, at.device, *inputs), *inputs


def tail_backward_arguments(at, block=8):
    inputs = tail_arguments(at, block)
    return dispatch.call("sparse_attention", at.impl, at.device, *inputs[:-1]), *inputs


def rows_arguments(at, block=8):
    q, k, v = attention_inputs(2, 4, 2, 5, 30, 16, at.dim(24), dtype=at.dtype(), device=at.device, strided=True)
    positions = torch.tensor([[29, 3, -1, 7, 28], [0, 1, 2, 12, 20]], dtype=torch.int32, device=at.device)
    return q, k, v, positions, 0.25, padding(2, 30, "left", device=at.device)


def rows_backward_arguments(at, block=8):
    inputs = rows_arguments(at, block)
    return dispatch.call("dense_rows", "reference", at.device, *inputs), *inputs


def heads_arguments(at, block=8):
    mixed = normal(2, 21, 3 * 16 + 16 + 3 + 1 + 4, dtype=at.dtype(), device=at.device)
    parts = mixed.split([48, 16, 3, 1, 4], -1)
    norm = normal(2, 16, dtype=at.dtype(), device=at.device, seed=2)
    hidden, line = normal(2, 21, 24, dtype=at.dtype(), device=at.device, seed=3), torch.tensor([0.5, 1.5], device=at.device)
    cos, sin = normal(2, 1, 21, 8, dtype=at.dtype(), device=at.device, seed=4)
    return *parts[:3], parts[3][..., 0], hidden, cos, sin, *norm, line, 1e-5, block


def convolution_arguments(at, block=8):
    Hk, Hv, K, V = 2, 4, 16, 24
    channels = 2 * Hk * K + Hv * V
    mixed, state = normal(2, 21, channels, dtype=at.dtype(), device=at.device), normal(2, channels, 4, device=at.device, seed=2)
    firsts = [h * K for h in range(2 * Hk)] + [2 * Hk * K + h * V for h in range(Hv)]
    columns = torch.tensor(firsts, dtype=torch.int32, device=at.device)
    return mixed, normal(channels, 4, dtype=at.dtype(), device=at.device, seed=1), state, columns, Hk, Hv, K, V


def gates_arguments(at, block=8):
    columns = torch.arange(8, dtype=torch.int32, device=at.device)
    decay = normal(2, 4, device=at.device, seed=1)
    return normal(2, 21, 8, dtype=at.dtype(), device=at.device), columns, *decay


def rule_arguments(at, block=8):
    q, k = normal(2, 2, 21, 2, 16, dtype=at.dtype(), device=at.device) / 4
    v, state = normal(2, 21, 4, 24, dtype=at.dtype(), device=at.device, seed=1), normal(2, 4, 16, 24, device=at.device, seed=2)
    g, beta = -normal(2, 21, 4, device=at.device, seed=3).abs(), normal(2, 21, 4, dtype=at.dtype(), device=at.device, seed=4)
    return q, k, v, g, beta.sigmoid(), state, block == 8


def gated_norm_arguments(at, block=8):
    x, gate = normal(2, 21, 4, 24, dtype=at.dtype(), device=at.device), normal(2, 21, 96, device=at.device, seed=1)
    columns = torch.arange(0, 96, 24, dtype=torch.int32, device=at.device)
    return x, gate.to(x.dtype), columns, normal(24, dtype=at.dtype(), device=at.device, seed=2), 1e-6


def norm_arguments(at, block=8):
    x = normal(2, 21, 48, dtype=at.dtype(), device=at.device)[..., :24]
    return x, normal(24, dtype=at.dtype(), device=at.device, seed=2), 1e-6


def swiglu_arguments(at, block=8):
    return *normal(2, 2, 21, 24, dtype=at.dtype(), device=at.device),


ARGUMENTS = {
    "attention_mass": mass_arguments,
    "delta_gates": gates_arguments,
    "delta_rule": rule_arguments,
    "dense_rows": rows_arguments,
    "dense_rows_backward": rows_backward_arguments,
    "gated_norm": gated_norm_arguments,
    "index_heads": heads_arguments,
    "index_kl": kl_arguments,
    "index_kl_backward": kl_backward_arguments,
    "index_partition": partition_arguments,
    "index_scores": index_arguments,
    "rms_norm": norm_arguments,
    "select_by_index": selection_arguments,
    "select_tokens": select_arguments,
    "select_two_level": two_level_arguments,
    "short_convolution": convolution_arguments,
    "sparse_attention": sparse_arguments,
    "sparse_attention_backward": sparse_backward_arguments,
    "sparse_attention_with_tail": tail_arguments,
    "sparse_attention_with_tail_backward": tail_backward_arguments,
    "swiglu": swiglu_arguments,
}


def attention_mass(q, k, scale, block, reduce, per_kv, valid, impl):
    return ops.attention_mass(
        q, k, scale=scale, reduce_block=block, reduce=reduce, per_kv=per_kv, valid=valid, impl=impl
    )


def index_scores(qi, ki, w, block, reduce, valid, partition, impl):
    return ops.index_scores(qi, ki, w, block=block, reduce=reduce, valid=valid, partition=partition, impl=impl)


def index_partition(qi, ki, w, valid, impl):
    return ops.index_partition(qi, ki, w, valid=valid, impl=impl)


def select_by_index(qi, ki, w, k, block, reduce, sink, recent, valid, partition, impl):
    support = ops.select_by_index(
        qi, ki, w, k=k, block=block, reduce=reduce, sink=sink, recent=recent, valid=valid, partition=partition, impl=impl
    )
    return support.indices, support.count


def select_tokens(scores, k, sink, recent, block, queries, valid, impl):
    support = ops.select_tokens(
        scores, k=k, sink=sink, recent=recent, block=block, queries=queries, valid=valid, impl=impl
    )
    return support.indices, support.count


def select_two_level(qi, ki, w, k, candidates, key_block, block, reduce, sink, recent, valid, partition, impl):
    support = ops.select_two_level(
        qi, ki, w, k=k, candidates=candidates, key_block=key_block, block=block, reduce=reduce, sink=sink, recent=recent,
        valid=valid, partition=partition, impl=impl,
    )  # fmt: skip
    return support.indices, support.count


def sparse_attention(q, k, v, indices, count, block, scale, impl):
    return ops.sparse_attention(q, k, v, Support(indices, count, block), scale=scale, impl=impl)


def index_heads(queries, keys, weights, dots, hidden, cos, sin, norm_weight, norm_bias, line, eps, start, impl):
    return ops.index_heads(
        queries, keys, weights, dots, hidden, cos, sin, norm_weight=norm_weight, norm_bias=norm_bias, line=line, eps=eps,
        start=start, impl=impl,
    )  # fmt: skip


def index_kl(q, k, qi, ki, w, starts, stops, scale, impl):
    return ops.index_kl(q, k, qi, ki, w, segments=list(zip(starts, stops)), scale=scale, impl=impl)


def index_kl_backward(*arguments, impl):
    return dispatch.call("index_kl_backward", impl, arguments[0].device.type, *arguments)


def sparse_attention_with_tail(q, k, v, indices, count, block, scale, valid, impl):
    support = Support(indices, count, block)
    return ops.sparse_attention_with_tail(q, k, v, support, scale=scale, valid=valid, impl=impl)


def sparse_attention_backward(*arguments, impl):
    return dispatch.call("sparse_attention_backward", impl, arguments[0].device.type, *arguments)


def sparse_attention_with_tail_backward(*arguments, impl):
    return dispatch.call("sparse_attention_with_tail_backward", impl, arguments[0].device.type, *arguments)


def dense_rows(q, k, v, positions, scale, valid, impl):
    return ops.dense_rows(q, k, v, positions, scale=scale, valid=valid, impl=impl)


def dense_rows_backward(*arguments, impl):
    return dispatch.call("dense_rows_backward", impl, arguments[0].device.type, *arguments)


def delta_gates(raw, columns, A_log, dt_bias, impl):
    return ops.hybrid.delta_gates(raw, columns, A_log, dt_bias, impl=impl)


def delta_rule(q, k, v, g, beta, state, keep, impl):
    out, last = ops.hybrid.delta_rule(q, k, v, g, beta, state, keep, impl=impl)
    return (out, last) if keep else out


def gated_norm(x, gate, columns, weight, eps, impl):
    return ops.hybrid.gated_norm(x, gate, columns, weight, eps, impl=impl)


def rms_norm(x, weight, eps, impl):
    return ops.hybrid.rms_norm(x, weight, eps, impl=impl)


def short_convolution(mixed, weight, state, columns, Hk, Hv, K, V, impl):
    return ops.hybrid.short_convolution(
        mixed, weight, state, columns, key_heads=Hk, value_heads=Hv, key_dim=K, value_dim=V, impl=impl
    )


def swiglu(gate, up, impl):
    return ops.hybrid.swiglu(gate.clone(), up, impl=impl)  # it is written over


FUNCTIONS = (
    attention_mass, dense_rows, dense_rows_backward, index_heads, index_kl, index_kl_backward, index_partition, index_scores,
    select_by_index, select_tokens, select_two_level, sparse_attention, sparse_attention_backward, sparse_attention_with_tail,
    sparse_attention_with_tail_backward, delta_gates, delta_rule, gated_norm, rms_norm, short_convolution, swiglu,
)  # fmt: skip
PUBLIC = {f.__name__: f for f in FUNCTIONS}
everywhere = pytest.mark.parametrize("op", ARGUMENTS)


def impl_for(backend, op):
    """The back-end's `impl`, or "reference" where the operator has kernels for other devices only."""
    missing = op != "select_by_index" and dispatch._kernel(op, backend.device) is None
    return "reference" if missing else backend.impl


def test_every_operator_is_tested_here():
    assert sorted(ARGUMENTS) == sorted(dispatch.OPERATORS)
    assert sorted(op for op in ARGUMENTS if dispatch.has_kernels_for(op, "npu")) == sorted(ascendc.SERVED)


@everywhere
@pytest.mark.parametrize("block", [1, 8, 16])
def test_opcheck(backend, op, block):
    kernel = backend.impl == "kernel" and dispatch._kernel(op, backend.device) is not None
    name = op if kernel else f"{op}_reference"
    torch.library.opcheck(getattr(torch.ops.npu_sparse, name).default, ARGUMENTS[op](backend, block))


@everywhere
@pytest.mark.parametrize("block", [1, 8, 16])
def test_fake_has_the_shape_the_dtype_and_the_strides_of_the_result(backend, op, block):
    arguments = ARGUMENTS[op](backend, block)
    impl = impl_for(backend, op)
    real = PUBLIC[op](*arguments, impl=impl)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = PUBLIC[op](*fakes, impl=impl)
    pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake, strict=True))
    for a, b in pairs:
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@everywhere
def test_full_graph_compile_gives_the_same(backend, op):
    arguments = ARGUMENTS[op](backend)
    impl = impl_for(backend, op)
    expected = PUBLIC[op](*arguments, impl=impl)
    torch.compiler.reset()
    compiled = torch.compile(PUBLIC[op], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, impl=impl), expected, rtol=0, atol=0)


def test_full_graph_compile_of_selection_in_slices_gives_the_same(backend):
    qi, ki, w, block, reduce, valid, own = index_arguments(backend)

    def select(qi, ki, w, valid, own):
        support = ops.select_by_index(
            qi, ki, w, k=12, sink=1, recent=2, block=block, reduce=reduce, valid=valid, partition=own, impl=backend.impl
        )
        return support.indices, support.count

    torch.compiler.reset()
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qi, ki, w, valid, own), select(qi, ki, w, valid, own), rtol=0, atol=0)


@pytest.mark.slow
def test_inductor_gives_the_same(backend):
    """Inductor checks the strides that the fakes promise."""
    if backend.device == "npu" and os.environ.get("NPU_SPARSE_RUNTIME_STUB"):
        pytest.skip("Inductor writes Triton for npu, which needs CANN")

    def layer(qi, ki, w, q, k, v):
        support = ops.select_by_index(qi * 2, ki, w, k=12, block=16, impl=backend.impl)
        return ops.sparse_attention(q + 1, k, v, support, scale=0.25, impl=backend.impl).relu()

    inputs = (
        *index_inputs(2, 3, 21, 30, 64, dtype=backend.dtype(), device=backend.device),
        *attention_inputs(2, 4, 2, 21, 30, 16, dtype=backend.dtype(), device=backend.device),
    )
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.parametrize(
    "impl, device, kernel",
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("auto", "npu", True),
        ("auto", "mps", False),
        ("reference", "cuda", False),
        ("kernel", "cpu", True),
    ],
)
def test_auto_means_the_kernel_on_cuda_and_npu_only(impl, device, kernel):
    assert dispatch.uses_kernel(impl, device) is kernel


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl must be one of auto, reference, kernel, got 'triton'"):
        dispatch.uses_kernel("triton", "cpu")


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    monkeypatch.setattr(ascendc, "load_if_built", lambda device_type: {})
    monkeypatch.setattr(dispatch, "register_triton", lambda device_type: None)


@everywhere
def test_a_missing_kernel_is_an_error_that_says_what_to_do(op, no_kernels):
    arguments = ARGUMENTS[op](CPU)
    with pytest.raises(KernelUnavailableError, match=rf"{op} has no kernel on 'cpu': .* pass impl='reference'"):
        PUBLIC[op](*arguments, impl="kernel")


def test_a_kernel_for_another_device_is_said_to_be(no_kernels):
    with pytest.raises(KernelUnavailableError, match="index_kl has no kernel on 'npu': it has kernels for cuda only"):
        raise dispatch._unavailable("index_kl", "npu")


def test_a_kernel_that_exists_for_another_device_only_is_said_to(no_kernels):
    with pytest.raises(KernelUnavailableError, match="select_two_level has no kernel on 'npu': it has kernels for cuda only"):
        dispatch.require_kernel("select_two_level", "npu", "or another")
    with pytest.raises(KernelUnavailableError, match="select_two_level has no kernel on 'cuda': its kernels need triton"):
        raise dispatch._unavailable("select_two_level", "cuda")


@pytest.mark.parametrize("device", ["cuda", "npu", "cpu", "mps"])
def test_every_device_without_kernels_is_told_what_to_do(device, no_kernels):
    with pytest.raises(KernelUnavailableError, match=f"attention_mass has no kernel on '{device}': .*impl='reference'"):
        dispatch.require_kernels(device)


@everywhere
def test_a_registered_kernel_is_what_runs(op, no_kernels):
    arguments = ARGUMENTS[op](CPU)
    expected = PUBLIC[op](*arguments, impl="reference")
    calls = []

    def kernel(*inputs):
        calls.append(inputs)
        return getattr(torch.ops.npu_sparse, f"{op}_reference")(*inputs)

    dispatch.register_kernel(op, "cpu", kernel)
    torch.testing.assert_close(PUBLIC[op](*arguments, impl="kernel"), expected, rtol=0, atol=0)
    assert len(calls) == 1
    PUBLIC[op](*arguments, impl="reference")
    PUBLIC[op](*arguments, impl="auto")
    assert len(calls) == 1


@everywhere
def test_without_gradients_a_kernel_is_called_at_once_and_gives_the_same(op, no_kernels):
    arguments = ARGUMENTS[op](CPU)
    expected = PUBLIC[op](*arguments, impl="reference")
    dispatched = []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            dispatched.append(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    def kernel(*inputs):
        assert not torch.is_grad_enabled()
        return getattr(torch.ops.npu_sparse, f"{op}_reference")(*inputs)

    dispatch.register_kernel(op, "cpu", kernel)
    with torch.no_grad():
        torch.testing.assert_close(PUBLIC[op](*arguments, impl="kernel"), expected, rtol=0, atol=0)
        with torch.profiler.profile() as profile:
            PUBLIC[op](*arguments, impl="kernel")
        with Listens():
            PUBLIC[op](*arguments, impl="kernel")
    assert f"npu_sparse::{op}" in {event.name for event in profile.events()}  # who listens hears of it
    assert f"npu_sparse.{op}" in dispatched


@pytest.mark.parametrize("reason", ["gradients", "autocast", "subclass", "mode", "transform", "profiler"])
def test_where_something_listens_a_kernel_is_dispatched(reason, no_kernels, monkeypatch):
    from contextlib import nullcontext

    arguments = list(ARGUMENTS["select_tokens"](CPU))

    class Mine(torch.Tensor):
        pass

    if reason == "subclass":
        arguments[0] = arguments[0].as_subclass(Mine)
    around = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "mode": FakeTensorMode, "profiler": torch.profiler.profile,
    }.get(reason, nullcontext)  # fmt: skip
    plain = []
    with torch.no_grad() if reason != "gradients" else nullcontext():
        assert dispatch._is_plain("cpu", tuple(ARGUMENTS["select_tokens"](CPU))) == (reason != "gradients")
        with around():
            if reason == "transform":
                torch.func.vmap(lambda x: plain.append(dispatch._is_plain("cpu", (x,))) or x)(torch.zeros(2, 3))
            else:
                plain.append(dispatch._is_plain("cpu", tuple(arguments)))
    assert plain == [False]


@everywhere
def test_a_missing_kernel_is_an_error_without_gradients_too(op, no_kernels):
    with torch.no_grad(), pytest.raises(KernelUnavailableError, match=rf"{op} has no kernel on 'cpu'"):
        PUBLIC[op](*ARGUMENTS[op](CPU), impl="kernel")


@everywhere
def test_a_kernel_that_fails_never_falls_back(op, no_kernels):
    def kernel(*inputs):
        raise RuntimeError("device lost")

    dispatch.register_kernel(op, "cpu", kernel)
    with pytest.raises(RuntimeError, match="device lost"):
        PUBLIC[op](*ARGUMENTS[op](CPU), impl="kernel")


def test_require_kernels_wants_every_operator_that_has_kernels_there(no_kernels):
    *others, last = ascendc.SERVED
    for op in others:
        dispatch.register_kernel(op, "cpu", print)
    with pytest.raises(KernelUnavailableError, match=last):
        dispatch.require_kernels("cpu")
    dispatch.register_kernel(last, "cpu", print)
    dispatch.require_kernels("cpu")


def test_asking_for_a_kernel_that_is_missing_replaces_none_that_was_registered(monkeypatch):
    """Triton's interpreter stands in for kernels of the CPU, where the emulation may be built, too."""
    monkeypatch.setattr(dispatch, "_KERNELS", {("select_tokens", "cpu"): "registered"})
    monkeypatch.setattr(dispatch, "_LOADERS", {"cpu": lambda: {"select_tokens": "loaded", "index_scores": "loaded"}})
    assert dispatch._kernel("sparse_attention_backward", "cpu") is None
    assert dispatch._kernel("select_tokens", "cpu") == "registered"
    assert dispatch._kernel("index_scores", "cpu") == "loaded"
