"""Sparse prefill through tiny models of every supported architecture."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from npu_sparse import Budget, Indexer, SparsePrefill, ascendc, ops, selectors
from npu_sparse.indexer import AdapterError
from npu_sparse.models.architectures import UnsupportedArchitectureError, attention_modules
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.testing import (
    TINY_MODELS,
    assert_accurate,
    naive_attention_mass,
    naive_select_tokens,
    naive_sparse_attention,
    naive_sparse_attention_with_tail,
    tiny_model,
)

T = 75
EVERYTHING = Budget(k=512, block=16)
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
every_model = pytest.mark.parametrize("name", TINY_MODELS)
every_selector = pytest.mark.parametrize("kind", ["dense", "oracle", "per_kv", "indexer"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_model(name)
        return made[name]

    return get


def selector(kind, model):
    if kind == "indexer":
        return selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2))
    return {"dense": selectors.Dense(), "oracle": selectors.Oracle(), "per_kv": selectors.Oracle(per_kv=True)}[kind]


def tokens(B=2, length=T, seed=0):
    return torch.randint(1, 90, (B, length), generator=torch.Generator().manual_seed(seed))


def left_padding(ids, missing=20):
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    return mask


def right_padding(ids, missing=9):
    mask = torch.ones_like(ids)
    mask[-1, -missing:] = 0
    return mask


def greedy(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, **options)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def continues(model) -> bool:
    """False where this transformers cannot continue a cache by several tokens: its early linear attention could not."""
    ids, cache = tokens(2, 20), DynamicCache(config=model.config.get_text_config())
    model(ids[:, :9], past_key_values=cache)
    return torch.allclose(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:], atol=1e-3)


def require_continuing(model):
    if not continues(model):
        pytest.skip("this version of transformers cannot continue a cache of linear attention by several tokens")


def record():
    """`(observe, list)`: the list receives (inputs, support, out) of every sparse layer."""
    seen = []
    return (lambda *what: seen.append(what)), seen


# A budget that holds every key is dense attention


@every_model
@every_selector
@pytest.mark.parametrize("block", [1, 16])
def test_a_budget_of_every_key_is_dense(models, name, kind, block):
    model, ids = models(name), tokens()
    dense = model(ids).logits
    observe, seen = record()
    with SparsePrefill.attach(model, selector(kind, model), EVERYTHING.replace(block=block), observe=observe):
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
    with SparsePrefill.attach(model, selector(kind, model), EVERYTHING):
        close(model(ids, attention_mask=mask).logits[mask.bool()], dense[mask.bool()])


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_generation_is_dense_too(models, name, kind):
    model, ids = models(name), tokens()
    mask = left_padding(ids)
    plain, beams = greedy(model, ids, attention_mask=mask), greedy(model, ids, attention_mask=mask, num_beams=3)
    with SparsePrefill.attach(model, selector(kind, model), EVERYTHING):
        assert torch.equal(greedy(model, ids, attention_mask=mask), plain)
        assert torch.equal(greedy(model, ids, attention_mask=mask, num_beams=3), beams)


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "bare"])
def test_chunked_prefill_is_dense(models, name, kind, cache):
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
    with SparsePrefill.attach(model, selector(kind, model), EVERYTHING):
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


# A small budget is sparse, and is what was asked for


def reapplied(model, layer, inputs, support):
    return naive_sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale)


@every_model
@every_selector
@pytest.mark.parametrize("block", [1, 8])
def test_every_layer_attends_to_its_support_and_to_nothing_else(models, name, kind, block):
    model, ids = models(name), tokens()
    observe, seen = record()
    mask = left_padding(ids)
    with SparsePrefill.attach(model, selector(kind, model), SPARSE.replace(block=block), observe=observe):
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
    observe, seen = record()
    mask = pad(ids)
    budget = SPARSE.replace(block=block, tail=True)
    with SparsePrefill.attach(model, selector(kind, model), budget, observe=observe):
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
    observe, seen = record()
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
    observe, seen = record()
    budget = SPARSE.replace(per_layer={1: 512})
    with SparsePrefill.attach(model, selector(kind, model), budget, observe=observe):
        assert not torch.allclose(model(ids).logits, dense, atol=1e-2)
    assert [support.width for _, support, _ in seen] == [24, T, 24]


def test_a_tier_applies_from_its_length_on(models):
    model = models("llama")
    observe, seen = record()
    with SparsePrefill.attach(model, selectors.Oracle(), Budget(k={0: 8, 40: 16}, block=1), observe=observe):
        model(tokens(1, 39))
        model(tokens(1, 40))
    assert [support.width for _, support, _ in seen] == [8] * 3 + [16] * 3


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_a_padded_row_gets_what_it_gets_alone(models, name, kind):
    model, ids = models(name), tokens(2)
    mask = right_padding(ids)
    with SparsePrefill.attach(model, selector(kind, model), SPARSE):
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
def test_chunks_of_whole_blocks_select_what_one_prefill_selects(models, name):
    model, ids = models(name), tokens()
    require_continuing(model)
    first_layer = min(attention_modules(model))
    supports = []
    for chunks in ([(0, T)], [(0, 32), (32, 48), (48, T)]):
        observe, seen = record()
        with SparsePrefill.attach(model, selector("indexer", model), SPARSE.replace(dense_below=0), observe=observe):
            cache = DynamicCache(config=model.config)
            for start, stop in chunks:
                model(ids[:, start:stop], past_key_values=cache)
        supports.append([s.member_mask(T) for inputs, s, _ in seen if inputs.layer == first_layer])
    assert torch.equal(torch.cat(supports[1], 2), supports[0][0])


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3"])
def test_chunked_logits_are_those_of_one_prefill(models, name, kind):
    model, ids = models(name), tokens()
    require_continuing(model)
    with SparsePrefill.attach(model, selector(kind, model), SPARSE):
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


# Dense where it was promised


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_below_dense_below_the_forward_is_dense_bit_for_bit(models, name, kind):
    model, ids = models(name), tokens()
    for mask in (None, left_padding(ids), right_padding(ids)):
        dense = model(ids, attention_mask=mask).logits
        with SparsePrefill.attach(model, selector(kind, model), SPARSE.replace(dense_below=T + 1)):
            assert torch.equal(model(ids, attention_mask=mask).logits, dense)
        with SparsePrefill.attach(model, selector(kind, model), SPARSE.replace(dense_below=T)):
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
    observe, seen = record()
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE, observe=observe):
        assert torch.equal(model(new, past_key_values=again).logits, dense)
    assert not seen


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_detach_restores_the_model_bit_for_bit(name, kind):
    model, ids = tiny_model(name), tokens()
    keys, before = list(model.state_dict()), model(ids).logits
    config = model.config.to_dict()
    implementations = {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")}
    attached = SparsePrefill.attach(model, selector(kind, model), SPARSE)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(ids).logits, before)
    attached.detach()
    attached.detach()
    assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert {
        n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")
    } == implementations
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_detach_happens_when_the_block_raises():
    model, ids = tiny_model("llama"), tokens()
    before = model(ids).logits
    with pytest.raises(KeyError), SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        raise KeyError
    assert torch.equal(model(ids).logits, before)


def test_a_model_can_be_attached_again_and_two_at_once():
    first, second, ids = tiny_model("llama"), tiny_model("qwen3"), tokens()
    dense = second(ids).logits
    with SparsePrefill.attach(first, selectors.Oracle(), SPARSE):
        alone = first(ids).logits
    with (
        SparsePrefill.attach(second, selectors.Oracle(), EVERYTHING),
        SparsePrefill.attach(first, selectors.Oracle(), SPARSE),
    ):
        assert torch.equal(first(ids).logits, alone)
        close(second(ids).logits, dense)


def test_a_model_that_shares_its_config_with_an_attached_one_is_not_changed():
    attached = tiny_model("llama")
    other = type(attached)(attached.config).eval()
    for implementation in ("sdpa", "eager"):
        attached.set_attn_implementation(implementation)
        ids = tokens(1)
        mask = left_padding(ids)
        expected = other(ids, attention_mask=mask).logits
        with SparsePrefill.attach(attached, selectors.Oracle(), SPARSE):
            with pytest.raises(ValueError, match="shares its config"):
                other(ids, attention_mask=mask)
        assert torch.equal(other(ids, attention_mask=mask).logits, expected)


def test_an_indexer_is_left_as_it_was(models):
    model = tiny_model("llama", dtype=torch.bfloat16)
    indexer = Indexer.for_model(model)
    with SparsePrefill.attach(model, indexer, SPARSE):
        model(tokens())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in indexer.parameters())


def test_a_dropped_model_is_freed_while_attached():
    model = tiny_model("llama")
    SparsePrefill.attach(model, selectors.Oracle(), SPARSE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Conversations


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("dense_below", [0, 40])
def test_a_second_turn_is_what_prefilling_the_conversation_in_two_parts_is(models, name, kind, dense_below):
    """With dense_below = 40 the first turn runs dense, and its tokens still serve the second one."""
    model = models(name)
    budget = SPARSE.replace(dense_below=dense_below)
    first, more = tokens(1, 30), tokens(1, 45, seed=1)
    with SparsePrefill.attach(model, selector(kind, model), budget):
        turn = greedy(model, first, max_new_tokens=5, return_dict_in_generate=True)
        conversation = torch.cat([turn.sequences, more], 1)
        second = greedy(model, conversation, past_key_values=turn.past_key_values)
    observe, seen = record()
    with SparsePrefill.attach(model, selector(kind, model), budget, observe=observe):
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
        with SparsePrefill.attach(model, selector(kind, model), SPARSE.replace(dense_below=40)):
            cache = DynamicCache(config=model.config)
            close_to.append([model(ids[:, a:b], past_key_values=cache).logits for a, b in chunks][-1])
    close(*close_to)


def test_many_dense_steps_are_remembered(models, monkeypatch):
    from npu_sparse.models import index_cache

    monkeypatch.setattr(index_cache, "PENDING_STEPS", 3)
    model, ids = models("llama"), tokens()
    expected = None
    for chunks in ([(0, 30), (30, T)], [(0, 20), *((t, t + 1) for t in range(20, 30)), (30, T)]):
        with SparsePrefill.attach(model, selector("indexer", model), SPARSE.replace(dense_below=40)):
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
    with SparsePrefill.attach(model, selector("indexer", model), SPARSE) as attached:
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
    with SparsePrefill.attach(model, selector("indexer", model), SPARSE):

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
    with SparsePrefill.attach(model, selector("indexer", model), SPARSE):
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_tokens_without_index_keys_are_an_error(models):
    model, ids = models("llama"), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache)
    with SparsePrefill.attach(model, selector("indexer", model), SPARSE):
        with pytest.raises(ValueError, match="holds 40 tokens of which 0 have index keys: .* conversation attached"):
            model(ids[:, 40:], past_key_values=cache)


def test_assisted_generation_is_dense(models):
    model, ids = models("llama"), tokens(1)
    options = dict(max_new_tokens=12, prompt_lookup_num_tokens=3, eos_token_id=95)
    expected = greedy(model, ids, **options)
    with SparsePrefill.attach(model, selector("indexer", model), EVERYTHING):
        assert torch.equal(greedy(model, ids, **options), expected)


# On every back-end: what the kernels of a device take, in the dtype they take


on_kernels = pytest.mark.parametrize("name", ["qwen3_5", "llama", "gemma3"])


@pytest.fixture
def placed(backend):
    """`placed(name)` gives a tiny model in the back-end's dtype and on its device."""

    def get(name):
        return tiny_model(name, dtype=backend.dtype()).to(backend.device)

    return get


