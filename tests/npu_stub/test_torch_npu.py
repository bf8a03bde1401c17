"""The published torch_npu without a card: its `npu` device on the runtime stub, our operators under PrivateUse1.

`make test-npu` runs this, together with the operator suite on the `npu` back-end, in an environment of its own.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import npu_sparse
from npu_sparse import Budget, Indexer, SparsePrefill, ascendc, ops, selectors
from npu_sparse.ops import dispatch
from npu_sparse.testing import attention_inputs, index_inputs, padding, ragged_scores, random_support, tiny_model, tokens

pytestmark = [pytest.mark.npu_stub, pytest.mark.usefixtures("stub_device")]
ROOT = Path(npu_sparse.__file__).resolve().parent.parent
NOT_SUPPORTED = 207000


@pytest.fixture(scope="module")
def runtime():
    return ctypes.CDLL("libascendcl.so")


def unimplemented() -> list[str]:
    source = (ROOT / "ops/emulation/runtime_stub/unsupported.cpp").read_text()
    return re.findall(r"^STATUS\((\w+)\)$", source, re.M)


def test_tensors_live_on_the_device_of_the_published_wheel():
    import torch_npu

    assert torch_npu.__version__.startswith(torch.__version__.partition("+")[0])
    assert torch.npu.is_available() and torch.npu.device_count() == 1
    x = torch.randn(3, 5)
    moved = x.to("npu")
    assert moved.device.type == "npu" and moved.data_ptr() != x.data_ptr()
    assert moved.cpu().device.type == "cpu" and torch.equal(moved.cpu(), x)
    assert torch.equal(moved.t().contiguous().cpu(), x.t())


@pytest.mark.parametrize("name", unimplemented())
def test_what_the_stub_does_not_do_returns_an_error(runtime, name):
    assert runtime[name]() == NOT_SUPPORTED
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert runtime.aclGetRecentErrMsg().decode() == f"runtime stub: {name} is not implemented"


def test_an_operator_of_cann_is_an_error_and_not_a_result():
    import torch_npu

    x = torch.ones(1, 2, 16, 16, dtype=torch.float16, device="npu")
    with pytest.raises(RuntimeError):
        torch_npu.npu_fusion_attention(x, x, x, 2, "BNSD").cpu()


def test_device_memory_is_bounded(runtime):
    pointer = ctypes.c_void_p()
    assert runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(64), 0) == 0
    host, back = (ctypes.c_char * 128)(*bytes(range(128))), (ctypes.c_char * 64)()
    size = ctypes.c_size_t
    assert runtime.aclrtMemcpy(pointer, size(64), host, size(64), 1) == 0
    assert runtime.aclrtMemcpy(back, size(64), pointer, size(64), 2) == 0
    assert back.raw == bytes(range(64))
    assert runtime.aclrtMemcpy(pointer, size(64), host, size(65), 1) != 0  # more than there is room for
    assert runtime.aclrtMemcpy(pointer, size(128), host, size(128), 1) != 0  # beyond the allocation, whatever is said
    assert runtime.aclrtMemset(pointer, size(128), 0, size(128)) != 0
    assert runtime.aclrtFree(pointer) == 0
    assert runtime.aclrtFree(pointer) != 0


def on_both(call):
    """The results of `call(device)` on the CPU and on `npu`, after checking that the latter are there."""
    on_cpu, on_npu = call("cpu"), call("npu")
    assert all(tensor.device.type == "npu" for tensor in on_npu)
    return [(a, b.cpu()) for a, b in zip(on_cpu, on_npu, strict=True)]


def attention_mass(device):
    q, k, _ = attention_inputs(2, 4, 2, 21, 30, 32, dtype=torch.bfloat16, device=device)
    valid = padding(2, 30, "left", device=device)
    return [ops.attention_mass(q, k, scale=0.2, reduce_block=8, valid=valid, impl="kernel")]


def index_scores(device):
    qi, ki, w = index_inputs(2, 3, 21, 30, 64, dtype=torch.float16, device=device)
    return [ops.index_scores(qi, ki, w, block=8, impl="kernel")]


def index_partition(device):
    qi, ki, w = index_inputs(2, 3, 21, 30, 64, dtype=torch.bfloat16, device=device)
    return [ops.index_partition(qi, ki, w, impl="kernel")]


def select_tokens(device):
    support = ops.select_tokens(ragged_scores(2, 1, 21, 30, block=8).to(device), k=9, block=8, queries=21, impl="kernel")
    return [support.count, support.indices.where(support.used(), -1)]


def select_by_index(device):
    qi, ki, w = index_inputs(2, 3, 21, 30, 64, dtype=torch.bfloat16, device=device)
    support = ops.select_by_index(qi, ki, w, k=9, block=8, sink=1, impl="kernel")
    return [support.count, support.indices.where(support.used(), -1)]


def sparse_attention(device):
    q, k, v = attention_inputs(2, 4, 2, 21, 30, 32, dtype=torch.bfloat16, device=device, strided=True)
    support = random_support(2, 2, 21, 30, k=7, block=8, device=device, empty=True)
    return [ops.sparse_attention(q, k, v, support, scale=0.2, impl="kernel")]


@pytest.mark.parametrize(
    "call", [attention_mass, index_scores, index_partition, select_tokens, select_by_index, sparse_attention]
)
def test_operators_on_npu_tensors_run_the_emulated_kernels(call):
    assert call.__name__ in dispatch.OPERATORS
    for expected, actual in on_both(call):
        assert torch.equal(actual, expected)


def test_the_library_refuses_tensors_of_other_devices():
    q = torch.ones(1, 2, 4, 16, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="q must be on a device that this library serves, got meta"):
        torch.ops.npu_sparse_emulated.attention_mass(q, q, 1.0, 1, "max", False, None)


@pytest.fixture(scope="module")
def card(stub_device, runtime):
    """The library for the card as torch calls it: torch_npu's streams and allocator, with the emulated kernels in it."""
    torch.ops.load_library(os.path.join(os.environ["NPU_SPARSE_RUNTIME_STUB"], "libnpu_sparse_card.so"))
    for name in ("npu_sparse_copies", "npu_sparse_waits", "npu_sparse_launches"):
        runtime[name].restype = ctypes.c_uint64
    return torch.ops.npu_sparse_card


