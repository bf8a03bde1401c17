"""Budget.candidates: an indexer that ranks blocks of keys before it scores keys."""

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, Indexer, SparsePrefill, ascendc, ops, selectors
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.testing import tiny_model, tokens

T = 300
BUDGET = Budget(k=24, block=16, sink=2, recent=4, candidates=32, key_block=16)
every_model = pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def ids():
    return tokens(2, T)


def prefill(model, budget, ids, **inputs):
    """Logits, and `{layer: (inputs, support)}`, of one prefill with an untrained indexer."""
    seen = {}
    observe = lambda inputs, support, out: seen.update({inputs.layer: (inputs, support)})  # noqa: E731
    with SparsePrefill.attach(model, Indexer.for_model(model, dim=64, heads=2), budget, observe=observe):
        return model(ids, **inputs).logits, seen


@every_model
def test_every_layer_selects_in_two_levels(models, ids, name):
    _, seen = prefill(models(name), BUDGET, ids)
    one_level = 0
    for inputs, support in seen.values():
        options = dict(k=24, block=16, sink=2, recent=4)
        expected = ops.select_two_level(*inputs.index, candidates=32, key_block=16, **options)
        assert torch.equal(support.check(T, T).member_mask(T), expected.member_mask(T))
        one_level += torch.equal(support.member_mask(T), ops.select_by_index(*inputs.index, **options).member_mask(T))
    assert len(seen) > 1 and not one_level


@every_model
def test_where_every_block_is_a_candidate_nothing_changes(models, ids, name):
    logits, _ = prefill(models(name), BUDGET.replace(candidates=T), ids)
    assert torch.equal(logits, prefill(models(name), BUDGET.replace(candidates=0), ids)[0])


@every_model
def test_right_padding_changes_nothing_for_real_tokens(models, ids, name):
    mask = torch.ones_like(ids)
    mask[1, -70:] = 0
    padded, _ = prefill(models(name), BUDGET, ids, attention_mask=mask)
    alone, _ = prefill(models(name), BUDGET, ids[1:, :-70])
    torch.testing.assert_close(padded[1, :-70], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_of_whole_groups_select_what_one_prefill_does(models, ids, name):
    model = models(name)
    whole, seen = prefill(model, BUDGET, ids)
    cache, parts = DynamicCache(config=model.config), []
    indexer, last = Indexer.for_model(model, dim=64, heads=2), {}
    observe = lambda inputs, support, out: last.update({inputs.layer: support})  # noqa: E731
    with SparsePrefill.attach(model, indexer, BUDGET, observe=observe):
        for part in ids.split(128, 1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for layer, support in last.items():
        assert torch.equal(support.member_mask(T), seen[layer][1].member_mask(T)[:, :, 16:])


def test_layers_that_share_read_the_candidates_of_the_first(models, ids):
    _, seen = prefill(models("llama"), BUDGET.replace(share_layers=2), ids)
    assert seen[1][1] is seen[0][1] and seen[2][1] is not seen[0][1]


@pytest.mark.slow
def test_a_prefill_in_two_levels_compiles_to_one_graph(ids):
    model = tiny_model("llama", num_hidden_layers=2)
    with SparsePrefill.attach(model, Indexer.for_model(model, dim=64), BUDGET):
        eager = model(ids, use_cache=True).logits
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, use_cache=True).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), eager, rtol=1e-4, atol=1e-4)


def test_selectors_without_an_indexer_have_no_candidates(models):
    with pytest.raises(ValueError, match="candidates must be 0 for a selector without an indexer, got 32 for 'oracle'"):
        SparsePrefill.attach(models("llama"), selectors.Oracle(), BUDGET)


def test_a_device_without_a_kernel_for_it_is_refused_when_attaching(models, monkeypatch):
    kernels = {(op, "cpu"): print for op in ascendc.SERVED}
    monkeypatch.setattr(dispatch, "_KERNELS", kernels)
    monkeypatch.setattr(ascendc, "load_if_built", lambda device_type: {})
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match="select_two_level has no kernel on 'cpu': it has kernels for cuda only"):
        SparsePrefill.attach(model, Indexer.for_model(model, dim=64), BUDGET, impl="kernel")
    SparsePrefill.attach(model, Indexer.for_model(model, dim=64), BUDGET.replace(candidates=0), impl="kernel").detach()
