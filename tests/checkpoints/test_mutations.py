"""Damaged adapters and GGUF files: each loads, or is refused in one sentence with its name, within seconds.

Every file is made from a seed, so that a failure names what makes it again. The default run is a sample; the files marked
exhaustive are 1,000 of either kind.
"""

import hashlib
import json
import random
import shutil
import signal
import struct
import time

import pytest
import torch

from npu_sparse import Indexer, checkpoints
from npu_sparse.checkpoints import CheckpointError
from npu_sparse.indexer import AdapterError
from npu_sparse.testing import tiny_model

LIMIT_S = 10
NUMBERS = [0, 1, 2, 7, 8, 9, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    None, True, False, -1, 0, 1, 1.5, 1e308, 2**31, 2**63, 10**400, 300000, "", "a.b", "x" * 5000, "\ud800", [], [[]], {},
    {"a": {}}, ["a.b"], [0, 0], [None], [True], {"": 0}, "distilled",
]  # fmt: skip


class Hang(BaseException):
    """No Exception, so that no boundary takes it for the file's fault."""


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(max(1, min(len(data), rng.choice((64, 512, 4096, len(data))))))  # headers more often than weights
        size = rng.choice((1, 2, 4, 8, 16, 200))
        how = rng.randrange(8)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + size]
        elif how == 3:
            data[at:at] = rng.randbytes(size)
        elif how == 4:
            data[at : at + size] = bytes(size)
        elif how == 5:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif how == 6:
            data[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        else:
            other = rng.randrange(max(1, len(data)))
            data[at : at + size] = data[other : other + size]
    return bytes(data)


def mutated_json(value, rng: random.Random):
    """The value with one of its nodes replaced, removed, added to or nested."""
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if children and rng.random() < 0.8:
        key, child = rng.choice(children)
        value = value.copy()
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutated_json(child, rng)
        return value
    if isinstance(value, dict) and rng.random() < 0.3:
        return {**value, rng.choice(("colour", "", "layers", "k")): rng.choice(VALUES)}
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 64, 2**20))
    return rng.choice(VALUES)


def outcome(load, seed: int, name: str, error: type[Exception]) -> bool:
    """Whether it loads; fails where it neither loads nor is refused in a sentence, or takes too long."""
    def hang(*_):
        raise Hang(f"seed {seed} takes more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT_S)
    try:
        load()
        return True
    except error as refused:
        said = str(refused)
        assert "\n" not in said and len(said) < 1000 and name in said, (seed, said)
        return False
    except Exception as leaked:
        raise AssertionError(f"seed {seed} gives a traceback: {leaked!r}") from leaked
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from npu_sparse import Budget

    indexer = Indexer.for_model(tiny_model("llama"), heads=2, dim=64)
    indexer.evidence, indexer.budget = "distilled", Budget(k={0: 16, 64: 32}, block=8, per_layer={1: 64}).to_dict()
    return indexer.save_pretrained(tmp_path_factory.mktemp("mutated") / "whole")


def try_adapters(adapter, tmp_path, seeds) -> int:
    config, weights = json.loads((adapter / "config.json").read_text()), (adapter / "model.safetensors").read_bytes()
    loaded = 0
    for seed in seeds:
        rng = random.Random(seed)
        directory = tmp_path / "mutated"
        shutil.copytree(adapter, directory)
        changed = dict(config)
        if seed % 2:
            data = mutated_bytes(weights, rng)
            (directory / "model.safetensors").write_bytes(data)
            changed["weights_sha256"] = hashlib.sha256(data).hexdigest()  # so that the parser meets it
            text = json.dumps(changed)
        else:
            text = json.dumps(mutated_json(changed, rng))
        data = text.encode(errors="surrogatepass")
        if seed % 10 == 8:
            data = mutated_bytes(data, rng)
        if seed % 50 == 4:
            data = data.replace(b": ", b": " + b"[" * 50_000, 1)
        (directory / "config.json").write_bytes(data)

        def load(directory=directory):
            indexer = Indexer.from_pretrained(directory)
            assert all(bool(parameter.isfinite().all()) for parameter in indexer.parameters())

        loaded += outcome(load, seed, "mutated", AdapterError)
        shutil.rmtree(directory)
    return loaded


@pytest.fixture(scope="module")
def gguf_bytes(gguf_file):
    return gguf_file[0].read_bytes()


def try_ggufs(data, tmp_path, monkeypatch, seeds) -> int:
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    loaded = 0
    for seed in seeds:
        file = tmp_path / "mutated.gguf"
        file.write_bytes(mutated_bytes(data, random.Random(seed)))
        loaded += outcome(lambda file=file: checkpoints.prepare(file, progress=False), seed, "mutated.gguf", CheckpointError)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    return loaded


def test_mutated_adapters_load_or_are_refused_in_a_sentence(adapter, tmp_path):
    assert 0 < try_adapters(adapter, tmp_path, range(150)) < 100  # some mutations are harmless, most are not


def test_mutated_gguf_files_load_or_are_refused_in_a_sentence(gguf_bytes, tmp_path, monkeypatch):
    started, seeds = time.monotonic(), []
    for seed in range(40):  # as many as fit: a conversion takes 0.1 s of one core that may be shared
        seeds.append(seed)
        try_ggufs(gguf_bytes, tmp_path, monkeypatch, [seed])
        if time.monotonic() - started > LIMIT_S:
            break
    assert len(seeds) >= 5


@pytest.mark.exhaustive
def test_a_thousand_mutated_adapters(adapter, tmp_path):
    assert 0 < try_adapters(adapter, tmp_path, range(1000, 2000)) < 700


@pytest.mark.exhaustive
def test_a_thousand_mutated_gguf_files(gguf_bytes, tmp_path, monkeypatch):
    assert 0 < try_ggufs(gguf_bytes, tmp_path, monkeypatch, range(1000, 2000)) < 700


@pytest.mark.parametrize(("hidden_size", "layers"), [(300_000, [0]), (100_000, list(range(1000)))])
def test_a_geometry_is_refused_before_anything_is_allocated(adapter, tmp_path, monkeypatch, hidden_size, layers):
    directory = tmp_path / "mutated"
    shutil.copytree(adapter, directory)
    config = json.loads((directory / "config.json").read_text())
    config["indexer"] |= {"hidden_size": hidden_size, "heads": 64, "layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    made, real = set(), torch.nn.init.kaiming_uniform_

    def initialise(tensor, *args, **options):
        made.add(tensor.device.type)
        return real(tensor, *args, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", initialise)
    with pytest.raises(AdapterError, match="weights do not fit config.json"):
        Indexer.from_pretrained(directory)
    assert made <= {"meta"}
