"""The AscendC kernels as a shared library: built once for the host emulation or for the card, and loaded.

The sources are one directory, `ops/` of a checkout. The cache keeps a library under a name made from its sources, torch and
compiler, so that a stale one is never loaded. A library that is incomplete, or that another user could have written, is not
loaded either (`compiled`). Nothing heavy is imported before a library is loaded, because the doctor asks here too.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from . import cann, compiled
from .checkpoints import cache_dir
from .errors import ActionableError

TARGETS = {"emulated": "cpu", "npu": "npu"}  # target -> the device type that its library serves
OPERATORS = ("index_scores", "index_partition", "select_tokens", "select_by_index", "sparse_attention", "attention_mass")
OF_ANOTHER_KERNEL = ("dense_rows",)  # operators that sparse_attention's kernel serves
SERVED = (*OPERATORS, *OF_ANOTHER_KERNEL)
SOURCES = Path(__file__).resolve().parent / "ascendc_sources"
_SOURCE_SUFFIXES = (".h", ".cpp")
# torch's headers want C++20; a kernel is C++17, like everything that CANN's compiler reads
_BINDING = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
_EMULATION = ["-std=c++17", "-O2", "-fPIC", "-pthread"]
# The kernels synchronise their own instructions. What bisheng adds by default would use the same event ids and cost time. The
# emulation checks every hazard without it.
_KERNELS = ["-x", "asc", f"--npu-arch={cann.ARCHITECTURE}", "-std=c++17", "-O3", "--cce-auto-sync=off", "-shared", "-fPIC"]
_TASK_TYPE_MACRO = "-DNPU_SPARSE_TASK_TYPE_MACRO"  # for versions of CANN older than the attribute `__mix__`


class BuildError(ActionableError, RuntimeError):
    """A library that cannot be built; the message says what is missing and where it was looked for."""


def library(target: str) -> Path:
    """Where the library of these sources, this torch and this compiler (or CANN) is kept, built or not."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    made_of = hashlib.sha256()
    of_npu = (_version("torch-npu"), cann.installed_version()) if target == "npu" else ()
    for part in (target, _version("torch"), *of_npu, platform.machine()):
        made_of.update(f"{part}\n".encode())
    for flags in (_BINDING, _EMULATION, _KERNELS):
        made_of.update(" ".join(flags).encode())
    for path in _source_files():
        made_of.update(f"{path.relative_to(SOURCES)}\n".encode() + path.read_bytes())
    return cache_dir() / "native" / f"{target}-{made_of.hexdigest()[:16]}" / f"libnpu_sparse_{target}.so"


def build(target: str, report: Callable[[str], object] = print) -> Path:
    """The built library of a target, compiled if need be; two processes that ask at once compile it once.

    `report` is called with a line for every step. Raises BuildError where a compiler, a header or a library is missing, or a
    compiler fails.
    """
    path = library(target)
    if not _misfit(path):
        report(f"{path} is up to date")
        return path
    if reason := compiled.unsafe(path.parent):
        raise BuildError(reason)
    commands, link = _COMMANDS[target](path.parent)
    with _locked(path.parent):
        if why := _misfit(path):
            if path.exists():
                report(f"{path} {why}: it is built again")
            report(f"compiling the AscendC kernels for {target} ({len(commands)} files, up to a few minutes)")
            _run_all(commands)
            unfinished = path.with_suffix(f".{os.getpid()}")
            _run_all([[*link, "-o", str(unfinished)]])
            for beside in set(path.parent.glob("*.so")) - {path}:  # libraries that it links with
                compiled.keep(beside, beside)
            compiled.keep(unfinished, path)
            for made in path.parent.glob("*.o"):
                made.unlink()
    report(f"built {path}")
    return path


def load(target: str) -> dict[str, Callable]:
    """Loads the built library of a target: its kernel of every operator, and `selection_refusal`, which checks limits before a
    selection.

    Raises BuildError where it is not built, or not for the card that is there.
    """
    import torch

    path = library(target)
    if why := _misfit(path):
        wrong = f"must not be loaded, because it {why}" if path.exists() else "is not built"
        raise BuildError(f"the {target} library {wrong}: run `npu-sparse build {target}` (it is kept at {path})")
    torch.ops.load_library(path)
    namespace = getattr(torch.ops, f"npu_sparse_{target}")
    if refusal := cann.unserved(namespace.soc_name()):
        raise BuildError(refusal)
    return {name: getattr(namespace, name).default for name in (*SERVED, "selection_refusal")}


def load_if_built(device_type: str) -> dict[str, Callable]:
    """The kernels of the library that serves this device type; none where it is not built."""
    built = [target for target, served in TARGETS.items() if served == device_type and not _misfit(library(target))]
    return load(built[0]) if built else {}


def state(target: str) -> str | None:
    """Why the library of a target cannot be loaded as it is, in words that follow "its library"; None where it can."""
    path = library(target)
    return _misfit(path) if path.exists() else "is not built"


