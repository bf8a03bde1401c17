"""The operators of sparse prefill, of distillation and of the layers around full attention (`ops.hybrid`), their references and
the dispatcher seam."""

from .. import ascendc
from . import dispatch
from .attention_mass import attention_mass
from .dense_rows import dense_rows
from .dispatch import KernelUnavailableError
from .index_heads import index_heads
from .index_kl import index_kl
from .index_scores import index_partition, index_scores, select_by_index
from .select_tokens import select_tokens
from .select_two_level import select_two_level
from .sparse_attention import sparse_attention
from .sparse_attention_with_tail import sparse_attention_with_tail

# isort: split
from . import hybrid  # last: where no kernel is there, the sentence names an operator of sparse prefill

for _device_type in ascendc.TARGETS.values():
    dispatch.register_loader(_device_type, lambda device_type=_device_type: ascendc.load_if_built(device_type))

__all__ = [
    "KernelUnavailableError",
    "attention_mass",
    "dense_rows",
    "hybrid",
    "index_heads",
    "index_kl",
    "index_partition",
    "index_scores",
    "select_by_index",
    "select_tokens",
    "select_two_level",
    "sparse_attention",
    "sparse_attention_with_tail",
]
