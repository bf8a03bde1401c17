"""Budget.reduce = "softmax_max": every query's index scores less its own log-partition, exact or learned by the adapter."""

import json

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, Indexer, SparsePrefill, ops, selectors
from npu_sparse.indexer import AdapterError, IndexerConfig, PartitionHead
from npu_sparse.models.architectures import attention_modules
from npu_sparse.ops.masks import keys_seen
from npu_sparse.selectors import learns_partition
from npu_sparse.testing import naive_index_partition, normal, padding, tiny_model, tokens

T = 150
BUDGET = Budget(k=24, block=16, sink=2, recent=4, reduce="softmax_max")
every_model = pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def ids():
    return tokens(2, T)


def indexer_for(model, partition=True, **options):
    """An untrained indexer whose queries are louder or quieter than one another; its partition heads predict nonsense."""
    indexer = Indexer.for_model(model, dim=64, heads=2, partition=partition, **options)
    for n, head in enumerate(indexer.layers.values()):
        head.q_proj.weight.mul_(4)
        if partition:
            head.partition.direction.copy_(normal(len(head.partition.direction), seed=n))
            head.partition.line.copy_(torch.tensor([0.5 * n, 1.5]))
    return indexer


def prefill(model, budget, ids, indexer=None, **inputs):
    """Logits, and `{layer: (inputs, support)}`, of one prefill."""
    seen = {}
    observe = lambda inputs, support, out: seen.update({inputs.layer: (inputs, support)})  # noqa: E731
    with SparsePrefill.attach(model, indexer or indexer_for(model), budget, observe=observe):
        return model(ids, **inputs).logits, seen


def members(support):
    return support.member_mask(T)


# What is selected


@every_model
@pytest.mark.parametrize("partition", ["auto", "exact", "learned"])
def test_every_layer_subtracts_the_partition_that_the_budget_names(models, ids, name, partition):
    indexer = indexer_for(models(name))
    _, seen = prefill(models(name), BUDGET.replace(partition=partition), ids, indexer)
    options, raw = dict(k=24, block=16, sink=2, recent=4), 0
    assert len(seen) > 1
    for inputs, support in seen.values():
        if partition == "exact":
            assert inputs.partition is None
            own = naive_index_partition(*inputs.index).float()
        else:
            own = inputs.partition
            assert own.dtype == torch.float32 and own.shape == (2, T)
        expected = ops.select_by_index(*inputs.index, reduce="softmax_max", partition=own, **options)
        assert torch.equal(members(support), members(expected))
        raw += torch.equal(members(support), members(ops.select_by_index(*inputs.index, **options)))
    assert raw < len(seen)


@every_model
def test_the_learned_partition_is_that_of_the_layers_hidden_states(models, ids, name):
    model, indexer, hidden = models(name), indexer_for(models(name)), {}

    def remember(n):
        return lambda module, args, kwargs: hidden.update({n: kwargs["hidden_states"]})

    handles = [
        module.register_forward_pre_hook(remember(n), with_kwargs=True) for n, module in attention_modules(model).items()
    ]
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    _, seen = prefill(model, BUDGET, ids, indexer, attention_mask=mask)
    for handle in handles:
        handle.remove()
    n = torch.stack([torch.arange(1, T + 1) - 30, torch.arange(1, T + 1)]).clamp(min=1)
    for layer, (inputs, _) in seen.items():
        head = indexer.layers[str(layer)].partition
        expected = hidden[layer] @ head.direction + head.line[0] + head.line[1] * n.log()
        torch.testing.assert_close(inputs.partition, expected)


def test_without_a_head_the_partition_is_exact(models, ids):
    model = models("llama")
    auto, seen = prefill(model, BUDGET, ids, indexer_for(model, partition=False))
    assert all(inputs.partition is None for inputs, _ in seen.values())
    assert torch.equal(auto, prefill(model, BUDGET.replace(partition="exact"), ids)[0])


@pytest.mark.parametrize("partition", ["exact", "learned"])
def test_where_every_query_selects_for_itself_it_is_the_maximum(models, ids, partition):
    model, budget = models("llama"), BUDGET.replace(block=1, partition=partition)
    logits, seen = prefill(model, budget, ids)
    assert all(inputs.partition is None for inputs, _ in seen.values())  # the work is skipped
    assert torch.equal(logits, prefill(model, budget.replace(reduce="max"), ids)[0])


