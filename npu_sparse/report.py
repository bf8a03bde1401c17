"""Run directories and reports: config.json first, everything written atomically, every figure with its config and machine."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class RunError(ValueError):
    """An output directory that cannot be used: unwritable, or already holding something else."""


def open_run(directory, config: dict) -> Path:
    """The directory of a run, with `config` in config.json.

    A new or empty directory is made and config.json written first. A directory of the same config is resumed. Anything else
    is refused with RunError: nothing is ever mixed or overwritten.
    """
    directory = Path(directory)
    config = json.loads(json.dumps(config))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise RunError(f"output directory {directory} must be writable ({error.strerror})") from error
    path = directory / "config.json"
    if not path.exists():
        if entries:
            raise RunError(f"output directory {directory} must be empty or hold an earlier run, found {sorted(entries)[0]!r}")
        write_json(path, config)
        return directory
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"output directory {directory}: config.json cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise RunError(f"output directory {directory}: config.json cannot be read (it holds no object)")
    if found != config:
        keys = [key for key in {**found, **config} if found.get(key, ...) != config.get(key, ...)]
        change = ", ".join(f"{key} = {found.get(key)!r} there, {config.get(key)!r} now" for key in sorted(keys)[:3])
        raise RunError(f"output directory {directory} holds another run ({change}): choose another directory")
    return directory


def replace_files(files: dict[Path, bytes]) -> None:
    """Writes files so that a reader sees the old content or all of the new: none is replaced before all are on the disk.

    OSError passes through; the old files are whole then, and nothing else is left behind.
    """
    written = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            with open(written[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def write_bytes(path, data: bytes) -> None:
    """`replace_files` of one file. Raises RunError where that fails."""
    try:
        replace_files({Path(path): data})
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror})") from error


def write_text(path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path, value) -> None:
    """`write_bytes` of indented JSON; NaN and infinities are refused, they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_figure(path, figure) -> None:
    """`write_bytes` of a matplotlib figure as PNG, 144 dpi."""
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())


def new_figure(columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 3.6):
    """`(figure, axes array [rows, columns])` on a headless canvas, in the house look."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(True, alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


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


def markdown_table(rows: list[dict], columns: dict[str, str] | None = None) -> str:
    """A markdown table of dicts; `columns` maps keys to headings, in order. Floats show 4 significant digits."""
    columns = columns or {key: key for key in rows[0]}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def say(message: str) -> None:
    """One line for the person who waits, on stderr."""
    print(message, file=sys.stderr, flush=True)
