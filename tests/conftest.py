import json
import os
import random
import signal

import pytest
import torch
from hypothesis import settings
from transformers import DynamicCache, PreTrainedTokenizerFast

from npu_sparse import Indexer, ascendc
from npu_sparse.ops import dispatch
from npu_sparse.testing import BACKENDS, Backend, open_backend, tiny_model, tiny_tokenizer, tokens

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background jobs ignore it, but tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set by `make test-npu`: the directory of the runtime stub's libraries, where torch_npu runs without a card
RUNTIME_STUB = os.environ.get("NPU_SPARSE_RUNTIME_STUB")

ONLY_ELSEWHERE = ": it has kernels for "  # begins the list of devices that an operator has kernels for
NEEDS_CANN = "needs CANN"  # begins the reason of a test that the runtime stub cannot run

TASK_LINES = [
    "Some special magic numbers are hidden within the following text. Make sure to memorize it.",
    "What are all the special magic numbers for one key mentioned in the provided text? The numbers for that key are",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR ABCDE = 12345",
    "Question: Find all variables that are assigned the value 12345 in the text above. Answer:",
]

# the same examples on every run and every machine; `--hypothesis-profile=explore` looks for new ones
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption(
        "--backend", help=f"run the tests of these back-ends alone ({', '.join(BACKENDS)}); one that cannot run here fails"
    )
    parser.addoption("--headers", help="CANN's published headers: the AscendC kernels are type-checked against them")


def required(config) -> list[str]:
    """The back-ends of --backend."""
    names = (config.getoption("--backend") or "").split(",") if config.getoption("--backend") else []
    if unknown := sorted(set(names) - set(BACKENDS)):
        raise pytest.UsageError(f"--backend must name some of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    return names


def must_run(config) -> set[str]:
    """The back-ends whose tests fail where they would skip: those of --backend, and of NPU_SPARSE_REQUIRE beside all others."""
    named = [name for name in os.environ.get("NPU_SPARSE_REQUIRE", "").split(",") if name]
    if unknown := sorted(set(named) - set(BACKENDS)):
        raise pytest.UsageError(f"NPU_SPARSE_REQUIRE must name some of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    return {*required(config), *named}


def pytest_configure(config):
    must_run(config)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """On a card that must run them tests do not skip, but for operators that have no kernel for such a card; on the stub, which
    is no card, also for what needs CANN."""
    outcome = yield
    report = outcome.get_result()
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if report.skipped and not hasattr(report, "wasxfail") and backend in must_run(item.config):
        reason = report.longrepr[2]
        if ONLY_ELSEWHERE not in reason and not (RUNTIME_STUB and NEEDS_CANN in reason):
            report.outcome, report.longrepr = "failed", f"must run on {backend!r}, got {reason}"


def pytest_collection_modifyitems(config, items):
    names = required(config)
    if not names:
        return
    stub = RUNTIME_STUB and "npu" in names  # its own tests are of the npu back-end, too
    chosen = [
        item for item in items
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") in names
        or stub and item.get_closest_marker("npu_stub")
    ]  # fmt: skip
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


@pytest.fixture(scope="session")
def emulated_library():
    """The AscendC kernels, built for the host emulation; compiled once, whoever asks."""
    if reason := ascendc.missing_for("emulated"):
        pytest.skip(reason)
    ascendc.build("emulated", report=lambda line: None)


@pytest.fixture(scope="session")
def stub_device(emulated_library):
    """The `npu` device of the real torch_npu, on the runtime stub: aten runs on the CPU, our operators on the emulation."""
    if not RUNTIME_STUB:
        pytest.skip("the runtime stub of torch_npu is not set up: run `make test-npu`")
    torch.empty(1, device="npu")  # torch_npu registers its kernels before they are replaced
    torch.ops.load_library(os.path.join(RUNTIME_STUB, "libnpu_cpu_fallback.so"))
    for op, kernel in ascendc.load("emulated").items():
        dispatch.register_kernel(op, "npu", kernel)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    """Every back-end in turn; one that cannot run here skips with the sentence that a user would get."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_library")
    if request.param == "npu" and RUNTIME_STUB:
        request.getfixturevalue("stub_device")
    try:
        return open_backend(request.param)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError for a device it was not built for
        leave = pytest.fail if request.param in must_run(request.config) else pytest.skip
        leave(str(error).splitlines()[0])


@pytest.fixture(scope="session")
def models():
    """`models(name)`: the tiny model of an architecture, made once; a test that changes its weights makes one of its own."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_model(name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens, trained on lines of the tasks, so that prompts of a few hundred tokens hold a task."""
    return tiny_tokenizer(TASK_LINES, special=("<eos>",), begins=False, eos_token="<eos>")


@pytest.fixture(scope="session")
def model(tokenizer):
    """A tiny Llama for `tokenizer`, with weights as small as those of an untrained checkpoint."""
    return tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        max_position_embeddings=4096, initializer_range=0.02, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def indexer(model) -> Indexer:
    return Indexer.for_model(model, dim=64)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def require_continuing():
    """`require_continuing(model)` skips where transformers cannot continue a cache by several tokens: early versions of linear
    attention forgot their states."""

    def require(model):
        ids, cache = tokens(2, 20), DynamicCache(config=model.config.get_text_config())
        model(ids[:, :9], past_key_values=cache)
        if not torch.allclose(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:], atol=1e-3):
            pytest.skip("this version of transformers cannot continue a cache of linear attention by several tokens")

    return require


@pytest.fixture(scope="session")
def mutations():
    """`mutations(value, count, seed)`: JSON files that began as `value`, each damaged once or twice, as bytes."""

    def places(value, path=()):
        yield path
        if isinstance(value, (dict, list)):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from places(value[key], (*path, key))

    def mutate(value, count: int, seed: int = 0):
        drawn = random.Random(seed)
        strange = [
            None, True, False, 0, -1, 3, 1.5, 1e400, -1e400, 1e305, 2**70, "", "a", "dense", [], {}, [[]], {"": None}, ["a"] * 3,
            {"k": "8"}, float("nan"),
        ]  # fmt: skip
        for _ in range(count):
            text = json.dumps(value)
            for _ in range(drawn.randint(1, 2)):
                try:
                    changed = json.loads(text)
                    path = drawn.choice(list(places(changed))[1:])
                except (ValueError, IndexError, RecursionError):
                    break
                parent = changed
                for key in path[:-1]:
                    parent = parent[key]
                kind = drawn.choice(("drop", "replace", "replace", "nest", "double", "cut", "flip"))
                if kind == "drop":
                    del parent[path[-1]]
                elif kind == "replace":
                    parent[path[-1]] = drawn.choice(strange)
                elif kind == "double" and isinstance(parent, list):
                    parent.append(parent[path[-1]])
                text = json.dumps(changed)
                if kind == "nest":
                    deep = drawn.choice((20, 200, 20_000))
                    text = text.replace(json.dumps(parent[path[-1]]), "[" * deep + "]" * deep, 1)
                elif kind == "cut":
                    text = text[: drawn.randrange(len(text))]
                elif kind == "flip":
                    at = drawn.randrange(len(text))
                    text = text[:at] + chr(ord(text[at]) ^ (1 << drawn.randrange(8))) + text[at + 1 :]
            yield text.encode("utf-8", "surrogatepass")

    return mutate
