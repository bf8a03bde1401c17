"""One context object a forward: threads, gradient checkpointing and torch.compile see what one serial forward sees."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, Indexer, SparsePrefill, peers, selectors
from npu_sparse.models.forward import ForwardContext, noted, prompt_length_of
from npu_sparse.testing import tiny_model, tokens

THREADS, TURNS, T = 4, 40, 24
BUDGET = Budget(k=8, block=4, sink=1, recent=1)
SELECTORS = {
    "oracle": lambda model: selectors.Oracle(),
    "per_kv": lambda model: selectors.Oracle(per_kv=True),
    "indexer": lambda model: selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2)),
    "local": lambda model: selectors.Local(),
    "random": lambda model: selectors.Random(),
    "dense": lambda model: selectors.Dense(),
    "pooled": lambda model: peers.PooledBlocks(0.9, key_block=4),
    "antidiagonal": lambda model: peers.Antidiagonal(0.9, key_block=4, stride=2),
    "vertical-slash": lambda model: peers.VerticalSlash(last=8),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=6)


def prompts(model, seed, length=T):
    """Hidden states of a prompt, so that they may hold anything: `[1, T, hidden_size]`."""
    generator = torch.Generator().manual_seed(seed)
    return model.model.embed_tokens(torch.randint(1, 100, (1, length), generator=generator)).detach()


def together(run):
    """`run(thread)` in every thread at once; their results."""
    start = Barrier(THREADS)

    def one(thread):
        start.wait()
        return run(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


@contextmanager
def contexts(model):
    """The list that receives the ForwardContext of every forward."""
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["npu_sparse_forward"])  # noqa: E731
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", SELECTORS)
@pytest.mark.parametrize("share_layers", [1, 2, 3])
def test_forwards_side_by_side_give_what_each_gives_alone(model, kind, share_layers):
    inputs = [prompts(model, seed, T + seed) for seed in range(THREADS)]
    budget = BUDGET.replace(share_layers=share_layers)
    with SparsePrefill.attach(model, SELECTORS[kind](model), budget), torch.no_grad():
        alone = [model(inputs_embeds=part).logits for part in inputs]

        @torch.no_grad()
        def wrong(thread):
            return sum(not torch.equal(model(inputs_embeds=inputs[thread]).logits, alone[thread]) for _ in range(TURNS))

        assert together(wrong) == [0] * THREADS


def test_the_finite_check_of_a_forward_is_its_own(model):
    inputs = [prompts(model, seed) for seed in range(THREADS)]
    inputs[1][0, 20, 3] = float("nan")
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET):

        @torch.no_grad()
        def errors(thread):
            raised = 0
            for _ in range(TURNS):
                try:
                    model(inputs_embeds=inputs[thread])
                except FloatingPointError as error:
                    assert "hidden states of layer 0 must be finite" in str(error)
                    raised += 1
            return raised

        assert together(errors) == [0, TURNS, 0, 0]


def test_the_decoder_alone_is_checked_too(model):
    inputs = prompts(model, 0)
    inputs[0, 20, 3] = float("nan")
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET), torch.no_grad():
        with pytest.raises(FloatingPointError, match="hidden states of layer 0 must be finite"):
            model.model(inputs_embeds=inputs)


# Gradient checkpointing: layers run again in autograd's thread


@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("share_layers", [1, 2, 3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind, share_layers, use_reentrant):
    ids = torch.randint(1, 100, (2, T), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama", num_hidden_layers=6).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with SparsePrefill.attach(model, SELECTORS[kind](model), BUDGET.replace(share_layers=share_layers)):
            logits = model(ids, use_cache=False).logits
            other = model(ids.flip(1), use_cache=False).logits  # a second forward before the first goes back
            (logits.square().sum() + other.sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


@pytest.mark.slow
@pytest.mark.parametrize("share_layers", [2, 3])
def test_a_compiled_prefill_shares_supports_like_an_eager_one(share_layers):
    model = tiny_model("llama")
    ids = torch.randint(1, 100, (2, T), generator=torch.Generator().manual_seed(0))
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET.replace(share_layers=share_layers)), torch.no_grad():
        eager = model(ids).logits
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), eager, rtol=1e-4, atol=1e-4)


def test_a_support_is_dropped_with_the_group_that_reads_it(model):
    """A long prompt's supports would else be held all at once."""
    held, seen = [], []
    observe = lambda inputs, support, out: held.append(support)  # noqa: E731
    budget = BUDGET.replace(share_layers=2)
    with SparsePrefill.attach(model, selectors.Oracle(), budget, observe=observe), torch.no_grad():
        with contexts(model) as seen:
            model(inputs_embeds=prompts(model, 0))
    assert list(seen[0].supports) == [4] and seen[0].supports[4] is held[-1]


