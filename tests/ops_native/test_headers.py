"""The kernels against CANN's published headers, where a user has them: `pytest --headers DIR tests/ops_native/test_headers.py`.

DIR is a toolkit or a checkout of its sources, with include/basic_api and impl below it. g++ reads them with `headers/` in place
of what the device compiler knows by itself. It knows no instructions, so that the bodies of CANN's own functions have errors;
what counts are those in files of this project: a call that none of the published functions takes.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from npu_sparse import ascendc

HERE = Path(__file__).resolve().parent
KERNELS = ascendc.SOURCES.resolve() / "ascendc"
OF_THE_COMPILER = ("stub_fun.h", "simt_stub.h", "kernel_fp16.h", "kernel_bf16.h")  # included by name; all is in stub_def.h

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="headers are read by g++: not found")


def base(directory: Path) -> Path:
    """The folder whose include/basic_api has the headers. Raises ValueError where there is none below a directory."""
    header = min(directory.rglob("include/basic_api/kernel_tpipe.h"), key=lambda path: len(path.parts), default=None)
    if header is None:
        raise ValueError(f"--headers must hold include/basic_api/kernel_tpipe.h, got {directory}")
    return header.parents[2]


def misuses(headers: Path, source: Path, project: Path, scratch: Path) -> list[str]:
    """The errors of a source that are in files under `project`, or that keep g++ from reading on."""
    for name in OF_THE_COMPILER:
        (scratch / name).write_text("#pragma once\n")
    published = (headers, headers / "include", headers / "include/basic_api", headers / "impl")
    folders = (HERE / "headers", scratch, *published, project)
    flags = ["-std=c++17", "-fsyntax-only", "-fpermissive", "-w", "-fmax-errors=0"]
    defined = ["-D__NPU_ARCH__=2201", "-DASCENDC_CPU_DEBUG=1"]
    command = ["g++", *flags, *defined, *(f"-I{folder}" for folder in folders), "-include", "kernel_operator.h", str(source)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    errors = re.findall(r"^(.+?):(\d+):\d+: ((?:fatal )?error: .*)$", said, re.M)
    return [
        f"{file}:{line}: {what}" for file, line, what in errors
        if what.startswith("fatal") or Path(file).resolve().is_relative_to(project.resolve())
    ]  # fmt: skip


@pytest.fixture(scope="module")
def published(request) -> Path:
    directory = request.config.getoption("--headers")
    if directory is None:
        pytest.skip("CANN's headers are not here: pass --headers DIR, a toolkit or a checkout of its sources")
    return base(Path(directory))


@pytest.mark.parametrize("op", ascendc.OPERATORS)
def test_a_kernel_calls_only_what_is_published(published, op, tmp_path):
    assert misuses(published, KERNELS / op / f"{op}.h", KERNELS, tmp_path) == []


@pytest.mark.parametrize(
    "call, wrong",
    [
        ("PipeBarrier<PIPE_V>();", "PipeBarrier<PIPE_V>(rows);"),
        ("DataCopy(outGm_[place], stagingUb_, valueDim);", "DataCopy(stagingUb_, outGm_, outGm_);"),
        ("params.nSize", "params.columns"),
    ],
)
def test_a_call_that_is_not_published_is_found(published, call, wrong, tmp_path):
    copied = tmp_path / "ascendc"
    shutil.copytree(KERNELS, copied)
    for path in copied.rglob("*.h"):
        path.write_text(path.read_text().replace(call, wrong))
    assert misuses(published, copied / "sparse_attention/sparse_attention.h", copied, tmp_path)


# Without CANN: the check itself, on headers as small as can be


@pytest.fixture
def tiny(tmp_path) -> Path:
    api = tmp_path / "toolkit/x86_64-linux/asc/include/basic_api"
    api.mkdir(parents=True)
    for name in ("kernel_tpipe", "kernel_tensor", "kernel_type"):
        (api / f"{name}.h").write_text("#pragma once\n")
    (api / "kernel_basic_intf.h").write_text("#pragma once\ninline void Add(half a, half b) { vadd(a, b); }\n")  # no such thing
    return tmp_path / "toolkit"


def test_errors_of_the_headers_do_not_count_and_those_of_a_kernel_do(tiny, tmp_path):
    project, scratch = tmp_path / "project", tmp_path / "scratch"
    project.mkdir()
    scratch.mkdir()
    kernel = project / "kernel.h"
    kernel.write_text("__aicore__ inline void Run(half x)\n{\n    Add(x, x);\n}\n")
    assert misuses(base(tiny), kernel, project, scratch) == []
    kernel.write_text("__aicore__ inline void Run(half x)\n{\n    Add(x);\n}\n")
    (misuse,) = misuses(base(tiny), kernel, project, scratch)
    assert misuse.startswith(f"{kernel}:3: error: ") and "Add" in misuse
    kernel.write_text('#include "not_there.h"\n')
    assert "fatal error: not_there.h" in misuses(base(tiny), kernel, project, scratch)[0]


def test_a_directory_without_the_headers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--headers must hold include/basic_api/kernel_tpipe\.h, got "):
        base(tmp_path)
