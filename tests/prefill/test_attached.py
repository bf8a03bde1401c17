"""What users do to a model while it is attached: it is right, or a sentence says what to do instead."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from npu_sparse import Budget, Indexer, SparsePrefill, selectors
from npu_sparse.testing import tiny_model

SPARSE = Budget(k=16, block=8, sink=2, recent=4)
T = 75
KINDS = {
    "oracle": lambda model, seed=0: selectors.Oracle(),
    "indexer": lambda model, seed=0: selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2, seed=seed)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_model = pytest.mark.parametrize("name", ["llama", "qwen3_5", "qwen3_5_wrapper", "gemma3"])
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def ids():
    """A prompt that repeats itself, so that its continuation can be guessed."""
    part = torch.randint(1, 90, (1, 13), generator=torch.Generator().manual_seed(1))
    return part.repeat(1, 7)[:, :T]


def attach(model, kind, budget=SPARSE, **options):
    return SparsePrefill.attach(model, KINDS[kind](model), budget, **options)


def recorder():
    """`(observe, list)`: the list receives how many queries every sparse layer had, and the first position after them."""
    seen = []
    return (lambda inputs, support, out: seen.append((inputs.q.shape[2], inputs.k.shape[2]))), seen


# Assisted decoding


def generated(model, ids, **options):
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=95) | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def require_assistance(model, ids):
    """Early versions of transformers cannot take back tokens beyond a sliding window, or write a token more."""
    try:
        assisted = generated(model, ids, prompt_lookup_num_tokens=4)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    if not torch.equal(assisted, generated(model, ids)):
        pytest.skip("this version of transformers writes something else, without this package too")


@every_kind
@pytest.mark.parametrize("name, implementation", [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gemma3", "sdpa")])
def test_assisted_decoding_writes_what_greedy_decoding_writes(name, kind, implementation, ids):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    require_assistance(model, ids)
    observe, seen = recorder()
    with attach(model, kind, observe=observe):
        greedy = generated(model, ids)
        layers = len(seen)
        assisted = generated(model, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted, greedy)
    assert set(seen[:layers]) == set(seen[layers:]) == {(T, T)} and len(seen) == 2 * layers  # the prompt, and nothing else


@every_kind
def test_an_assistants_candidates_are_decode_steps_too(kind, ids):
    model, assistant = tiny_model("llama"), tiny_model("llama", num_hidden_layers=1)
    observe, seen = recorder()
    with attach(model, kind, observe=observe):
        assert torch.equal(generated(model, ids, assistant_model=assistant), generated(model, ids))
    assert set(seen) == {(T, T)}


@every_kind
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_several_tokens_after_the_prompt_are_what_they_are_one_by_one(name, kind, ids):
    """A caller's own speculation: `prompt_length` says that they are no chunk."""
    model, more = tiny_model(name), torch.randint(1, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    observe, seen = recorder()
    with attach(model, kind, observe=observe):

        def steps(parts, **options):
            cache = DynamicCache(config=model.config)
            return torch.cat([model(part, past_key_values=cache, **options).logits for part in parts], 1)[:, T - 1 :]

        one_by_one = steps([ids, *more.split(1, 1)])
        torch.testing.assert_close(steps([ids, more], prompt_length=T), one_by_one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(steps([torch.cat([ids, more], 1)], prompt_length=T), one_by_one, rtol=1e-4, atol=1e-4)
        assert set(seen) == {(T, T)}
        assert not torch.allclose(steps([ids, more]), one_by_one, atol=1e-2)  # a chunk


@every_kind
def test_padding_is_masked_after_the_prompts_end(kind, ids):
    model, more = tiny_model("llama"), torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    prompt = torch.cat([ids, ids.flip(1)])
    mask = torch.ones(2, T + 5, dtype=torch.long)
    mask[0, :20] = 0
    with attach(model, kind):
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, attention_mask=mask[:, :T])
        steps = [
            model(more[:, n : n + 1], past_key_values=cache, attention_mask=mask[:, : T + n + 1]).logits for n in range(5)
        ]
        whole = model(torch.cat([prompt, more], 1), attention_mask=mask, prompt_length=T, use_cache=False).logits
    torch.testing.assert_close(whole[:, T:], torch.cat(steps, 1), rtol=1e-4, atol=1e-4)


@every_kind
def test_a_static_cache_continues_densely_too(kind, ids):
    model, more = tiny_model("llama"), torch.randint(1, 90, (1, 5), generator=torch.Generator().manual_seed(2))
    logits = []
    with attach(model, kind):
        for parts, options in (((ids, *more.split(1, 1)), {}), ((ids, more), {"prompt_length": T})):
            cache = StaticCache(config=model.config, max_cache_len=128)
            logits.append(torch.cat([model(part, past_key_values=cache, **options).logits for part in parts], 1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@every_kind
@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_a_second_turn_and_a_chunk_stay_sparse(kind, ids, logits_to_keep):
    model = tiny_model("llama")
    observe, seen = recorder()
    with attach(model, kind, observe=observe):
        cache = DynamicCache(config=model.config)
        generated(model, ids[:, :40], past_key_values=cache, max_new_tokens=4)
        held = cache.get_seq_length()
        model(ids[:, 40:], past_key_values=cache, logits_to_keep=logits_to_keep)
    assert set(seen) == {(40, 40), (T - 40, held + T - 40)}


def filled(model, ids, cache=None):
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    model(ids, past_key_values=cache)
    return cache


@every_model
def test_a_cache_is_not_continued_under_another_adapter(name, ids):
    model = tiny_model(name)
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=0), SPARSE):
        cache = filled(model, ids[:, :40])
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=1), SPARSE):
        with pytest.raises(ValueError, match="cache must be continued with the adapter that made its index keys, got another"):
            model(ids[:, 40:], past_key_values=cache)


