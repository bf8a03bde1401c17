import json
from dataclasses import replace

import pytest

from npu_sparse.measure import teacher_forced
from npu_sparse.measure.quality import MACRO, EvalConfig, adopt_records, prepare_prompts, report_eval, run_eval
from npu_sparse.measure.quality import run as quality
from npu_sparse.measure.quality.forced import tabulate_forced
from npu_sparse.measure.quality.page import is_solved
from npu_sparse.runs.store import RunError

CONFIG = EvalConfig(
    model="tiny", tasks=("niah_single_1", "vt"), length=900, count=3, budget="k=32,block=16", max_new_tokens=60, dtype="float32",
    variants=("dense", "oracle", "indexer", "indexer-shared", "local"), min_dense_score=0.0, instruments=("forced",),
)  # fmt: skip


@pytest.fixture
def evaluate(model, tokenizer, indexer):
    def run(config, output, **options):
        return run_eval(config, output, **{"model": model, "tokenizer": tokenizer, "indexer": indexer, **options})

    return run


@pytest.fixture(scope="module")
def finished(model, tokenizer, indexer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("forced") / "run"
    return directory, run_eval(CONFIG, directory, model=model, tokenizer=tokenizer, indexer=indexer)


@pytest.fixture
def counted(monkeypatch):
    """The number of questions of every call of `score_forced` from here on."""
    calls, compute = [], teacher_forced.score_forced

    def counting(model, questions, *rest, **options):
        calls.append(len(questions))
        return compute(model, questions, *rest, **options)

    monkeypatch.setattr(teacher_forced, "score_forced", counting)
    return calls


def record(directory, task, variant):
    return json.loads((directory / "records" / f"{task}-{variant}.json").read_text())


def test_dense_has_no_divergence_and_a_small_budget_has(finished):
    directory, result = finished
    rows = {row["variant"]: row for row in result["forced"]["rows"] if row["task"] == MACRO}
    assert set(rows) == set(CONFIG.variants)
    assert rows["dense"]["kl"]["value"] == 0.0 and rows["dense"]["change"] is None
    assert all(rows[name]["kl"]["low"] > 0 for name in rows if name != "dense")
    for task in CONFIG.tasks:
        samples = record(directory, task, "local")["samples"]
        assert [sample["index"] for sample in samples] == [0, 1, 2]
        assert all({"right", "tokens", "kl", "stress_right", "stress_kl"} < set(sample) for sample in samples)
        assert not any("output" in sample for sample in samples)


def test_each_cell_is_what_score_forced_says_of_its_prompts(finished, model, tokenizer, indexer):
    directory, _ = finished
    prompts = quality._prompts(CONFIG, directory, "vt", tokenizer)
    dense = teacher_forced.read_states(directory / "forced" / "vt.safetensors")
    from npu_sparse import SparsePrefill, selectors

    attach = lambda: SparsePrefill.attach(model, selectors.ByIndexer(indexer), CONFIG.budget, impl="reference")  # noqa: E731
    expected, _ = teacher_forced.score_forced(model, prompts.asked, attach, dense)
    samples = record(directory, "vt", "indexer-shared")["samples"]
    assert [{name: sample[name] for name in ("right", "tokens", "kl")} for sample in samples] == expected


def test_the_report_says_why_generated_scores_flatter_and_shows_both_measures(finished):
    directory, result = finished
    text = (directory / "report.md").read_text()
    assert teacher_forced.FLATTERS in text and "KL (nats)" in text and "stress: KL" in text and "teacher-forced" in text
    assert (directory / "forced.png").read_bytes().startswith(b"\x89PNG")
    assert {gap["gap"] for gap in result["forced"]["gaps"]} == {"oracle gap", "indexer gap", "realization gap", "total"}


def test_a_finished_run_is_read_and_not_computed_again(finished, evaluate, counted):
    directory, result = finished
    assert evaluate(CONFIG, directory) == report_eval(directory) == result
    assert counted == []


def test_dense_answers_are_computed_once_for_all_variants(evaluate, tmp_path, counted):
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "local"), stress=False)
    result = evaluate(config, tmp_path)
    assert counted == [3, 3]
    (tmp_path / "records" / "vt-local.json").unlink()
    counted.clear()
    assert evaluate(config, tmp_path)["forced"] == result["forced"]
    assert counted == [3]


