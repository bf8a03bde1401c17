"""The campaign: its commands are valid at their true size, run on random weights, go on where they stopped, and travel."""

import importlib.util
import json
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path

import pytest

from npu_sparse import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def campaign(monkeypatch):
    found = importlib.util.spec_from_file_location("campaign", ROOT / "scripts" / "campaign.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "campaign", module)  # dataclasses look their module up
    monkeypatch.delitem(sys.modules, "matched", raising=False)
    found.loader.exec_module(module)
    return module


def test_every_command_is_valid_at_its_true_size(campaign, monkeypatch, tmp_path):
    configs = []
    for kind in ("distill", "eval", "ttft"):
        command = cli.COMMANDS[kind]

        def instead(config, output, *, workers=0, shard=(0, 1), budget_s=None, profile=None, crossover=None):
            configs.append((config, output))

        monkeypatch.setattr(import_module(command.module), command.run, instead)
    every = campaign.steps()
    assert len({step.name for step in every}) == len(every)
    for step in every:
        if step.kind == "matched":
            args = campaign.load_matched().arguments(step.words(tmp_path))
            assert args.output == tmp_path / step.name and campaign.load_matched().left(args)
        elif step.kind != "shape":
            assert cli.main([step.kind, *step.words(tmp_path)]) == 0, step.name
            assert configs.pop()[1] == tmp_path / step.name
        assert not step.after or [other.name for other in every].index(step.after) < every.index(step)
        assert campaign.cells(step, tmp_path)[0] == 0 < campaign.expected_s(step, tmp_path), step.name
    prompts = campaign.load_matched().arguments(next(s for s in every if s.name == "bar-0.5b-16k").words(tmp_path))
    assert prompts.count == 200 and prompts.length == 16384 and prompts.unsolved == "skip"


ONE_OF_EACH_KIND = "fitted,peers-0.5b-32k,question-0.5b-front,generated-0.5b,ablation-shared,shape,speed-0.8b-16k"


@pytest.mark.slow
@pytest.mark.parametrize("only", [ONE_OF_EACH_KIND, pytest.param("", marks=pytest.mark.exhaustive, id="all")])
def test_steps_run_on_random_weights_and_nothing_is_done_twice(campaign, tmp_path, capsys, only):
    words = ["--tiny", "--output", str(tmp_path), "--only", only]
    assert campaign.main([*words, "--prepare"]) == 0
    prepared = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("prompts/*")}
    assert {path.parent.parent for path in prepared} == {tmp_path, *tmp_path.glob("generated-*")}
    campaign.main(words)
    assert prepared == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("prompts/*")}
    assert json.loads((tmp_path / "failed.json").read_text()) == {}
    assert "all is done" in capsys.readouterr().out
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    lost = tmp_path / "question-0.5b-front" / "quality" / "niah_multikey_1-1.json"
    before = json.loads(lost.read_text())["samples"]
    lost.unlink()
    assert campaign.main(words) == 0
    assert json.loads(lost.read_text())["samples"] == before
    changed = {path for path, when in done.items() if path.stat().st_mtime_ns != when}
    assert {path.name for path in changed - {lost}} == {"report.json", "failed.json"}
    assert {path.parent.name for path in changed - {lost}} == {"question-0.5b-front", tmp_path.name}


