import pytest
import torch

from npu_sparse import Budget, selectors
from npu_sparse.ops import workspace
from npu_sparse.selectors import LayerInputs
from npu_sparse.testing import attention_inputs, index_inputs, naive_index_scores, naive_select_tokens, padding

EVERY = [
    selectors.Oracle(), selectors.Oracle(per_kv=True), selectors.Local(sink=2), selectors.Random(), selectors.Dense(),
    selectors.ByIndexer(type("Distilled", (), {"evidence": "distilled"})()),
]  # fmt: skip
every_selector = pytest.mark.parametrize("selector", EVERY, ids=lambda s: s.name)


def layer_inputs(B=2, Tq=37, Tk=50, side=None, seed=0, layer=3):
    q, k, v = attention_inputs(B, 4, 2, Tq, Tk, 16, seed=seed)
    valid = padding(B, Tk, side) if side else None
    return LayerInputs(layer, q, k, v, 0.25, valid, index_inputs(B, 2, Tq, Tk, 64, seed=seed))


def member(support, keys=50):
    return support.member_mask(keys)


@every_selector
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_supports_keep_their_contract(selector, block, side):
    inputs = layer_inputs(side=side)
    support = selector.select(inputs, Budget(k=24, block=block, sink=2, recent=3)).check(37, 50)
    assert support.block == block
    assert support.indices.shape[1] == (2 if selector.name == "oracle per KV group" else 1)
    if side:
        assert not bool((member(support) & ~inputs.valid[:, None, None]).any())


@every_selector
@pytest.mark.parametrize("block", [1, 8])
def test_the_budget_is_spent_and_not_exceeded(selector, block):
    support = selector.select(layer_inputs(Tq=50), Budget(k=16, block=block, sink=2, recent=3))
    visible = torch.arange(block, 50 + block, block).clamp(max=50)
    most = 50 if selector.name == "dense" else 16
    assert torch.equal(support.count, visible.clamp(max=most).int().expand_as(support.count))


@every_selector
def test_slicing_the_queries_does_not_change_the_choice(selector, monkeypatch):
    inputs, budget = layer_inputs(side="left"), Budget(k=12, block=4, sink=1, recent=2)
    whole = selector.select(inputs, budget)
    monkeypatch.setattr(workspace, "SIZE", 4)
    sliced = selector.select(inputs, budget).check(37, 50)
    if selector.name == "random":
        assert torch.equal(sliced.count, whole.count)
    else:
        assert torch.equal(member(sliced), member(whole))


@every_selector
def test_a_layer_override_applies_to_its_layer_only(selector):
    budget = Budget(k=8, block=1, per_layer={3: 20})
    widths = [selector.select(layer_inputs(layer=layer), budget).width for layer in (3, 4)]
    assert widths == ([50, 50] if selector.name == "dense" else [20, 8])


def test_oracles_and_controls_and_indexers_are_never_mixed_up():
    evidence = {selector.name: selector.evidence for selector in EVERY}
    assert evidence == {
        "oracle": "oracle", "oracle per KV group": "oracle", "sink 2 + recent": "control", "random": "control",
        "dense": "dense", "indexer": "distilled",
    }  # fmt: skip


def test_local_keeps_the_sinks_and_the_newest_keys():
    support = selectors.Local(sink=2).select(layer_inputs(), Budget(k=6, block=1))
    for t in range(37):
        assert support.indices[0, 0, t].tolist() == [0, 1, *range(13 + t - 3, 13 + t + 1)]


def test_local_sinks_are_the_first_valid_keys():
    inputs = layer_inputs(side="left")
    first = inputs.valid.int().argmax(-1)
    support = selectors.Local(sink=2).select(inputs, Budget(k=6, block=1))
    assert torch.equal(support.indices[:, 0, -1, :2].long(), first[:, None] + torch.arange(2))


def test_random_is_the_same_for_the_same_seed_and_differs_by_layer_and_seed():
    budget = Budget(k=12, block=4)

    def chosen(seed, layer):
        return member(selectors.Random(seed).select(layer_inputs(layer=layer), budget))

    assert torch.equal(chosen(0, 3), chosen(0, 3))
    assert not torch.equal(chosen(0, 3), chosen(1, 3))
    assert not torch.equal(chosen(0, 3), chosen(0, 4))


def test_random_neither_reads_nor_changes_the_global_generator():
    state = torch.get_rng_state()
    selectors.Random(0).select(layer_inputs(), Budget(k=12, block=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_is_uniform():
    chosen = sum(
        member(selectors.Random(seed).select(layer_inputs(B=1, Tq=1), Budget(k=10, block=1)))[0, 0, 0].float()
        for seed in range(300)
    )
    assert float((chosen / 300 - 0.2).abs().max()) < 0.1


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_the_indexer_selects_its_best_scores(reduce):
    inputs, budget = layer_inputs(), Budget(k=24, block=8, sink=2, recent=3, reduce=reduce)
    support = EVERY[-1].select(inputs, budget)
    scores = naive_index_scores(*inputs.index, block=8, reduce=reduce).float()
    expected = naive_select_tokens(scores, k=24, sink=2, recent=3, block=8, queries=37)
    assert torch.equal(support.count, expected.count)
    assert float((member(support) != member(expected)).float().mean()) < 0.002  # equal scores in fp32


@pytest.mark.parametrize("selector", [s for s in EVERY if s.name in ("oracle", "indexer")], ids=lambda s: s.name)
def test_stages_are_reported(selector):
    names = []

    def stage(name):
        names.append(name)
        return torch.no_grad()

    inputs = layer_inputs()
    selector.select(
        LayerInputs(3, inputs.q, inputs.k, inputs.v, 0.25, None, inputs.index, "auto", stage), Budget(k=8, block=1)
    )
    assert names == ["scoring", "top-k"]


def test_a_local_control_that_cannot_hold_its_sinks_is_refused():
    with pytest.raises(ValueError, match="k must hold the keys that are always kept"):
        selectors.Local(sink=4).select(layer_inputs(), Budget(k=3, block=1))


def test_the_first_name_of_the_indexers_selector_keeps_working():
    assert selectors.Indexer is selectors.ByIndexer