def test_a_cache_is_continued_under_the_same_adapter_attached_again(ids):
    model = tiny_model("llama")
    logits = []
    for again in (False, True):
        attached = attach(model, "indexer")
        cache = filled(model, ids[:, :40])
        if again:
            attached.detach()
            attached = attach(model, "indexer")
        logits.append(model(ids[:, 40:], past_key_values=cache).logits)
        attached.detach()
    assert torch.equal(*logits)


def test_an_emptied_cache_may_be_filled_under_another_adapter(ids):
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=128)
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=0), SPARSE):
        filled(model, ids, cache)
    cache.reset()
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=1), SPARSE):
        logits = model(ids, past_key_values=cache).logits
        assert torch.equal(logits, model(ids).logits)


def test_decoding_under_another_adapter_is_dense_and_leaves_no_keys(ids):
    model = tiny_model("llama")
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=0), SPARSE):
        cache = filled(model, ids[:, :40])
    new, dense = ids[:, 40:41], copy.deepcopy(cache)
    expected = model(new, past_key_values=dense).logits
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=1), SPARSE):
        assert torch.equal(model(new, past_key_values=cache).logits, expected)
    with SparsePrefill.attach(model, KINDS["indexer"](model, seed=0), SPARSE):
        with pytest.raises(ValueError, match="holds 41 tokens of which 40 have index keys"):
            model(ids[:, 41:], past_key_values=cache)


