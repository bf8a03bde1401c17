"""Weight files that are complete, and hold what the model wants, in finite numbers, and nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..boundary import read_json, reading
from .cache import CheckpointError
from .gguf_header import LFS_POINTER

if TYPE_CHECKING:
    from torch import Tensor

_NAMED = 4  # the most names that a message lists; above that it counts them


def check_names(source: Any, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raises CheckpointError naming the weights that a checkpoint lacks, or has no place for."""
    if missing:
        raise CheckpointError(
            f"{source} lacks weights of its model, which would run on random numbers: {_listed(missing)}"
        )
    if unexpected:
        raise CheckpointError(f"{source} must hold its model's weights alone, got {_listed(unexpected)} as well")


def check_loaded(source: Any, info: dict[str, Any]) -> None:
    """`check_names` of what transformers' `from_pretrained(..., output_loading_info=True)` returns beside the model."""
    mismatched = [name if isinstance(name, str) else name[0] for name in info.get("mismatched_keys", ())]
    if mismatched:
        raise CheckpointError(f"{source} has weights of another shape than its config says: {_listed(mismatched)}")
    check_names(source, info.get("missing_keys", ()), info.get("unexpected_keys", ()))
    for message in info.get("error_msgs") or ():
        raise CheckpointError(f"{source} cannot be loaded: {str(message).splitlines()[0]}")


def check_finite(source: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises CheckpointError naming the weights that hold NaN or Inf, which a model would turn into answers of no meaning.

    One pass over the memory of each tensor: its smallest and its largest element are NaN where any is. Integers
    and floats of 8 bits are not read.
    """
    import torch

    read = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    broken = [
        (name, weight.dtype)
        for name, weight in weights
        if weight.dtype in read and weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all()
    ]
    if broken:
        dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in broken}))
        raise CheckpointError(
            f"{source} must have finite weights in {dtypes}, got NaN or Inf in {_listed([name for name, _ in broken])}"
        )


def check_files(directory: Path) -> None:
    """Raises CheckpointError for a safetensors file of a checkpoint directory that is empty, cut off, or not there."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} must have a weight_map from weights to files")
        if escaping := sorted({name for name in shards.values() if Path(name).name != name}):
            raise CheckpointError(f"{index} must name files of its own directory, got {escaping[0]!r}")
        files = [directory / name for name in sorted(set(shards.values()))]
    else:
        files = sorted(directory.glob("model.safetensors"))
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> None:
    """Raises CheckpointError for a file whose header and length do not agree; the weights themselves are not read."""
    with reading(path, CheckpointError, "its safetensors header"):
        if not path.is_file():
            raise CheckpointError(f"{path} is named by the checkpoint's index, and is not there")
        size = path.stat().st_size
        if not size:
            raise CheckpointError(f"{path} must be a safetensors file, and is empty")
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise CheckpointError(f"{path} must be a safetensors file, got the pointer that git-LFS leaves in its "
                                      "place: run `git lfs pull`")  # fmt: skip
            length = struct.unpack("<Q", start[:8])[0]
            if length > size - 8:
                raise CheckpointError(f"{path} is cut off or no safetensors file: its header wants {length} of {size} bytes")
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if (needed := 8 + length + max(ends, default=0)) != size:
            raise CheckpointError(f"{path} is cut off or damaged: its header wants {needed} bytes, it has {size}")


def _listed(names: Collection[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{rest}"
