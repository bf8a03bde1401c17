"""Budget.exact_last: the last queries of a prompt attend densely."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, Indexer, SparsePrefill, ops, selectors
from npu_sparse.exact_end import exact_end
from npu_sparse.models.architectures import attention_modules
from npu_sparse.models.forward import ForwardContext
from npu_sparse.ops import KernelUnavailableError, dispatch
from npu_sparse.selectors import LayerInputs
from npu_sparse.testing import TINY_MODELS, assert_accurate, close, tiny_model, tokens

T = 75
SPARSE = Budget(k=16, block=8)
BUDGETS = {
    "per query": Budget(k=8, block=1),
    "shared": SPARSE,
    "shared by 64": Budget(k=12, block=64),
    "tail": SPARSE.replace(tail=True),
    "layers": SPARSE.replace(share_layers=2),
    "two levels": SPARSE.replace(candidates=16, key_block=16),
    "softmax_max": SPARSE.replace(reduce="softmax_max"),
    "softmax_max, learned": SPARSE.replace(reduce="softmax_max"),
    "tiers": Budget(k={0: 8, 60: 24}, block=8, per_layer={1: 12}),
}
pytestmark = pytest.mark.usefixtures("no_gradients")


def choose(kind, model):
    if kind in ("indexer", "learned"):
        return selectors.ByIndexer(Indexer.for_model(model, dim=64, heads=2, partition=kind == "learned"))
    return {"oracle": selectors.Oracle(), "per_kv": selectors.Oracle(per_kv=True)}[kind]


def attached(model, budget, kind="oracle", **options):
    return SparsePrefill.attach(model, choose(kind, model), budget, impl="reference", **options)


def first_layer(model, context, ids, **options):
    """What the first full-attention layer's attention gives in one forward, `[B, T, Hq * Dv]`, and the logits."""
    module, seen = attention_modules(model)[min(attention_modules(model))], []
    handle = module.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with context:
        logits = model(ids, **options).logits
    handle.remove()
    return torch.cat(seen, 1), logits


# Which rows


@pytest.mark.parametrize("n", [1, 5, 8, 20])
@pytest.mark.parametrize("name, budget", BUDGETS.items())
def test_the_last_rows_are_dense_and_the_others_as_without_an_exact_end(models, name, budget, n):
    model, ids = models("llama"), tokens()
    kind = {"two levels": "indexer", "softmax_max": "indexer", "softmax_max, learned": "learned"}.get(name, "oracle")
    dense, _ = first_layer(model, nullcontext(), ids)
    sparse, _ = first_layer(model, attached(model, budget, kind), ids)
    exact, _ = first_layer(model, attached(model, budget.replace(exact_last=n), kind), ids)
    close(exact[:, T - n :], dense[:, T - n :])
    close(exact[:, : T - n], sparse[:, : T - n])
    assert not torch.allclose(sparse[:, T - n :], dense[:, T - n :], atol=1e-2)  # and that makes a difference


@pytest.mark.parametrize("n", [20, 77, 100])
def test_queries_that_share_candidates_are_left_out_together_or_not_at_all(models, n):
    model, ids = models("llama"), tokens(length=200)
    budget = Budget(k=16, block=4, candidates=16, key_block=16)
    sparse, _ = first_layer(model, attached(model, budget, "indexer"), ids)
    exact, _ = first_layer(model, attached(model, budget.replace(exact_last=n), "indexer"), ids)
    close(exact[:, : 200 - n], sparse[:, : 200 - n])


