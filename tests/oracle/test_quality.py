import pytest
import torch

from npu_sparse.budget import Budget
from npu_sparse.oracle import quality
from npu_sparse.prefill import SparsePrefill
from npu_sparse.selectors import LayerInputs, Local, Oracle, Random
from npu_sparse.support import Support


@pytest.fixture(scope="module")
def prompts(model):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, model.config.vocab_size, (T,), generator=generator) for T in (100, 37)]


def measured(model, prompts, selector, budget, stride=1):
    dense = [quality.hidden_states(model, ids, stride) for ids in prompts]
    return quality.measure(model, prompts, dense, model, selector=selector, budget=budget, stride=stride)


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("per_kv", [False, True])
def test_a_budget_of_every_key_is_dense(model, prompts, block, reduce, per_kv):
    for row in measured(model, prompts, Oracle(per_kv), Budget(k=128, block=block, reduce=reduce)):
        assert row["kl"] < 1e-5 and row["agreement"] == 1
        assert row["retained_by_layer"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_a_smaller_budget_is_further_from_dense(model, prompts):
    kl = [measured(model, prompts, Oracle(), Budget(k=k, block=1))[0]["kl"] for k in (4, 16, 64)]
    assert kl[0] > kl[1] > kl[2] > 0


def test_oracle_keeps_more_mass_than_the_controls(model, prompts):
    oracle, local, random = (
        measured(model, prompts, selector, Budget(k=8, block=1))[0] for selector in (Oracle(), Local(2), Random())
    )
    assert min(oracle["retained_by_layer"]) > max(local["retained_by_layer"] + random["retained_by_layer"])
    assert oracle["kl"] < min(local["kl"], random["kl"])


def test_kl_and_agreement_equal_those_of_whole_logits(model, prompts):
    ids = prompts[0]
    selector, budget = Local(1), Budget(k=5, block=1)
    with torch.no_grad():
        p = model(ids[None]).logits[0].log_softmax(-1)
        with SparsePrefill.attach(model, selector, budget):
            q = model(ids[None]).logits[0].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float()
    (row,) = measured(model, [ids], selector, budget)
    assert row["kl"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert row["kl_second_half"] == pytest.approx(float(divergence[50:].mean()), rel=1e-4)
    assert row["agreement"] == pytest.approx(float(same.mean()))
    assert row["agreement_second_half"] == pytest.approx(float(same[50:].mean()))
    assert row["kl"] > 1e-3


def test_slices_of_logits_change_nothing(model, prompts, monkeypatch):
    whole = measured(model, prompts, Random(), Budget(k=5, block=1))
    monkeypatch.setattr(quality, "LOGIT_ELEMENTS", 7 * model.config.vocab_size)
    sliced = measured(model, prompts, Random(), Budget(k=5, block=1))
    assert [f["kl"] for f in sliced] == pytest.approx([f["kl"] for f in whole], rel=1e-5)


def test_hidden_states_at_a_stride_end_with_the_last_position(model, prompts):
    every = quality.hidden_states(model, prompts[1])
    assert torch.equal(quality.hidden_states(model, prompts[1], 10), every[[6, 16, 26, 36]])


def test_model_is_dense_again_afterwards(model, prompts):
    before = quality.hidden_states(model, prompts[0])
    measured(model, prompts, Random(), Budget(k=5, block=1))
    assert torch.equal(quality.hidden_states(model, prompts[0]), before)


def test_changed_logits_are_refused(model, prompts, monkeypatch):
    forward = model.forward

    def softcapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(model, "forward", softcapped)
    with pytest.raises(ValueError, match="changes its logits"):
        quality.hidden_states(model, prompts[0])


@pytest.mark.parametrize("heads", [1, 2])
def test_retained_mass_equals_a_sum_over_whole_attention(heads):
    torch.manual_seed(0)
    T, block = 50, 4
    q, k = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8)
    inputs = LayerInputs(0, q, k, k, scale=1.0, impl="reference")
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    seen = torch.ones(T, T).tril().bool()
    attention = scores.masked_fill(~seen, float("-inf")).softmax(-1)[0]  # [Hq, T, T]
    support = Support(
        torch.randint(0, 10, (1, heads, 13, 6)).sort(-1).values.int(), torch.full((1, heads, 13), 3).int(), block
    )
    support.indices[..., 0], support.indices[..., 1], support.indices[..., 2] = 0, 11, 48
    support.indices[..., 3:] = torch.iinfo(torch.int32).max
    member = torch.zeros(T, dtype=torch.bool)
    member[[0, 11, 48]] = True
    expected = (attention * member).sum(-1).mean(0)[20:50]
    torch.testing.assert_close(quality.retained_mass(inputs, support, 20, 50)[0], expected)
