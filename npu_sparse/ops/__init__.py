"""The four operators, their references and the dispatcher seam."""

from .attention_mass import attention_mass
from .dispatch import KernelUnavailableError
from .index_scores import index_scores, select_by_index
from .select_tokens import select_tokens
from .select_two_level import select_two_level
from .sparse_attention import sparse_attention

__all__ = [
    "KernelUnavailableError",
    "attention_mass",
    "index_scores",
    "select_by_index",
    "select_tokens",
    "select_two_level",
    "sparse_attention",
]