# The end of a prompt


@pytest.mark.parametrize(
    "start, queries, prompt_length, phase, sparse_queries, end",
    [
        (0, 40, None, "prompt", 40, 40),
        (0, 40, 40, "prompt", 40, 40),
        (0, 40, 90, "prompt", 40, 40),
        (0, 40, 36, "prompt", 36, 36),
        (40, 20, None, "chunk", 20, 60),
        (40, 20, 50, "chunk", 10, 50),
        (40, 20, 41, "continuation", 0, 41),
        (40, 20, 40, "continuation", 0, 40),
        (40, 20, 7, "continuation", 0, 7),
        (0, 1, None, "decode", 0, 1),
        (40, 1, 90, "decode", 0, 41),
        (0, 9, None, "prompt", 0, 9),  # shorter than dense_below
        (0, 40, 9, "prompt", 0, 9),
    ],
)
def test_a_forward_knows_which_of_its_queries_are_the_prompts(start, queries, prompt_length, phase, sparse_queries, end):
    forward = ForwardContext(start, queries, prompt_length, dense_below=10)
    assert (forward.phase, forward.sparse_queries, forward.end) == (phase, sparse_queries, end)


def test_a_caller_says_how_long_the_prompt_is(model):
    ids = torch.randint(1, 100, (1, T), generator=torch.Generator().manual_seed(0))
    first, rest = ids[:, :10], ids[:, 10:]
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET) as attached, torch.no_grad(), contexts(model) as seen:
        cache = DynamicCache(config=model.config)
        model(first, past_key_values=cache)
        model(rest, past_key_values=cache, prompt_length=15)
        model.model(ids, prompt_length=15)
        cache = DynamicCache(config=model.config)
        with attached.prompt(cache, 20):
            model(first, past_key_values=cache)
            model(rest, past_key_values=cache)
        model(first, past_key_values=cache)
    assert [(one.start, one.prompt_length) for one in seen] == [(0, None), (10, 15), (0, 15), (0, 20), (10, 20), (T, None)]


def test_a_generation_in_chunks_knows_the_prompts_end_from_its_cache(model):
    ids = torch.randint(1, 100, (1, T), generator=torch.Generator().manual_seed(0))
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET) as attached, torch.no_grad(), contexts(model) as seen:
        cache = DynamicCache(config=model.config)
        with attached.prompt(cache, T):
            model.generate(ids, past_key_values=cache, prefill_chunk_size=10, max_new_tokens=3, do_sample=False)
    assert [(one.phase, one.prompt_length) for one in seen[:3]] == [("prompt", T), ("chunk", T), ("chunk", T)]
    assert {one.phase for one in seen[3:]} == {"decode"}


@pytest.mark.parametrize(
    "length, error, message",
    [
        (0, ValueError, "prompt_length must be >= 1, got 0"),
        (1.5, TypeError, "prompt_length must be an integer, got 1.5"),
        (True, TypeError, "prompt_length must be an integer, got True"),
    ],
)
def test_what_is_no_length_is_refused(model, length, error, message):
    cache = DynamicCache(config=model.config)
    with SparsePrefill.attach(model, selectors.Oracle(), BUDGET) as attached, torch.no_grad():
        with pytest.raises(error, match=message), attached.prompt(cache, length):
            pass
        with pytest.raises(error, match=message):
            model(torch.ones(1, 9, dtype=torch.long), prompt_length=length)


def test_a_note_on_a_cache_ends_with_its_block():
    cache = DynamicCache()
    with noted(cache, 9):
        with noted(cache, 5):
            assert prompt_length_of({}, cache, 20) == 5
        assert prompt_length_of({}, cache, 20) == 9
        assert prompt_length_of({"prompt_length": 7}, cache, 20) == 7
    assert prompt_length_of({}, cache, 20) is None
    assert vars(cache).keys() == vars(DynamicCache()).keys()


@pytest.mark.parametrize("chunk", [0, 7])
def test_no_forward_of_a_measurement_is_warned_for_its_caches_name(model, chunk):
    import warnings

    from npu_sparse.measure.ttft.run import time_to_first_token

    ids = tokens(1, T)
    expected = int(model(ids).logits[0, -1].argmax())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert time_to_first_token(model, ids, chunk)[1] == expected
        with SparsePrefill.attach(model, selectors.Oracle(), Budget(k=T)):
            assert time_to_first_token(model, ids, chunk)[1] == expected
            model.generate(ids, max_new_tokens=2, do_sample=False)
    assert not [str(one.message) for one in caught if "past_key_values" in str(one.message)]
