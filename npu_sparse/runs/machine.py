"""What a figure was measured on: processor or card, versions, commit."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(device: str = "cpu") -> dict:
    """What a figure was measured on: processor or card, versions, commit and whether the tree was changed.

    Where the tree travels without its history, `NPU_SPARSE_COMMIT` says which commit it is.
    """
    stated = os.environ.get("NPU_SPARSE_COMMIT")
    found = {
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
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    if device.startswith("cuda"):
        import torch

        found["card"] = torch.cuda.get_device_name(device)
    return found


def machine_line(found: dict) -> str:
    """One sentence of `machine()` for a caption."""
    where = found.get("card") or f"{found['processor']}, {found['cores']} cores"
    commit = f"{found['commit'] or 'unknown'}{'+changes' if found['dirty'] else ''}"
    return f"{where}; torch {found.get('torch')}, transformers {found.get('transformers')}; commit {commit}; {found['date']}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
