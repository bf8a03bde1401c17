import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = -signal.SIGKILL
RUNS = ["random", *(f"write-{n}" for n in (2, 3, 4, 6, 8))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_config):
    folder = tmp_path_factory.mktemp("killed")
    config = make_config(steps=24, save_every=3, validate_every=8, loss="both", sparse_k=8, heads=2)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder / "config.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_process_was_killed_and_the_last_one_finished(runs, name):
    *deaths, last = json.loads((runs / "deaths.json").read_text())[name]
    assert last == 0
    assert deaths.count(KILLED) >= (3 if name == "random" else 1)


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_to_the_same_loss_curve(runs, curve_of, name):
    assert curve_of(runs / name) == curve_of(runs / "whole")
    assert [record["step"] for record in curve_of(runs / name)] == list(range(24))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_adapter(runs, weights_of, name):
    assert weights_of(runs / name) == weights_of(runs / "whole")
    resumed, expected = (json.loads((runs / run / "adapter" / "config.json").read_text()) for run in (name, "whole"))
    assert {**resumed, "weights_sha256": ""} == {**expected, "weights_sha256": ""}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_report(runs, name):
    """All of it but the speed, which is that of the machine at the time."""

    def written(run: str) -> tuple[dict, list[str]]:
        report = json.loads((runs / run / "report.json").read_text())
        assert report.pop("tokens_per_s") > 0
        lines = (runs / run / "report.md").read_text().splitlines()
        kept = [line for line in lines if "tokens of context a second in training" not in line]
        assert len(kept) == len(lines) - 1
        return report, kept

    assert written(name) == written("whole")