@pytest.fixture
def launched(runtime):
    """`launched(call)`: what `call()` launched, as (stream, blocks, workspace)."""

    def run(call):
        before = runtime.npu_sparse_launches()
        call()
        launches = []
        for i in range(before, runtime.npu_sparse_launches()):
            stream, blocks, workspace = ctypes.c_void_p(), ctypes.c_uint32(), ctypes.c_void_p()
            runtime.npu_sparse_launch(ctypes.c_size_t(i), *map(ctypes.byref, (stream, blocks, workspace)))
            launches.append((stream.value, blocks.value, workspace.value))
        return launches

    return run


def card_arguments():
    """Arguments of every operator of the library for the card, on `npu`, and whether its blocks are vector cores."""
    half = {"dtype": torch.float16, "device": "npu"}
    qi, ki = torch.ones(1, 1, 700, 64, **half), torch.ones(1, 700, 64, **half)
    q, k = torch.ones(1, 4, 700, 32, **half), torch.ones(1, 2, 700, 32, **half)
    indices = torch.zeros(1, 1, 700, 3, dtype=torch.int32, device="npu")
    return {
        "index_scores": (qi, ki, None, 1, "max", None, None),
        "index_partition": (qi, ki, None, None),
        "select_tokens": (torch.ones(1, 1, 700, 700, device="npu"), 9, 0, 0, 1, 700, None),
        "select_by_index": (qi, ki, None, 9, 8, "max", 0, 0, None, None),
        "sparse_attention": (q, k, k, indices, torch.ones(1, 1, 700, dtype=torch.int32, device="npu"), 1, 0.2),
        "attention_mass": (q, k, 0.2, 64, "max", False, None),
    }


@pytest.mark.parametrize("op", ascendc.OPERATORS)
def test_the_library_for_the_card_copies_nothing_and_waits_for_nothing(card, runtime, launched, op):
    arguments = card_arguments()[op]
    torch.npu.synchronize()
    before = runtime.npu_sparse_copies(), runtime.npu_sparse_waits()
    ((stream, blocks, _),) = launched(lambda: getattr(card, op)(*arguments))
    assert (runtime.npu_sparse_copies(), runtime.npu_sparse_waits()) == before
    assert stream == torch.npu.current_stream().npu_stream and blocks > 1


