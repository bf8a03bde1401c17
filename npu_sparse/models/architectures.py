"""The only file that knows model classes: where their full and linear attention is, and which models are refused and why."""

from dataclasses import asdict, dataclass

from ..errors import USER_ERROR, ActionableError

SUPPORTED = {
    "qwen3_5": "Qwen3.5 (conditional-generation wrapper)",
    "qwen3_5_text": "Qwen3.5 (text)",
    "qwen3_next": "Qwen3-Next",
    "qwen3": "Qwen3",
    "qwen2": "Qwen2 / Qwen2.5",
    "llama": "Llama family (SmolLM2 too)",
    "gemma3_text": "Gemma3 (global layers)",
}
ZERO_CENTRED_NORMS = ("Qwen3_5RMSNorm", "Qwen3NextRMSNorm")
_REASONS = {
    "gemma2": "its attention scores are soft-capped",
    "gemma3": "its image tokens attend in both directions; load the text model (Gemma3ForCausalLM)",
    "gemma3n": "layers share their keys and values",
    "llama4_text": "its layers attend within chunks",
    "smollm3": "some of its layers have no rotary embedding",
    "deepseek_v3": "its multi-head latent attention has no separate KV heads",
    "deepseek_v32": "it is sparse already: it has an indexer of its own",
    "gpt_oss": "its attention has learned sinks",
    "gpt2": "it has no rotary embedding",
    "bert": "it attends in both directions",
}


class UnsupportedArchitectureError(ActionableError, ValueError):
    """A model that this package does not serve; the message gives the reason."""

    exit_status = USER_ERROR


@dataclass(frozen=True)
class Architecture:
    """The attention geometry of a checkpoint.

    Attributes:
        model_type: transformers' name of the text model.
        layers: indices of the full-attention layers, the ones that become sparse.
        num_layers: all decoder layers.
        hidden_size, query_heads, kv_heads, head_dim: as in the config.
        rotary_dim: how many of head_dim's dimensions rotate.
        max_positions: the longest context of the checkpoint, in tokens, with its rotary embedding scaled as the config says.
    """

    model_type: str
    layers: tuple[int, ...]
    num_layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    max_positions: int

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {**asdict(self), "layers": list(self.layers)}


def describe(config) -> Architecture:
    """The Architecture of a transformers config. Raises UnsupportedArchitectureError with the reason."""
    if config.model_type not in SUPPORTED:
        reason = _REASONS.get(config.model_type, f"only {', '.join(sorted(SUPPORTED))} are")
        raise UnsupportedArchitectureError(f"model type {config.model_type!r} is not supported: {reason}")
    text = config.get_text_config()
    if getattr(text, "use_bidirectional_attention", False) or getattr(text, "is_causal", True) is False:
        raise UnsupportedArchitectureError(f"{config.model_type!r} with bidirectional attention is not supported")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedArchitectureError(f"{config.model_type!r} with soft-capped attention scores is not supported")
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = tuple(n for n, kind in enumerate(kinds) if kind == "full_attention")
    if not layers:
        raise UnsupportedArchitectureError(f"{config.model_type!r}: this config has no full-attention layer")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Architecture(
        model_type=text.model_type,
        layers=layers,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        query_heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_factor(text)),
        max_positions=_max_positions(text),
    )


def attention_modules(model) -> dict:
    """`{layer index: self-attention module}` of the full-attention layers of a loaded model."""
    architecture = describe(model.config)
    try:
        return {n: decoder(model).layers[n].self_attn for n in architecture.layers}
    except AttributeError as error:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} must be a causal language model with decoder layers, got none ({error})"
        ) from error