def test_nothing_begins_after_its_time(campaign, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(campaign, "run", None)
    assert campaign.main(["--output", str(tmp_path), "--only", "fitted", "--seconds", "0"], started=time.monotonic()) == 3
    assert "not done: fitted-0.5b-16k" in capsys.readouterr().out
    assert campaign.main(["--output", str(tmp_path), "--only", "fitted", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "0 / 12" in shown and "python scripts/matched.py qwen2.5-coder-0.5b --adapter" in shown


def simple(campaign, name, after=""):
    return campaign.Step(name, "?", "ttft", "tiny", {"lengths": "1,2"}, 10, after)


def finish(step, out):
    (out / step.name / "records").mkdir(parents=True, exist_ok=True)
    (out / step.name / "report.json").write_text("{}")


def test_what_fails_is_noted_and_tried_again_after_all_others(campaign, tmp_path, monkeypatch):
    bad, good, waits = simple(campaign, "bad"), simple(campaign, "good"), simple(campaign, "waits", "bad")
    tried = []

    def run(step, out, deadline):
        tried.append(step.name)
        if step.name == "bad" and tried.count("bad") == 1:
            raise RuntimeError("no kernel\nfor this")
        finish(step, out)

    monkeypatch.setattr(campaign, "run", run)
    every = [bad, good, waits]
    assert campaign.run_all(every, every, tmp_path, float("inf")) == {"bad": "no kernel for this"}
    assert "failed: no kernel for this" in campaign.table(every, tmp_path, campaign.failures(tmp_path))
    (tmp_path / "good" / "report.json").unlink()
    assert campaign.run_all(every, every, tmp_path, float("inf")) == {}
    assert tried == ["bad", "good", "good", "bad"] and not campaign.is_done(waits, tmp_path)  # its turn came before
    campaign.run_all(every, every, tmp_path, float("inf"))
    assert tried[-1] == "waits" and campaign.expected_s(waits, tmp_path) == 0


def test_an_error_of_the_device_ends_the_process(campaign, tmp_path, monkeypatch):
    def run(step, out, deadline):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(campaign, "run", run)
    every = [simple(campaign, "one"), simple(campaign, "two")]
    with pytest.raises(RuntimeError, match="one: CUDA error.*run the same command again"):
        campaign.run_all(every, every, tmp_path, float("inf"))
    assert list(campaign.failures(tmp_path)) == ["one"]


def test_a_step_without_cells_is_stopped_when_time_is_up(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign.cli, "main", lambda words: time.sleep(60))
    step, began = simple(campaign, "long"), time.monotonic()
    assert campaign.run_all([step], [step], tmp_path, began + 0.2) == {}
    assert time.monotonic() - began < 30 and not campaign.is_done(step, tmp_path)


def test_a_checkpoint_is_loaded_once_for_the_steps_in_a_row_that_are_of_it(campaign, monkeypatch):
    loaded = []
    monkeypatch.setattr(campaign.checkpoints, "load", lambda name, **options: loaded.append((name, options)) or object())
    with campaign.loads_once({"demo": "/a/copy"}):
        load = campaign.checkpoints.load
        first = load("demo", dtype="bfloat16", progress=False)
        assert load("demo", dtype="bfloat16") is first
        assert load("other", dtype="bfloat16") is not first and load("demo", dtype="bfloat16") is not first
    assert [name for name, _ in loaded] == ["/a/copy", "other", "/a/copy"]


def test_a_pack_holds_what_is_needed_elsewhere(campaign, tmp_path):
    out = tmp_path / "runs"
    kept = ("m/config.json", "m/quality/a-0.json", "prompts/a.safetensors", "d/checkpoint.safetensors", "done/report.json",
            "done/adapter/model.safetensors", "failed.json")  # fmt: skip
    left = ("m/dense/a.safetensors", "tiny/x/config.json", "e/forced/a.safetensors", "done/checkpoint.safetensors",
            "shape-0.8b/checkpoint/model.safetensors")  # fmt: skip
    for name in (*kept, *left):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    for _ in range(2):  # an earlier pack in the folder is no part of the next
        assert campaign.main(["--output", str(out), "--pack", str(out / "pack.tar.xz")]) == 0
    with tarfile.open(out / "pack.tar.xz") as tar:
        assert sorted(tar.getnames()) == sorted(kept)


@pytest.mark.parametrize("words, message", [
    (["--only", "nothing"], "only must begin the name of a step, got 'nothing'"),
    (["--model", "gpt=/a"], "model must be NAME=PATH with a name among"),
    (["--model", "smollm2-135m"], "model must be NAME=PATH with a name among"),
])  # fmt: skip
def test_bad_arguments_are_one_sentence(campaign, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        campaign.main([*words, "--output", str(tmp_path)])
