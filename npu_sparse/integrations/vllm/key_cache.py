"""Index keys in pages of vLLM's own block manager, one vector a token and layer, replicated over tensor-parallel ranks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from . import ascend, pages


@dataclass(frozen=True, eq=False)
class KeyPages:
    """Where the index keys of a batch lie: int32 `[requests, pages]`, and a slot for every token."""

    block_table: Tensor
    slot_mapping: Tensor


class KeyPagesBuilder(AttentionMetadataBuilder[KeyPages]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH  # the default, NEVER, would take the graphs from the whole model

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return KeyPages(common_attn_metadata.block_table_tensor, common_attn_metadata.slot_mapping)


class KeyPagesBackend(AttentionBackend):
    """Says how the pages of index keys are shaped; nothing attends through it."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name():
        return "NPU_SPARSE_INDEX"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("index keys have no attention of their own")

    @staticmethod
    def get_builder_cls():
        return KeyPagesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(1)]

    # Since vLLM 0.32 the runner shapes pages itself; before, it asks for these two.
    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return num_blocks, block_size, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension=False):
        if include_num_layers_dimension:
            raise NotImplementedError("pages of index keys are not stacked over layers")
        return 0, 1, 2


class IndexKeys(nn.Module, AttentionLayerBase):
    """The index keys of one layer. The block manager gives it pages as it does to attention layers, so that a block that is
    shared, evicted or freed takes its index keys along."""

    def __init__(self, name: str, dim: int, vllm_config):
        super().__init__()
        self.dim, self.dtype = dim, vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])
        self.on_ascend = ascend.serves(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"layer name must be given once, got {name} again")
        layers[name] = self

    def get_attn_backend(self):
        return ascend.key_pages_backend(KeyPagesBackend) if self.on_ascend else KeyPagesBackend

    def get_kv_cache_spec(self, vllm_config):
        if self.on_ascend:
            return ascend.index_spec(vllm_config.cache_config.block_size, self.dim, self.dtype)
        given = dict(block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.dim, dtype=self.dtype)
        known = {field.name for field in fields(MLAAttentionSpec)}
        if "max_tp_shards" in known:
            given["max_tp_shards"] = 1
        if "cache_role" in known:
            from vllm.v1.kv_cache_interface import SparseCacheRole

            given["cache_role"] = SparseCacheRole.INDEXER
        return MLAAttentionSpec(**given)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache

    @property
    def pages(self) -> Tensor:
        """`[pages, tokens, dim]`, whether the runner gives them a head or not."""
        held = self.kv_cache[0] if isinstance(self.kv_cache, tuple) else self.kv_cache
        return held.squeeze(1) if held.ndim == 4 else held

    def forward(self): ...

    def write(self, keys: Tensor, metadata: KeyPages) -> None:
        """Keeps the index keys `[T, dim]` of a batch."""
        pages.write_keys(self.pages, keys, metadata.slot_mapping)

    def read(self, metadata: KeyPages, row: int, length: int) -> Tensor:
        """`[1, length, dim]` of one request."""
        return pages.read_keys(self.pages, metadata.block_table[row], length)