@every_model
@pytest.mark.parametrize("partition", ["exact", "learned"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(models, ids, name, partition, side):
    mask, missing = torch.ones_like(ids), 38  # an even number: blocks of two begin at the same tokens
    real = slice(missing, T) if side == "left" else slice(0, T - missing)
    mask[1] = 0
    mask[1, real] = 1
    budget = BUDGET.replace(partition=partition, block=2)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    padded, _ = prefill(models(name), budget, ids, attention_mask=mask, position_ids=position_ids)
    alone, _ = prefill(models(name), budget, ids[1:, real])
    torch.testing.assert_close(padded[1, real], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("partition", ["exact", "learned"])
def test_chunks_of_whole_blocks_select_what_one_prefill_does(models, ids, name, partition):
    model, budget = models(name), BUDGET.replace(partition=partition)
    indexer = indexer_for(model)
    whole, seen = prefill(model, budget, ids, indexer)
    cache, parts, last = DynamicCache(config=model.config), [], {}
    observe = lambda inputs, support, out: last.update({inputs.layer: (inputs, support)})  # noqa: E731
    with SparsePrefill.attach(model, indexer, budget, observe=observe):
        for part in ids.split(64, 1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for layer, (inputs, support) in last.items():
        assert torch.equal(members(support), members(seen[layer][1])[:, :, 8:])
        if partition == "learned":
            torch.testing.assert_close(inputs.partition, seen[layer][0].partition[:, 128:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 16])
def test_two_levels_subtract_the_learned_partition(models, ids, block):
    model = models("llama")
    budget = BUDGET.replace(candidates=32, key_block=16, block=block)
    _, seen = prefill(model, budget, ids)
    for inputs, support in seen.values():
        options = dict(k=24, block=block, sink=2, recent=4, candidates=32, key_block=16)
        expected = ops.select_two_level(*inputs.index, reduce="softmax_max", partition=inputs.partition, **options)
        assert torch.equal(members(support), members(expected))


def test_the_oracles_mass_is_normalised_already(models, ids):
    model = models("llama")
    for chooser in (selectors.Oracle(), selectors.Oracle(per_kv=True), selectors.Local(), selectors.Random()):
        with SparsePrefill.attach(model, chooser, BUDGET):
            ours = model(ids).logits
        with SparsePrefill.attach(model, chooser, BUDGET.replace(reduce="max")):
            assert torch.equal(model(ids).logits, ours)


def test_layers_that_share_and_a_tail_work_as_ever(models, ids):
    _, seen = prefill(models("llama"), BUDGET.replace(share_layers=2, tail=True), ids)
    assert seen[1][1] is seen[0][1] and seen[2][1] is not seen[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["exact", "learned"])
def test_a_prefill_compiles_to_one_graph(ids, partition):
    model = tiny_model("llama", num_hidden_layers=2)
    with SparsePrefill.attach(model, indexer_for(model), BUDGET.replace(partition=partition)):
        eager = model(ids, use_cache=True).logits
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, use_cache=True).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), eager, rtol=1e-4, atol=1e-4)


# The head, and the adapter that carries it


def test_an_unfitted_head_predicts_the_logarithm_of_the_visible_keys():
    seen = keys_seen(5, 9, padding(2, 9, "left"), "cpu")
    assert seen.shape == (2, 5)
    torch.testing.assert_close(PartitionHead(16)(normal(2, 5, 16), seen), seen.clamp(min=1).log())
    assert torch.equal(keys_seen(5, 9, None, "cpu"), torch.tensor([[5, 6, 7, 8, 9]]))


def test_a_head_takes_no_gradient(models):
    indexer = Indexer.for_model(models("llama"), partition=True)
    assert not any(p.requires_grad for n, p in indexer.named_parameters() if ".partition." in n)
    assert all(p.requires_grad for n, p in indexer.named_parameters() if ".partition." not in n)


def test_an_adapter_keeps_its_heads(models, ids, tmp_path):
    model = models("llama")
    indexer = Indexer.from_pretrained(indexer_for(model).save_pretrained(tmp_path / "adapter"))
    assert indexer.config.partition
    again = Indexer.from_pretrained(indexer.save_pretrained(tmp_path / "again"))
    assert torch.equal(prefill(model, BUDGET, ids, indexer)[0], prefill(model, BUDGET, ids, again)[0])


def test_an_adapter_from_before_there_were_heads_is_read(models, tmp_path):
    directory = indexer_for(models("llama"), partition=False).save_pretrained(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    del config["indexer"]["partition"]
    (directory / "config.json").write_text(json.dumps(config))
    assert not Indexer.from_pretrained(directory).config.partition


def test_an_adapter_whose_head_is_missing_is_refused(models, tmp_path):
    directory = indexer_for(models("llama"), partition=False).save_pretrained(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["indexer"]["partition"] = True
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="weights do not fit config.json"):
        Indexer.from_pretrained(directory)


# What is refused when attaching


def test_a_learned_partition_takes_an_adapter_with_heads(models):
    model = models("llama")
    with pytest.raises(AdapterError, match="must be auto or exact for an adapter without a partition head, got learned: distil"):
        SparsePrefill.attach(model, indexer_for(model, partition=False), BUDGET.replace(partition="learned"))
    SparsePrefill.attach(model, indexer_for(model, partition=False), BUDGET.replace(partition="learned", reduce="max")).detach()


@pytest.mark.parametrize("head, partition", [(False, "auto"), (False, "exact"), (True, "exact")])
def test_candidates_take_a_learned_partition(models, head, partition):
    model, budget = models("llama"), BUDGET.replace(candidates=32, key_block=16, partition=partition)
    with pytest.raises(ValueError, match=f"must be learned by the adapter for softmax_max with candidates.*got {partition}"):
        SparsePrefill.attach(model, indexer_for(model, partition=head), budget)


@pytest.mark.parametrize("value", ["", "none", True])
def test_an_unknown_partition_is_refused(value):
    with pytest.raises(ValueError, match=f"partition must be one of auto, exact, learned, got {value!r}"):
        Budget(partition=value)
    with pytest.raises(TypeError, match="partition must be True or False, got 1"):
        IndexerConfig(16, (0,), 8, partition=1)


def test_the_budget_spells_it():
    budget = Budget.parse("k=1024,reduce=softmax_max,partition=learned")
    assert (budget.reduce, budget.partition) == ("softmax_max", "learned")
    assert Budget.parse(str(budget)) == budget


def test_nobody_learns_without_an_indexer_or_a_need(models):
    indexer = indexer_for(models("llama"))
    assert learns_partition(BUDGET, indexer)
    assert not learns_partition(BUDGET, None)
    assert not learns_partition(BUDGET.replace(reduce="mean"), indexer)
    assert not learns_partition(BUDGET.replace(block=1), indexer)
    assert learns_partition(BUDGET.replace(block=1, candidates=32), indexer)
