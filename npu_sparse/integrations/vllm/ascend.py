"""vLLM-Ascend's side of the plugin. Written from its sources and run on stand-ins; not run on a card.

Read: vLLM-Ascend at commit 182b75e of 22 August 2026, for vLLM 0.27.1, torch 2.10.0, torch_npu 2.10.0.post4, CANN 9.1.0. What is
different there:

- the platform takes its own backend whatever was selected; that of grouped-query attention calls itself "CUSTOM";
- its `forward` writes keys and values to their pages, so that here they are written before anything attends;
- keys and values are two tensors `[pages, tokens, Hkv, D]`, and the one tensor of another cache comes as a tuple of one;
- a cache of a generic spec would be split into keys and values: the spec of its own indexers is one tensor;
- a batch has its lengths on the host in three fields, and may end with requests that are padding;
- a hybrid model's caches are all of one kind, which the indexers' spec does not fit.

Only functions here import vllm_ascend; nothing does when this file is imported.
"""

import functools

import torch
from torch import Tensor

from .plan import Plan, Request, divided, packed, run_plan

NAME = "ASCEND"  # of its pages, in pages.py
BACKEND, IMPL = "AscendAttentionBackend", "AscendAttentionBackendImpl"
PAGE_TOKENS = 128


def owns(backend: type) -> bool:
    """Whether an attention backend is vLLM-Ascend's."""
    return any(cls.__module__.partition(".")[0] == "vllm_ascend" for cls in backend.__mro__)


def serves(config) -> bool:
    """Whether an engine runs on Ascend."""
    return getattr(getattr(config, "device_config", None), "device_type", None) == "npu"


def check_backend(backend: type) -> None:
    """Raises ValueError for another backend of vLLM-Ascend than that of grouped-query attention on 910B and 910C."""
    names = backend.__name__, backend.get_impl_cls().__name__
    if names != (BACKEND, IMPL):
        raise ValueError(
            f"the attention backend must be {BACKEND} with {IMPL} for sparse prefill on Ascend, got {' with '.join(names)}: "
            "serve a model of grouped-query attention, without context parallelism"
        )


def refusals(config):
    """The sentences that a VllmConfig earns on Ascend beside those of every device."""
    model = config.model_config
    if getattr(model, "is_hybrid", False):
        yield (
            "the model must have no linear-attention layers for sparse prefill on Ascend, whose runner has one kind of cache for "
            f"a hybrid model and none for its index keys, got {getattr(model, 'model', 'one')}"
        )
    block = config.cache_config.block_size
    if block is not None and block % PAGE_TOKENS:
        yield f"block-size must be a multiple of {PAGE_TOKENS} for sparse prefill on Ascend, got {block}"


def index_spec(block_size: int, dim: int, dtype: torch.dtype):
    """The cache spec of a layer's index keys."""
    from vllm_ascend.core.kv_cache_interface import AscendSFAIndexerCacheSpec

    return AscendSFAIndexerCacheSpec(block_size=block_size, num_kv_heads=1, head_size=dim, dtype=dtype)


@functools.cache
def key_pages_backend(generic: type) -> type:
    """`KeyPagesBackend` with the page size of Ascend's kernels, so that index keys share the block table of keys and values."""

    class AscendKeyPages(generic):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec=None):
            return [PAGE_TOKENS]

    return AscendKeyPages


def read_kv(kv_cache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`(k, v)`, `[1, Hkv, length, D]` each, of one request; kv_cache: two tensors `[pages, tokens, Hkv, D]`."""
    k, v = kv_cache[0], kv_cache[1]
    used = blocks[: -(-length // k.shape[1])].long()
    return tuple(one.index_select(0, used).flatten(0, 1)[:length].transpose(0, 1)[None] for one in (k, v))


def make_plan(common, dense_below: int, build) -> Plan | None:
    """`plan.make_plan` of an AscendCommonAttentionMetadata."""
    if common.max_query_len <= 1 or common.max_seq_len < dense_below:
        return None
    real = min(common.num_reqs, len(common.seq_lens_cpu_upper_bound))
    prefilling = None if common.is_prefilling is None else common.is_prefilling[:real].tolist()
    starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
    while real and starts[real] > common.num_actual_tokens:  # a request that only fills up the tokens
        real -= 1
    sparse, dense = divided(starts, lengths, prefilling, real, dense_below)
    if not sparse:
        return None
    if not dense:
        return Plan(sparse, common.block_table_tensor)
    rows, subset = part_of(common, dense)
    return Plan(sparse, common.block_table_tensor, build(subset), rows)


def part_of(common, chosen: tuple[Request, ...]):
    """`(rows of their tokens, the metadata)` of some requests of a batch."""
    rows, on_host, begins, counts = packed(common, chosen)
    lengths = common.seq_lens_cpu_upper_bound[on_host]
    device = common.query_start_loc.device
    on_device, rows_on_device = on_host.to(device), rows.to(device)
    changes = dict(
        query_start_loc=begins.to(device), query_start_loc_cpu=begins, seq_lens=common.seq_lens[on_device],
        seq_lens_cpu_upper_bound=lengths, seq_lens_cpu=lengths, _seq_lens_cpu=lengths,
        num_computed_tokens_cpu=lengths - counts, num_reqs=len(chosen), num_actual_tokens=len(rows), num_input_tokens=len(rows),
        max_query_len=int(counts.max()), max_seq_len=int(lengths.max()), actual_seq_lengths_q=begins[1:].tolist(),
        block_table_tensor=common.block_table_tensor[on_device], slot_mapping=common.slot_mapping[rows_on_device],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[on_host],
        positions=None if common.positions is None else common.positions[..., rows_on_device], graph_pad_size=-1,
    )  # fmt: skip
    for remembered in ("_num_computed_tokens_cache", "_token_to_req_indices_cache"):
        if hasattr(common, remembered):
            changes[remembered] = None
    return rows_on_device, common.replace(**changes)


@functools.cache
def sparse_backend(backend: type) -> type:
    """The subclass of vLLM-Ascend's backend. Raises ValueError where it is another one than was read."""
    check_backend(backend)
    base_builder, base_impl = backend.get_builder_cls(), backend.get_impl_cls()

    class Builder(base_builder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            layers = self.vllm_config.compilation_config.static_forward_context
            self._dense_below = layers[self.layer_names[0]].npu_sparse.attached.budget.dense_below

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, type(support).UNIFORM_BATCH, key=lambda one: one.value)

        def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            build_dense = functools.partial(base_builder.build, self, 0)
            metadata.npu_sparse = make_plan(common_attn_metadata, self._dense_below, build_dense)
            return metadata

    class Impl(base_impl):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None, *args, **kwargs):
            dense, plan = super().forward, getattr(attn_metadata, "npu_sparse", None)
            if plan is None:
                return dense(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            # what runs dense is written once more below, with the same values
            self.reshape_and_cache(query, key, value, kv_cache, attn_metadata, output)
            run_plan(plan, lambda *inputs: dense(*inputs, *args, **kwargs), layer, query, key, value, kv_cache, output)
            return output

    class Sparse(backend):
        get_builder_cls = staticmethod(lambda: Builder)
        get_impl_cls = staticmethod(lambda: Impl)

    for cls, base in ((Builder, base_builder), (Impl, base_impl), (Sparse, backend)):
        cls.__name__ = cls.__qualname__ = f"NpuSparse{base.__name__}"
    return Sparse
