import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from npu_sparse import tasks
from npu_sparse.budget import Budget
from npu_sparse.measure.prompts import text_prompts
from npu_sparse.oracle import quality, run_oracle, study
from npu_sparse.oracle.config import variants
from npu_sparse.runs.store import RunError
from npu_sparse.selectors import Local, Oracle, Random


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(study.figures, "draw", lambda report: {})


@pytest.fixture
def run(config, model, tokenizer, tmp_path, no_figures):
    def run(output=tmp_path / "run", shard=(0, 1), **changes):
        return run_oracle(replace(config, **changes), output, model=model, tokenizer=tokenizer, shard=shard)

    return run


def count_measurements(monkeypatch) -> list:
    """A list that grows by one with every end-to-end cell or layer cell that is measured."""
    measured = []
    for name in ("_end_to_end", "_layers", "_noise_floor"):
        original = getattr(study, name)

        def counted(*args, original=original, name=name):
            measured.append((name, *args[1:]))
            return original(*args)

        monkeypatch.setattr(study, name, counted)
    return measured


def test_a_study_writes_config_cells_report_and_figures(config, model, tokenizer, tmp_path):
    output = tmp_path / "run"
    report = run_oracle(config, output, model=model, tokenizer=tokenizer)
    assert json.loads((output / "config.json").read_text()) == {"stage": "oracle", **config.to_dict()}
    assert json.loads((output / "report.json").read_text()) == report
    page = (output / "report.md").read_text()
    for figure in ("quality.png", "retained.png", "error.png", "sharing.png"):
        assert (output / figure).read_bytes().startswith(b"\x89PNG") and f"({figure})" in page
    names = {variant.cell for variant in variants(config, 2)} | {"noise-bfloat16", "layers-0", "layers-1"}
    assert {path.stem for path in (output / "cells").iterdir()} == names


def test_every_row_names_its_evidence(run):
    report = run()
    rows = report["end_to_end"] + report["layers"] + report["overlap"]
    assert {row["evidence"] for row in rows} == {"oracle", "control", "noise floor"}
    assert {row["evidence"] for row in report["end_to_end"] if row.get("selector") in ("local", "random")} == {"control"}
    assert {row["evidence"] for row in report["layers"]} == {"oracle"}


def test_report_carries_machine_model_and_intervals(run):
    report = run()
    assert report["machine"]["torch"] == torch.__version__ and "commit" in report["machine"]
    assert report["model"]["layers"] == [0, 1] and len(report["model"]["weights_fingerprint"]) == 16
    for row in report["end_to_end"]:
        if row["label"] != "all keys through the sparse path":  # two prompts only
            low, high = row["kl_interval"]
            assert low <= row["kl"] <= high


def test_two_prompts_have_no_interval(run):
    assert all(row["kl_interval"] is None for row in run(prompts=2)["end_to_end"])


def test_means_are_over_prompts(run, tmp_path):
    row = next(row for row in run()["end_to_end"] if row.get("selector") == "random" and row["k"] == 8)
    cell = json.loads((tmp_path / "run/cells/random-k8.json").read_text())
    assert row["kl"] == pytest.approx(sum(prompt["kl"] for prompt in cell["prompts"]) / 3)


def test_cells_measure_what_their_names_say(run, config, model, tokenizer, tmp_path):
    run(share_layers=(1, 2))
    prompts = [ids for _, ids in text_prompts(tokenizer, tasks.documents(config.texts), length=100, count=3, seed=0)]
    dense = [quality.hidden_states(model, ids) for ids in prompts]
    for name, selector, budget in (
        ("oracle-all-b1-k8", Oracle(), Budget(k=8, block=1)),
        ("oracle-kv-b1-k8", Oracle(per_kv=True), Budget(k=8, block=1)),
        ("oracle-kv-b16-max-k40", Oracle(per_kv=True), Budget(k=40, block=16, reduce="max")),
        ("oracle-all-b16-mean-k40", Oracle(), Budget(k=40, block=16, reduce="mean")),
        ("oracle-all-b16-max-l2-k8", Oracle(), Budget(k=8, block=16, share_layers=2)),
        ("local-k40", Local(4), Budget(k=40, block=1)),
        ("random-k8", Random(0), Budget(k=8, block=1)),
    ):
        cell = json.loads((tmp_path / f"run/cells/{name}.json").read_text())
        assert cell["prompts"] == quality.measure(model, prompts, dense, model, selector=selector, budget=budget)


