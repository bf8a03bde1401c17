"""A prefill on every back-end: what the kernels of a device take, in the dtype they take."""

import copy

import pytest
import torch
from transformers import DynamicCache

from npu_sparse import Budget, SparsePrefill, ops, selectors
from npu_sparse.models.architectures import attention_modules
from npu_sparse.ops import dispatch
from npu_sparse.testing import (
    assert_accurate,
    greedy,
    left_padding,
    naive_sparse_attention,
    recorder,
    right_padding,
    tiny_model,
    tiny_selector,
    tokens,
)

T = 75
EVERYTHING = Budget(k=512, block=16)
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
every_selector = pytest.mark.parametrize("kind", ["dense", "oracle", "per_kv", "indexer"])
pytestmark = pytest.mark.usefixtures("no_gradients")


on_kernels = pytest.mark.parametrize("name", ["qwen3_5", "llama", "gemma3"])


@pytest.fixture
def placed(backend):
    """`placed(name)` gives a tiny model in the back-end's dtype and on its device."""

    def get(name, **changes):
        return tiny_model(name, dtype=backend.dtype(), **changes).to(backend.device)

    return get


@on_kernels
@every_selector
@pytest.mark.parametrize("block", [1, 8])
def test_every_backend_attends_to_the_support_and_to_nothing_else(backend, placed, name, kind, block):
    model, ids = placed(name), tokens().to(backend.device)
    observe, seen = recorder()
    budget, mask = SPARSE.replace(block=block), left_padding(ids)
    with SparsePrefill.attach(model, tiny_selector(kind, model), budget, impl=backend.impl, observe=observe):
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
    with SparsePrefill.attach(model, tiny_selector(kind, model), EVERYTHING, impl=backend.impl):
        sparse = model(ids, attention_mask=mask).logits[real]
    assert_accurate(sparse, truth, dense)


@on_kernels
def test_every_backend_serves_an_exact_end_under_normalised_scores(backend, placed, name):
    """The lossless default, in small: the first sparse layer's last rows are dense attention, the others as without the end."""
    model, ids = placed(name), tokens().to(backend.device)
    budget, mask, n = Budget.parse("k=16,block=8,reduce=softmax_max,exact_last=11"), right_padding(ids), 11
    module = attention_modules(model)[min(attention_modules(model))]

    def rows(budget):
        seen = []
        handle = module.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        with SparsePrefill.attach(model, tiny_selector("indexer", model), budget, impl=backend.impl):
            logits = model(ids, attention_mask=mask).logits
        handle.remove()
        return seen[0], logits

    exact, logits = rows(budget)
    assert bool(logits[mask.bool()].isfinite().all())
    sparse, every = rows(budget.replace(exact_last=0))[0], rows(EVERYTHING)[0]
    for sequence, length in enumerate(mask.sum(1).tolist()):
        assert torch.equal(exact[sequence, : length - n], sparse[sequence, : length - n])
        last = slice(length - n, length)
        assert (exact[sequence, last] - every[sequence, last]).norm() < 0.02 * every[sequence, last].norm()
        assert (sparse[sequence, last] - every[sequence, last]).norm() > 0.1 * every[sequence, last].norm()


@on_kernels
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_every_backend_selects_the_same_for_chunks_of_whole_blocks(backend, placed, name, kind, require_continuing):
    # linear attention's output depends on the chunks in its last bits, more so on a GPU, so it follows the checked layer
    first = {"layer_types": ["full_attention", "linear_attention"] * 2} if name == "qwen3_5" else {}
    model, ids = placed(name, **first), tokens().to(backend.device)
    require_continuing(tiny_model(name))
    first_layer = min(attention_modules(model))
    assert first_layer == 0 or not first
    supports = []
    for chunks in ([(0, T)], [(0, 32), (32, 48), (48, T)]):
        observe, seen = recorder()
        with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE, impl=backend.impl, observe=observe):
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
    with SparsePrefill.attach(model, tiny_selector("indexer", model), EVERYTHING, impl=backend.impl):
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
