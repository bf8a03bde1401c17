"""Compiled code in the cache. It is loaded only where this user, or root, wrote all of it; otherwise it is made again.

A file `x.so` is complete when its digest `x.so.sha256`, which is written last, fits it. A file that a killed process or a crash
cut off, or that was changed later, does not fit. Nothing heavy is imported, because the doctor asks here.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path

from .checkpoints import cache_dir

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def misfit(path: Path) -> str | None:
    """Why a compiled file must not be loaded, in words that follow its name; None where it may be."""
    try:
        _content(path)
    except (OSError, ValueError) as error:
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return None


def read(path: Path) -> bytes | None:
    """The bytes of a compiled file that fits, None for any other."""
    with contextlib.suppress(OSError, ValueError):
        return _content(path)
    return None


def write(path: Path, data: bytes) -> None:
    """Writes `data` as a compiled file, completely or not at all. OSError passes through."""
    _own(path.parent)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as file:
            file.write(data)
        keep(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def keep(unfinished: Path, path: Path) -> None:
    """Moves a file that a compiler wrote to the compiled file `path`: its bytes reach the disk first, its digest last."""
    os.chmod(unfinished, stat.S_IMODE(unfinished.stat().st_mode) & ~_OTHERS_WRITE)
    digest = hashlib.sha256(unfinished.read_bytes()).hexdigest()
    _digest_file(path).unlink(missing_ok=True)  # a digest of an earlier file must never stand beside the new one
    _flush(unfinished)
    os.replace(unfinished, path)
    _flush(path.parent)
    written = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "w") as file:
            file.write(f"{digest}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, _digest_file(path))
    finally:
        written.unlink(missing_ok=True)
    _flush(path.parent)


def unsafe(directory: Path) -> str | None:
    """Why nothing compiled may be kept in a directory of the cache, one sentence; None where it may, or is not there yet."""
    for folder in (directory, *directory.parents):
        try:
            status = folder.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{folder} cannot be read ({error.strerror})"
        sticky = status.st_mode & stat.S_ISVTX
        if status.st_uid not in (os.geteuid(), 0):
            return f"{folder} must belong to this user or to root, and belongs to user {status.st_uid}: {_REMEDY}"
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"{folder} must not be writable by everybody: {_REMEDY}"
        if folder == cache_dir():
            break
    return None


_REMEDY = "change that, or set NPU_SPARSE_CACHE to a directory of your own"


def _content(path: Path) -> bytes:
    """The bytes of a compiled file; ValueError in words that follow its name where it does not fit, OSError."""
    if reason := unsafe(path.parent):
        raise ValueError(f"lies where others may write: {reason}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"belongs to user {status.st_uid}")
        if status.st_mode & _OTHERS_WRITE:
            raise ValueError(f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})")
        if not status.st_size:
            raise ValueError("is empty")
        data = file.read()
    try:
        digest = _digest_file(path).read_text().strip()
    except FileNotFoundError:
        raise ValueError("has no digest beside it: it was not finished") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("is truncated or changed (its sha256 differs)")
    return data


def _own(directory: Path) -> None:
    """Makes a directory of the cache, writable by this user alone."""
    directory.mkdir(parents=True, exist_ok=True)
    if reason := unsafe(directory):
        raise PermissionError(0, reason)
    if directory.stat().st_uid == os.geteuid():
        os.chmod(directory, stat.S_IMODE(directory.stat().st_mode) & ~_OTHERS_WRITE)


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
