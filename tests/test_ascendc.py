"""Building and loading the AscendC libraries; the compiler is a script wherever what it makes does not matter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npu_sparse import ascendc, cli
from npu_sparse.ops.dispatch import ASCENDC

ROOT = Path(ascendc.__file__).resolve().parent.parent
RECORD = """#!/bin/sh
echo "$@" >> "$RECORD"
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """`compiler(script)` puts a g++ of that text in front of PATH and gives the file that it records its calls in."""
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RECORD", str(tmp_path / "calls"))
    monkeypatch.delenv("CXX", raising=False)

    def put(script=RECORD):
        tool = tmp_path / "bin" / "g++"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(script)
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "calls"

    return put


def calls(record: Path) -> list[str]:
    return record.read_text().splitlines() if record.exists() else []


def test_a_library_is_built_once(compiler):
    record, said = compiler(), []
    path = ascendc.build("emulated", report=said.append)
    assert path == ascendc.library("emulated") and path.read_text() == "made\n"
    assert len(calls(record)) == len(ascendc.OPERATORS) + 2  # the binding and the link
    assert ascendc.build("emulated", report=said.append) == path
    assert len(calls(record)) == len(ascendc.OPERATORS) + 2
    assert said == [
        "compiling the AscendC kernels for emulated (7 files, up to a few minutes)", f"built {path}", f"{path} is up to date"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"mad"), r"its sha256 differs"),
        (lambda path: path.chmod(0o777), r"may be written by others \(mode 777\)"),
        (lambda path: path.with_name(f"{path.name}.sha256").unlink(), "has no digest beside it"),
        (lambda path: path.with_name("libmore.so").write_bytes(b"planted"), "has no digest beside it"),
    ],
)
def test_a_library_that_does_not_fit_is_not_loaded_and_is_built_again(compiler, damage, why):
    compiler()
    path = ascendc.build("emulated", report=lambda line: None)
    damage(path)
    with pytest.raises(ascendc.BuildError, match=rf"must not be loaded, because it .*{why}.*: run `npu-sparse build emulated`"):
        ascendc.load("emulated")
    assert ascendc.load_if_built("cpu") == {}  # as if it were not there
    said = []
    assert ascendc.build("emulated", report=said.append) == path
    assert said[0].startswith(f"{path} ") and said[0].endswith(": it is built again")
    assert path.read_text() == "made\n" and ascendc.state("emulated") is None


def test_a_cache_that_everybody_may_write_to_is_refused(compiler, tmp_path):
    compiler()
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ascendc.BuildError, match="cache must not be writable by everybody: .* NPU_SPARSE_CACHE"):
        ascendc.build("emulated", report=lambda line: None)


def test_two_processes_build_it_once(compiler):
    record = compiler()
    program = "from npu_sparse import ascendc; ascendc.build('emulated', report=lambda line: None)"
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(calls(record)) == len(ascendc.OPERATORS) + 2


def test_other_sources_make_another_library(compiler, monkeypatch, tmp_path):
    compiler()
    first = ascendc.build("emulated", report=lambda line: None)
    copied = tmp_path / "ops"
    shutil.copytree(ascendc.SOURCES, copied)
    monkeypatch.setattr(ascendc, "SOURCES", copied)
    assert ascendc.library("emulated") == first
    with (copied / "ascendc/common/hardware.h").open("a") as file:
        file.write("// changed\n")
    assert ascendc.library("emulated") != first
    assert first.exists()


@pytest.mark.parametrize("step", ["-c", "-shared"])
def test_a_compiler_that_fails_leaves_no_library_and_shows_what_it_said(compiler, step):
    compiler(f"""#!/bin/sh
for word in "$@"; do
    [ "$word" = {step} ] && echo "kernel.h:12: error: no such thing" && exit 3
done
exit 0
""")
    with pytest.raises(ascendc.BuildError, match=r"kernel.h:12: error: no such thing\nfailed with status 3"):
        ascendc.build("emulated", report=lambda line: None)
    assert not ascendc.library("emulated").exists()


