import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "scripts" / "gpu_suite.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    return module


def steps(suite, monkeypatch, *made):
    monkeypatch.setattr(suite, "STEPS", made)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_that_succeeded_is_not_run_again_and_one_that_failed_is(suite, monkeypatch, tmp_path, capsys):
    good = suite.Step("good", python("open(r'{out}/ran', 'a').write('x')"), 60)
    bad = suite.Step("bad", python("open(r'{out}/ran', 'a').write('x'); raise SystemExit(3)"), 60)
    steps(suite, monkeypatch, good, bad)
    for _ in range(2):
        assert suite.main(["--output", str(tmp_path)]) == 1
    assert (tmp_path / "good" / "ran").read_text() == "x" and (tmp_path / "bad" / "ran").read_text() == "xx"
    assert json.loads((tmp_path / "bad" / "status.json").read_text())["rc"] == 3
    assert "1 of 2 steps done; not done: bad" in capsys.readouterr().out


def test_every_step_has_one_gpu_to_itself(suite, monkeypatch, tmp_path):
    code = "import os, time; time.sleep(0.2); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    steps(suite, monkeypatch, *(suite.Step(f"s{n}", python(code), 60) for n in range(4)))
    assert suite.main(["--output", str(tmp_path)]) == 0
    assert {(tmp_path / f"s{n}" / "log").read_text().strip() for n in range(4)} == {"3", "5"}


def test_a_step_that_takes_too_long_is_stopped(suite, monkeypatch, tmp_path, capsys):
    steps(suite, monkeypatch, suite.Step("slow", python("import time; time.sleep(60)"), 1))
    assert suite.main(["--output", str(tmp_path)]) == 1
    assert "slow: stopped after 1 s" in capsys.readouterr().out


def test_a_missing_program_is_named(suite, monkeypatch, tmp_path, capsys):
    steps(suite, monkeypatch, suite.Step("check", python(""), 60, needs="no-such-program"))
    assert suite.main(["--output", str(tmp_path)]) == 1
    assert "check: needs no-such-program" in capsys.readouterr().out


def test_unknown_steps_are_refused(suite):
    with pytest.raises(ValueError, match="only must name steps among tests, .*, got 'nonsense'"):
        suite.main(["--only", "nonsense"])


def test_listed_scripts_and_tests_exist(suite):
    for step in suite.STEPS:
        for part in step.command:
            if part.startswith("tests/") or part.endswith(".py"):
                assert (ROOT / part).exists(), part
