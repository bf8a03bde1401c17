"""Where a budget holds every key, below dense_below and while decoding, a prefill is dense attention."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.models.architectures import attention_modules
from npu_sparse.testing import (
    TINY_MODELS,
    close,
    greedy,
    left_padding,
    recorder,
    right_padding,
    tiny_model,
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
@pytest.mark.parametrize("block", [1, 16])
def test_a_budget_of_every_key_is_dense(models, name, kind, block):
    model, ids = models(name), tokens()
    dense = model(ids).logits
    observe, seen = recorder()
    with SparsePrefill.attach(model, tiny_selector(kind, model), EVERYTHING.replace(block=block), observe=observe):
        close(model(ids).logits, dense)
        close(model(ids, use_cache=False).logits, dense)
    assert len(seen) == 2 * len(attention_modules(model))


@every_model
@every_selector
@pytest.mark.parametrize("pad", [left_padding, right_padding])
def test_padded_batches_are_dense_on_their_real_tokens(models, name, kind, pad):
    model, ids = models(name), tokens(3)
    mask = pad(ids)
    dense = model(ids, attention_mask=mask).logits
    with SparsePrefill.attach(model, tiny_selector(kind, model), EVERYTHING):
        close(model(ids, attention_mask=mask).logits[mask.bool()], dense[mask.bool()])


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_generation_is_dense_too(models, name, kind):
    model, ids = models(name), tokens()
    mask = left_padding(ids)
    plain, beams = greedy(model, ids, attention_mask=mask), greedy(model, ids, attention_mask=mask, num_beams=3)
    with SparsePrefill.attach(model, tiny_selector(kind, model), EVERYTHING):
        assert torch.equal(greedy(model, ids, attention_mask=mask), plain)
        assert torch.equal(greedy(model, ids, attention_mask=mask, num_beams=3), beams)


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "bare"])
def test_chunked_prefill_is_dense(models, name, kind, cache, require_continuing):
    model, ids = models(name), tokens()
    text = model.config.get_text_config()
    new = {
        "dynamic": lambda: DynamicCache(config=text),
        "static": lambda: StaticCache(config=text, max_cache_len=128),
        "bare": DynamicCache,
    }[cache]
    if cache == "bare" and "linear_attention" in (getattr(text, "layer_types", None) or ()):
        pytest.skip("a cache of linear attention needs the config")
    require_continuing(model)

    def in_chunks():
        held = new()
        return [model(ids[:, start:stop], past_key_values=held).logits for start, stop in ((0, 33), (33, 34), (34, T))]

    dense = in_chunks()  # linear attention in chunks rounds differently
    with SparsePrefill.attach(model, tiny_selector(kind, model), EVERYTHING):
        for part, expected in zip(in_chunks(), dense):
            close(part, expected, 1e-5)


@every_model
def test_bf16_is_dense_within_its_own_rounding(name):
    model = tiny_model(name, dtype=torch.bfloat16)
    exact, ids = tiny_model(name, dtype=torch.bfloat16).float(), tokens()
    truth = exact(ids).logits
    noise = (model(ids).logits.float() - truth).square().mean().sqrt()
    with SparsePrefill.attach(model, selectors.Dense(), EVERYTHING):
        error = (model(ids).logits.float() - truth).square().mean().sqrt()
    assert error <= 2 * noise


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_native_implementation_is_kept_for_decoding(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    ids = tokens()
    expected = greedy(model, ids, attention_mask=left_padding(ids))
    with SparsePrefill.attach(model, selectors.Oracle(), EVERYTHING):
        assert torch.equal(greedy(model, ids, attention_mask=left_padding(ids)), expected)
    assert model.config._attn_implementation == implementation


def test_assisted_generation_is_dense(models):
    model, ids = models("llama"), tokens(1)
    options = dict(max_new_tokens=12, prompt_lookup_num_tokens=3, eos_token_id=95)
    expected = greedy(model, ids, **options)
    with SparsePrefill.attach(model, tiny_selector("indexer", model), EVERYTHING):
        assert torch.equal(greedy(model, ids, **options), expected)


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_below_dense_below_the_forward_is_dense_bit_for_bit(models, name, kind):
    model, ids = models(name), tokens()
    for mask in (None, left_padding(ids), right_padding(ids)):
        dense = model(ids, attention_mask=mask).logits
        with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE.replace(dense_below=T + 1)):
            assert torch.equal(model(ids, attention_mask=mask).logits, dense)
        with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE.replace(dense_below=T)):
            assert not torch.equal(model(ids, attention_mask=mask).logits, dense)


@every_model
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_decoding_is_dense_bit_for_bit(models, name, cache_class):
    model, ids = models(name), tokens()
    options = {"max_cache_len": 128} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.get_text_config(), **options)
    model(ids, past_key_values=cache)
    again, new = copy.deepcopy(cache), tokens(2, 1, seed=1)
    try:
        dense = model(new, past_key_values=cache).logits
    except TypeError as error:  # transformers 5.6: the wrapper and a static cache
        pytest.skip(str(error).splitlines()[0])
    observe, seen = recorder()
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE, observe=observe):
        assert torch.equal(model(new, past_key_values=again).logits, dense)
    assert not seen
