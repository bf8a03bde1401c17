"""Builds the runtime stub into a directory: `python build.py DIRECTORY`, with the Python that has torch and torch_npu.

The directory then goes into LD_LIBRARY_PATH, before torch is imported.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPS = HERE.parent.parent
EMPTY = ("libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")  # they find it all in libascendcl


def main(directory: str) -> None:
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    torch, torch_npu = package("torch"), package("torch_npu")
    shared = ["g++", "-O1", "-Wall", "-shared", "-fPIC"]
    acl = [str(HERE / name) for name in ("acl.cpp", "unsupported.cpp")]
    headers = f"-I{torch_npu / 'include/third_party/acl/inc'}"
    compile_into(out / "libascendcl.so", [*shared, "-std=c++17", headers, *acl, "-Wl,-soname,libascendcl.so"], acl)
    for name in EMPTY:
        linked = ["-x", "c++", "/dev/null", f"-Wl,-soname,{name}.so", "-Wl,--no-as-needed", f"-L{out}", "-lascendcl"]
        compile_into(out / f"{name}.so", [*shared, *linked], [])
    fallback = str(HERE / "cpu_fallback.cpp")
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [*shared, "-std=c++20", f"-I{torch / 'include'}", fallback, *libraries]
    compile_into(out / "libnpu_cpu_fallback.so", command, [fallback])
    compile_into(out / "libnpu_sparse_card.so", card_commands(out, torch, torch_npu, shared), [*map(str, card_sources())])


def card_sources() -> list[Path]:
    return [path for folder in ("ascendc", "emulation/emulation", "torch") for path in (OPS / folder).rglob("*.[ch]*")]


def card_commands(out: Path, torch: Path, torch_npu: Path, shared: list[str]) -> list[list[str]]:
    """The binding and the host code of the library for the card, over the emulated kernels in place of bisheng's."""
    kept = (OPS / "ascendc", OPS / "torch", torch / "include", torch_npu / "include", torch_npu / "include/third_party/acl/inc")
    headers = [f"-I{folder}" for folder in kept]
    defined = ["-DNPU_SPARSE_NAMESPACE=npu_sparse_card", "-DNPU_SPARSE_ON_CARD"]
    commands, objects = [], []
    for name in ("binding", "card"):
        objects.append(str(out / f"{name}.o"))
        host = ["g++", "-O1", "-fPIC", "-std=c++20", "-fvisibility=hidden", *defined, *headers, "-c"]
        commands.append([*host, str(OPS / "torch" / f"{name}.cpp"), "-o", objects[-1]])
    for op in ("index_scores", "index_partition", "select_tokens", "select_by_index", "sparse_attention", "attention_mass"):
        objects.append(str(out / f"{op}.o"))
        kernel = ["g++", "-O1", "-fPIC", "-std=c++17", "-pthread", f"-I{OPS / 'emulation'}", *headers[:2]]
        named = [f"-DNPU_SPARSE_OPERATOR={op}", "-include", f"{op}/{op}.h", "-c", str(OPS / "torch/launch_emulated.cpp")]
        commands.append([*kernel, *named, "-o", objects[-1]])
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-L{torch_npu / 'lib'}", "-ltorch_npu", f"-L{out}"]
    return [*commands, [*shared, "-pthread", *objects, *libraries, "-lascendcl"]]


def compile_into(path: Path, command: list, sources: list[str]) -> None:
    """Runs a command, or several of which the last one makes the file, unless the file is newer than its sources."""
    if path.exists() and all(path.stat().st_mtime > Path(source).stat().st_mtime for source in sources):
        return
    print(path)
    *before, last = command if isinstance(command[0], list) else [command]
    for step in before:
        subprocess.run(step, check=True)
    subprocess.run([*last, "-o", str(path)], check=True)


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


if __name__ == "__main__":
    main(sys.argv[1])
