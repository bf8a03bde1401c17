"""What tells one checkpoint's weights from another's, whether they are loaded or in files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FINGERPRINT_SAMPLES = 4096


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """16 hex digits of a SHA-256 over samples of the embedding and of the first full-attention layer's q_proj.

    Weights stored in bf16 or fp16 give the same digits whichever of fp32, bf16 and fp16 they are loaded in; weights
    stored in fp32 do in fp32 and bf16. It tells checkpoints apart and is no protection against tampering. None
    for weights in a few bits, which no digits of the checkpoint they were made of can be compared with. Raises
    ValueError for a model without such weights.
    """
    weights = base_weights(model)
    layer = first_full_attention_layer(model.config)
    tensors = [weights[name] for name in _fingerprinted(weights, layer)]
    return _fingerprint(tensors) if all(tensor.is_floating_point() for tensor in tensors) else None


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters by the names that the checkpoint has for them: PEFT's layers hold the model's own, and are left out."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): p for name, p in model.named_parameters()}


def first_full_attention_layer(config: Any) -> int:
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


def stored_fingerprint(directory: Path, layer: int) -> str | None:
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
