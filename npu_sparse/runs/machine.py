"""The machine that a figure was measured on: processor or card, versions, commit."""

import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORM = {"processor": str, "cores": (int, None), "commit": str, "dirty": bool, "date": str}  # how a record keeps `machine()`


def machine(device: str = "cpu") -> dict:
    """The machine that a figure is measured on: processor or card, versions, commit and whether the tree was changed.

    The commit is this project's: "" where the package is installed, whatever repository that installation lies in. Where the tree
    travels without its history, `NPU_SPARSE_COMMIT` says which commit it is.
    """
    stated = os.environ.get("NPU_SPARSE_COMMIT")
    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "commit": stated or _git("rev-parse", "--short=12", "HEAD"),
        "dirty": not stated and bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for package in ("torch", "transformers", "triton", "npu-sparse", "fla-core", "fa3-fwd"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            pass
    if device.startswith("cuda"):
        import torch

        facts["card"] = torch.cuda.get_device_name(device)
    return facts


@cache
def fast_dtype(device: str = "cpu") -> str:
    """"bfloat16", or "float32" on a processor that is not faster in bfloat16, where it can be tens of times slower.

    One small product in each dtype decides, once a process, because a processor's flags do not say whether a library uses them.
    """
    if not device.startswith("cpu"):
        return "bfloat16"
    import torch

    took = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            samples = []
            for _ in range(5):
                started = time.perf_counter()
                a @ b
                samples.append(time.perf_counter() - started)
            took[dtype] = min(samples)
    return "bfloat16" if took[torch.bfloat16] <= took[torch.float32] else "float32"


def chosen_dtype(dtype: str, device: str) -> str:
    """The dtype of a config: `fast_dtype` of its device where it says "auto"."""
    return fast_dtype(device) if dtype == "auto" else dtype


def machine_line(facts: dict) -> str:
    """One sentence of `machine()` for a caption."""
    where = facts.get("card") or f"{facts['processor']}, {facts['cores']} cores"
    commit = f"{facts['commit'] or 'unknown'}{'+changes' if facts['dirty'] else ''}"
    return f"{where}; torch {facts.get('torch')}, transformers {facts.get('transformers')}; commit {commit}; {facts['date']}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _is_project(root: Path) -> bool:
    """Whether a folder is the root of this project's own repository."""
    try:
        named = re.search(r'^name = "npu-sparse"$', (root / "pyproject.toml").read_text(), re.M)
    except (OSError, ValueError):
        return False
    return bool(named) and (root / ".git").exists()


def _git(*args: str) -> str:
    if not _is_project(ROOT):
        return ""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
