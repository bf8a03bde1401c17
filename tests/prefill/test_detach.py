"""Detaching restores the model; other models, and what it was attached with, are left as they are."""

import gc
import weakref

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, selectors
from npu_sparse.testing import TINY_MODELS, close, left_padding, tiny_model, tiny_selector, tokens

EVERYTHING = Budget(k=512, block=16)
SPARSE = Budget(k=24, block=8, sink=2, recent=4)
every_model = pytest.mark.parametrize("name", TINY_MODELS)
pytestmark = pytest.mark.usefixtures("no_gradients")


@every_model
@pytest.mark.parametrize("kind", ["oracle", "indexer"])
def test_detach_restores_the_model_bit_for_bit(name, kind):
    model, ids = tiny_model(name), tokens()
    keys, before = list(model.state_dict()), model(ids).logits
    config = model.config.to_dict()
    implementations = {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")}
    attached = SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE)
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
