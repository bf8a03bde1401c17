"""The seam to model loading: vLLM's own loader of the checkpoint, and then `attach`."""

import copy

from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from . import versions
from .options import Options

LOAD_FORMAT = "npu_sparse"


class SparseLoader(BaseModelLoader):
    """Loads a checkpoint as vLLM would, and makes its prefill sparse."""

    def __init__(self, load_config):
        super().__init__(load_config)
        versions.check(versions.installed())
        self.options = Options.parse(load_config.model_loader_extra_config)
        inner = copy.copy(load_config)
        inner.load_format, inner.model_loader_extra_config = self.options.load_format, {}
        self.inner = get_model_loader(inner)
        self.vllm_config = self.attached = None

    def download_model(self, model_config):
        self.inner.download_model(model_config)

    def load_model(self, vllm_config, model_config, prefix=""):
        from .attach import prepare

        self.vllm_config, self.attached = vllm_config, prepare(vllm_config, self.options)
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model, model_config):
        from .attach import attach, check_weights

        if self.attached is None:
            raise ValueError("weights must be loaded by load_model for sparse prefill, got load_weights alone")
        self.inner.load_weights(model, model_config)
        check_weights(self.vllm_config, self.attached.indexer)
        attach(model, self.vllm_config, self.attached)


def register_loader() -> None:
    """Adds the load format, once."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known

    if LOAD_FORMAT not in known:
        register_model_loader(LOAD_FORMAT)(SparseLoader)
