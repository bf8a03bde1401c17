"""The suite for an Ascend card, with steps of its own: what is done stays done, and the report holds what there is."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("npu_suite", ROOT / "scripts" / "npu_suite.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "npu_suite", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def packed(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {name: archive.extractfile(name).read().decode() for name in archive.getnames()}


def test_steps_go_on_where_they_failed_and_the_report_holds_all(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "MOST_BYTES", 1000)
    steps = (
        suite.Step("good", python("import os; print(os.environ['NPU_SPARSE_REQUIRE']); open(r'{out}/ran', 'a').write('x')"), 60),
        suite.Step("bad", python("open(r'{out}/ran', 'a').write('x'); raise SystemExit(3)"), 60),
        suite.Step("large", python("open(r'{out}/trace', 'w').write('x' * 2000)"), 60),
        suite.Step("absent", ("no-such-program",), 60),
        suite.Step("slow", python("import time; time.sleep(60)"), 1),
    )
    monkeypatch.setattr(suite, "STEPS", steps)
    output = tmp_path / "npu"
    for _ in range(2):
        assert suite.main(["--output", str(output)]) == 1
    said = capsys.readouterr().out
    assert "2 of 5 steps done; not done: bad, absent, slow" in said and f"{tmp_path / 'npu.tar.gz'}" in said
    files = packed(tmp_path / "npu.tar.gz")
    assert (files["npu/good/log"], files["npu/good/ran"], files["npu/bad/ran"]) == ("npu\n", "x", "xx")
    manifest = json.loads(files["npu/manifest.json"])
    assert {name: step["rc"] for name, step in manifest["steps"].items()} == {
        "good": 0, "bad": 3, "large": 0, "absent": "needs no-such-program", "slow": "stopped after 1 s"
    }  # fmt: skip
    assert manifest["left_out_bytes"] == {"large/trace": 2000} and "npu/large/trace" not in files
    assert list(tmp_path.glob(".*")) == []


def test_a_step_that_is_chosen_alone_is_reported_with_those_before(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "STEPS", (suite.Step("a", python("print(1)"), 60), suite.Step("b", python("print(2)"), 60)))
    for name in "ab":
        assert suite.main(["--output", str(tmp_path / "npu"), "--only", name]) == 0
    assert packed(tmp_path / "npu.tar.gz")["npu/a/log"] == "1\n"
    with pytest.raises(ValueError, match="only must name steps among a, b, got 'c'"):
        suite.main(["--output", str(tmp_path / "npu"), "--only", "c"])


def test_the_suite_has_the_tests_the_times_and_the_profile_of_a_card(suite, capsys):
    assert suite.main(["--list"]) == 0
    commands = {step.name: step.command for step in suite.STEPS}
    assert list(commands) == [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert "--backend" in commands["tests"] and "--profile" in commands["profile"] and "build" in commands["build"]
    for part in (part for command in commands.values() for part in command):
        if part.startswith("tests/") or part.endswith(".py"):
            assert (ROOT / part).exists(), part


def test_options_of_the_steps_are_options_of_the_script(suite):
    """What the script calls unknown would be found only on the card."""
    shown = subprocess.run(
        [sys.executable, str(ROOT / "scripts/ttft_qwen35.py"), "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    used = {part for step in suite.STEPS if "ttft" in step.command[1] for part in step.command if part.startswith("--")}
    assert {"--device", "--profile", "--chunk"} <= used
    assert {option for option in used if option not in shown} == set()
