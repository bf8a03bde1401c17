import copy
import json
import re
from dataclasses import replace

import pytest

from npu_sparse.measure.frontier import FrontierConfig, join, run_frontier
from npu_sparse.measure.frontier.config import timed_variant
from npu_sparse.measure.quality import GAPS, MACRO
from npu_sparse.measure.quality import run as quality
from npu_sparse.measure.ttft import run as ttft
from npu_sparse.runs.store import RunError

CONFIG = FrontierConfig(
    model="tiny", length=900, ks=(32, 64), blocks=(1, 16), tasks=("niah_single_1", "vt"), count=2, batch=2,
    max_new_tokens=2, min_dense_score=0.0, runs=2, warmup=0, stage_runs=1, prompt="random", dtype="float32",
    instruments=("generated",),
)  # fmt: skip


@pytest.fixture(scope="module")
def grid(model, tokenizer, indexer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("frontier") / "run"
    return directory, run_frontier(CONFIG, directory, model=model, tokenizer=tokenizer, indexer=indexer)


@pytest.fixture
def pairs(grid):
    directory, _ = grid

    def read(kind, k, block):
        return json.loads((directory / kind / f"k{k}-b{block}" / "report.json").read_text())

    return [(read("quality", *point), read("ttft", *point)) for point in CONFIG.points()]


def test_one_row_per_budget_beside_dense_and_the_oracles(grid):
    rows = grid[1]["rows"]
    assert [(row["evidence"], row["k"], row["block"]) for row in rows] == [
        ("dense", None, None), ("oracle", 32, 1), ("oracle", 64, 1),
        ("untrained", 32, 1), ("untrained", 32, 16), ("untrained", 64, 1), ("untrained", 64, 16),
    ]  # fmt: skip
    for row in rows:
        assert row["how"] == "measured" and "torch" in row["machine"] and "commit" in row
        assert 0 <= row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"] <= 1
        assert (row["ttft_s"] is None) == (row["evidence"] == "oracle")


def test_candidates_and_shared_layers_are_those_of_both_halves_of_a_point():
    config = replace(CONFIG, budget="candidates=128,key_block=16,share_layers=2")
    for point in config.points():
        for half in (config.quality_at(*point), config.ttft_at(*point)):
            assert (half.budget.candidates, half.budget.key_block, half.budget.share_layers) == (128, 16, 2)
    with pytest.raises(ValueError, match="candidates must be 0 or hold the k keys"):
        replace(CONFIG, budget="candidates=32")  # the grid has k = 64


def test_points_have_the_three_gaps_and_unshared_ones_no_realization_gap(grid):
    for row in grid[1]["rows"][3:]:
        assert set(row["gaps"]) == set(GAPS) - ({"realization gap"} if row["block"] == 1 else set())
    text = (grid[0] / "report.md").read_text()
    assert all(gap in text for gap in GAPS) and "untrained" in text
    assert (grid[0] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_each_point_joins_the_scores_gaps_and_times_of_its_own_budget(pairs):
    numbers = iter(range(1, 10_000))
    for scored, _ in pairs:  # an untrained model solves nothing: numbers that can be told apart
        for row in scored["rows"]:
            row["score"] = {"value": next(numbers)}
        for gap in scored["gaps"]:
            gap["change"] = {"value": next(numbers)}
    for row, (scored, timed) in zip(join(pairs)["rows"][3:], pairs):
        variant = "indexer" if row["block"] == 1 else "indexer-shared"
        (score,) = [r["score"] for r in scored["rows"] if r["variant"] == variant and r["task"] == MACRO]
        times = {r["variant"]: r for r in timed["rows"]}
        assert (row["score"], row["ttft_s"]) == (score, times[variant]["ttft_s"])
        assert (row["speed_up"], row["dense_ttft_s"]) == (times[variant]["speed_up"], times["dense"]["ttft_s"])
        macro = {gap["gap"]: gap["change"] for gap in scored["gaps"] if gap["task"] == MACRO}
        assert row["gaps"] == {name: change for name, change in macro.items() if name in GAPS}


def test_dense_time_pools_the_rounds_of_all_points(grid, pairs):
    assert grid[1]["rows"][0]["ttft_s"]["n"] == len(pairs) * CONFIG.runs


def test_cells_are_shared_between_budgets_and_nothing_is_run_twice(
    grid, model, tokenizer, indexer, tmp_path, monkeypatch
):
    cells, compute = [], quality._compute_cell

    def counting(config, directory, cell, *rest):
        cells.append((config.budget.k, config.budget.block, *cell))
        compute(config, directory, cell, *rest)

    monkeypatch.setattr(quality, "_compute_cell", counting)
    config = replace(CONFIG, tasks=("niah_single_1",), runs=1)
    first = run_frontier(config, tmp_path, model=model, tokenizer=tokenizer, indexer=indexer)
    assert [(k, block, name) for k, block, _, name in cells] == [
        (32, 1, "dense"), (32, 1, "oracle"), (32, 1, "indexer"), (32, 16, "oracle-shared"), (32, 16, "indexer-shared"),
        (64, 1, "oracle"), (64, 1, "indexer"), (64, 16, "oracle-shared"), (64, 16, "indexer-shared"),
    ]  # fmt: skip
    cells.clear()
    monkeypatch.setattr(ttft, "_measure", None)
    assert run_frontier(config, tmp_path, indexer=indexer) == first  # loads nothing
    assert cells == []


@pytest.mark.parametrize(
    "half, change, message",
    [
        (1, {"base": {"weights_fingerprint": "other"}}, "the same model"),
        (1, {"adapter": "other"}, "the same adapter"),
        (1, {"config": {"lengths": [512]}}, "the same length, got 900 and 512"),
        (1, {"config": {"lengths": [512, 900]}}, "must have one length"),
        (1, {"config": {"k": 128}}, "the same k, got 64 and 128"),
        (1, {"config": {"impl": "kernel"}}, "the same impl"),
        (1, {"config": {"dtype": "bfloat16"}}, "the same dtype"),
        (1, {"machines": [{"processor": "another"}]}, "all ttft runs must have the same processor"),
        (0, {"prompts": {"vt": "others"}}, "all points must have the same prompts"),
    ],
)
def test_runs_that_do_not_match_are_not_joined(pairs, half, change, message):
    pairs = copy.deepcopy(pairs)
    changed = pairs[-1][half]
    for name, value in change.items():
        changed[name] = {**changed[name], **value} if name == "config" else value
    with pytest.raises(RunError, match=message):
        join(pairs)


def test_points_of_different_models_are_not_joined(pairs):
    pairs = copy.deepcopy(pairs)
    for half in pairs[-1]:
        half["base"] = {"weights_fingerprint": "other"}
    with pytest.raises(RunError, match="all points must have the same model"):
        join(pairs)


def test_a_frontier_needs_a_task_that_dense_attention_solves(pairs):
    pairs = copy.deepcopy(pairs)
    for scored, _ in pairs:
        for task in scored["tasks"].values():
            task["solved"] = False
    with pytest.raises(RunError, match="must solve at least one task"):
        join(pairs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ks": ()}, "ks must name at least one"),
        ({"blocks": (16, 16)}, "blocks must name at least one value and none twice"),
        ({"ks": (32, 2000)}, "k must not exceed the context"),
        ({"count": 0}, "count must be a positive integer"),
        ({"tasks": ("vtt",)}, "did you mean vt"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_a_frontier_needs_an_indexer(tmp_path):
    with pytest.raises(ValueError, match="adapter must name an indexer's directory"):
        run_frontier(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_survives_json():
    assert FrontierConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    assert timed_variant(1) == "indexer"


def test_teacher_forced_answers_stand_beside_the_scores_of_every_point(model, tokenizer, indexer, tmp_path):
    config = replace(CONFIG, ks=(32,), tasks=("vt",), max_new_tokens=60, instruments=("generated", "forced"))
    frontier = run_frontier(config, tmp_path, model=model, tokenizer=tokenizer, indexer=indexer)
    for k, block in config.points():
        report = json.loads((tmp_path / "quality" / f"k{k}-b{block}" / "report.json").read_text())
        macro = {row["variant"]: row for row in report["forced"]["rows"] if row["task"] == MACRO}
        (row,) = [row for row in frontier["rows"] if row["evidence"] == "untrained" and row["block"] == block]
        expected = macro[timed_variant(block)]
        assert row["forced"] == {name: expected[name] for name in ("right", "change", "kl")} and row["forced"]["kl"]["value"] > 0
    assert frontier["rows"][0]["forced"]["kl"]["value"] == 0 and frontier["forced_tasks"] == ["vt"]
    text = (tmp_path / "report.md").read_text()
    assert "KL (nats)" in text and "flatter" in text


def test_a_frontier_of_before_is_read_as_a_generated_one():
    assert FrontierConfig.from_dict(CONFIG.to_dict()) == CONFIG and "instruments" not in CONFIG.to_dict()


def test_a_grid_is_spelled_as_a_budget_is():
    spelled = replace(CONFIG, ks=(1,), blocks=(1,), budget="k=32|64,sink=4,block=1|16")
    assert spelled == replace(CONFIG, budget="sink=4") and (spelled.ks, spelled.blocks) == ((32, 64), (1, 16))
    assert FrontierConfig.from_dict(json.loads(json.dumps(spelled.to_dict()))) == spelled
    for budget, message in (("k=32|x", "k must be a whole number"), ("k=0:8+9:16", "joined by |"), ("sink=1|2", "sink must be")):
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(CONFIG, budget=budget)
