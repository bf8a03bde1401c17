import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from npu_sparse import checkpoints
from npu_sparse.distill import DistillConfig
from npu_sparse.measure import quality

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("quality_suite", ROOT / "scripts" / "quality_suite.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quality_suite", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def plan_of(suite, output, *jobs):
    plan = suite.Plan(output, 5, (), ())
    plan.jobs = list(jobs)
    return plan


def job(suite, output, name, code="", after=(), makes=True):
    code = f"import os, time; {code or 'pass'}; {'open({!r}, {!r}).write(os.environ[{!r}])' if makes else 'pass'}".format(
        str(output / name), "w", "CUDA_VISIBLE_DEVICES"
    )
    return suite.Job(name, (sys.executable, "-c", code), output / name, after, least_s=0)


def test_jobs_wait_for_those_they_need_and_have_a_gpu_each(suite, tmp_path):
    order = f"open({str(tmp_path / 'order')!r}, 'a').write"
    first = job(suite, tmp_path, "first", f"time.sleep(0.3); {order}('1')")
    second = job(suite, tmp_path, "second", f"{order}('2')", ("first",))
    beside = job(suite, tmp_path, "beside", "time.sleep(0.3)")
    assert suite.run(plan_of(suite, tmp_path, second, first, beside), ["4", "7"], time.time() + 60) == []
    assert (tmp_path / "order").read_text() == "12"
    assert {(tmp_path / name).read_text() for name in ("first", "beside")} == {"4", "7"}


def test_what_fails_is_left_and_so_is_what_needs_it(suite, tmp_path):
    bad = job(suite, tmp_path, "bad", "raise SystemExit(3)")
    after = job(suite, tmp_path, "after", after=("bad",))
    good = job(suite, tmp_path, "good")
    assert suite.run(plan_of(suite, tmp_path, bad, after, good), ["0"], time.time() + 60) == ["bad", "after"]
    assert (tmp_path / "good").exists()


def test_time_up_stops_a_job_that_the_next_call_does(suite, tmp_path):
    mark = str(tmp_path / "mark")
    code = f"n = os.path.exists({mark!r}); open({mark!r}, 'w').close(); time.sleep(0 if n else 60)"
    plan = plan_of(suite, tmp_path, job(suite, tmp_path, "slow", code))
    assert suite.run(plan, ["0"], time.time() + 1.5) == ["slow"]
    assert suite.run(plan, ["0"], time.time() + 60) == []


def test_the_plan_trains_tries_chooses_and_scores(suite, tmp_path):
    plan = suite.Plan(tmp_path, 100, suite.MODELS, ("ends", "wide"))
    by_name = {job.name: job for job in plan.jobs}
    assert by_name["choose"].after == ("try ends", "try wide", "try shipped")
    assert by_name["try wide"].after == ("train wide",)
    assert "choose" in by_name["score smollm2-135m 64"].after and "choose" not in by_name["score gemma3-270m 64"].after
    assert not any(name.startswith("score") for job in plan.jobs for name in job.after)  # they run beside each other
    assert all(name in by_name for job in plan.jobs for name in job.after)
    assert not any(job.name.startswith(("train", "try", "choose")) for job in suite.Plan(tmp_path, 9, suite.MODELS, ()).jobs)


@pytest.mark.parametrize("candidate", ["ends", "even", "both", "wide"])
def test_every_candidate_is_a_configuration_of_distill(suite, candidate):
    options = {**suite.COMMON, **suite.CANDIDATES[candidate]}
    for name in ("texts", "tasks"):
        options[name] = options[name].split(",")
    options["lengths"] = [int(length) for length in options["lengths"].split(",")]
    config = DistillConfig("smollm2-135m", **options)
    parameters = 30 * 576 * (config.heads * config.dim + config.dim + (config.heads if config.heads > 1 else 0))
    assert 2 * parameters < 12e6  # bytes of an adapter


def test_the_best_on_the_prompts_of_another_seed_is_chosen(suite, tmp_path):
    for name, score in (("ends", 0.8), ("wide", 0.9)):
        directory = tmp_path / f"train-{name}" / "adapter"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(name)
        rows = [
            {"task": "macro average", "variant": variant, "score": {"value": value}}
            for variant, value in (("dense", 1.0), ("indexer", score))
        ]
        (tmp_path / f"try-{name}").mkdir()
        (tmp_path / f"try-{name}" / "report.json").write_text(json.dumps({"rows": rows}))
    suite.job_choose(tmp_path, 100)
    assert (tmp_path / "chosen" / "config.json").read_text() == "wide"
    assert json.loads((tmp_path / "chosen.json").read_text())["scores"]["ends"] == {"macro average": 0.8}
    suite.publish(tmp_path)
    with tarfile.open(tmp_path / "publish" / "adapter-chosen.tar") as archive:
        assert "chosen/config.json" in archive.getnames()
    with tarfile.open(tmp_path / "publish" / "reports.tar.gz") as archive:
        assert {"try-wide/report.json", "chosen.json"} <= set(archive.getnames())


def test_the_configuration_says_which_operators_ran(suite, tmp_path):
    (tmp_path / "impl").write_text("reference\n")
    config = suite.eval_config("gemma3-270m", tmp_path, "gemma3-270m", 16, True, 0, 100)
    assert (config.impl, config.budget.tail, config.budget.block, config.budget.k) == ("reference", True, 16, 512)


def test_an_evaluation_takes_packed_prompts_and_finished_cells(suite, tmp_path, monkeypatch):
    (tmp_path / "impl").write_text("auto\n")
    packed = tmp_path / "prompts" / "gemma3-270m-0"
    packed.mkdir(parents=True)
    (packed / "vt.json").write_text("[]")
    calls = []
    monkeypatch.setattr(quality, "adopt_records", lambda config, directory, earlier: calls.append([p.name for p in earlier]))
    monkeypatch.setattr(quality, "run_eval", lambda config, directory: (directory / "report.json").write_text("{}"))
    for block, tail in ((64, False), (16, True)):
        config = suite.eval_config("gemma3-270m", tmp_path, "gemma3-270m", block, tail, 0, 100)
        suite.evaluate(config, tmp_path / f"eval-gemma3-270m-4096-b{block}{'-tail' if tail else ''}")
    assert calls == [[], ["eval-gemma3-270m-4096-b64"]]
    assert (tmp_path / "eval-gemma3-270m-4096-b16-tail" / "prompts" / "vt.json").read_text() == "[]"


def test_what_is_packed_in_pieces_arrives_whole(suite, tmp_path, monkeypatch):
    wheel = checkpoints.Wheel("tiny==1", "tiny-1-py3-none-any.whl", 2500, "", "member")
    monkeypatch.setattr(checkpoints, "DEMOS", {"tiny": checkpoints.Demo("", (wheel,), 0, "", 0)})
    monkeypatch.setattr(checkpoints, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(suite, "PIECE_BYTES", 2000)
    monkeypatch.setattr(suite, "PACKAGES", ())
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.html").write_text("text")
    monkeypatch.setattr(suite, "TEXTS", (str(texts / "*.html"),))
    content = bytes(range(250)) * 10

    def download(command, **options):
        (Path(command[command.index("-d") + 1]) / wheel.filename).write_bytes(content)

    def prepare(config, directory):
        (directory / "prompts").mkdir(parents=True, exist_ok=True)
        (directory / "prompts" / "vt.json").write_text("prompts")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(quality, "prepare_prompts", prepare)
    pieces = suite.pack(tmp_path / "packed", 3, ("tiny",))
    assert len(pieces) >= 2
    there, store, output = tmp_path / "there", tmp_path / "store", tmp_path / "out"
    there.mkdir()
    (texts / "one.html").unlink()
    for n, piece in enumerate(pieces):  # one at a time, as they are carried
        for earlier in there.iterdir():
            earlier.unlink()
        (there / piece.name).write_bytes(piece.read_bytes())
        missing = suite.unpack(there, store, output, ("tiny",))
        assert bool(missing) == (n + 1 < len(pieces))
    assert (tmp_path / "cache" / "partial" / "tiny" / wheel.filename).read_bytes() == content
    assert (texts / "one.html").read_text() == "text"
    assert (output / "prompts" / "tiny-0" / "vt.json").read_text() == "prompts"


def test_an_unknown_candidate_is_refused(suite):
    with pytest.raises(ValueError, match="candidates must be among ends, even, both, wide, got 'best'"):
        suite.main(["run", "--candidates", "best"])
