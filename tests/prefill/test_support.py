"""A small budget is sparse: every layer attends to what its selector was asked for, and to nothing else."""

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.models.architectures import attention_modules
from npu_sparse.testing import (
    TINY_MODELS,
    close,
    left_padding,
    naive_attention_mass,
    naive_select_tokens,
    naive_sparse_attention,
    naive_sparse_attention_with_tail,
    recorder,
    right_padding,
    tiny_selector,
    tokens,
)

T = 75
EVERYTHING = Budget(k=512, block=16)
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
every_model = pytest.mark.parametrize("name", TINY_MODELS)
every_selector = pytest.mark.parametrize("kind", ["dense", "oracle", "per_kv", "indexer"])
pytestmark = pytest.mark.usefixtures("no_gradients")


@every_model
@every_selector
@pytest.mark.parametrize("block", [1, 8])
def test_every_layer_attends_to_its_support_and_to_nothing_else(models, name, kind, block):
    model, ids = models(name), tokens()
    observe, seen = recorder()
    mask = left_padding(ids)
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE.replace(block=block), observe=observe):
        model(ids, attention_mask=mask)
    assert [inputs.layer for inputs, _, _ in seen] == list(attention_modules(model))
    for inputs, support, out in seen:
        support.check(T, T)
        assert kind == "dense" or support.width == 24
        member = support.member_mask(T)
        assert not bool(member[0, :, :, :20].any())  # padding is never selected
        exact = naive_sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale)
        close(out.double(), exact)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("pad", [left_padding, right_padding])
@pytest.mark.parametrize("kind", ["oracle", "per_kv", "indexer"])
@pytest.mark.parametrize("block", [1, 8])
def test_with_a_tail_every_layer_attends_to_what_its_support_leaves_out_as_one_key(models, name, kind, pad, block):
    model, ids = models(name), tokens()
    observe, seen = recorder()
    mask = pad(ids)
    budget = SPARSE.replace(block=block, tail=True)
    with SparsePrefill.attach(model, tiny_selector(kind, model), budget, observe=observe):
        model(ids, attention_mask=mask)
    assert len(seen) == len(attention_modules(model))
    for inputs, support, out in seen:
        exact = naive_sparse_attention_with_tail(
            inputs.q, inputs.k, inputs.v, support, scale=inputs.scale, valid=mask.bool()
        )
        close(out.double(), exact)


@every_model
def test_a_tail_of_no_keys_is_dense(models, name):
    model, ids = models(name), tokens(3)
    mask = left_padding(ids)
    dense = model(ids, attention_mask=mask).logits
    with SparsePrefill.attach(model, selectors.Oracle(), EVERYTHING.replace(tail=True)):
        close(model(ids, attention_mask=mask).logits[mask.bool()], dense[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunks_have_the_tail_of_one_prefill(models, name):
    model, ids = models(name), tokens()
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE.replace(tail=True)):
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        model(ids[:, :32], past_key_values=cache)
        close(model(ids[:, 32:], past_key_values=cache).logits, whole[:, 32:])


@every_model
@pytest.mark.parametrize("per_kv", [False, True])
def test_the_oracle_selects_the_heaviest_keys_of_its_own_layer(models, name, per_kv):
    model, ids = models(name), tokens()
    mask = right_padding(ids)
    observe, seen = recorder()
    with SparsePrefill.attach(model, selectors.Oracle(per_kv), SPARSE, observe=observe):
        model(ids, attention_mask=mask)
    for inputs, support, _ in seen:
        mass = naive_attention_mass(
            inputs.q, inputs.k, scale=inputs.scale, reduce_block=8, per_kv=per_kv, valid=mask.bool()
        ).float()
        ends = torch.arange(8, T + 8, 8).clamp(max=T)[:, None]
        hidden = (torch.arange(T) >= ends)[None, None] | ~mask.bool()[:, None, None]
        expected = naive_select_tokens(
            mass.masked_fill(hidden, -torch.inf), k=24, sink=2, recent=4, block=8, queries=T, valid=mask.bool()
        )
        differing = (support.member_mask(T) != expected.member_mask(T)).float().mean()
        assert differing < 0.002  # two keys of equal mass in fp32


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_a_small_budget_changes_the_output_and_a_layer_override_applies(models, kind):
    model, ids = models("llama"), tokens()
    dense = model(ids).logits
    observe, seen = recorder()
    budget = SPARSE.replace(per_layer={1: 512})
    with SparsePrefill.attach(model, tiny_selector(kind, model), budget, observe=observe):
        assert not torch.allclose(model(ids).logits, dense, atol=1e-2)
    assert [support.width for _, support, _ in seen] == [24, T, 24]


def test_a_tier_applies_from_its_length_on(models):
    model = models("llama")
    observe, seen = recorder()
    with SparsePrefill.attach(model, selectors.Oracle(), Budget(k={0: 8, 40: 16}, block=1), observe=observe):
        model(tokens(1, 39))
        model(tokens(1, 40))
    assert [support.width for _, support, _ in seen] == [8] * 3 + [16] * 3


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_a_padded_row_gets_what_it_gets_alone(models, name, kind):
    model, ids = models(name), tokens(2)
    mask = right_padding(ids)
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE):
        batch = model(ids, attention_mask=mask).logits
        close(batch[:1], model(ids[:1]).logits)
        close(batch[1:, : T - 9], model(ids[1:, : T - 9]).logits)


@every_model
def test_left_padding_with_a_support_per_query_gets_what_it_gets_alone(models, name):
    model, ids = models(name), tokens(2)
    mask = left_padding(ids)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE.replace(block=1)):
        batch = model(ids, attention_mask=mask, position_ids=position).logits
        close(batch[:1, 20:], model(ids[:1, 20:]).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3"])
def test_chunks_of_whole_blocks_select_what_one_prefill_selects(models, name, require_continuing):
    model, ids = models(name), tokens()
    require_continuing(model)
    first_layer = min(attention_modules(model))
    supports = []
    for chunks in ([(0, T)], [(0, 32), (32, 48), (48, T)]):
        observe, seen = recorder()
        with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE.replace(dense_below=0), observe=observe):
            cache = DynamicCache(config=model.config)
            for start, stop in chunks:
                model(ids[:, start:stop], past_key_values=cache)
        supports.append([s.member_mask(T) for inputs, s, _ in seen if inputs.layer == first_layer])
    assert torch.equal(torch.cat(supports[1], 2), supports[0][0])


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3"])
def test_chunked_logits_are_those_of_one_prefill(models, name, kind, require_continuing):
    model, ids = models(name), tokens()
    require_continuing(model)
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE):
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 32), (32, 48), (48, T))]
    close(torch.cat(parts, 1), whole, tolerance=1e-3)  # linear attention adds up in another order


def test_sliding_layers_run_as_they_would(models):
    model, ids = models("gemma3"), tokens()
    outputs = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    model(ids, attention_mask=left_padding(ids))
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        model(ids, attention_mask=left_padding(ids))
    handle.remove()
    assert torch.equal(*outputs)


def test_stages_are_timed_in_order(models):
    model, names = models("llama"), []

    def stage(name):
        names.append(name)
        return torch.no_grad()

    with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE, stage=stage):
        model(tokens())
    assert names == ["projection", "scoring", "top-k", "attention"] * 3
