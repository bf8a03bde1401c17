"""What a figure was measured on: processor or card, versions, commit."""

import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORM = {"processor": str, "cores": (int, None), "commit": str, "dirty": bool, "date": str}  # of `machine()`, as a record has it


def machine(device: str = "cpu") -> dict:
    """What a figure was measured on: processor or card, versions, commit and whether the tree was changed.

    The commit is this project's: "" where the package is installed, whatever repository that installation lies in. Where the tree
    travels without its history, `NPU_SPARSE_COMMIT` says which commit it is.
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
