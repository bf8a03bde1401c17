"""GGUF files unpacked into bf16 safetensors, once."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .cache import MARKER, MARKER_FORMAT, CheckpointError, first_line, progress_bar
from .sources import Checkpoint


def convert(
    gguf: Path, gguf_sha256: str, checkpoint: Checkpoint, directory: Path, scratch: Path, progress: bool
) -> None:
    target = scratch / "converted"
    target.mkdir()
    with progress_bar(f"converting {checkpoint.name} to bf16 safetensors", None, progress):
        # transformers draws bars of its own here, under ours.
        with contextlib.redirect_stderr(io.StringIO()), transformers_bars(False):
            versions = write_bf16(gguf, target)
    marker = {
        "format": MARKER_FORMAT,
        "name": checkpoint.name if checkpoint.kind == "demo" else gguf.name,
        "license": checkpoint.license,
        "gguf_sha256": gguf_sha256,
        "versions": versions,
        "files": {file.name: file.stat().st_size for file in sorted(target.iterdir())},
    }
    (target / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    if directory.exists():  # damaged, or of an earlier format: os.replace wants the place empty
        shutil.rmtree(directory)
    os.replace(target, directory)


def write_bf16(gguf: Path, target: Path) -> dict[str, str]:
    import torch
    import transformers
    from safetensors import SafetensorError

    source, options = str(gguf.parent), {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        # Without this, versions that have GgufConfig leave the weights packed: slow to run, and not to be saved.
        # Versions that do not have it always unpack.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        for file in target.iterdir():  # safetensors leaves its file to the owner alone; a cache may be shared
            shutil.copymode(target / "config.json", file)
    except (ImportError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        if f"os error {errno.ENOSPC}" in str(error):  # safetensors reports a full disk in its own words
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise CheckpointError(f"transformers cannot convert {gguf}: {first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # transformers raises a bare OSError for files that it cannot make sense of.
        raise CheckpointError(f"transformers cannot convert {gguf}: {first_line(error)}") from error
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def transformers_bars(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