@pytest.mark.parametrize("op", ascendc.OPERATORS)
def test_the_library_for_the_card_agrees_with_the_emulated_one(card, op):
    arguments = card_arguments()[op]
    actual = getattr(card, op)(*arguments)
    expected = getattr(torch.ops.npu_sparse_emulated, op)(*arguments)
    for a, b in zip(*((each,) if isinstance(each, torch.Tensor) else each for each in (actual, expected)), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("op", ascendc.OPERATORS)
def test_a_stream_gets_as_many_blocks_as_it_may_use_cores(card, runtime, launched, op):
    arguments, stream = card_arguments()[op], torch.npu.Stream()
    with torch.npu.stream(stream):
        ((_, whole, _),) = launched(lambda: getattr(card, op)(*arguments))
        for kind, cores in ((0, 2), (1, 4)):
            assert runtime.aclrtSetStreamResLimit(ctypes.c_void_p(stream.npu_stream), kind, cores) == 0
        ((used, limited, _),) = launched(lambda: getattr(card, op)(*arguments))
        assert runtime.aclrtResetStreamResLimit(ctypes.c_void_p(stream.npu_stream)) == 0
    most = 4 if op == "select_tokens" else 2
    assert limited == most < whole <= (40 if op == "select_tokens" else 20) and used == stream.npu_stream


def test_a_stream_without_two_vector_cores_is_refused(card, runtime):
    arguments, stream = card_arguments()["attention_mass"], torch.npu.Stream()
    assert runtime.aclrtSetStreamResLimit(ctypes.c_void_p(stream.npu_stream), 1, 1) == 0
    with torch.npu.stream(stream), pytest.raises(RuntimeError, match="a cube core and two vector cores at least, got 20 and 1"):
        card.attention_mass(*arguments)
    assert runtime.aclrtResetStreamResLimit(ctypes.c_void_p(stream.npu_stream)) == 0


def test_workspaces_of_two_streams_are_never_the_same_memory(card, launched):
    """The workspace is freed when a call returns, before its kernel has run: only work of the same stream may get it."""
    arguments, streams = card_arguments()["sparse_attention"], [torch.npu.Stream() for _ in range(2)]

    def work():
        for stream in (*streams, *streams):
            with torch.npu.stream(stream):
                card.sparse_attention(*arguments)

    launches = launched(work)
    assert [stream for stream, _, _ in launches] == [stream.npu_stream for stream in (*streams, *streams)]
    first, second, third, fourth = (workspace for _, _, workspace in launches)
    assert first != second and (third, fourth) == (first, second)  # again what the same stream has had


def test_the_library_names_the_chip(card):
    assert card.soc_name() == "Ascend910B3"


def prefill(name: str, kind: str, device: str):
    """`(logits of the real tokens, members of every support)` of a tiny patched model on this device."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    model, seen = tiny_model(name, dtype=torch.bfloat16).to(device), []
    selector = selectors.Oracle() if kind == "oracle" else selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2))

    def observe(inputs, support, out):
        assert inputs.q.device.type == support.indices.device.type == out.device.type == device
        seen.append(support.member_mask(75).cpu())

    budget = Budget(k=24, block=8, sink=2, recent=4)
    with torch.no_grad(), SparsePrefill.attach(model, selector, budget, impl="kernel", observe=observe):
        logits = model(ids.to(device), attention_mask=mask.to(device)).logits
    assert logits.device.type == device
    return logits.cpu()[mask.bool()], seen


@pytest.mark.parametrize("name", ["qwen3_5", "llama", "gemma3"])
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_a_patched_model_on_npu_computes_what_it_does_on_the_cpu(name, kind):
    expected, supports = prefill(name, kind, "cpu")
    actual, on_npu = prefill(name, kind, "npu")
    assert len(supports) >= 2 and all(map(torch.equal, on_npu, supports))
    assert torch.equal(actual, expected)


def run_without_cann(*command: str, **environment) -> subprocess.CompletedProcess:
    hidden = ("LD_LIBRARY_PATH", "NPU_SPARSE_RUNTIME_STUB", "TORCH_DEVICE_BACKEND_AUTOLOAD", "ASCEND_HOME_PATH")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run([sys.executable, *command], env=env | environment, cwd=ROOT, capture_output=True, text=True)


def test_without_cann_the_package_and_the_doctor_work_and_say_what_to_do():
    broken = run_without_cann("-c", "import torch")
    assert broken.returncode and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in broken.stderr
    assert run_without_cann("-c", "import npu_sparse; print(npu_sparse.__version__)").returncode == 0
    doctor = run_without_cann("-m", "npu_sparse", "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert "`import torch` fails" in doctor.stdout and "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in doctor.stdout
    works = run_without_cann("-c", "import npu_sparse.ops", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert works.returncode == 0, works.stderr


@pytest.mark.parametrize("command", [("scripts/ttft_qwen35.py",), ("-m", "npu_sparse", "ttft", "smollm2-135m")])
def test_without_cann_a_run_ends_with_a_sentence_and_no_traceback(command):
    refused = run_without_cann(*command, "--output", "unused", PYTHONPATH=str(ROOT))
    (sentence,) = refused.stderr.strip().splitlines()
    assert refused.returncode and sentence.startswith("error: torch_npu must find CANN, got none in this shell (lib")
    assert "set_env.sh" in sentence and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in sentence
