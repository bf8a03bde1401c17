"""What tells one checkpoint's weights from another's, whether they are loaded or in files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..boundary import read_json, reading
from .cache import CheckpointError
from .weights import check_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FINGERPRINT_SAMPLES = 4096
BACKBONE_ROWS, BACKBONE_COLUMNS = 4, 1024  # sampled from every matrix


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """16 hex digits of a SHA-256 over samples of the embedding and of the first full-attention layer's q_proj.

    Weights stored in bf16 or fp16 give the same digits whether they are loaded in fp32, bf16 or fp16; weights stored in fp32 give
    the same in fp32 and bf16. It tells checkpoints apart, but does not protect against tampering, and it does not see changes of
    other matrices, such as a LoRA merged into v_proj; `backbone_fingerprint` does. None for quantised weights, which cannot be
    compared with those they were made from. Raises ValueError for a model without such weights.
    """
    weights = base_weights(model)
    layer = first_full_attention_layer(model.config)
    tensors = [weights[name] for name in _fingerprinted(weights, layer)]
    return _fingerprint(tensors) if all(tensor.is_floating_point() for tensor in tensors) else None


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters by the names that the checkpoint has for them: PEFT's layers hold the model's own and others beside
    them, which are left out."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
    parameters = dict(model.named_parameters())
    wrapped = tuple({f"{own.split(name)[0]}." for name in parameters if own.search(name)})
    return {own.sub("", name): p for name, p in parameters.items() if own.search(name) or not name.startswith(wrapped)}


def backbone_fingerprint(model: PreTrainedModel) -> str | None:
    """16 hex digits of a SHA-256 over samples of every matrix of the text model's layers, and of the embedding.

    Four rows of each, so that it costs milliseconds; mixtures' experts are left out, which are stored and loaded under
    different names. Independent of the dtype as `weights_fingerprint` is, and None as that is. Raises ValueError for a
    model without layers of matrices.
    """
    weights = base_weights(model)
    if not all(tensor.is_floating_point() for tensor in weights.values()):
        return None
    return _backbone_fingerprint(weights, lambda name: _rows(weights[name], tuple(weights[name].shape)))


def first_full_attention_layer(config: Any) -> int:
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    return types.index("full_attention") if "full_attention" in types else 0


def stored_fingerprints(directory: Path, layer: int) -> tuple[str, str] | tuple[None, None]:
    """`(weights_fingerprint, backbone_fingerprint)` of a directory's safetensors, (None, None) where it has none.

    Raises CheckpointError for files that are damaged.
    """
    from contextlib import ExitStack

    from safetensors import safe_open

    check_files(directory)
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    with reading(directory, CheckpointError), ExitStack() as stack:
        if index.is_file():
            file_of = read_json(index, CheckpointError)["weight_map"]
        elif single.is_file():
            file_of = dict.fromkeys(stack.enter_context(safe_open(single, framework="pt")).keys(), single.name)
        else:
            return None, None
        opened = {
            name: stack.enter_context(safe_open(directory / name, framework="pt")) for name in sorted(set(file_of.values()))
        }
        whole = [opened[file_of[name]].get_tensor(name) for name in _fingerprinted(file_of, layer)]

        def rows(name: str) -> list:
            stored = opened[file_of[name]].get_slice(name)
            return _rows(stored, tuple(stored.get_shape()))

        shapes = {name for name in file_of if len(opened[file_of[name]].get_slice(name).get_shape()) > 1}
        return _fingerprint(whole), _backbone_fingerprint(shapes, rows)


def _fingerprinted(names: Any, layer: int) -> tuple[str, str]:
    # Anchored at the embedding's prefix, because vision towers and draft heads have layers.0.self_attn.q_proj as well.
    for name in names:
        if name.endswith("embed_tokens.weight"):
            query = f"{name.removesuffix('embed_tokens.weight')}layers.{layer}.self_attn.q_proj.weight"
            if query in names:
                return name, query
    raise ValueError(f"model must have embed_tokens and layers.{layer}.self_attn.q_proj weights, and has not")


def _fingerprint(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        stride = max(1, tensor.numel() // FINGERPRINT_SAMPLES) | 1  # odd, so that it does not stay in a few columns
        sample = tensor.detach().reshape(-1)[::stride][:FINGERPRINT_SAMPLES]
        digest.update(repr(tuple(tensor.shape)).encode() + _comparable(sample))
    return digest.hexdigest()[:16]


def _backbone_fingerprint(names: Iterable[str], rows: Callable[[str], list]) -> str:
    import torch

    names = list(names)
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise ValueError("model must have embed_tokens weights, and has not")
    prefix = embedding.removesuffix("embed_tokens.weight")
    layers = re.compile(re.escape(prefix) + r"layers\.\d+\.(?!.*\bexperts\b).*weight")
    digest = hashlib.sha256()
    for name in sorted([embedding, *(name for name in names if layers.fullmatch(name))]):
        sampled = rows(name)
        if sampled:  # a vector has no rows: norms are not sampled
            digest.update(name.removeprefix(prefix).encode() + _comparable(torch.cat(sampled)))
    return digest.hexdigest()[:16]


def _rows(tensor: Any, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """A few rows, evenly spread, of a matrix (or of more dimensions), each cut to its first columns."""
    if len(shape) < 2:
        return []
    picked = sorted({row * shape[0] // BACKBONE_ROWS for row in range(BACKBONE_ROWS)}) if shape[0] else []
    return [tensor[row : row + 1].reshape(-1)[:BACKBONE_COLUMNS] for row in picked]


def _comparable(sample: torch.Tensor) -> bytes:
    """The bytes of a sample that are the same in every dtype that its weights may be loaded in."""
    import torch

    sample = sample.detach().to("cpu", torch.bfloat16).float()
    # Below 2**-16 bf16 values need not be representable in fp16, so loading in fp16 may have changed them.
    return torch.where(sample.abs() < 2**-16, 0.0, sample).numpy().astype("<f4").tobytes()
