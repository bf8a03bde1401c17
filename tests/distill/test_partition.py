import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill
from npu_sparse.distill.data import Contexts
from npu_sparse.distill.partition import LeastSquares, exact_partitions, fit_partition, partition_residuals
from npu_sparse.distill.teacher import tap
from npu_sparse.testing import naive_index_partition, normal


@pytest.fixture(scope="module")
def contexts(make_config, tokenizer):
    return Contexts(make_config(partition_steps=24, rows=0), tokenizer)


def loud_indexer(model):
    """Scores that differ in height from query to query."""
    indexer = Indexer.for_model(model, dim=64, heads=2, partition=True)
    for head in indexer.layers.values():
        head.q_proj.weight.data *= 3
        head.w_proj.weight.data *= 2
    return indexer


def test_least_squares_find_what_is_linear():
    fit, a = LeastSquares(), normal(12, seed=1) * 2
    a[3] = 0
    for n in range(4):
        hidden, seen = normal(500, 12, seed=n), torch.arange(1 + 500 * n, 501 + 500 * n)
        hidden[:, 3] = 300.0  # some channels of real models are large and nearly constant
        fit.add(hidden, seen, hidden @ a + 2.5 + 0.7 * seen.log())
    direction, bias, growth = fit.solve()
    torch.testing.assert_close(direction, a.double(), rtol=1e-2, atol=1e-2)
    hidden, seen = normal(99, 12, seed=9), torch.arange(1, 100)
    predicted = hidden.double() @ direction + bias + growth * seen.double().log()
    assert float((predicted - (hidden @ a + 2.5 + 0.7 * seen.log())).square().mean().sqrt()) < 0.02 * float(a.norm())


def test_a_channel_that_never_varies_gets_no_coefficient():
    fit = LeastSquares()
    hidden = normal(200, 5)
    hidden[:, 2] = 1.0
    fit.add(hidden, torch.full((200,), 7), hidden[:, 0] * 2)
    direction, bias, growth = fit.solve()
    assert direction[2] == 0 and growth == 0 and abs(bias) < 0.1
    torch.testing.assert_close(direction[:1], torch.tensor([2.0], dtype=torch.float64), rtol=1e-2, atol=0)


def test_targets_are_the_exact_partitions_of_the_rows_that_are_supervised(model):
    indexer, taps = loud_indexer(model), []
    tap(model, torch.arange(1, 61)[None].repeat(2, 1), taps.append)
    for seen_layer in taps:
        head = indexer.layers[str(seen_layer.layer)]
        with torch.no_grad():
            qi, ki, w = head(seen_layer.hidden, seen_layer.cos, seen_layer.sin)
            exact = naive_index_partition(qi, ki, w).float()
            for (start, stop), (hidden, n, partition) in zip(
                [(0, 9), (30, 60)], exact_partitions(head, seen_layer, [(0, 9), (30, 60)]), strict=True
            ):
                assert torch.equal(hidden, seen_layer.hidden[:, start:stop])
                assert n.tolist() == [list(range(start + 1, stop + 1))]
                torch.testing.assert_close(partition, exact[:, start:stop])


def test_fitting_predicts_most_of_what_varies_on_held_out_text(model, contexts):
    indexer = loud_indexer(model)
    before = partition_residuals(model, indexer, contexts.held_out())
    fit_partition(model, indexer, contexts)
    after = partition_residuals(model, indexer, contexts.held_out())
    assert after["spread"] == before["spread"] > 0.5
    assert after["residual"] < 0.6 * min(before["residual"], after["spread"])
    assert after["residual_in_block"] <= after["residual"]
    assert [row["layer"] for row in after["by_layer"]] == [0, 1]
    for row in after["by_layer"]:
        assert row["residual"] < 0.7 * row["spread"]


def test_fitting_is_the_same_every_time(model, contexts):
    fitted = []
    for _ in range(2):
        indexer = loud_indexer(model)
        fit_partition(model, indexer, contexts)
        fitted.append({name: p.clone() for name, p in indexer.state_dict().items() if ".partition." in name})
    assert len(fitted[0]) == 4
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0])


def test_fitted_heads_serve_supports_near_those_of_the_exact_partition(model, contexts):
    indexer = loud_indexer(model)
    read = [contexts.batch(step) for step in range(100, 108)]  # neither training nor fitting has seen them
    budget = Budget(k=16, block=16, reduce="softmax_max", partition="exact")

    def supports(budget):
        """Of the first layer, all contexts in a row: the layers after it see other hidden states."""
        seen = []

        def observe(inputs, support, out):
            if inputs.layer == 0:
                seen.append(support.member_mask(inputs.k.shape[2]).flatten())

        with SparsePrefill.attach(model, indexer, budget, observe=observe), torch.no_grad():
            for ids in read:
                model(ids)
        return torch.cat(seen)

    def agreement(mask):
        return float((mask & exact).sum() / exact.sum())

    exact, raw = supports(budget), supports(budget.replace(reduce="max"))
    unfitted = supports(budget.replace(partition="learned"))
    fit_partition(model, indexer, contexts)
    fitted = supports(budget.replace(partition="learned"))
    assert agreement(fitted) > agreement(unfitted) and agreement(fitted) > agreement(raw)


def test_a_run_reports_its_heads_and_ships_them(finished):
    config, output, result = finished
    indexer = Indexer.from_pretrained(output / "adapter")
    assert indexer.config.partition and all(bool(head.partition.direction.any()) for head in indexer.layers.values())
    assert set(result["partition"]) == {"residual", "residual_in_block", "spread", "by_layer"}
    words = f"miss the exact log-partition by {result['partition']['residual']:.3f} nats"
    assert words in (output / "adapter" / "README.md").read_text()
    assert str(Budget.from_dict(indexer.budget)) == "k=1024,reduce=softmax_max,dense_below=1024,exact_last=128"


def test_a_run_without_heads_is_as_before(make_config, model, tokenizer, tmp_path, finished, curve_of):
    from npu_sparse.distill import run_distill

    result = run_distill(make_config(partition_steps=0), tmp_path, model=model, tokenizer=tokenizer, progress=False)
    without = Indexer.from_pretrained(tmp_path / "adapter")
    assert result["partition"] is None and not without.config.partition and without.budget["reduce"] == "max"
    assert "It has no partition heads." in (tmp_path / "report.md").read_text()
    assert curve_of(tmp_path) == curve_of(finished[1])  # heads change nothing else
