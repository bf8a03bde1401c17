"""The attention backend that vLLM selected, with requests that run sparse.

A subclass of whichever it is, and its instances swapped layer by layer, because not every platform honours a selection of one's
own: the CPU's and Ascend's ignore it.
"""

import functools

from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport

from . import ascend
from .plan import make_plan, run_plan
from .refusals import check_pages


@functools.cache
def sparse_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The subclass of an attention backend. Raises ValueError where its pages cannot be read."""
    if ascend.owns(backend):
        return ascend.sparse_backend(backend)
    check_pages(backend.get_name(), None)
    base_builder, base_impl = backend.get_builder_cls(), backend.get_impl_cls()

    class Builder(base_builder):
        supports_update_block_table = False  # a copy of the metadata with another block table would keep the old one's plan

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            isa = getattr(self, "isa", None)  # of a CPU
            check_pages(backend.get_name(), isa)
            layers = self.vllm_config.compilation_config.static_forward_context
            for name in self.layer_names:
                layers[name].npu_sparse.isa = isa
            self._attached = layers[self.layer_names[0]].npu_sparse.attached

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            # A full graph of a mixed batch would hold the support of the batch that it was captured with.
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda one: one.value)

        def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            build_dense = functools.partial(base_builder.build, self, 0)
            metadata.npu_sparse = make_plan(
                common_attn_metadata, self._attached.budget.dense_below, build_dense, self._attached.prompts.of_batch
            )
            return metadata

    class Impl(base_impl):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            dense, plan = super().forward, getattr(attn_metadata, "npu_sparse", None)
            if plan is None:
                return dense(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            run_plan(plan, lambda *inputs: dense(*inputs, *args, **kwargs), layer, query, key, value, kv_cache, output)
            return output

    class Sparse(backend):
        get_builder_cls = staticmethod(lambda: Builder)
        get_impl_cls = staticmethod(lambda: Impl)

    for cls, base in ((Builder, base_builder), (Impl, base_impl), (Sparse, backend)):  # layers are grouped by these names
        cls.__name__ = cls.__qualname__ = f"NpuSparse{base.__name__}"
    return Sparse
