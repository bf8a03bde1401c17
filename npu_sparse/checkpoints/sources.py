"""What a name or a path means: a demo, a directory, a GGUF file or a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .cache import CheckpointError, cache_dir
from .demos import DEMOS


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is: `path` and `gguf_file` are the two that transformers' `from_pretrained` takes.

    `path` is None for a hub id, which `name` holds; for a demo it is the directory in the cache, there or not yet.
    """

    name: str
    path: Path | None
    kind: Literal["hub", "directory", "gguf", "demo"]
    gguf_file: str | None
    license: str | None


def resolve(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """What `name_or_path` names; nothing is fetched or converted.

    A demo name comes first, then a directory, then a GGUF file, then a hub id; to load a directory that is called like
    a demo, write `./smollm2-135m`. Raises CheckpointError for a path that is not there and for a directory without a
    config.json.
    """
    name = os.fspath(name_or_path)
    if name in DEMOS:
        return Checkpoint(name, cache_dir() / "checkpoints" / name, "demo", None, DEMOS[name].license)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            hint = f": name the file, {ggufs[0]}" if ggufs else ""
            raise CheckpointError(f"{name} must be a checkpoint directory with a config.json, and has none{hint}")
        return Checkpoint(name, path, "directory", None, None)
    if path.suffix == ".gguf" and path.is_file():
        return Checkpoint(name, path.parent, "gguf", path.name, None)
    if path.suffix != ".gguf" and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return Checkpoint(name, None, "hub", None, None)
    raise CheckpointError(f"no checkpoint at {name}: give {WHAT_LOADS}")


WHAT_LOADS = f"a directory, a GGUF file, a hub id, or one of {', '.join(DEMOS)}"