def test_a_missing_compiler_is_named_with_where_it_was_looked_for(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NPU_SPARSE_CACHE", str(tmp_path))
    assert cli.main(["build", "emulated"]) == cli.FAILURE
    assert f"error: no C++ compiler: g++ is not in PATH ({tmp_path}); install g++ or set CXX" in capsys.readouterr().err


def test_without_cann_the_places_are_named(compiler, monkeypatch, tmp_path, capsys):
    compiler()
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert cli.main(["build", "npu"]) == cli.FAILURE
    said = capsys.readouterr().err
    assert "no CANN toolkit" in said and "/usr/local/Ascend/ascend-toolkit/latest" in said and "set_env.sh" in said
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    assert cli.main(["build", "npu"]) == cli.FAILURE
    assert f"in {tmp_path / 'cann'}, which ASCEND_HOME_PATH names" in capsys.readouterr().err


def test_the_npu_library_is_made_of_every_kernel_by_bisheng(compiler, monkeypatch, tmp_path):
    record = compiler()
    bisheng = tmp_path / "cann/bin/bisheng"
    (tmp_path / "cann/include").mkdir(parents=True)
    bisheng.parent.mkdir()
    shutil.copy(tmp_path / "bin/g++", bisheng)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    monkeypatch.setattr(ascendc, "_package", lambda name: tmp_path / name)  # torch_npu need not be there
    assert ascendc.build("npu", report=lambda line: None).read_text() == "made\n"
    kernels = next(call for call in calls(record) if "launch_npu.cpp" in call)
    assert "-x asc --npu-arch=dav-2201" in kernels and "-shared -fPIC" in kernels
    source = (ascendc.SOURCES / "torch/launch_npu.cpp").read_text()
    assert all(f"LAUNCH({op}, " in source and f'#include "{op}/{op}.h"' in source for op in ascendc.OPERATORS)


def test_an_unknown_target_is_a_mistake(capsys):
    assert cli.main(["build", "cuda"]) == cli.USER_ERROR
    assert "target must be one of emulated, npu, got 'cuda'" in capsys.readouterr().err


def test_a_library_that_is_not_built_says_how_to_build_it(compiler):
    compiler()
    with pytest.raises(ascendc.BuildError, match="not built: run `npu-sparse build emulated`"):
        ascendc.load("emulated")


# The emulated library itself


@pytest.fixture
def emulated(emulated_library):
    ascendc.load("emulated")
    return torch.ops.npu_sparse_emulated


def attention_arguments(**changes):
    shapes = dict(q=(1, 4, 8, 32), k=(1, 2, 8, 32), v=(1, 2, 8, 32))
    arguments = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    arguments["indices"] = torch.zeros(1, 1, 8, 3, dtype=torch.int32)
    arguments["count"] = torch.ones(1, 1, 8, dtype=torch.int32)
    return {**arguments, "block": 1, "scale": 0.2, **changes}


def test_what_a_kernel_does_not_serve_is_refused_before_the_launch(emulated):
    def zeros(*shape, dtype=torch.bfloat16, **options):
        return torch.zeros(shape, dtype=dtype, **options)

    refused = [
        ({"q": zeros(1, 4, 8, 32, dtype=torch.float32)}, "k must be Float, got BFloat16"),
        ({"k": zeros(1, 2, 8, 16)}, r"k must have shape \[1, 2, 8, 32\], got \[1, 2, 8, 16\]"),
        ({"v": zeros(1, 2, 7, 32)}, r"v must have shape \[1, 2, 8, 32\], got \[1, 2, 7, 32\]"),
        ({"v": zeros(1, 2, 8, 24)}, r"Dv must be a multiple of 16 from 16 to 256, got 24 \(nearest: (16|32)\)"),
        ({"v": zeros(1, 2, 8, 272)}, r"Dv must be a multiple of 16 from 16 to 256, got 272 \(nearest: 256\)"),
        ({"count": zeros(1, 1, 7, dtype=torch.int32)}, r"count must have shape \[1, 1, 8\], got \[1, 1, 7\]"),
        ({"indices": zeros(1, 1, 8, 3, dtype=torch.int64)}, "indices must be Int, got Long"),
        ({"v": zeros(1, 2, 8, 32, device="meta")}, "v must be on cpu, got meta"),
        ({"block": 129, "indices": zeros(1, 1, 1, 3, dtype=torch.int32), "count": zeros(1, 1, 1, dtype=torch.int32)},
         r"block must be from 1 to 128, got 129 \(nearest: 128\)"),
        ({"block": -1}, "block must be from 0 to 4294967295, got -1"),
    ]  # fmt: skip
    for changes, message in refused:
        with pytest.raises((ValueError, TypeError), match=message):
            emulated.sparse_attention(**attention_arguments(**changes))
    wide = {name: zeros(1, 2, 8, 32, dtype=torch.float32) for name in "qkv"}
    with pytest.raises(TypeError, match=r"q must be float16 or bfloat16 .*, got Float \(nearest: bfloat16\)"):
        emulated.sparse_attention(**attention_arguments(**wide))


def test_limits_of_the_other_operators_are_refused_with_the_nearest_value(emulated):
    qi, ki, scores = torch.zeros(1, 1, 4, 40).half(), torch.zeros(1, 4, 40).half(), torch.zeros(1, 1, 1, 5000)
    with pytest.raises(ValueError, match=r"d_idx must be a multiple of 16 from 16 to 256, got 40 \(nearest: (32|48)\)"):
        emulated.index_scores(qi, ki, None, 1, "max", None, None)
    with pytest.raises(ValueError, match=r"d_idx must be .*, got 40"):
        emulated.select_by_index(qi, ki, None, 2, 1, "max", 0, 0, None, None)
    with pytest.raises(ValueError, match="reduce must be one of max, mean, softmax_max, got 'sum'"):
        emulated.index_scores(qi, ki, None, 1, "sum", None, None)
    with pytest.raises(ValueError, match=r"k must be from 1 to 4032, got 4500 \(nearest: 4032\)"):
        emulated.select_tokens(scores, 4500, 0, 0, 1, 1, None)
    with pytest.raises(ValueError, match=r"D must be .*, got 40"):
        emulated.attention_mass(qi, ki[:, None], 1.0, 1, "max", False, None)


def test_the_attachment_limits_are_those_of_the_kernels(emulated):
    """`dispatch.LIMITS` says before the first token what the kernels' own checks would say at the first launch."""
    width, most = ASCENDC.dim_multiple, ASCENDC.most_dim
    for dim in range(1, most + 2 * width):
        inputs = {name: torch.zeros(1, 2, 1, dim, dtype=torch.float16) for name in "qk"}
        served = dim % width == 0 and dim <= most
        try:
            emulated.attention_mass(inputs["q"], inputs["k"], 1.0, 1, "max", False, None)
            assert served, dim
        except ValueError as error:
            assert not served and "D must be" in str(error), dim


def test_a_broken_rule_of_the_hardware_is_an_error_that_names_it(emulated):
    count = torch.full((1, 1, 8), 4000, dtype=torch.int32)  # a support that breaks its contract: it has 3 slots
    rule = r"rule 4 \(bounds\): .* GM indices .*; kernel sparse_attention, .*sparse_attention\.h:\d+, core AI[CV] \d"
    with pytest.raises(RuntimeError, match=rule):
        emulated.sparse_attention(**attention_arguments(count=count))
