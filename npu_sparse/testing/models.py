"""Tiny models and tokenizers of the supported architectures."""

from collections.abc import Callable

import torch


def tiny_model(name: str, *, seed: int = 0, dtype=torch.float32, **changes):
    """A randomly initialised model of a supported architecture, in eval mode; the same weights for the same seed.

    Small enough for a test, with at least two full-attention layers, and with weights large enough for attention to be
    peaked: with the usual small ones a wrong mask hardly shows.

    Args:
        name: one of TINY_MODELS.
        changes: fields of the text config to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TINY_MODELS[name](changes).to(dtype).eval()


_COMMON = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
_HYBRID = _COMMON | dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, head_dim=32, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_MROPE = _ROPE | {"mrope_section": [3, 3, 2]}


def _llama(changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON | changes))


def _qwen2(changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_COMMON | changes))


def _qwen3(changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_COMMON | {"head_dim": 16} | changes))


def _qwen3_next(changes):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    return Qwen3NextForCausalLM(Qwen3NextConfig(**_HYBRID | experts | {"rope_parameters": dict(_ROPE)} | changes))


def _qwen3_5(changes):
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_HYBRID | {"rope_parameters": dict(_MROPE)} | changes))


def _qwen3_5_wrapper(changes):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64, num_position_embeddings=16
    )
    text = _HYBRID | {"rope_parameters": dict(_MROPE)} | changes
    tokens = dict(image_token_id=96, video_token_id=97, vision_start_token_id=98, vision_end_token_id=99)
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **tokens))


def _gemma3(changes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    geometry = dict(num_hidden_layers=4, layer_types=kinds, num_key_value_heads=1, head_dim=16, sliding_window=16)
    return Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON | geometry | {"query_pre_attn_scalar": 16} | changes))


TINY_MODELS: dict[str, Callable] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_wrapper": _qwen3_5_wrapper,
    "gemma3": _gemma3,
}


def tiny_tokenizer(lines: list[str], *, size: int = 600, special: tuple[str, ...] = ("<bos>",), begins: bool = True, **roles):
    """A byte-level BPE of `size` tokens, trained on a few lines.

    `special`: tokens of their own. `begins`: the first of them stands before raw text, as with Gemma and Llama. `roles`: what
    `PreTrainedTokenizerFast` takes, for example `eos_token="<bos>"`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    if begins:
        first = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