def test_a_shard_without_the_dense_cell_makes_the_dense_answers_itself(evaluate, tmp_path, finished, counted):
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "local"))
    assert evaluate(config, tmp_path, shard=(1, 2))["complete"] is False
    assert counted == [3, 3]
    merged = evaluate(config, tmp_path, shard=(0, 2))
    single = [row for row in finished[1]["forced"]["rows"] if row["task"] == "vt" and row["variant"] in config.variants]
    assert [row for row in merged["forced"]["rows"] if row["task"] == "vt"] == single


def test_both_instruments_share_a_record_and_a_report(evaluate, tmp_path):
    config = replace(CONFIG, tasks=("vt",), variants=("dense", "local"), instruments=("generated", "forced"), stress=False)
    result = evaluate(config, tmp_path)
    (sample, *_) = record(tmp_path, "vt", "local")["samples"]
    assert {"score", "output", "right", "kl"} < set(sample) and "stress_kl" not in sample
    assert {"score"} < set(result["rows"][0]) and result["forced"]["rows"]
    assert "stress" not in (tmp_path / "report.md").read_text().split("```json")[0].replace("Stress", "")


def test_adopted_cells_bring_the_dense_answers(evaluate, finished, tmp_path, counted):
    directory, _ = finished
    config = replace(CONFIG, budget=CONFIG.budget.replace(k=16), variants=("dense", "local"))
    assert adopt_records(config, tmp_path, [directory]) == [("niah_single_1", "dense"), ("vt", "dense")]
    evaluate(config, tmp_path)
    assert counted == [3, 3]  # local on two tasks


def test_runs_of_before_resume_as_generated_ones(evaluate, tmp_path):
    config = replace(CONFIG, tasks=("vt",), variants=("dense",), instruments=("generated",), max_new_tokens=2)
    assert not {"instruments", "stress"} & set(config.to_dict())
    evaluate(config, tmp_path)
    assert report_eval(tmp_path)["forced"] is None
    with pytest.raises(RunError, match="holds another run .instruments = None there"):
        evaluate(replace(config, instruments=("generated", "forced")), tmp_path)


def fake_records(right: dict, kl: dict) -> dict:
    return {
        (task, name): {
            "evidence": name,
            "samples": [{"right": r, "kl": k} for r, k in zip(right[task][name], kl[task][name], strict=True)],
        }
        for task in right for name in right[task]
    }  # fmt: skip


def test_differences_are_paired_and_the_macro_average_is_over_what_dense_solves():
    config = replace(CONFIG, tasks=("vt", "fwe"), count=4, variants=("dense", "local"), min_dense_score=0.5, stress=False)
    records = fake_records(
        {"vt": {"dense": [1, 1, 1, 0], "local": [1, 0, 0, 1]}, "fwe": {"dense": [0, 0, 1, 0], "local": [1, 1, 1, 1]}},
        {"vt": {"dense": [0] * 4, "local": [0.1, 0.2, 0.3, 0.4]}, "fwe": {"dense": [0] * 4, "local": [9] * 4}},
    )
    table = tabulate_forced(config, records)
    assert table["tasks"] == {"vt": {"dense": 0.75, "solved": True}, "fwe": {"dense": 0.25, "solved": False}}
    rows = {(row["variant"], row["task"]): row for row in table["rows"]}
    assert rows["local", MACRO]["change"]["value"] == -0.25 and rows["local", "fwe"]["change"]["value"] == 0.75
    assert rows["local", MACRO]["kl"]["value"] == pytest.approx(0.25)
    assert rows["local", MACRO]["change"]["low"] < -0.25 < rows["local", MACRO]["change"]["high"]


def test_a_task_is_solved_by_either_instrument():
    dense = {"samples": [{"score": 0.0, "right": 1.0}, {"score": 0.2, "right": 0.0}]}
    assert is_solved(replace(CONFIG, min_dense_score=0.5), dense)
    assert not is_solved(replace(CONFIG, min_dense_score=0.6), dense)


def test_bad_instruments_and_answers_that_do_not_fit_are_refused(tokenizer, tmp_path):
    for wrong in ((), ("spoken",), ("forced", "forced")):
        with pytest.raises(ValueError, match="instruments must name generated or forced or both, got"):
            replace(CONFIG, instruments=wrong)
    with pytest.raises(ValueError, match="max_new_tokens must hold the answer of niah_single_1 example 0"):
        prepare_prompts(replace(CONFIG, max_new_tokens=2), tmp_path, tokenizer=tokenizer)
