"""Dense implementations as models see them; the kernels themselves only on a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.measure.ttft import baselines as dense
from npu_sparse.testing import assert_accurate, attention_inputs, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def fa3(monkeypatch):
    """A module with FlashAttention-3's function: `[B, T, H, D]`, causal from the last key; returns what it was called with."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **options):
        assert causal and not options
        calls.append(SimpleNamespace(q=q, k=k, v=v, scale=softmax_scale))
        Tq, Tk = q.shape[1], k.shape[1]
        mask = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    module = SimpleNamespace(flash_attn_func=flash_attn_func, __spec__=SimpleNamespace(name="fa3_fwd_interface"))
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    return calls


def logits(model, ids, implementation, pieces=()):
    model.set_attn_implementation(dense.register(implementation))
    cache = DynamicCache(config=model.config)
    cuts = zip((0, *pieces), (*pieces, ids.shape[1]))
    return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in cuts], 1)


@pytest.mark.parametrize("implementation", ["fa2", "fa3"])
@pytest.mark.parametrize("name", ["qwen3_5", "llama"])
@pytest.mark.parametrize("pieces", [(), (32, 48, 49)], ids=str)
def test_logits_are_those_of_sdpa(fa3, implementation, name, pieces):
    model, ids = tiny_model(name), tokens(2, 61)
    expected = logits(model, ids, "sdpa", pieces)
    torch.testing.assert_close(logits(model, ids, implementation, pieces), expected, rtol=1e-4, atol=1e-4)
    assert bool(fa3) == (implementation == "fa3")
    assert all(call.q.shape[2] == 4 and call.k.shape[2] == 2 for call in fa3)  # KV heads are not repeated


def test_sparse_prefill_falls_back_to_a_registered_implementation(fa3):
    model, ids = tiny_model("qwen3_5"), torch.randint(1, 90, (1, 40))
    expected = logits(model, ids, "fa3")
    with SparsePrefill.attach(model, selectors.Oracle(), Budget(k=8, block=1, dense_below=41)):
        fa3.clear()
        assert torch.equal(model(ids).logits, expected)
        assert len(fa3) == 2


def test_padding_is_refused_by_name(fa3):
    model, ids = tiny_model("qwen3_5"), torch.randint(1, 90, (2, 20))
    model.set_attn_implementation(dense.register("fa3"))
    model(ids, attention_mask=torch.ones_like(ids))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match="dense fa3 must have prompts without padding"):
        model(ids, attention_mask=mask)


def test_what_is_missing_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(dense, "FA3_MODULES", ("a_module_that_is_not_there",))
    with pytest.raises(ImportError, match="dense fa3 must have FlashAttention-3: run `pip install fa3-fwd`"):
        dense.register("fa3")
    assert dense.available() == ["fa2", "cudnn"]
    assert dense.register("eager") == "eager"


def test_cudnn_refuses_pieces_in_a_sentence():
    q, k, v = attention_inputs(1, 4, 4, 3, 9, 16)
    with pytest.raises(ValueError, match="dense cudnn must have as many queries as keys"):
        dense.DENSE["cudnn"]()(q, k, v, 0.25)


@pytest.mark.parametrize("implementation", ["fa2", "cudnn", "fa3"])
@pytest.mark.parametrize("Tq, Tk", [(256, 256), (100, 300)])
def test_cuda_kernels_are_causal_from_the_last_key(implementation, Tq, Tk):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if implementation not in dense.available():
        pytest.skip(f"{implementation} is not installed")
    if implementation == "cudnn" and Tq != Tk:
        pytest.skip("cudnn serves no chunks")
    q, k, v = attention_inputs(1, 8, 2, Tq, Tk, 256, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device="cuda").tril(Tk - Tq)

    def attend(dtype):
        parts = (part.to(dtype) for part in (q, k, v))
        return scaled_dot_product_attention(*parts, attn_mask=mask, scale=1 / 16, enable_gqa=True).transpose(1, 2)

    assert_accurate(dense.DENSE[implementation]()(q, k, v, 1 / 16), attend(torch.float64), attend(torch.bfloat16))
