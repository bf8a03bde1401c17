"""Learned sparse prefill: oracle, distilled indexer, and sparse attention kernels behind one interface.

Importing this package imports nothing else; the names below load their modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_sparse.budget import Budget
    from npu_sparse.indexer import Indexer, IndexerConfig
    from npu_sparse.models.hybrid import FastHybrid
    from npu_sparse.prefill import SparsePrefill
    from npu_sparse.support import Support

__version__ = "0.1.0"
__all__ = ["Budget", "FastHybrid", "Indexer", "IndexerConfig", "SparsePrefill", "Support", "__version__"]

_MODULE_OF = {
    "Budget": "budget",
    "FastHybrid": "models.hybrid",
    "Indexer": "indexer",
    "IndexerConfig": "indexer",
    "SparsePrefill": "prefill",
    "Support": "support",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