@on_kernels
@every_selector
@pytest.mark.parametrize("block", [1, 8])
def test_every_backend_attends_to_the_support_and_to_nothing_else(backend, placed, name, kind, block):
    model, ids = placed(name), tokens().to(backend.device)
    observe, seen = record()
    budget, mask = SPARSE.replace(block=block), left_padding(ids)
    with SparsePrefill.attach(model, selector(kind, model), budget, impl=backend.impl, observe=observe):
        assert bool(model(ids, attention_mask=mask).logits[mask.bool()].isfinite().all())
    assert [inputs.layer for inputs, _, _ in seen] == list(attention_modules(model))
    for inputs, support, out in seen:
        support.check(T, T)
        assert kind == "dense" or support.width == 24
        assert not bool(support.member_mask(T)[0, :, :, :20].any())  # padding is never selected
        exact = naive_sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale)
        if backend.impl == "reference":
            yardstick = naive_sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale, dtype=out.dtype)
        else:
            yardstick = ops.sparse_attention(inputs.q, inputs.k, inputs.v, support, scale=inputs.scale, impl="reference")
        assert_accurate(out, exact, yardstick)


@on_kernels
@every_selector
def test_every_backend_is_dense_within_its_own_rounding_where_the_budget_holds_every_key(backend, placed, name, kind):
    model, ids = placed(name), tokens().to(backend.device)
    mask = right_padding(ids)
    real, exact = mask.bool(), copy.deepcopy(model).double()
    truth = exact(ids, attention_mask=mask).logits[real]
    dense = model(ids, attention_mask=mask).logits[real]
    with SparsePrefill.attach(model, selector(kind, model), EVERYTHING, impl=backend.impl):
        sparse = model(ids, attention_mask=mask).logits[real]
    assert_accurate(sparse, truth, dense)


