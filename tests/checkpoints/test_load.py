"""Loading a checkpoint by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError

ROOT = Path(checkpoints.__file__).parent.parent.parent


def test_import_is_cheap():
    script = "import npu_sparse.checkpoints, sys; print({'torch', 'transformers', 'numpy', 'rich'} & {*sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", script], env=env, text=True).strip() == "set()"


def test_hub_id_that_transformers_cannot_load_is_explained(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def from_pretrained(name, **options):
        assert (name, options) == ("someone/nothing", {"dtype": "bfloat16"})  # passed on unchanged
        raise OSError("someone/nothing is not a local folder\nand more lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"cannot load 'someone/nothing' \(someone/nothing is not a .* folder\)"):
        checkpoints.load("someone/nothing", progress=False)
