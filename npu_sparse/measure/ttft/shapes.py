"""True shapes of Qwen3.5 and of Qwen2.5 with random weights: times are those of the checkpoint, quality is not."""

COMMON = dict(
    vocab_size=248320, head_dim=256, max_position_embeddings=262144, linear_conv_kernel_dim=4, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16,
    rope_parameters={
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
)  # fmt: skip
SIZES = {
    "0.8b": dict(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "9b": dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4,
        linear_num_value_heads=32,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        head_dim=64, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        rope_parameters={**COMMON["rope_parameters"], "mrope_section": [3, 3, 2]},
    ),
}  # fmt: skip
QWEN2_SIZES = {
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
    ),
}  # fmt: skip
SHAPES = (*(f"qwen3.5-{size}" for size in SIZES), *(f"qwen2.5-{size}" for size in QWEN2_SIZES))


def drawn(shape: str, *, dtype, device, seed: int = 0):
    """A model of one of SHAPES in eval mode, its weights drawn on the device itself."""
    family, _, size = shape.partition("-")
    return {"qwen3.5": qwen35, "qwen2.5": qwen2}[family](size, dtype=dtype, device=device, seed=seed)


def qwen35(size: str, *, dtype, device, seed: int = 0, **changes):
    """A Qwen3.5 text model of one of SIZES in eval mode, its weights drawn on the device itself.

    changes: fields of the config; every fourth layer attends fully unless `layer_types` says otherwise.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    shape = COMMON | SIZES[size] | changes
    kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(shape["num_hidden_layers"])]
    return _drawn(Qwen3_5ForCausalLM, Qwen3_5TextConfig(**{"layer_types": kinds, **shape}), dtype, device, seed)


def qwen2(size: str, *, dtype, device, seed: int = 0):
    """A Qwen2.5 of one of QWEN2_SIZES in eval mode, as `qwen35`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = dict(
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    return _drawn(Qwen2ForCausalLM, Qwen2Config(**shape | QWEN2_SIZES[size]), dtype, device, seed)


def _drawn(kind, config, dtype, device, seed: int):
    import torch

    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(usual)
