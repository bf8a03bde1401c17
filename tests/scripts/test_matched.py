"""scripts/matched.py: what its report says of cells whose figures are known, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest

from npu_sparse.measure.variants import Subject

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("matched", ROOT / "scripts" / "matched.py")
matched = importlib.util.module_from_spec(specification)
specification.loader.exec_module(matched)

VARIANT = "indexer:k=64,block=16"
COMMON = {"base": {"model_type": "llama"}, "adapter": "0123", "machine": {
    "processor": "p", "cores": 2, "python": "3", "platform": "l", "device": "cpu", "commit": "c", "dirty": False, "date": "d",
    "torch": "2", "transformers": "5"}}  # fmt: skip


def sample(right, kl):
    return {"right": right, "tokens": right, "kl": kl}


@pytest.fixture
def run(tmp_path):
    """A run whose cells are all there: dense solves `easy` and not `hard`."""
    words = ["tiny", "--tasks", "easy,hard", "--variants", VARIANT, "--count", "4", "--timed", "300", "--dense", "sdpa,fa2",
             "--device", "cpu", "--output", str(tmp_path / "run")]  # fmt: skip
    args = matched.arguments(words)
    matched.open_run(args.output, matched.config_of(args))
    scores = {("easy", "dense"): [1, 1, 1, 0], ("easy", VARIANT): [1, 0, 1, 0], ("hard", "dense"): [0, 0, 1, 0],
              ("hard", VARIANT): [1, 1, 1, 1]}  # fmt: skip
    for task in ("easy", "hard"):
        for number, spec in enumerate(("dense", VARIANT)):
            samples = [sample(float(right), 0.0 if spec == "dense" else 0.25) for right in scores[task, spec]]
            evidence = "dense" if spec == "dense" else "distilled"
            record = {**COMMON, "task": task, "variant": spec, "samples": samples, "evidence": evidence}
            path = args.output / "quality" / f"{task}-{number}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record))
    (args.output / "timings").mkdir()
    seconds = {"dense sdpa": [0.4, 0.4, 0.4], "dense fa2": [0.3, 0.3, 0.3], VARIANT: [0.2, 0.2, 0.2]}
    (args.output / "timings" / "300.json").write_text(json.dumps({**COMMON, "length": 300, "seconds": seconds}))
    return words, args.output


def test_the_report_averages_what_dense_solves_and_compares_with_the_fastest_dense(run, capsys):
    words, output = run
    assert matched.main(words) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["solved"] == ["easy"]
    dense, row = report["rows"]
    assert (dense["right"]["value"], row["right"]["value"], row["over_dense"]["value"]) == (0.75, 0.5, -0.25)
    assert row["kl"]["value"] == 0.25 and dense["kl"]["value"] == 0
    assert row["worst"] == {"task": "easy", "difference": -0.25}
    timed = next(line for line in report["timings"] if line["variant"] == VARIANT)
    assert timed["best_dense"] == "dense fa2" and timed["speed_up"]["value"] == pytest.approx(1.5)
    assert "1.50x" in capsys.readouterr().out and (output / "report.png").exists()


def test_cells_of_two_adapters_are_no_report(run):
    words, output = run
    path = output / "quality" / "hard-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": "4567"}))
    with pytest.raises(ValueError, match="must have the same adapter"):
        matched.main(words)


@pytest.mark.parametrize("spec, message", [
    ("best:k=3", "must begin with one of oracle, indexer, local, random, pooled, antidiagonal, vertical-slash, got 'best:k=3'"),
    ("indexer:k=three", "k"),
])  # fmt: skip
def test_a_variant_that_cannot_be_read_is_refused_before_anything_is_loaded(spec, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        matched.main(["tiny", "--variants", spec, "--output", str(tmp_path / "run")])


@pytest.fixture
def subject(monkeypatch, model, tokenizer, indexer):
    """A tiny model in place of what would be loaded."""
    subject = Subject(model, tokenizer, indexer)
    monkeypatch.setattr(matched, "load_subject", lambda args, names: subject)
    return subject


def test_cells_are_measured_by_the_same_means_as_a_run_of_eval_and_ttft(subject, tmp_path):
    words = ["tiny", "--adapter", "a", "--tasks", "niah_single_1", "--variants", "indexer:k=32,block=16;local:k=32", "--scored",
             "oracle:k=32,block=1", "--length", "700", "--count", "2", "--timed", "300", "--rounds", "2", "--dense", "sdpa,eager",
             "--solved", "-1", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path)]  # fmt: skip
    assert matched.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["evidence"] for row in report["rows"]] == ["dense", "oracle", "untrained", "control"]
    assert report["adapter"] == subject.inputs()["adapter"] and report["base"] == subject.base()
    assert {row["variant"] for row in report["timings"]} == {"dense sdpa", "dense eager", "indexer:k=32,block=16", "local:k=32"}
    assert all(row["ttft_s"]["n"] == 2 and row["ttft_s"]["median"] > 0 for row in report["timings"])
    assert all(row["kl"]["value"] > 0 for row in report["rows"][1:])
    assert subject.model.config._attn_implementation == "sdpa"


SCORED = ["tiny", "--adapter", "a", "--tasks", "niah_single_1", "--variants", "", "--length", "700", "--solved", "-1",
          "--device", "cpu", "--dtype", "float32"]  # fmt: skip


def test_training_free_peers_are_scored_beside_the_indexer(subject, tmp_path):
    peers = "pooled:k=64,block=64;antidiagonal:k=64,block=64,exact_last=16;vertical-slash:k=64,block=16;random:k=64,block=16"
    assert matched.main([*SCORED, "--scored", peers, "--count", "2", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["evidence"] for row in rows] == ["dense", *["training-free"] * 3, "control"]
    assert all(row["kl"]["value"] > 0 for row in rows[1:])


def test_kept_prompts_are_those_that_would_be_made_and_serve_smaller_counts(subject, tmp_path, monkeypatch):
    def kl(output, count, *more):
        assert matched.main([*SCORED, "--scored", "local:k=32", "--count", count, *more, "--output", str(tmp_path / output)]) == 0
        path = tmp_path / output / "quality" / "niah_single_1-1.json"
        return [sample["kl"] for sample in json.loads(path.read_text())["samples"]]

    kept = ["--prompts", str(tmp_path / "prompts")]
    made = kl("made", "2")
    monkeypatch.setattr("npu_sparse.checkpoints.load_tokenizer", lambda model: subject.tokenizer)
    assert matched.main([*SCORED, "--count", "3", *kept, "--prepare", "--output", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()
    with monkeypatch.context() as patch:
        patch.setattr(matched.tasks, "generate", None)
        assert kl("kept", "2", *kept) == made
    front = kl("front", "2", *kept, "--question", "front")
    assert front != made and "the question at the front" in (tmp_path / "front" / "report.md").read_text()
    (stored,) = (tmp_path / "prompts").glob("niah_single_1-700-end-*")
    stored.write_bytes((next((tmp_path / "prompts").glob("*-front-*"))).read_bytes())
    with pytest.raises(ValueError, match="must hold prompts of .*'question': 'end'.*got .*'question': 'front'"):
        kl("other", "2", *kept)


def test_a_run_without_its_dense_rows_or_of_before_there_were_questions_goes_on(subject, tmp_path):
    words = [*SCORED, "--scored", "local:k=32", "--count", "2", "--output", str(tmp_path)]
    assert matched.main(words) == 0
    cell = tmp_path / "quality" / "niah_single_1-1.json"
    before = json.loads(cell.read_text())["samples"]
    cell.unlink()
    (tmp_path / "dense" / "niah_single_1.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["question"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert matched.main(words) == 0
    assert json.loads(cell.read_text())["samples"] == before


def test_tasks_that_dense_does_not_solve_are_scored_unless_they_are_skipped(run):
    words, output = run
    for number in (0, 1):
        (output / "quality" / f"hard-{number}.json").unlink()
    args = matched.arguments(words)
    assert matched.left(args) == [("quality", "hard-0"), ("quality", "hard-1")]
    dense = json.loads((output / "quality" / "easy-0.json").read_text())
    samples = [sample(float(right), 0.0) for right in (1, 1, 0, 0)]  # half is not solved
    (output / "quality" / "hard-0.json").write_text(json.dumps({**dense, "task": "hard", "samples": samples}))
    assert matched.left(args) == [("quality", "hard-1")]
    args.unsolved = "skip"
    assert matched.left(args) == []
    args.solved = 0.4
    assert matched.left(args) == [("quality", "hard-1")]


def test_gaps_lie_between_dense_oracle_indexer_and_shared_indexer_with_the_same_exact_end():
    shared, raw = "indexer:k=64,block=16,exact_last=8", "indexer:k=64,block=16"
    oracle, own = "oracle:k=32,block=1,exact_last=8", "indexer:k=32,block=1,exact_last=8"
    gaps = matched.gaps_of(shared, ["oracle:k=32,block=1", oracle, own, shared, raw, "oracle:k=32,block=16,exact_last=8"])
    assert gaps == {"oracle gap": ("dense", oracle), "indexer gap": (oracle, own), "realization gap": (own, shared)}
    assert matched.gaps_of(raw, [oracle, own, raw]) == {} and matched.gaps_of(own, [oracle, own]) == {}
    assert matched.gaps_of("dense", [oracle]) == {}
    assert matched.gaps_of(shared, [oracle, shared]) == {"oracle gap": ("dense", oracle)}