@on_kernels
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_every_backend_selects_the_same_for_chunks_of_whole_blocks(backend, placed, name, kind):
    model, ids = placed(name), tokens().to(backend.device)
    require_continuing(tiny_model(name))
    first_layer = min(attention_modules(model))
    supports = []
    for chunks in ([(0, T)], [(0, 32), (32, 48), (48, T)]):
        observe, seen = record()
        with SparsePrefill.attach(model, selector(kind, model), SPARSE, impl=backend.impl, observe=observe):
            cache = DynamicCache(config=model.config)
            for start, stop in chunks:
                model(ids[:, start:stop], past_key_values=cache)
        supports.append([s.member_mask(T) for inputs, s, _ in seen if inputs.layer == first_layer])
    differing = (torch.cat(supports[1], 2) != supports[0][0]).float().mean()
    assert differing == 0 if kind == "indexer" else differing < 0.002  # two keys of equal mass


@on_kernels
def test_every_backend_generates_what_dense_attention_generates(backend, placed, name):
    model, ids = placed(name), tokens().to(backend.device)
    mask = left_padding(ids)
    with SparsePrefill.attach(model, selector("indexer", model), EVERYTHING, impl=backend.impl):
        sparse = greedy(model, ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    dense = model(sparse.sequences[:, :-1], attention_mask=torch.nn.functional.pad(mask, (0, 5), value=1)).logits[:, T - 1 :]
    exact = copy.deepcopy(model).double()
    padded = torch.nn.functional.pad(mask, (0, 5), value=1)
    truth = exact(sparse.sequences[:, :-1], attention_mask=padded).logits[:, T - 1 :]
    assert_accurate(torch.stack(sparse.logits, 1), truth, dense)


@pytest.mark.parametrize(
    "changes, budget, error, message",
    [
        ({}, SPARSE, TypeError, "dtype must be float16 or bfloat16 for the kernels on 'cpu', got torch.float32"),
        ({"head_dim": 24}, SPARSE, ValueError, r"head_dim must be a multiple of 16 up to 256 .*, got 24 \(nearest: (16|32)\)"),
        ({"head_dim": 512}, SPARSE, ValueError, r"head_dim must be .*, got 512 \(nearest: 256\)"),
        ({}, Budget(k=5000), ValueError, "k must be at most 4032 for the kernels on 'cpu', got 5000"),
        ({}, Budget(k={0: 64, 9000: 5000}, block=1), ValueError, "k must be at most 4032 .*, got 5000"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused_when_attaching(monkeypatch, changes, budget, error, message):
    monkeypatch.setattr(dispatch, "_KERNELS", {(op, "cpu"): print for op in dispatch.OPERATORS})
    model = tiny_model("llama", dtype=torch.float32 if error is TypeError else torch.bfloat16, **changes)
    with pytest.raises(error, match=message):
        SparsePrefill.attach(model, selectors.Oracle(), budget, impl="kernel")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# Compiled


WITH_CACHE = {"use_cache": True}
PADDED = {"use_cache": False, "attention_mask": left_padding(tokens())}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("llama", "oracle", PADDED),
        ("llama", "indexer", WITH_CACHE),
        ("gemma3", "indexer", PADDED),
        ("qwen3_5", "indexer", WITH_CACHE),
    ],
)
def test_a_prefill_compiles_to_one_graph(name, kind, options):
    changes = {} if name == "qwen3_5" else {"num_hidden_layers": 2}
    if name == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    model, ids = tiny_model(name, **changes), tokens()
    with SparsePrefill.attach(model, selector(kind, model), SPARSE):
        eager = model(ids, **options).logits
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, **options).logits, fullgraph=True, backend="aot_eager")
        close(compiled(ids), eager)


