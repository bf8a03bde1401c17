"""Budgets fitted to what layers lose: the measurement against attention weights, the fit against trying everything."""

import itertools
import json

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill
from npu_sparse.measure import fit
from npu_sparse.measure.fit import FitConfig, lost_mass, run_fit, spend
from npu_sparse.selectors import Dense, LayerInputs

LADDER = (8, 16, 32)


def ids_of(tokenizer, length=64):
    return torch.arange(length) * 7 % len(tokenizer)


@pytest.mark.parametrize("seed", range(12))
def test_spend_finds_what_trying_everything_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    ks, layers = (256, 512, 1024, 2048), (0, 3, 4, 7)
    drops = torch.rand(len(layers), len(ks), generator=generator).cumsum(1).flip(1)  # more keys lose less
    losses = {layer: dict(zip(ks, map(float, row), strict=True)) for layer, row in zip(layers, drops, strict=True)}
    costs, total = {k: float(k) for k in ks}, 4 * 512.0
    chosen = spend(losses, costs, total)
    affordable = [way for way in itertools.product(ks, repeat=4) if sum(way) <= total]
    best = min(sum(losses[layer][k] for layer, k in zip(layers, way, strict=True)) for way in affordable)
    assert sum(chosen.values()) <= total
    assert sum(losses[layer][k] for layer, k in chosen.items()) == pytest.approx(best, abs=1e-12)


def test_spend_keeps_to_a_total_of_measured_times():
    losses = {0: {1: 1.0, 2: 0.0}, 1: {1: 1.0, 2: 0.5}}
    assert spend(losses, {1: 0.0101, 2: 0.0203}, 0.0303) == {0: 1, 1: 1}  # 0.0304 would be needed
    assert spend(losses, {1: 0.0101, 2: 0.0203}, 0.0304) == {0: 2, 1: 1}
    assert spend(losses, {1: 1.0, 2: 1.0}, 2.0) == {0: 2, 1: 2}  # a key that costs nothing is taken
    with pytest.raises(ValueError, match="total must pay for the cheapest k of 2 layers"):
        spend(losses, {1: 1.0, 2: 2.0}, 1.5)


