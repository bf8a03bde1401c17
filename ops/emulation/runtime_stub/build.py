"""Builds the runtime stub into a directory: `python build.py DIRECTORY`, with the Python that has torch and torch_npu.

The directory then goes into LD_LIBRARY_PATH, before torch is imported.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
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


def compile_into(path: Path, command: list[str], sources: list[str]) -> None:
    if path.exists() and all(path.stat().st_mtime > Path(source).stat().st_mtime for source in sources):
        return
    print(path)
    subprocess.run([*command, "-o", str(path)], check=True)


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


if __name__ == "__main__":
    main(sys.argv[1])
