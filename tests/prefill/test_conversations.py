"""Later turns and changed caches: index keys go where a cache's keys go."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from npu_sparse import Budget, SparsePrefill
from npu_sparse.testing import TINY_MODELS, close, greedy, recorder, tiny_selector, tokens

T = 75
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("dense_below", [0, 40])
def test_a_second_turn_is_what_prefilling_the_conversation_in_two_parts_is(models, name, kind, dense_below):
    """With dense_below = 40 the first turn runs dense, and its tokens still serve the second one."""
    model = models(name)
    budget = SPARSE.replace(dense_below=dense_below)
    first, more = tokens(1, 30), tokens(1, 45, seed=1)
    with SparsePrefill.attach(model, tiny_selector(kind, model), budget):
        turn = greedy(model, first, max_new_tokens=5, return_dict_in_generate=True)
        conversation = torch.cat([turn.sequences, more], 1)
        second = greedy(model, conversation, past_key_values=turn.past_key_values)
    observe, seen = recorder()
    with SparsePrefill.attach(model, tiny_selector(kind, model), budget, observe=observe):
        cache = DynamicCache(config=model.config.get_text_config())
        model(conversation[:, :30], past_key_values=cache)
        for t in range(30, 34):
            model(conversation[:, t : t + 1], past_key_values=cache)
        logits = model(conversation[:, 34:], past_key_values=cache).logits[:, -1]
    assert int(logits.argmax()) == int(second[0, 80])
    assert {inputs.q.shape[2] for inputs, _, _ in seen} == ({30, 46} if dense_below == 0 else {46})


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_a_dense_first_turn_leaves_the_index_keys_of_a_whole_prefill(models, kind):
    model, ids = models("llama"), tokens()
    close_to = []
    for chunks in ([(0, 30), *((t, t + 1) for t in range(30, 34)), (34, T)], [(0, 34), (34, T)]):
        with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE.replace(dense_below=40)):
            cache = DynamicCache(config=model.config)
            close_to.append([model(ids[:, a:b], past_key_values=cache).logits for a, b in chunks][-1])
    close(*close_to)


def test_many_dense_steps_are_remembered(models, monkeypatch):
    from npu_sparse.models import index_cache

    monkeypatch.setattr(index_cache, "PENDING_STEPS", 3)
    model, ids = models("llama"), tokens()
    expected = None
    for chunks in ([(0, 30), (30, T)], [(0, 20), *((t, t + 1) for t in range(20, 30)), (30, T)]):
        with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE.replace(dense_below=40)):
            cache = DynamicCache(config=model.config)
            last = [model(ids[:, a:b], past_key_values=cache).logits for a, b in chunks][-1]
        expected = last if expected is None else close(last, expected)


def prepared(model, attached, ids, kind):
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=128)
    )
    attached.model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_copied_cache_has_its_own_index_keys(models, name, kind):
    model, ids = models(name), tokens()
    with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE) as attached:
        cache = prepared(model, attached, ids[:, :40], kind)
        copied = copy.deepcopy(cache)
        first = model(ids[:, 40:], past_key_values=cache).logits
        assert torch.equal(model(ids[:, 40:], past_key_values=copied).logits, first)


@pytest.mark.parametrize("decoded", [0, 3])
def test_a_reordered_repeated_cropped_or_reset_cache_carries_its_index_keys(models, decoded):
    """Whatever happens to a cache's batch and length, the next chunk is what it is for a cache made that way."""
    model, ids = models("llama"), tokens(3)
    first, rest = ids[:, :40], ids[:, 40:]

    def fresh(rows):
        cache = DynamicCache(config=model.config)
        model(first[rows], past_key_values=cache)
        for _ in range(decoded):
            model(first[rows][:, :1], past_key_values=cache)
        return cache

    every, order = torch.arange(3), torch.tensor([2, 0, 0])
    with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE):

        def after(cache, rows):
            return model(rest[rows], past_key_values=cache).logits

        cache = fresh(every)
        cache.reorder_cache(order)
        close(after(cache, every), after_of(model, fresh(order), rest[every]))
        cache = fresh(every)
        cache.batch_select_indices(torch.tensor([1]))
        close(after(cache, [1]), after(fresh([1]), [1]))
        cache = fresh([1])
        cache.batch_repeat_interleave(2)
        close(after(cache, [1, 1]), after(fresh([1, 1]), [1, 1]))
        cache = fresh(every)
        model(rest, past_key_values=cache)
        cache.crop(-rest.shape[1])
        close(after(cache, every), after(fresh(every), every))
        cache.reset()
        if cache.get_seq_length():
            return  # before transformers 5.23 a dynamic cache keeps its length
        model(first, past_key_values=cache)
        for _ in range(decoded):
            model(first[:, :1], past_key_values=cache)
        close(after(cache, every), after(fresh(every), every))


def after_of(model, cache, rest):
    return model(rest, past_key_values=cache).logits


def test_a_static_cache_can_be_reset(models):
    model, ids = models("llama"), tokens()
    cache = StaticCache(config=model.config, max_cache_len=128)
    with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE):
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_tokens_without_index_keys_are_an_error(models):
    model, ids = models("llama"), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache)
    with SparsePrefill.attach(model, tiny_selector("indexer", model), SPARSE):
        with pytest.raises(ValueError, match="holds 40 tokens of which 0 have index keys: .* conversation attached"):
            model(ids[:, 40:], past_key_values=cache)
