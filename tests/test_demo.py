"""The demo on a tiny model: every stage runs, and the report answers its four questions."""

import json
from dataclasses import replace

import pytest

from npu_sparse import checkpoints, demo

SIZES = {
    "_oracle_config": {"length": 300, "budgets": (64, 256), "prompts": 1, "dtype": "float32", "noise_dtype": "bfloat16"},
    "_eval_config": {
        "length": 600, "budget": "k=64,block=64", "count": 1, "tasks": ("niah_single_1",), "min_dense_score": 0.0,
    },
    "_ttft_config": {"lengths": (128, 256), "budget": "k=64,block=64", "runs": 2, "dtype": "float32"},
}


@pytest.fixture
def small(monkeypatch, tmp_path, model, tokenizer, indexer):
    """The demo's stages at sizes for a tiny model, with text of the test's own."""
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{i * 7 % 601} follows word{i}." for i in range(n, 4000)))
    monkeypatch.setattr(demo, "TEXTS", (str(tmp_path),))
    monkeypatch.setattr(checkpoints, "load", lambda name, dtype: (model, tokenizer))
    monkeypatch.setattr(demo.Indexer, "from_pretrained", lambda name: indexer)
    for name in SIZES:
        monkeypatch.setattr(demo, name, _shrunk(name, getattr(demo, name)))


def _shrunk(name, full):
    return lambda *arguments: replace(full(*arguments), **SIZES[name])


def test_the_demo_answers_its_four_questions(small, tmp_path, capsys):
    output = tmp_path / "demo"
    summary = demo.run_demo(output)["summary"]
    assert len({row["question"] for row in summary}) == 4
    costs = [row for row in summary if row["question"] == "What do selecting and sharing cost?"]
    assert [", KL " in row["found"] for row in costs] == [row["evidence"] != "dense" for row in costs]
    assert {row["evidence"] for row in costs} >= {"dense", "oracle", "control"}
    assert {"oracle", "control", "noise floor", "dense"} <= {row["evidence"] for row in summary}
    text = (output / "report.md").read_text()
    figures = ("oracle/quality.png", "oracle/retained.png", "eval/report.png", "ttft/report.png")
    assert all((output / figure).exists() and f"({figure})" in text for figure in figures)
    first = text.splitlines()[2]
    assert first.endswith("(report.png)") and (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(output / "report.md") in capsys.readouterr().out
    assert json.loads((output / "report.json").read_text())["summary"] == summary


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_stage_takes_the_dtype_that_is_fast_here(dtype):
    configs = (demo._oracle_config("m", dtype), demo._eval_config("m", dtype))
    assert all(config.dtype == dtype for config in configs)
    assert configs[0].floor_dtype == ("float32" if dtype == "bfloat16" else None)


def test_scores_are_points_of_100():
    score = {"value": 0.875, "low": 0.5, "high": 1.0}
    row = {"task": "macro average", "label": "dense", "k": None, "evidence": "dense", "score": score}
    recall = {name: dict.fromkeys(("128", "256", "512"), 0.9) for name in ("mass_recall", "support_recall")}
    quality = {"rows": [row], "config": {"length": 9}}
    summary = demo._summary({"end_to_end": [], "config": {}}, recall, quality, {"rows": [], "ceilings": []})
    assert summary[-1]["found"] == "score 87.5 [50.0, 100.0] of 100"


def test_a_model_without_a_shipped_adapter_is_refused(tmp_path):
    shipped = "gemma3-270m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, smollm2-135m"
    with pytest.raises(ValueError, match=f"shipped adapter .{shipped}., got 'qwen'"):
        demo.run_demo(tmp_path / "demo", "qwen")