@pytest.mark.parametrize("name, kind", [("llama", "oracle"), ("llama", "indexer"), ("gemma3", "indexer")])
@pytest.mark.parametrize("use", ["forward", "chunks", "generate", "beams", "assisted", "copied", "noted"])
def test_a_cache_is_gone_with_its_last_user(name, kind, use, ids):
    """By counting references alone: the garbage collector sleeps."""
    model = tiny_model(name)
    if use == "assisted":
        require_assistance(model, ids)
    gc.collect()
    gc.disable()
    try:
        with attach(model, kind) as attached:
            cache = DynamicCache(config=model.config)
            if use == "forward":
                filled(model, ids, cache)
            if use == "chunks":
                filled(model, ids[:, 40:], filled(model, ids[:, :40], cache))
            if use in ("generate", "beams", "assisted"):
                options = {"beams": {"num_beams": 2}, "assisted": {"prompt_lookup_num_tokens": 4}}.get(use, {})
                generated(model, ids, past_key_values=cache, **options)
            if use == "copied":
                other = copy.deepcopy(filled(model, ids[:, :40], cache))
                filled(model, ids[:, 40:], other)
                del other
            if use == "noted":
                with attached.prompt(cache, T):
                    filled(model, ids, cache)
            gone = [weakref.ref(cache), *(weakref.ref(layer) for layer in cache.layers)]
            del cache
            assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_a_saved_cache_continues_as_it_would(ids):
    model = tiny_model("llama")
    with attach(model, "indexer"):
        cache = filled(model, ids[:, :40])
        loaded = pickle.loads(pickle.dumps(cache))
        loaded.crop(-8)
        expected = copy.deepcopy(cache)
        expected.crop(-8)
        assert torch.equal(*(model(ids[:, 32:], past_key_values=one).logits for one in (loaded, expected)))


# The model


@every_model
@every_kind
def test_another_attention_implementation_is_refused_until_detached(name, kind, ids):
    model = tiny_model(name)
    before = model(ids).logits
    with attach(model, kind):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"keep its attention implementation while attached, got 'eager': detach\(\)"):
            model(ids)
    assert torch.equal(model(ids).logits, before)


@every_model
@every_kind
def test_a_copy_of_an_attached_model_says_so_and_can_be_made_dense(name, kind, ids):
    model = tiny_model(name)
    dense = model(ids).logits
    with attach(model, kind):
        sparse = model(ids).logits
        copied = copy.deepcopy(model)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"copied before attach\(\) or after detach\(\), got a copy of one that was"):
                copied(ids)
        assert torch.equal(model(ids).logits, sparse)
    with pytest.raises(ValueError, match="got a copy of one that was attached"):
        copied.generate(ids, max_new_tokens=2)
    copied.set_attn_implementation("sdpa")
    assert torch.equal(copied(ids).logits, dense)
    with attach(copied, kind):
        assert torch.equal(copied(ids).logits, sparse)
    assert torch.equal(copied(ids).logits, dense)


def test_a_model_of_another_dtype_is_refused_where_its_indexer_has_the_old_one(ids):
    model = tiny_model("llama")
    with attach(model, "indexer"):
        model.to(torch.bfloat16)
        message = r"stay torch.float32 on cpu while attached, got torch.bfloat16 on cpu: detach\(\), change it, and attach again"
        with pytest.raises(ValueError, match=message):
            model(ids)
        model.to(torch.float32)
        model(ids)


def test_a_model_of_another_dtype_serves_where_nothing_depends_on_it(ids):
    model = tiny_model("llama")
    with attach(model, "oracle"):
        model.to(torch.bfloat16)
        sparse = model(ids).logits
    with attach(model, "oracle"):
        assert torch.equal(model(ids).logits, sparse)


@every_kind
def test_an_attached_model_is_saved_detached_or_not_at_all(kind, ids, tmp_path):
    model = tiny_model("llama")
    dense = model(ids).logits
    with attach(model, kind):
        for save in (lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model)):
            with pytest.raises(ValueError, match=r"model must be detached before it is pickled, got one that is attached"):
                save()
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation == "sdpa" and torch.equal(loaded(ids).logits, dense)
    pickle.dumps(model)


@every_model
@every_kind
def test_the_decoder_alone_is_what_it_is_in_its_model(name, kind, ids):
    model = tiny_model(name)
    with attach(model, kind):
        hidden = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(ids).logits)
        assert torch.equal(model.model(ids).last_hidden_state, hidden)