def _misfit(path: Path) -> str | None:
    """Why a library, or one that it is linked with, must not be loaded."""
    others = sorted(set(path.parent.glob("*.so")) - {path})
    return next((why for each in (path, *others) if (why := compiled.misfit(each))), None)


def missing_for(target: str) -> str | None:
    """Why this machine cannot build a target, in one sentence; None where it can."""
    try:
        _COMMANDS[target](Path())
    except BuildError as error:
        return str(error)
    return None


def _emulated_commands(out: Path) -> tuple[list[list[str]], list[str]]:
    gxx, torch = _gxx(), _package("torch")
    headers = [f"-I{SOURCES / folder}" for folder in ("emulation", "ascendc", "torch")]
    commands = [_binding_command(gxx, torch, out, "emulated")]
    for op in OPERATORS:  # the same source for every kernel, whose header comes in front of it
        kernel = [f"-DNPU_SPARSE_OPERATOR={op}", "-include", f"{op}/{op}.h"]
        source = str(SOURCES / "torch/launch_emulated.cpp")
        commands.append([gxx, *_EMULATION, *headers, *kernel, "-c", source, "-o", str(out / f"{op}.o")])
    objects = [str(out / f"{name}.o") for name in ("binding", *OPERATORS)]
    return commands, [gxx, "-shared", "-pthread", *objects, *_torch_libraries(torch)]


def _npu_commands(out: Path) -> tuple[list[list[str]], list[str]]:
    gxx, torch, toolkit = _gxx(), _package("torch"), _cann()
    torch_npu = _package("torch_npu")
    root = toolkit.root
    headers = [f"-I{folder}" for folder in (torch_npu / "include", torch_npu / "include/third_party/acl/inc", root / "include")]
    kernels = out / "libnpu_sparse_kernels.so"
    older = [] if toolkit.has_attributes else [_TASK_TYPE_MACRO]
    commands = [
        [*_binding_command(gxx, torch, out, "npu"), "-DNPU_SPARSE_ON_CARD", *headers],
        [gxx, *_BINDING, f"-I{SOURCES / 'ascendc'}", *headers, "-c", str(SOURCES / "torch/card.cpp"), "-o", str(out / "card.o")],
        [str(toolkit.bisheng), *_KERNELS, *older, f"-I{SOURCES / 'ascendc'}", f"-I{root / 'include'}",
         str(SOURCES / "torch/launch_npu.cpp"), f"-L{root / 'lib64'}", "-lascendcl", "-o", str(kernels)],
    ]  # fmt: skip
    objects = [str(out / "binding.o"), str(out / "card.o")]
    libraries = [str(kernels), f"-L{torch_npu / 'lib'}", "-ltorch_npu", f"-L{root / 'lib64'}", "-lascendcl"]
    return commands, [gxx, "-shared", *objects, *_torch_libraries(torch), *libraries]


_COMMANDS = {"emulated": _emulated_commands, "npu": _npu_commands}  # what compiles a target's objects, and what links them


def _binding_command(gxx: str, torch: Path, out: Path, target: str) -> list[str]:
    headers = [f"-I{torch / 'include'}", f"-I{SOURCES / 'ascendc'}"]
    source, namespace = SOURCES / "torch" / "binding.cpp", f"-DNPU_SPARSE_NAMESPACE=npu_sparse_{target}"
    return [gxx, *_BINDING, namespace, *headers, "-c", str(source), "-o", str(out / "binding.o")]


def _torch_libraries(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]


def _gxx() -> str:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"no C++ compiler: {name} is not in PATH ({os.environ.get('PATH', '')}); install g++ or set CXX")
    return path


def _cann() -> cann.Toolkit:
    try:
        cann.check_cards()
        return cann.find()
    except cann.CannError as error:
        raise BuildError(str(error)) from error


def _package(name: str) -> Path:
    """The directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed: its headers and libraries are needed to build")
    return Path(spec.submodule_search_locations[0])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source_files() -> list[Path]:
    """Every file that a library is compiled from, in a fixed order."""
    folders = ("ascendc", "emulation/emulation", "emulation", "torch")
    files = {
        path for folder in folders for path in (SOURCES / folder).glob("*" if folder == "emulation" else "**/*")
        if path.suffix in _SOURCE_SUFFIXES and "tests" not in path.relative_to(SOURCES).parts
    }  # fmt: skip
    return sorted(files)


def _run_all(commands: list[list[str]]) -> None:
    """Runs the commands side by side; raises BuildError with the first one's output that fails."""
    pending, running = list(commands), []
    cores = len(os.sched_getaffinity(0))
    try:
        while pending or running:
            while pending and len(running) < cores:
                command = pending.pop(0)
                running.append((command, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
            command, process = running.pop(0)
            output, _ = process.communicate()
            if process.returncode:
                raise BuildError(f"{' '.join(command)}\n{output}failed with status {process.returncode}")
    finally:
        for _, process in running:
            process.kill()
            process.communicate()


@contextmanager
def _locked(directory: Path):
    """One process at a time per directory; the system releases the lock of a process that dies."""
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