def test_layers_that_share_have_their_own_rows_and_lines(config, model, tokenizer, tmp_path):
    config = replace(config, share_layers=(1, 2), heads=("all",), controls=(), reduces=("max",), budgets=(8,))
    report = run_oracle(config, tmp_path / "run", model=model, tokenizer=tokenizer)
    rows = {row["label"]: row for row in report["end_to_end"] if row["evidence"] == "oracle"}
    assert list(rows) == [
        "per query", "16 queries share, max", "per query, 2 layers share", "16 queries share, max, 2 layers share"
    ]  # fmt: skip
    alone, follows = (rows[label]["retained_by_layer"] for label in ("per query", "per query, 2 layers share"))
    assert alone[0] == follows[0] and follows[1] < alone[1]
    assert {row["share_layers"] for row in report["layers"]} == {1}
    assert "per query, 2 layers share" in (tmp_path / "run/report.md").read_text()


def test_layer_means_are_over_the_layer_prompts(run, tmp_path):
    report = run()
    cells = [json.loads((tmp_path / f"run/cells/layers-{n}.json").read_text()) for n in (0, 1)]
    for n in (0, 5, -1):
        expected = sum(cell["layers"][n]["retained_mean"] for cell in cells) / 2
        assert report["layers"][n]["retained_mean"] == pytest.approx(expected)
        assert report["layers"][n]["layer"] == cells[0]["layers"][n]["layer"]


def test_tasks_are_scored_dense_and_sparse(run):
    report = run(tasks=("niah_single_1",), length=500, task_count=2, task_new_tokens=4, budgets=(200,), heads=("all",))
    scored = [row for row in report["end_to_end"] if "score" in row]
    assert scored[0]["evidence"] == "dense" and "kl" not in scored[0]
    assert all(set(row["scores"]) == {"niah_single_1"} for row in scored)
    assert all("score_minus_dense" in row for row in scored[1:])


def test_task_difference_is_taken_example_by_example(run, monkeypatch):
    def fake(model, tokenizer, examples, *, selector=None, **options):
        return [1.0, 0.0] if selector is None else [0.0, 0.0]

    monkeypatch.setattr(quality, "task_scores", fake)
    report = run(tasks=("niah_single_1",), length=500, task_count=2, task_new_tokens=4, budgets=(200,), heads=("all",))
    oracle = next(row for row in report["end_to_end"] if row["evidence"] == "oracle")
    assert oracle["score"] == 0 and oracle["score_minus_dense"] == -0.5


def test_finished_cells_are_not_measured_again(run, monkeypatch, tmp_path):
    first = run()
    measured = count_measurements(monkeypatch)
    again = run()
    assert measured == []
    assert {**again, "machine": None} == {**first, "machine": None}
    for name in ("local-k8", "layers-1"):
        (tmp_path / f"run/cells/{name}.json").unlink()
    third = run()
    assert [name for name, *_ in measured] == ["_layers", "_end_to_end"]
    rows = [[{**row} for row in report["end_to_end"]] for report in (first, third)]
    assert rows[0] == rows[1] and first["layers"] == third["layers"]


def test_shards_divide_the_cells_and_the_last_one_reports(run, config, tmp_path):
    whole = run(tmp_path / "whole")
    output = tmp_path / "shared"
    first = run(output, shard=(1, 2))
    assert not first["complete"] and not (output / "report.json").exists()
    done = {path.stem for path in (output / "cells").iterdir()}
    assert len(done) == 9 and done.isdisjoint(first["missing"])
    assert run(output, shard=(0, 2))["end_to_end"] == whole["end_to_end"]


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_impossible_shards_are_refused(run, shard):
    with pytest.raises(ValueError, match="shard must be"):
        run(shard=shard)


