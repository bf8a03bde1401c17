"""GGUF files unpacked into bf16 safetensors, once."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..boundary import is_the_files_fault, reason
from .cache import MARKER, MARKER_FORMAT, CheckpointError, progress_bar
from .gguf_header import Header, Tensor, read_header, write_without_vocabulary
from .sources import Checkpoint
from .weights import check_finite, check_loaded, check_names

if TYPE_CHECKING:
    import torch


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
    """Writes the checkpoint of a GGUF file into `target`; returns the versions it was made with.

    Weights that the model wants and the file has not, and the other way round, are refused by name: transformers would
    fill the first with random numbers. So are weights that are not finite in bf16. Raises CheckpointError with one
    sentence for whatever is wrong with the file.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    header = read_header(gguf)
    layers = header.metadata.get(f"{header.architecture}.block_count", 0)
    if not isinstance(layers, int) or layers > len(header.tensors):
        raise CheckpointError(f"{gguf}: block_count must be at most its {len(header.tensors)} tensors, got {layers!r}")
    try:
        if header.architecture in _DIRECT:
            model, tokenizer = _unpacked(header, target)
        else:
            model, tokenizer = _by_transformers(gguf)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        for file in target.iterdir():  # safetensors leaves its file to the owner alone; a cache may be shared
            shutil.copymode(target / "config.json", file)
    except CheckpointError:
        raise
    except BaseException as error:
        if not is_the_files_fault(error):
            raise
        if isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error):  # a full disk in its own words
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        # transformers raises a bare OSError for files that it cannot make sense of.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CheckpointError(f"transformers cannot convert {gguf}: {reason(error)}") from error
    return {"torch": torch.__version__, "transformers": transformers.__version__}


_DIRECT = ("llama", "qwen2", "qwen3", "gemma3")  # transformers has their weights under other names, see `_weight`


def _unpacked(header: Header, target: Path):
    """`(model, tokenizer)`, with the weights read here: transformers parses the vocabulary at every step."""
    import numpy as np
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        write_without_vocabulary(header, Path(folder) / "header.gguf")
        config = AutoConfig.from_pretrained(folder, gguf_file="header.gguf", local_files_only=True)
    # Told the type, AutoTokenizer does not read the whole file once more to find it.
    told = {"tokenizer_type": config.model_type} if config.model_type in TOKENIZER_MAPPING_NAMES else {}
    tokenizer = AutoTokenizer.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, local_files_only=True, **told
    )
    config._name_or_path = header.metadata.get("general.name", "")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == header.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    wanted = {}  # transformers' name -> GGUF's
    for parameter in model.state_dict():
        stem, dot, suffix = parameter.rpartition(".")
        if not (config.tie_word_embeddings and parameter == "lm_head.weight"):
            wanted[parameter] = f"{names.get_name(stem)}{dot}{suffix}"
    check_names(header.path, set(wanted.values()) - set(header.tensors), set(header.tensors) - set(wanted.values()))
    stored = np.memmap(header.path, np.uint8, "r")
    weights = {}
    for parameter, expected in model.state_dict().items():
        if parameter in wanted:
            tensor = header.tensors[wanted[parameter]]
            if tensor.shape != tuple(expected.shape):
                raise CheckpointError(
                    f"{header.path}: tensor {tensor.name} must have shape {tuple(expected.shape)}, got {tensor.shape}"
                )
            weights[parameter] = _weight(header.architecture, config, tensor, stored)
    check_finite(header.path, ((wanted[parameter], weight) for parameter, weight in weights.items()))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model, tokenizer


def _weight(architecture: str, config, tensor: Tensor, stored) -> torch.Tensor:
    """A tensor as transformers keeps it, in bf16.

    llama.cpp turns the rows of Llama's queries and keys from halves to pairs, and stores Gemma's norms with the 1 that
    the model adds.
    """
    import torch
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    data = stored[tensor.start : tensor.start + tensor.bytes]
    plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}.get(kind)
    if plain:
        weight = torch.from_numpy(data.view(plain).reshape(tensor.shape).astype("f4"))
    else:
        rows = tensor.bytes * tensor.shape[-1] // max(1, math.prod(tensor.shape))
        weight = torch.from_numpy(dequantize(data.reshape(*tensor.shape[:-1], rows), kind))
    if architecture == "llama" and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
        heads = config.num_attention_heads if ".attn_q." in tensor.name else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if architecture == "gemma3" and "norm.weight" in tensor.name:
        weight = weight - 1
    return weight.to(torch.bfloat16)


def _by_transformers(gguf: Path):
    """`(model, tokenizer)` of an architecture that only transformers knows."""
    import torch
    import transformers

    source, options = str(gguf.parent), {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    # Without this, versions that have GgufConfig leave the weights packed: slow to run, and not to be saved.
    # Versions that do not have it always unpack.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, output_loading_info=True, **options
    )
    check_loaded(gguf, info)
    check_finite(gguf, model.named_parameters())
    return model, tokenizer


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
