"""Checks adapter, budget and checkpoint before the first token, and attaches branches to the layers of this rank."""

from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from ...budget import Budget
from ...checkpoints.identity import first_full_attention_layer, stored_fingerprints
from ...checkpoints.load import describe_base
from ...checks import check_kernels, check_layers, selecting_layers
from ...indexer import Indexer
from ...models import crossover
from ...models.architectures import Architecture, describe
from ...selectors import learns_partition
from .backend import sparse_backend
from .branch import OP, Attached, IndexBranch, hook
from .options import Options
from .prompts import WORKER, provide_state
from .refusals import check_engine, check_stage

logger = init_logger("vllm.npu_sparse")  # vLLM shows what is below its own name


def prepare(vllm_config, options: Options) -> Attached:
    """What the branches share, after every check that needs no weights. Raises ValueError in one sentence."""
    check_engine(vllm_config)
    model, device = vllm_config.model_config, torch.device(vllm_config.device_config.device)
    architecture = describe(model.hf_config)
    indexer = Indexer.from_pretrained(options.adapter, device=device, dtype=model.dtype)
    indexer.check_geometry(architecture)
    budget = options.budget
    if budget is None:
        budget = Budget.from_dict(indexer.budget) if indexer.budget else Budget()
    if budget.dense_below == "auto":
        budget = budget.replace(dense_below=crossover.dense_below(SimpleNamespace(device=device, config=model.hf_config), budget))
    check_layers(budget, architecture.layers)
    check_kernels(budget, options.impl, device.type, model.dtype, architecture, indexer)
    return Attached(
        indexer, budget, selecting_layers(budget, architecture.layers), options.impl, options.workspace_mib,
        learns_partition(budget, indexer), _reserve(vllm_config, architecture, indexer, options),
    )  # fmt: skip


def _reserve(vllm_config, architecture: Architecture, indexer: Indexer, options: Options) -> int:
    """Bytes: an operator's slices, and keys, values and index keys of the longest context out of their pages."""
    heads = max(1, architecture.kv_heads // vllm_config.parallel_config.tensor_parallel_size)
    numbers = 2 * heads * architecture.head_dim + indexer.config.dim
    copies = vllm_config.model_config.max_model_len * numbers * vllm_config.model_config.dtype.itemsize
    return 5 * (options.workspace_mib << 20) + copies


def check_weights(vllm_config, indexer: Indexer) -> None:
    """Raises AdapterError where the checkpoint's files are not those the adapter was made for, as when attaching.

    Weights stored in a few bits cannot be compared with those that they were made of; then the geometry is.
    """
    if not indexer.base:
        return
    model = vllm_config.model_config
    weights = backbone = None
    if model.quantization is None:
        directory = _directory(model, vllm_config.load_config)
        weights, backbone = stored_fingerprints(directory, first_full_attention_layer(model.hf_config))
    if weights is None:
        logger.warning("npu_sparse: the weights of %s are not compared with the adapter's base, only their geometry", model.model)
    indexer.check_identity(describe_base(model.hf_config, None, weights, backbone))


def _directory(model, load_config) -> Path:
    """Where the checkpoint that vLLM loaded lies."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model.model, revision=model.revision, cache_dir=load_config.download_dir, local_files_only=True)
    )


def attach(model: torch.nn.Module, vllm_config, attached: Attached) -> None:
    """Puts an IndexBranch beside every full-attention layer of this rank. Attaching again changes nothing."""
    modules = full_attention_modules(model, tuple(attached.selects))
    if any(hasattr(module.attn, "npu_sparse") for module in modules.values()):
        return
    if not modules:
        logger.info("npu_sparse: no full-attention layer on this pipeline stage")
    check_stage(attached.selects, modules.keys())
    for layer, module in modules.items():
        attention = module.attn
        sparse = sparse_backend(attention.attn_backend)
        attention.npu_sparse = IndexBranch(attached, layer, attention, module.rotary_emb, vllm_config)
        attention.attn_backend, attention.impl.__class__ = sparse, sparse.get_impl_cls()
        if attention.npu_sparse.selects:
            module.register_forward_pre_hook(hook(module), with_kwargs=True)
    _split_graphs(vllm_config)
    provide_state(model, vllm_config, attached.prompts)
    if attached.budget.exact_last and not _says_prompts(vllm_config):
        logger.info(
            "npu_sparse: exact_last ends every chunk, for this model runner does not say where prompts end: --worker-cls %s does",
            WORKER,
        )
    selecting = sum(module.attn.npu_sparse.selects for module in modules.values())
    per_token = selecting * attached.indexer.config.dim * vllm_config.model_config.dtype.itemsize
    logger.info(
        "npu_sparse: %d layers sparse, %d select, budget %s, dense below %d tokens, %d bytes of index keys a token on this rank",
        len(modules), selecting, str(attached.budget) or "default", attached.budget.dense_below, per_token,
    )  # fmt: skip


def full_attention_modules(model: torch.nn.Module, layers) -> dict[int, torch.nn.Module]:
    """`{layer: its self-attention module}` of the full-attention layers that a rank holds."""
    modules = {}
    for module in model.modules():
        attention = getattr(module, "attn", None)
        if not isinstance(attention, Attention) or not hasattr(module, "rotary_emb"):
            continue
        layer = extract_layer_index(attention.layer_name)
        if layer in layers and attention.sliding_window is None:
            modules[layer] = module
    return modules


def _says_prompts(vllm_config) -> bool:
    return getattr(vllm_config, "use_v2_model_runner", False) or vllm_config.parallel_config.worker_cls == WORKER


def _split_graphs(vllm_config) -> None:
    """Ends piecewise graphs before the index op, which reads a forward's context; no dense engine's compiled code is reused."""
    splitting = vllm_config.compilation_config.splitting_ops
    if splitting is not None and OP not in splitting:
        splitting.append(OP)
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config.setdefault("npu_sparse", "attached")