def test_an_interrupted_study_loses_one_cell(run, monkeypatch, tmp_path):
    measure = quality.measure
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(quality, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    finished = {path.stem for path in (tmp_path / "run/cells").iterdir()}
    assert len(finished) == 3 + 2 and not (tmp_path / "run/report.json").exists()
    monkeypatch.setattr(quality, "measure", measure)
    measured = count_measurements(monkeypatch)
    report = run()
    assert len(measured) == 19 - len(finished)
    assert report["end_to_end"] == run(tmp_path / "uninterrupted")["end_to_end"]


def test_the_model_is_dense_after_an_interruption(run, model, monkeypatch):
    ids = torch.arange(1, 60)
    before = quality.hidden_states(model, ids)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "sampled_retained_mass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert torch.equal(quality.hidden_states(model, ids), before)


def test_the_noise_floor_leaves_the_model_as_it_was(run, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = run()
    assert report["end_to_end"][0]["label"] == "dense in bfloat16" and report["end_to_end"][0]["kl"] > 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


def test_another_config_in_the_directory_is_refused(run):
    run()
    with pytest.raises(RunError, match="holds another run.*budgets"):
        run(budgets=(8,))


def test_other_weights_in_the_directory_are_refused(run, model):
    run()
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(RunError, match="other weights or texts"):
            run()
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_other_texts_in_the_directory_are_refused(run, folder):
    run()
    text = (folder / "0.txt").read_text()
    try:
        for n in range(3):
            (folder / f"{n}.txt").write_text(f"changed {n} {text}")
        with pytest.raises(RunError, match="other weights or texts"):
            run()
    finally:
        (folder / "0.txt").write_text(text)


def test_a_damaged_cell_is_named(run, tmp_path):
    run()
    (tmp_path / "run/cells/local-k8.json").write_text("{")
    with pytest.raises(RunError, match="local-k8.json cannot be read.*delete it"):
        run()


REFUSED = [
    ({"tasks": ("niah_singl_1",)}, "task must be a known name.*did you mean niah_single_1"),
    ({"tasks": ("qa_1",)}, "qa_1 needs qa_file"),
    ({"tasks": ("niah_single_1",)}, "length must be >="),
    ({"texts": ("/no/such/folder",)}, "a source must be an existing file or folder"),
    ({"length": 4000}, "length must fit the model's 2048 positions, got 4000"),
    ({"prompts": 900}, "texts must hold 900 prompts of 100 tokens, got enough for"),
    ({"dtype": "bfloat16"}, "model must be bfloat16 on cpu"),
    ({"device": "nowhere"}, "device must be a torch device"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_is(run, monkeypatch, tmp_path, changes, sentence):
    monkeypatch.setattr(quality, "hidden_states", lambda *args: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=sentence):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_empty_text_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n ")
    with pytest.raises(ValueError, match="sources must hold text, got none"):
        run(texts=(str(tmp_path / "empty.txt"),))


def test_a_model_that_is_not_supported_is_refused_with_the_reason(config, tokenizer, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=400))
    with pytest.raises(ValueError, match="'gpt2' is not supported: it has no rotary embedding"):
        run_oracle(config, tmp_path / "run", model=model, tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_a_used_directory_is_refused_before_a_model_is_loaded(config, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("")
    monkeypatch.setattr(study.checkpoints, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(RunError, match="must be empty or hold an earlier run, found 'thesis.tex'"):
        run_oracle(config, tmp_path)
    with pytest.raises(RunError, match="output must be a directory"):
        run_oracle(config, tmp_path / "thesis.tex")


def test_model_without_tokenizer_is_refused(config, model, tmp_path):
    with pytest.raises(ValueError, match="given together"):
        run_oracle(config, tmp_path / "run", model=model)


def test_report_writes_nothing_that_is_not_json(run, tmp_path):
    run()
    text = (tmp_path / "run/report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
