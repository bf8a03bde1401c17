"""A prefill waits for the device once, at its end, and a CUDA graph that records it makes it wait not at all."""

import importlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from npu_sparse import Budget, Indexer, SparsePrefill, selectors
from npu_sparse.models import attention, forward
from npu_sparse.ops import dispatch
from npu_sparse.testing import tiny_model

prefill = importlib.import_module("npu_sparse.prefill")
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "masked_select", "equal", "unique_dim", "_unique2", "lift_fresh")
T = 100
NORMAL = Budget(k=24, block=8, reduce="softmax_max", exact_last=10)
BUDGETS = {
    "normal": NORMAL,
    "raw maximum": Budget(k=24, block=8),
    "per query": Budget(k=24, block=1, exact_last=10),
    "two levels": NORMAL.replace(candidates=48, key_block=16),
    "shared layers": NORMAL.replace(share_layers=2),
    "tail": Budget(k=24, block=8, tail=True),
}


class Waits(TorchDispatchMode):
    """Records the operators that wait for the device, or would on CUDA. What happens within this package's operators, whose
    kernels are tested on a card, it does not see."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        tensor = next((x for x in args if isinstance(x, torch.Tensor)), None)
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or (name in WAITS and (name != "lift_fresh" or tensor.numel())):
            self.names.append(name)
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def kernels(monkeypatch):
    """Every operator has a kernel on the CPU, which is its reference."""

    def reference(op):
        return lambda *inputs: getattr(torch.ops.npu_sparse, f"{op}_reference")(*inputs)

    monkeypatch.setattr(dispatch, "_KERNELS", {(op, "cpu"): reference(op) for op in dispatch.OPERATORS})


def attached(model, kind, budget, impl):
    if kind == "indexer":
        indexer = Indexer.for_model(model, dim=64, partition=True)
        return SparsePrefill.attach(model, selectors.ByIndexer(indexer), budget, impl=impl)
    return SparsePrefill.attach(model, {"local": selectors.Local()}[kind], budget, impl=impl)


def tokens(B=1, length=T, seed=0):
    return torch.randint(1, 90, (B, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("mask", [None, "whole", "padded"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_forward_waits_for_its_finite_check_alone(monkeypatch, budget, name, mask, capturing):
    kernels(monkeypatch)
    for module in (forward, attention, prefill):
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing)
    model, ids = tiny_model(name, dtype=torch.bfloat16), tokens(2)
    options = {} if mask is None else {"attention_mask": torch.ones_like(ids)}
    if mask == "padded":
        options["attention_mask"][0, :9] = 0
    with attached(model, "indexer", BUDGETS[budget], "kernel"):
        expected = model(ids, **options).logits
        with Waits() as waits:
            actual = model(ids, **options).logits
    assert torch.equal(actual, expected)
    of_mask = ["_local_scalar_dense"] if mask else []  # whether anything is padding at all
    assert waits.names == ([] if capturing else [*of_mask, "_local_scalar_dense"])


def test_a_wait_within_a_layer_is_found(monkeypatch):
    kernels(monkeypatch)
    model, ids = tiny_model("qwen2", dtype=torch.bfloat16), tokens()
    monkeypatch.setattr(prefill, "_of_one_dtype", lambda q, k, v: (q, k, v) if bool(q.sum() < 1e9) else None)
    with attached(model, "indexer", NORMAL, "kernel"), Waits() as waits:
        model(ids)
    assert waits.names == ["_local_scalar_dense"] * 4  # three layers wait, and the forward


class Counts(TorchDispatchMode):
    """How often PyTorch is asked for an operator, a view among them: each takes the host microseconds."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.asked[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget, own, others", [("normal", 4, 17), ("raw maximum", 3, 5)])
def test_a_sparse_layer_asks_for_few_operators(monkeypatch, budget, own, others):
    kernels(monkeypatch)
    monkeypatch.setattr(prefill, "is_capturing", lambda device: True)  # the finite check is the forward's, not a layer's
    asked = []
    for layers in (2, 6):
        model, ids = tiny_model("qwen2", dtype=torch.bfloat16, num_hidden_layers=layers), tokens()
        with Counts() as dense:
            model(ids)
        with attached(model, "indexer", BUDGETS[budget], "kernel"), Counts() as sparse:
            model(ids)
        ours = sum(count for name, count in sparse.asked.items() if name.startswith("npu_sparse"))
        asked.append((ours, sparse.asked.total() - ours - dense.asked.total()))
    (first, few), (second, more) = asked
    assert (second - first) / 4 == own  # index_heads, select_by_index, sparse_attention, and dense_rows for exact rows
    assert (more - few) / 4 <= others


# On the card


on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
LONG = 1300
ON_CARD = {
    name: budget.replace(k=192, block=1 if budget.block == 1 else 64, exact_last=budget.exact_last and 128,
                         candidates=budget.candidates and 512)
    for name, budget in BUDGETS.items()
}  # fmt: skip


@pytest.fixture
def card_model():
    return tiny_model(
        "qwen2", dtype=torch.bfloat16, hidden_size=256, num_attention_heads=4, max_position_embeddings=4096
    ).cuda()


@on_a_card
@pytest.mark.parametrize("budget", ON_CARD)
@pytest.mark.parametrize("cached", [False, True])
def test_a_graph_of_a_prefill_gives_what_the_prefill_gives(card_model, budget, cached):
    model, ids = card_model, tokens(1, LONG).cuda()
    others = tokens(1, LONG, seed=1).cuda()

    def run():
        cache = DynamicCache(config=model.config) if cached else None
        return model(ids, past_key_values=cache, use_cache=cached).logits

    with attached(model, "indexer", ON_CARD[budget], "kernel"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and allocate before the graph is recorded
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
        for prompt in (ids.clone(), others):
            ids.copy_(prompt)
            graph.replay()
            recorded = replayed.clone()
            torch.testing.assert_close(recorded, run(), rtol=1e-2, atol=1e-2)
            assert bool(recorded.isfinite().all())


@on_a_card
def test_a_forward_waits_once(card_model):
    model, ids = card_model, tokens(1, LONG).cuda()
    with attached(model, "indexer", ON_CARD["normal"], "kernel"):
        model(ids)
        made = importlib.import_module("npu_sparse.models.forward")
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prefill, "is_capturing", lambda device: True)  # but for the finite check
                patch.setattr(made, "is_capturing", lambda device: True)
                model(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_a_card
@pytest.mark.slow
def test_reduce_overhead_records_a_graph_and_gives_the_same(card_model):
    from torch._dynamo.utils import counters

    model, ids = card_model, tokens(1, LONG).cuda()
    with attached(model, "indexer", ON_CARD["normal"], "kernel"):
        eager = model(ids, use_cache=True).logits
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(lambda ids: model(ids, use_cache=True).logits, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            recorded = compiled(ids).clone()
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(recorded, eager, rtol=5e-2, atol=5e-2)
