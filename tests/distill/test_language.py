"""A soft selection is the hard one where scores lie far apart, and only the indexer is trained through it."""

import pytest
import torch

from npu_sparse import Indexer
from npu_sparse.distill import run_distill, train
from npu_sparse.distill.language import language_loss, soft_attention
from npu_sparse.distill.teacher import Tap
from npu_sparse.testing import attention_inputs, tiny_model

T = 21


def selected(k: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(soft attention, attention over every query's k best keys)`, both `[B, T, Hq, D]`."""
    q, key, v = attention_inputs(2, 4, 2, T, T, 16)
    actual = soft_attention(Tap(0, None, None, None, q, key, 0.25), v, z, k)
    keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, z.topk(min(k, T), -1).indices, True) & (z > float("-inf"))
    scores = (q @ key.repeat_interleave(2, 1).mT * 0.25).masked_fill(~keep[:, None], float("-inf"))
    return actual, (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)


@pytest.mark.parametrize("k", [1, 5, T - 1, T, 40])
def test_scores_that_lie_far_apart_select_the_k_best_keys(k):
    z = torch.rand(2, T, T, generator=torch.Generator().manual_seed(3)).argsort(-1).float() * 50  # all different
    z.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu_(1), float("-inf"))
    actual, expected = selected(k, z)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_only_the_indexer_has_gradients_and_every_layer_has():
    model = tiny_model("llama").requires_grad_(False)
    indexer = Indexer.for_model(model, dim=64)
    ids = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    loss = language_loss(model, indexer, ids, 8)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for head in indexer.layers.values():
        assert float(head.q_proj.weight.grad.abs().sum()) > 0 and float(head.k_proj.weight.grad.abs().sum()) > 0
    dense = model(ids, labels=ids).loss
    every = language_loss(model, indexer, ids, 40)
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-5)  # all keys are read
    assert abs(float((loss - dense).detach())) > 1e-3
    assert model.config._attn_implementation == "sdpa"


def test_the_stage_follows_the_divergences_and_goes_on_where_it_was_stopped(
    make_config, model, tokenizer, tmp_path, monkeypatch, curve_of, weights_of
):
    config = make_config(steps=3, lm_steps=3, sparse_k=8, save_every=1, validate_every=3)
    options = dict(model=model, tokenizer=tokenizer, progress=False)
    result = run_distill(config, tmp_path / "whole", **options)
    assert [point["step"] for point in result["curve"]] == [0, 1, 2]
    assert [point["step"] for point in result["language_curve"]] == [3, 4, 5]
    assert result["final_loss"] == result["curve"][-1]["loss"] and result["tokens_per_s"] > 0
    text = (tmp_path / "whole" / "report.md").read_text()
    assert "then 3 steps of language-model loss" in text
    assert f"100M tokens project to {1e8 / result['tokens_per_s'] / 3600:.2g} hours" in text
    run_distill(make_config(steps=3), tmp_path / "without", **options)
    assert "language-model" not in (tmp_path / "without" / "report.md").read_text()
    assert weights_of(tmp_path / "whole") != weights_of(tmp_path / "without")
    step_of = train._step

    def stopping(model, loss_module, optimizer, batch, config, step, world):
        if step == 4:
            raise KeyboardInterrupt
        return step_of(model, loss_module, optimizer, batch, config, step, world)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_distill(config, tmp_path / "stopped", **options)
    run_distill(config, tmp_path / "stopped", **options)
    assert curve_of(tmp_path / "stopped") == curve_of(tmp_path / "whole")
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")


def test_several_processes_are_refused(make_config, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="lm_steps must be 0 under torchrun, got 2"):
        run_distill(make_config(lm_steps=2), tmp_path, model=model, tokenizer=tokenizer, progress=False)
