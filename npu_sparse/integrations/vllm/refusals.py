"""What of an engine's configuration sparse prefill does not serve, each with its sentence."""

from . import ascend
from .pages import INSTRUCTION_SETS

SAME_DTYPE = ("auto", "float16", "bfloat16", "float32")
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def check_engine(config) -> None:
    """Raises ValueError for the first thing in a VllmConfig that sparse prefill does not serve."""
    for reason in refusals(config):
        raise ValueError(reason)


def refusals(config):
    """The sentences that a VllmConfig earns, in order."""
    parallel, compilation = config.parallel_config, config.compilation_config
    if config.cache_config.cache_dtype not in SAME_DTYPE:
        yield (
            f"kv-cache-dtype must be auto for sparse prefill, whose operators read keys and values in the model's dtype, "
            f"got {config.cache_config.cache_dtype}"
        )
    if config.kv_transfer_config is not None:
        yield (
            "kv-transfer-config must be absent for sparse prefill, because pages that another engine filled may be of another "
            f"adapter or budget, got {_name(config.kv_transfer_config, 'kv_connector')}"
        )
    if parallel.decode_context_parallel_size > 1:
        yield f"decode-context-parallel-size must be 1 for sparse prefill, got {parallel.decode_context_parallel_size}"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield f"prefill-context-parallel-size must be 1 for sparse prefill, got {parallel.prefill_context_parallel_size}"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        yield "enable-dbo must be off for sparse prefill, which plans a batch as a whole, got on"
    if config.speculative_config is not None:
        yield (
            "speculative-config must be absent for sparse prefill, whose index keys are not taken back with rejected tokens, "
            f"got {_name(config.speculative_config, 'method')}"
        )
    if config.lora_config is not None:
        yield "enable-lora must be off for sparse prefill, whose adapter belongs to the base weights, got on"
    if images := _modalities(config.model_config):
        yield (
            "limit-mm-per-prompt must be 0 for every modality of a multimodal model under sparse prefill, which rotates by one "
            f"position a token (--language-model-only), got {', '.join(images)}"
        )
    if ascend.serves(config):
        yield from ascend.refusals(config)
    if getattr(getattr(compilation, "pass_config", None), "enable_sp", False):
        yield "compilation pass enable_sp must be off for sparse prefill, whose index branch reads whole hidden states, got on"


def check_pages(backend: str, isa: str | None) -> None:
    """Raises ValueError for an attention backend, or on a CPU its instruction set, whose pages `pages.py` cannot read."""
    if backend not in BACKENDS:
        raise ValueError(f"attention-backend must be one of {', '.join(BACKENDS)} for sparse prefill, got {backend}")
    if isa is not None and isa not in INSTRUCTION_SETS:
        served = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"the CPU attention must be laid out for one of {served} for sparse prefill, got {isa}")


def check_stage(selects, present) -> None:
    """Raises ValueError where a layer of this pipeline stage reads the support of a layer of another stage.

    selects: `checks.selecting_layers`; present: the layers of this stage.
    """
    for layer in sorted(present):
        if selects[layer] not in present:
            raise ValueError(
                f"share_layers and anchors must not cross a pipeline stage, got layer {layer}, which reads the support of layer "
                f"{selects[layer]} of an earlier stage: choose another pipeline-parallel-size or share_layers=1"
            )


def _modalities(model) -> list[str]:
    """What a multimodal model may be given beside text."""
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is None:
        return []
    return [name for name in ("image", "video", "audio") if multimodal.get_limit_per_prompt(name) > 0]


def _name(config, field: str) -> str:
    return str(getattr(config, field, None) or "one")