@pytest.mark.parametrize("kind", ["oracle", "per_kv", "indexer"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_model_and_selector_has_an_exact_end(models, name, kind):
    model, ids = models(name), tokens()
    dense, _ = first_layer(model, nullcontext(), ids)
    sparse, _ = first_layer(model, attached(model, SPARSE, kind), ids)
    exact, _ = first_layer(model, attached(model, SPARSE.replace(exact_last=11), kind), ids)
    close(exact[:, T - 11 :], dense[:, T - 11 :])
    close(exact[:, : T - 11], sparse[:, : T - 11])


@pytest.mark.parametrize("n", [T, T + 1, 1000])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_exact_end_as_long_as_the_prompt_is_dense(models, name, n):
    model, ids = models(name), tokens()
    expected, (_, logits) = model(ids).logits, first_layer(model, attached(model, SPARSE.replace(exact_last=n)), ids)
    close(logits, expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("n", [3, 8, 30, 100])
def test_each_sequence_of_a_padded_batch_ends_where_its_tokens_do(models, side, n):
    model, ids = models("llama"), tokens(3)
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :20] = 0
    if side != "left":
        mask[-1, -9:] = 0
    budget = SPARSE.replace(exact_last=n)
    dense, _ = first_layer(model, nullcontext(), ids, attention_mask=mask)
    sparse, _ = first_layer(model, attached(model, SPARSE), ids, attention_mask=mask)
    exact, _ = first_layer(model, attached(model, budget), ids, attention_mask=mask)
    for b in range(3):
        real = mask[b].nonzero()[:, 0]
        close(exact[b, real[-n:]], dense[b, real[-n:]])
        close(exact[b, real[: max(0, len(real) - n)]], sparse[b, real[: max(0, len(real) - n)]])


def test_queries_after_the_prompts_end_are_decode_steps_and_no_part_of_the_exact_end(models):
    model, ids = models("llama"), tokens()
    dense, _ = first_layer(model, nullcontext(), ids)
    sparse, _ = first_layer(model, attached(model, SPARSE), ids, prompt_length=T - 10)
    exact, _ = first_layer(model, attached(model, SPARSE.replace(exact_last=7)), ids, prompt_length=T - 10)
    close(exact[:, T - 17 :], dense[:, T - 17 :])
    close(exact[:, : T - 17], sparse[:, : T - 17])


def test_only_exact_rows_that_fill_whole_blocks_are_left_out_of_the_selection(models):
    model, seen = models("llama"), []

    def observe(inputs, support, out):
        seen.append((inputs.q.shape[2], inputs.k.shape[2], support.indices.shape[2], out.shape[2]))

    for n, queries in ((0, 75), (3, 72), (4, 72), (11, 64), (12, 64), (74, 8), (75, None)):
        seen.clear()
        with attached(model, SPARSE.replace(exact_last=n), observe=observe):
            model(tokens())
        assert seen == ([] if queries is None else [(queries, queries, -(-queries // 8), queries)] * 3)


# Chunks and caches


def in_chunks(model, context, ids, chunks, length=None, cache=None):
    """The first layer's attention and the logits of a prompt in chunks."""
    cache = cache or DynamicCache(config=model.config.get_text_config())
    module, seen, logits = attention_modules(model)[min(attention_modules(model))], [], []
    handle = module.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with context as prefill, prefill.prompt(cache, length) if length else nullcontext():
        for start, stop in chunks:
            logits.append(model(ids[:, start:stop], past_key_values=cache).logits)
    handle.remove()
    return torch.cat(seen, 1), torch.cat(logits, 1)


@pytest.mark.parametrize("n", [5, 20, 60])
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
def test_the_exact_end_is_the_same_in_chunks_of_whole_blocks(models, name, kind, n):
    model, ids, budget = models(name), tokens(), SPARSE.replace(exact_last=n)
    whole, logits = in_chunks(model, attached(model, budget, kind), ids, [(0, T)])
    for chunks in ([(0, 32), (32, 72), (72, T)], [(0, 64), (64, T)]):
        chunked, ours = in_chunks(model, attached(model, budget, kind), ids, chunks, length=T)
        close(chunked, whole, 1e-3)
        close(ours, logits, 1e-3)


def test_chunks_without_a_known_length_end_with_each_forward(models):
    model, ids, budget = models("llama"), tokens(), SPARSE.replace(exact_last=5)
    dense, _ = first_layer(model, nullcontext(), ids)
    logits, _ = in_chunks(model, attached(model, budget), ids, [(0, 32), (32, T)])
    for rows in (slice(27, 32), slice(T - 5, T)):
        close(logits[:, rows], dense[:, rows])
    known, _ = in_chunks(model, attached(model, budget), ids, [(0, 32), (32, T)], length=T)
    assert not torch.allclose(known[:, 27:32], dense[:, 27:32], atol=1e-2)


def test_a_prefix_hit_keeps_the_keys_and_values_it_finds(models):
    """The prefix was a prompt with an exact end; what continues it reads those keys and values, and has an end of its own."""
    model, ids, budget = models("llama"), tokens(), SPARSE.replace(exact_last=6)
    prefix = DynamicCache(config=model.config)
    with attached(model, budget):
        model(ids[:, :40], past_key_values=prefix)
        hit, later = copy.deepcopy(prefix), DynamicCache(config=model.config)
        continued = model(ids[:, 40:], past_key_values=hit).logits
        model(ids[:, :40], past_key_values=later)  # the same history, computed anew
        replayed = model(ids[:, 40:], past_key_values=later).logits
        once = model(ids).logits[:, 40:]
    assert torch.equal(continued, replayed)
    for mine, theirs in zip(prefix.layers, hit.layers):
        assert torch.equal(mine.keys, theirs.keys[:, :, :40]) and torch.equal(mine.values, theirs.values[:, :, :40])
    assert not torch.allclose(continued, once, atol=1e-3)  # rows 34 to 39 were dense in the history, and are not in one prefill


def test_an_exact_end_longer_than_what_follows_a_prefix_reaches_no_further_than_the_forward(models):
    model, ids, budget = models("llama"), tokens(), SPARSE.replace(exact_last=50)
    dense, _ = first_layer(model, nullcontext(), ids)
    cache = DynamicCache(config=model.config)
    with attached(model, SPARSE):
        model(ids[:, :40], past_key_values=cache)
    logits, _ = in_chunks(model, attached(model, budget), ids, [(40, T)], cache=cache)
    assert logits.shape[1] == T - 40
    close(logits, dense[:, 40:])  # the first layer's keys do not depend on what was sparse before


def test_decoding_and_generation_are_dense_with_an_exact_end(models):
    model, ids = models("llama"), tokens()
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    plain = model.generate(ids, **options)
    with attached(model, SPARSE.replace(exact_last=T)):
        assert torch.equal(model.generate(ids, **options), plain)


def test_short_contexts_run_dense_bit_for_bit(models):
    model, ids = models("llama"), tokens()
    expected = model(ids).logits
    with attached(model, SPARSE.replace(exact_last=5, dense_below=T + 1)):
        assert torch.equal(model(ids).logits, expected)


def test_a_compiled_prefill_has_the_same_exact_end(models):
    model, ids, mask = models("llama"), tokens(), torch.ones(2, T, dtype=torch.long)
    with attached(model, SPARSE.replace(exact_last=5)):
        expected = model(ids, attention_mask=mask).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)


# Where it is decided


def inputs(valid=None, queries=20, keys=50):
    q, k = torch.zeros(1, 2, queries, 4), torch.zeros(1, 2, keys, 4)
    return LayerInputs(0, q, k, k, 1.0, valid)


@pytest.mark.parametrize(
    "prompt_length, n, first",
    [
        (None, 5, 15),
        (None, 20, 0),
        (None, 100, 0),
        (50, 5, 15),
        (53, 5, 18),  # three of five in this chunk
        (55, 5, None),
        (60, 25, 5),
        (None, 0, None),
    ],
)
def test_rows_of_a_chunk_that_are_exact(prompt_length, n, first):
    end = exact_end(inputs(), ForwardContext(30, 20, prompt_length, 0), Budget(exact_last=n))
    assert (None if end is None else end.first) == first
    if end is not None:
        assert end.positions.tolist() == [list(range(30 + first, 50))]


def test_rows_of_a_padded_chunk_are_exact_where_they_hold_tokens():
    valid = torch.ones(1, 50, dtype=torch.bool)
    valid[0, 40:] = False
    end = exact_end(inputs(valid), ForwardContext(30, 20, None, 0), Budget(exact_last=4))
    assert sorted(p for p in end.positions[0].tolist() if p >= 0) == [36, 37, 38, 39]
    end = exact_end(inputs(valid), ForwardContext(30, 20, None, 0), Budget(exact_last=15))
    assert sorted(p for p in end.positions[0].tolist() if p >= 0) == list(range(30, 40))  # 25 to 29 are another chunk's


# Bad input


def test_a_length_that_is_none_is_refused():
    for wrong, error, sentence in (
        (-1, ValueError, "exact_last must be >= 0, got -1"),
        (1.5, TypeError, "exact_last must be an integer, got 1.5"),
        (True, TypeError, "exact_last must be an integer, got True"),
    ):
        with pytest.raises(error, match=sentence):
            Budget(exact_last=wrong)
    assert Budget.parse("exact_last=128") == Budget(exact_last=128)


def test_a_device_without_the_kernel_is_refused_when_attaching(monkeypatch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    monkeypatch.setattr("npu_sparse.checks.require_kernels", lambda device: None)
    monkeypatch.setattr(dispatch, "_kernel", lambda op, device: None if op == "dense_rows" else object())
    sentence = r"dense_rows has no kernel on 'cpu': .* is not built: .*, or Budget\(exact_last=0\)"
    with pytest.raises(KernelUnavailableError, match=sentence):
        SparsePrefill.attach(model, selectors.Oracle(), Budget(exact_last=8), impl="kernel")


def test_the_ascendc_kernels_serve_an_exact_end(emulated_library, monkeypatch):
    """Through the sparse attention kernel: the rows are the last of the prompt, and see what dense attention sees."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    served, dense_rows = [], ops.dense_rows

    def watched(q, k, v, positions, **options):
        actual = dense_rows(q, k, v, positions, **options)
        served.append((positions.tolist(), options["impl"]))
        plain = {**options, "impl": "reference"}
        exact = dense_rows(q.float(), k.float(), v.float(), positions, **plain).double()
        assert_accurate(actual, exact, dense_rows(q, k, v, positions, **plain))
        return actual

    monkeypatch.setattr(ops, "dense_rows", watched)
    with torch.no_grad(), SparsePrefill.attach(model, selectors.Local(), Budget(k=8, block=8, exact_last=5), impl="kernel"):
        model(ids)
    assert served == [([[35, 36, 37, 38, 39]], "kernel")] * model.config.num_hidden_layers
