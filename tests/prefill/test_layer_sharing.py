"""Budget.share_layers: layers in a row that read one support."""

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, selectors
from npu_sparse.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=5)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 100, (2, 48), generator=torch.Generator().manual_seed(0))


def supports(model, selector, budget, ids, **inputs):
    """`{layer: support}` and the logits of one prefill."""
    read = {}
    observe = lambda inputs, support, out: read.update({inputs.layer: support})  # noqa: E731
    with SparsePrefill.attach(model, selector, budget, observe=observe), torch.inference_mode():
        logits = model(ids, **inputs).logits
    return read, logits


def test_layers_of_a_group_read_the_support_of_their_first(model, ids):
    read, _ = supports(model, selectors.Oracle(), Budget(k=8, block=4, share_layers=2), ids)
    assert read[1] is read[0] and read[3] is read[2]
    assert not torch.equal(read[2].indices, read[0].indices)
    assert read[4] is not read[3]  # the last group is shorter


def test_only_the_first_layer_of_a_group_is_asked(model, ids):
    asked = []

    class Recorder(selectors.Oracle):
        def select(self, inputs, budget):
            asked.append(inputs.layer)
            return super().select(inputs, budget)

    supports(model, Recorder(), Budget(k=8, block=4, share_layers=3), ids)
    assert asked == [0, 3]


def test_the_first_group_computes_what_unshared_layers_would(model, ids):
    shared, _ = supports(model, selectors.Oracle(), Budget(k=8, block=4, share_layers=5), ids)
    alone, _ = supports(model, selectors.Oracle(), Budget(k=8, block=4), ids)
    assert torch.equal(shared[4].indices, alone[0].indices)


def test_chunked_prefill_with_an_indexer_gives_the_supports_of_one_prompt(model, ids):
    from transformers import DynamicCache

    indexer, budget = Indexer.for_model(model, heads=1, dim=64, seed=0), Budget(k=8, block=4, share_layers=2)
    whole, logits = supports(model, selectors.ByIndexer(indexer), budget, ids)
    read, cache = [], DynamicCache(config=model.config)
    observe = lambda inputs, support, out: read.append((inputs.layer, support))  # noqa: E731
    with SparsePrefill.attach(model, indexer, budget, observe=observe), torch.inference_mode():
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(16, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)
    last = dict(read[-5:])
    assert last[1] is last[0] and last[3] is last[2]
    used = last[2].used()
    assert torch.equal(last[2].indices[used], whole[2].indices[:, :, -4:][..., : last[2].width][used])


def test_a_budget_for_a_layer_that_does_not_select_is_refused(model):
    with pytest.raises(ValueError, match=r"per_layer must name layers that select for themselves \(share_layers 2\), got \[1\]"):
        SparsePrefill.attach(model, selectors.Oracle(), Budget(k=8, block=4, share_layers=2, per_layer={1: 4}))
    with pytest.raises(ValueError, match="share_layers must be >= 1, got 0"):
        Budget(share_layers=0)


def test_layers_read_the_support_of_the_last_anchor_before_them(model, ids):
    read, _ = supports(model, selectors.Oracle(), Budget(k=8, block=4, anchors=(0, 3)), ids)
    assert read[1] is read[0] and read[2] is read[0] and read[4] is read[3]
    assert not torch.equal(read[3].indices, read[0].indices)


def test_every_second_layer_as_an_anchor_is_two_layers_that_share(model, ids):
    _, anchored = supports(model, selectors.Oracle(), Budget(k=8, block=4, anchors=(0, 2, 4)), ids)
    _, shared = supports(model, selectors.Oracle(), Budget(k=8, block=4, share_layers=2), ids)
    assert torch.equal(anchored, shared)


def test_anchors_that_are_no_layers_or_leave_out_the_first_are_refused(model):
    for anchors in ((1, 2), (0, 7)):
        with pytest.raises(ValueError, match=r"anchors must be full-attention layers \[0, 1, .*\], the first among them, got"):
            SparsePrefill.attach(model, selectors.Oracle(), Budget(k=8, anchors=anchors))
    with pytest.raises(ValueError, match=r"per_layer must name layers that select .* \(anchors \[0, 3\]\), got \[1\]"):
        SparsePrefill.attach(model, selectors.Oracle(), Budget(k=8, anchors=(0, 3), per_layer={1: 9}))