def test_a_compiled_prefill_that_may_be_packed_says_what_to_pass():
    model = tiny_model("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="compiled prefill without a cache needs an attention_mask"):
            compiled(tokens())


# Refusals


def test_an_unknown_architecture_is_refused_with_the_reason():
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    tiny = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedArchitectureError, match="'gpt2' is not supported: it has no rotary embedding"):
        SparsePrefill.attach(gpt2, selectors.Oracle())
    mistral = MistralForCausalLM(MistralConfig(**tiny, intermediate_size=32, num_key_value_heads=1))
    with pytest.raises(UnsupportedArchitectureError, match="'mistral' is not supported: only .*llama.* are"):
        SparsePrefill.attach(mistral, selectors.Oracle())


def test_a_tail_is_refused_where_no_kernel_reads_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {(op, "cpu"): print for op in ascendc.OPERATORS})
    message = r"sparse_attention_with_tail has no kernel on 'cpu': it has kernels for cuda only: .*, or Budget\(tail=False\)"
    with pytest.raises(KernelUnavailableError, match=message):
        SparsePrefill.attach(
            tiny_model("llama", dtype=torch.bfloat16), selectors.Oracle(), SPARSE.replace(tail=True), impl="kernel"
        )


@pytest.mark.parametrize(
    "budget, impl, error, message",
    [
        (SPARSE.replace(per_layer={0: 64}), "auto", ValueError, r"full-attention layers \[1, 3\], got \[0\]"),
        (SPARSE, "kernel", KernelUnavailableError, "has no kernel on 'cpu': .* pass impl='reference'"),
        (SPARSE, "fast", ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
        ({"k": 8}, "auto", TypeError, "budget must be a Budget, got dict"),
    ],
)
def test_what_cannot_run_is_refused_when_attaching_and_changes_nothing(budget, impl, error, message, monkeypatch):
    monkeypatch.setattr(dispatch, "_KERNELS", {})
    monkeypatch.setattr(ascendc, "load_if_built", lambda device_type: {})
    model, ids = tiny_model("gemma3"), tokens()
    before = model(ids).logits
    with pytest.raises(error, match=message):
        SparsePrefill.attach(model, selectors.Oracle(), budget, impl=impl)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    SparsePrefill.attach(model, selectors.Oracle(), SPARSE).detach()


def test_a_second_attachment_is_refused(models):
    model = models("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="model must not be attached twice: detach"):
            SparsePrefill.attach(model, selectors.Oracle(), SPARSE)


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("layer", [0, 2])
def test_nan_hidden_states_name_the_layer(kind, layer):
    model = tiny_model("llama")
    model.model.layers[layer].input_layernorm.weight[3] = float("nan")
    with SparsePrefill.attach(model, selector(kind, model), SPARSE):
        with pytest.raises(FloatingPointError, match=f"hidden states of layer {layer} must be finite"):
            model(tokens())


def test_large_but_finite_fp16_hidden_states_are_finite():
    model = tiny_model("llama", dtype=torch.float16)
    model.model.embed_tokens.weight.fill_(1.0)
    model.model.layers[0].input_layernorm.weight.fill_(30.0)  # their sum is beyond fp16
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    with SparsePrefill.attach(model, selectors.Dense(), EVERYTHING):
        assert bool(model(tokens()).logits.isfinite().all())


def test_an_empty_prompt_is_refused(models):
    model = models("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="prompt must hold at least one token, got none"):
            model(torch.zeros(1, 0, dtype=torch.long))


def test_a_prompt_beyond_the_models_positions_is_refused():
    model = tiny_model("llama", max_position_embeddings=64)
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        model(tokens(1, 64))
        with pytest.raises(ValueError, match="prompt must fit the model's 64 positions, got 65 tokens"):
            model(tokens(1, 65))
        cache = DynamicCache(config=model.config)
        model(tokens(1, 60), past_key_values=cache)
        with pytest.raises(ValueError, match="64 positions, got 65 tokens"):
            model(tokens(1, 5), past_key_values=cache)


def test_a_custom_four_dimensional_mask_is_refused(models):
    model = models("llama")
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match=r"2-D padding mask \(batch, length\), got 4 dimensions"):
            model(tokens(), attention_mask=mask)


@pytest.mark.parametrize("kind", ["oracle", "indexer", "dense"])
def test_a_mask_of_another_length_is_refused(models, kind):
    model, ids = models("llama"), tokens()
    with SparsePrefill.attach(model, selector(kind, model), SPARSE):
        cache = DynamicCache(config=model.config)
        model(ids[:, :40], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must cover all 75 tokens, .* got \(2, 35\)"):
            model(ids[:, 40:], attention_mask=torch.ones(2, 35), past_key_values=cache)


def test_packed_sequences_are_refused(models):
    model, ids = models("llama"), tokens()
    packed = torch.cat([torch.arange(40), torch.arange(35)]).expand(2, -1)
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        with pytest.raises(ValueError, match="one causal sequence per row; packed or custom masks"):
            model(ids, position_ids=packed, use_cache=False)


def test_an_adapter_of_another_geometry_is_refused(models):
    with pytest.raises(AdapterError, match="adapter must have the model's geometry"):
        SparsePrefill.attach(models("llama"), Indexer.for_model(models("gemma3")))


def test_an_adapter_of_another_base_is_refused(models):
    indexer = Indexer.for_model(tiny_model("llama", seed=1))
    with pytest.raises(AdapterError, match="distilled from another base: weights_fingerprint must be"):
        SparsePrefill.attach(models("llama"), indexer)


def test_an_adapter_of_the_text_model_serves_its_wrapper(models):
    wrapper, ids = models("qwen3_5_wrapper"), tokens()
    text = tiny_model("qwen3_5")
    text.model.load_state_dict(wrapper.model.language_model.state_dict())
    text.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    indexer = Indexer.for_model(text, dim=64)
    with SparsePrefill.attach(text, indexer, SPARSE):
        expected = text(ids).logits
    with SparsePrefill.attach(wrapper, indexer, SPARSE):
        close(wrapper(ids).logits, expected)


def test_an_adapter_of_unknown_base_weights_serves_a_model_of_its_geometry(models):
    indexer = Indexer.for_model(models("llama"))
    indexer.base["weights_fingerprint"] = None
    SparsePrefill.attach(models("llama"), indexer, SPARSE).detach()


def test_the_recommended_budget_of_an_adapter_is_the_default(models):
    indexer = Indexer.for_model(models("llama"))
    with SparsePrefill.attach(models("llama"), indexer) as attached:
        assert attached.budget == Budget()
    indexer.budget = SPARSE.to_dict()
    with SparsePrefill.attach(models("llama"), indexer) as attached:
        assert attached.budget == SPARSE


def test_stages_are_timed_in_order(models):
    model, names = models("llama"), []

    def stage(name):
        names.append(name)
        return torch.no_grad()

    with SparsePrefill.attach(model, selector("indexer", model), SPARSE, stage=stage):
        model(tokens())
    assert names == ["projection", "scoring", "top-k", "attention"] * 3