@pytest.mark.parametrize("budget", ["block=8", "block=8,reduce=softmax_max,exact_last=16", "block=1"])
def test_lost_mass_is_the_attention_outside_the_support(model, indexer, tokenizer, budget):
    ids, budget = ids_of(tokenizer), Budget.parse(budget)
    measured = lost_mass(model, indexer, ids, budget, LADDER, blocks=64, impl="reference")
    with torch.no_grad():
        model.set_attn_implementation("eager")
        weights = model(ids[None], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    supports = {}
    for k in LADDER:
        with SparsePrefill.attach(
            model, indexer, budget.replace(k=k, exact_last=0), impl="reference",
            observe=lambda inputs, support, out, k=k: supports.setdefault((inputs.layer, k), support),
        ), torch.no_grad():  # fmt: skip
            model(ids[None])
    first, last = LADDER[0] // budget.block * budget.block, 64 - budget.exact_last
    row = {(row["layer"], row["k"]): row for row in measured["layers"]}
    assert set(row) == {(layer, k) for layer in (0, 1) for k in LADDER}
    for k in LADDER:  # in the first layer, no sparse layer before it changes the inputs
        support = supports[0, k]
        member = torch.zeros(len(support.indices[0, 0]), 65, dtype=torch.bool)
        used = torch.arange(support.indices.shape[-1]) < support.count[0, 0][:, None]
        member.scatter_(1, torch.where(used, support.indices[0, 0].long(), 64), True)
        outside = ~member[:, :64].repeat_interleave(budget.block, 0)[:64]
        lost = (weights[0][0].mean(0) * outside).sum(-1)[first:last]
        assert row[0, k]["mean"] == pytest.approx(float(lost.mean()), abs=1e-6)
        assert row[0, k]["square"] == pytest.approx(float(lost.square().mean()), abs=1e-6)
    assert row[0, 8]["mean"] > row[0, 32]["mean"] > 0
    assert set(measured["seconds"]) == {"8", "16", "32"}


def config(**changes) -> FitConfig:
    options = dict(model="tiny", budget="k=32,block=8", ladder=LADDER + (64,), lengths=(512,), tasks=("vt",), count=1, blocks=8,
                   dtype="float32", impl="reference")  # fmt: skip
    return FitConfig(**{**options, **changes})


def test_fit_by_layer_costs_no_more_and_loses_no_more(model, tokenizer, indexer, tmp_path, monkeypatch):
    result = run_fit(config(), tmp_path / "run", model=model, tokenizer=tokenizer, indexer=indexer)
    budget = Budget.parse(result["budget"])
    assert sum(budget.k_for(512, layer) for layer in (0, 1)) <= 2 * 32 and budget.block == 8
    assert sum(row["lost"] for row in result["rows"]) <= sum(row["lost_before"] for row in result["rows"])
    saved = Indexer.from_pretrained(tmp_path / "run" / "adapter")
    assert Budget.from_dict(saved.budget) == budget
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["budget"] == result["budget"] and result["budget"] in (tmp_path / "run" / "report.md").read_text()
    with SparsePrefill.attach(model, saved, budget), torch.no_grad():
        assert model(ids_of(tokenizer, 256)[None]).logits.isfinite().all()
    monkeypatch.setattr(fit, "lost_mass", None)  # a finished prompt is not measured again
    assert run_fit(config(), tmp_path / "run", model=model, tokenizer=tokenizer, indexer=indexer)["budget"] == result["budget"]


def test_fit_by_length_gives_tiers(model, tokenizer, indexer, tmp_path):
    options = config(lengths=(500, 1000), ladder=(16, 32, 64, 128), budget="k=32,block=8")
    result = run_fit(options, tmp_path / "run", model=model, tokenizer=tokenizer, indexer=indexer)
    budget, rows = Budget.parse(result["budget"]), result["rows"]
    assert [budget.k_for(length) for length in (500, 1000)] == [row["k"] for row in rows] and budget.k_for(501) == rows[1]["k"]
    assert rows[0]["k"] <= 32 and rows[1]["k"] > 32  # random weights attend everywhere: twice the keys lose more at one k
    assert rows[1]["lost"] <= rows[0]["lost_before"] or rows[1]["k"] == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="max"), "objective must be square or mean, got 'max'"),
        (dict(cost="money"), "cost must be keys or time, got 'money'"),
        (dict(lengths=(400, 200)), "lengths must be positive and ascending, got 400, 200"),
        (dict(ladder=(0, 4)), "ladder must be positive and ascending, got 0, 4"),
        (dict(lengths=()), "lengths must name at least one, got none"),
        (dict(count=0), "count must be a positive integer, got 0"),
        (dict(tasks=("qa_1",)), "tasks must not need a question file, got qa_1"),
        (dict(budget="k=4,colour=red"), "budget must name fields among"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(budget="k=48,block=8"), "ladder must hold the budget's k and fit into the prompts, got 48"),
        (dict(budget="k=0:16+128:32,block=8"), "budget must have one k to fit from, got tiers"),
        (dict(lengths=(512, 9000)), "length must fit the model's 4096 positions, got 9000"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(model, tokenizer, indexer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_fit(config(**changes), tmp_path / "run", model=model, tokenizer=tokenizer, indexer=indexer)


def test_fit_needs_an_adapter(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="adapter must name an indexer's directory, got none"):
        run_fit(config(), tmp_path / "run", model=model, tokenizer=tokenizer)


@pytest.mark.parametrize(("length", "block"), [(64, 8), (70, 16), (5, 1), (3, 64)])
def test_support_of_everything_is_the_dense_selectors(length, block):
    q = torch.zeros(1, 2, length, 8)
    chosen = Dense().select(LayerInputs(layer=0, q=q, k=q, v=q, scale=1.0, impl="reference"), Budget(block=block))
    made = fit._everything(length, block, q.device)
    assert torch.equal(made.indices, chosen.indices) and torch.equal(made.count, chosen.count) and made.block == chosen.block
