"""Runs a compiler, or a program that it made, so that nothing of it outlives the wait for it."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ERRORS = 20_000  # characters of a program's error output that are kept


def wait_for(
    command: list[str],
    limit_s: float,
    environment: dict[str, str] | None = None,
    *,
    directory: Path | None = None,
    output: bool = False,
) -> tuple[int, str]:
    """`(exit status, end of the error output)` of a command; its output goes nowhere, or with `output` among the errors.

    The command and all that it starts are one process group, which ends with the wait: at its own end, after `limit_s` seconds
    (TimeoutError), or when this process is interrupted or terminated.
    """
    with tempfile.TemporaryFile() as errors, interrupted_by_termination():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors if output else subprocess.DEVNULL, stderr=errors, env=environment,
            cwd=directory, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"must end within {limit_s:g} s, and did not") from error
        finally:
            _end(process)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - ERRORS))
        return status, errors.read().decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all of the group has ended; macOS says so with the second
        pass
    process.wait()


@contextmanager
def interrupted_by_termination() -> Iterator[None]:
    """SIGTERM as an exception, where it would end this process on the spot and leave children and files behind."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
