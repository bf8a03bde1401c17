"""Attaching an adapter: of this geometry and this base alone, with the budget that it recommends."""

import pytest

from npu_sparse import Budget, Indexer, SparsePrefill
from npu_sparse.indexer import AdapterError
from npu_sparse.testing import close, tiny_model, tokens

SPARSE = Budget(k=24, block=8, sink=2, recent=4)
pytestmark = pytest.mark.usefixtures("no_gradients")


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
