import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from npu_sparse.schedule.c.process import wait_for

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = """
void f(int n, double x[n]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i] = 1.0 / (1.0 + x[i]);
#pragma endscop
}
static __attribute__((constructor)) void wait_for_ever(void) { for (;;) ; }
"""


def within(seconds: float, holds) -> bool:
    end = time.monotonic() + seconds
    while not (done := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(done)


def processes(directory: Path) -> list[int]:
    """Of programs that lie in the directory."""
    ids = []
    for link in Path("/proc").glob("[0-9]*/exe"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(directory)):
            ids.append(int(link.parent.name))
    return ids


@pytest.mark.skipif(not Path("/proc/self/exe").exists(), reason="processes must be listed under /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_program_ends_with_the_command_that_runs_it(number, tmp_path):
    source = tmp_path / "endless.c"
    source.write_text(ENDLESS)
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "npu_sparse", "schedule", str(source), "--sizes", "n=9"]
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert within(60, lambda: processes(work) or running.poll() is not None) and running.poll() is None
        running.send_signal(number)
        assert running.wait(30) != 0
        assert within(5, lambda: not processes(work)), "the program outlives the command"
        assert number == signal.SIGKILL or not list(work.iterdir()), "files outlive the command"
    finally:
        running.kill()
        for process in processes(work):
            os.kill(process, signal.SIGKILL)


def test_status_and_the_end_of_the_errors_are_returned():
    assert wait_for(["sh", "-c", "echo shown; echo why >&2; exit 3"], 20) == (3, "why\n")
    status, errors = wait_for(["sh", "-c", "yes | head -c 100000 >&2; echo last >&2"], 20)
    assert status == 0 and errors.endswith("y\nlast\n") and len(errors) <= 20_000


def test_command_has_no_input():
    assert wait_for(["sh", "-c", "cat >&2"], 20) == (0, "")


def test_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="must end within 0.5 s, and did not"):
        wait_for(["sh", "-c", f"(sleep 3; touch {tmp_path}/late) & sleep 60"], 0.5)
    assert time.monotonic() - started < 30
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()
