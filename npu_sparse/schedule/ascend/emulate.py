"""Runs generated AscendC kernels on the project's host emulation, which g++ compiles: for tests and for modelled times."""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npu_sparse.schedule.ascend.kernel import Kernel

LETTERS = {"read": "r", "write": "w", "readwrite": "b", "workspace": "k"}


@dataclass(frozen=True)
class Program:
    """Compiled kernels, by name."""

    path: Path
    kernels: dict[str, Kernel]

    def run(self, name: str, arrays: dict[str, np.ndarray], scalars=(), blocks: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
        """The arrays that the kernel writes, by name, in the shapes of `arrays`.

        RuntimeError with the emulation's message for a kernel that breaks a rule.
        """
        self._launch(name, arrays, scalars, blocks, seed, trace=False)
        return {
            argument.name: np.fromfile(self.path.parent / f"{n}.bin", np.float32).reshape(arrays[argument.name].shape)
            for n, argument in enumerate(self.kernels[name].arguments)
            if argument.use in ("write", "readwrite")
        }

    def trace(self, name: str, arrays: dict[str, np.ndarray], scalars=(), blocks: int = 1) -> dict:
        """The instruction stream of the kernel, for npu_sparse.measure.npu_cost."""
        self._launch(name, arrays, scalars, blocks, seed=0, trace=True)
        return json.loads((self.path.parent / "trace.json").read_text())

    def _launch(self, name: str, arrays: dict[str, np.ndarray], scalars, blocks: int, seed: int, trace: bool) -> None:
        kernel, folder = self.kernels[name], self.path.parent
        for n, argument in enumerate(kernel.arguments):
            if argument.use in ("read", "readwrite"):
                arrays[argument.name].astype(np.float32).tofile(folder / f"{n}.bin")
        words = [f"{LETTERS[a.use]}:{a.floats}" for a in kernel.arguments] + [repr(float(value)) for value in scalars]
        numbers = [list(self.kernels).index(name), folder, blocks, seed, int(trace)]
        done = subprocess.run([str(self.path), *map(str, numbers), *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())


def build(kernels: dict[str, Kernel], folder: Path, emulation: Path) -> Program:
    """The compiled program of some kernels in `folder`; `emulation` is the directory ops/emulation of the sources."""
    cases, includes = [], ['#include "emulation/launch.h"']
    for n, kernel in enumerate(kernels.values()):
        (folder / f"{n}.h").write_text(kernel.text.replace("#pragma once\n", ""))  # which would skip equal kernels
        includes += [f"namespace case{n} {{", f'#include "{n}.h"', "}"]
        space = re.search(r"^namespace (\w+)", kernel.text, re.M)[1]
        cases.append(f"X({n}, case{n}::{space}::Run, {len(kernel.arguments)}, {len(kernel.scalars)})")
    (folder / "cases.h").write_text("\n".join([*includes, f"#define EACH_CASE(X) {' '.join(cases)}", ""]))
    program = folder / "program"
    flags = ["-std=c++17", "-O0", "-pthread", "-Werror=narrowing", f"-I{emulation}", f"-I{folder}", '-DCASES="cases.h"']
    command = ["g++", *flags, str(emulation / "tools/run_generated.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"generated code must compile, got: {done.stderr[:2000]}")
    return Program(program, kernels)