@dataclass(frozen=True)
class DeltaNet:
    """Where the heads of a Gated DeltaNet layer lie in the rows that its projections give.

    Attributes:
        key_heads, value_heads, key_dim, value_dim: as in the config; a key head serves value_heads / key_heads value heads.
        kernel: taps of the causal convolution.
        channels: first column of every query, key and value head, in this order (the convolution's), in the rows of `project`'s
            first result.
        gate: first column of every value head's output gate in the rows of its second result.
        beta, decay: column of every value head in the rows of its third result.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    channels: tuple[int, ...]
    gate: tuple[int, ...]
    beta: tuple[int, ...]
    decay: tuple[int, ...]


def delta_net(module) -> DeltaNet:
    """The DeltaNet of one Gated DeltaNet module."""
    Hk, Hv, K, V = module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim
    if hasattr(module, "in_proj_qkvz"):  # Qwen3-Next: key head by key head
        G = Hv // Hk
        wide = 2 * K + 2 * G * V
        channels = [h * wide + part for part in (0, K) for h in range(Hk)]
        channels += [h // G * wide + 2 * K + h % G * V for h in range(Hv)]
        gate = [h // G * wide + 2 * K + (G + h % G) * V for h in range(Hv)]
        beta = [h // G * 2 * G + h % G for h in range(Hv)]
        decay = [column + G for column in beta]
    else:
        channels = [h * K for h in range(2 * Hk)] + [2 * Hk * K + h * V for h in range(Hv)]
        gate, beta, decay = [h * V for h in range(Hv)], list(range(Hv)), list(range(Hv, 2 * Hv))
    return DeltaNet(Hk, Hv, K, V, module.conv_kernel_size, tuple(channels), tuple(gate), tuple(beta), tuple(decay))


def project(module, hidden):
    """The input projections of a Gated DeltaNet module: rows of queries, keys and values, of output gates, of beta and decay."""
    from torch import cat, nn
    from torch.nn.functional import linear

    if hasattr(module, "in_proj_qkvz"):
        mixed = module.in_proj_qkvz(hidden)
        return mixed, mixed, module.in_proj_ba(hidden)
    small = module.in_proj_b, module.in_proj_a
    if all(type(part) is nn.Linear and part.bias is None for part in small):  # one product reads `hidden` once
        gates = linear(hidden, cat([part.weight for part in small]))
    else:
        gates = cat([part(hidden) for part in small], -1)
    return module.in_proj_qkv(hidden), module.in_proj_z(hidden), gates


def delta_net_modules(model) -> dict:
    """`{layer index: Gated DeltaNet module}` of a loaded model; empty where it has none."""
    return {n: layer.linear_attn for n, layer in enumerate(decoder(model).layers) if hasattr(layer, "linear_attn")}


def norm_modules(model) -> list:
    """The RMSNorms of a loaded hybrid model that scale by `1 + weight`: of hidden states, queries and keys."""
    return [module for module in decoder(model).modules() if type(module).__name__ in ZERO_CENTRED_NORMS]


def gated_mlp_modules(model) -> list:
    """The feed-forward modules of a loaded model that compute `down(silu(gate(x)) * up(x))`."""
    from torch import nn

    modules = []
    for module in decoder(model).modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            if type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
                modules.append(module)
    return modules


def decoder(model):
    """The text decoder of a loaded model: what runs the layers."""
    inner = getattr(model, "model", model)
    return getattr(inner, "language_model", inner)


def text_config(model):
    """The config that names the attention implementation of the text layers."""
    return model.config.get_text_config()


def attention_selection(model, implementation: str):
    """What `model.set_attn_implementation` takes to change the text layers and nothing else."""
    nested = model.config.get_text_config() is not model.config
    return {"text_config": implementation} if nested else implementation


def unwrapped(model):
    """The transformers model itself: PEFT's wrapper hands its calls on to that, which holds the adapters.

    Raises UnsupportedArchitectureError for prompt learning, whose virtual tokens are no part of the prompt.
    """
    if not hasattr(model, "get_base_model"):
        return model
    learning = [kind for kind in getattr(model, "peft_config", {}).values() if getattr(kind, "is_prompt_learning", False)]
    if learning:
        name = getattr(learning[0].peft_type, "value", learning[0].peft_type)
        raise UnsupportedArchitectureError(
            f"PEFT's {name} is not supported: its virtual tokens have no hidden states to select by; adapters of weights, "
            "such as LoRA, are"
        )
    return model.get_base_model()


def _max_positions(text) -> int:
    """The longest context in tokens. By transformers' conventions, `max_position_embeddings` means different lengths for
    different kinds of rotary scaling.

    "linear" and "dynamic" stretch it by their factor, "yarn" stretches `original_max_position_embeddings` (where that is not
    given, the config's); "longrope" and "llama3" name the stretched length, and so do configs that scale some layers only.
    """
    longest, rope = text.max_position_embeddings, getattr(text, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
    if kind in ("linear", "dynamic"):
        return int(longest * factor)
    if kind == "yarn":
        return max(longest, int((rope.get("original_max_position_embeddings") or longest) * factor))
    return longest


def _rotary_factor(text) -> float:
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None) or 1.0)
