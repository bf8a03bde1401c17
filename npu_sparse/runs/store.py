"""Run directories: config.json first, everything written atomically, resumed by the same config and refused by another."""

import json
import os
from pathlib import Path


class RunError(ValueError):
    """An output directory that cannot be used: unwritable, or already holding something else."""


def open_run(directory, config: dict) -> Path:
    """The directory of a run, with `config` in config.json.

    A new or empty directory is made and config.json written first. A directory of the same config is resumed. Anything else
    is refused with RunError: nothing is ever mixed or overwritten.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise RunError(f"output directory {directory} must be writable ({error.strerror})") from error
    path = directory / "config.json"
    if not path.exists():
        if entries:
            raise RunError(f"output directory {directory} must be empty or hold an earlier run, found {sorted(entries)[0]!r}")
        write_json(path, config)
        return directory
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"output directory {directory}: config.json cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise RunError(f"output directory {directory}: config.json cannot be read (it holds no object)")
    if found != config:
        keys = [key for key in {**found, **config} if found.get(key, ...) != config.get(key, ...)]
        change = ", ".join(f"{key} = {found.get(key)!r} there, {config.get(key)!r} now" for key in sorted(keys)[:3])
        raise RunError(f"output directory {directory} holds another run ({change}): choose another directory")
    return directory


def replace_files(files: dict[Path, bytes]) -> None:
    """Writes files so that a reader sees the old content or all of the new: none is replaced before all are on the disk.

    OSError passes through; the old files are whole then, and nothing else is left behind.
    """
    written = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            with open(written[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def write_bytes(path, data: bytes) -> None:
    """`replace_files` of one file. Raises RunError where that fails."""
    try:
        replace_files({Path(path): data})
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror})") from error


def write_text(path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    """`write_bytes` of indented JSON; NaN and infinities are refused, they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
