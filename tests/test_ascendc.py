"""Building and loading the AscendC libraries; the compiler is a script wherever what it makes does not matter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill, ascendc, cli, selectors
from npu_sparse.ops.dispatch import ASCENDC
from npu_sparse.testing import index_inputs, tiny_model

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


def made_by(call: str) -> str:
    """The name of the file that a recorded call makes."""
    words = call.split()
    return Path(words[words.index("-o") + 1]).name


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
    assert ascendc.load_if_built("cpu") == {}  # it counts as not built
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


@pytest.fixture
def toolkit(compiler, monkeypatch, tmp_path):
    """`toolkit(version)` puts a CANN of that version, whose bisheng records as the compiler does, where ASCEND_HOME_PATH says."""

    def put(version: str) -> Path:
        record, root = compiler(), tmp_path / f"cann-{version}"
        (root / "include").mkdir(parents=True)
        (root / "bin").mkdir()
        shutil.copy(tmp_path / "bin/g++", root / "bin/bisheng")
        (root / "bin/bisheng").write_text((root / "bin/bisheng").read_text().replace('echo "$@"', 'echo bisheng "$@"'))
        info = root / "x86_64-linux/ascend_toolkit_install.info"
        info.parent.mkdir()
        info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\n")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(root))
        monkeypatch.setattr(ascendc, "_package", lambda name: tmp_path / name)  # torch_npu need not be there
        return record

    return put


def test_the_npu_library_is_compiled_with_these_flags_and_no_others(toolkit, tmp_path):
    record = toolkit("9.1.0")
    path = ascendc.build("npu", report=lambda line: None)
    assert path.read_text() == "made\n"
    root, out, sources = tmp_path / "cann-9.1.0", path.parent, ascendc.SOURCES
    commands = {made_by(line): line.split() for line in calls(record)}
    acl = [f"-I{tmp_path}/torch_npu/include", f"-I{tmp_path}/torch_npu/include/third_party/acl/inc", f"-I{root}/include"]
    assert commands.pop("libnpu_sparse_kernels.so") == [
        "bisheng", "-x", "asc", "--npu-arch=dav-2201", "-std=c++17", "-O3", "--cce-auto-sync=off", "-shared", "-fPIC",
        f"-I{sources}/ascendc", f"-I{root}/include", f"{sources}/torch/launch_npu.cpp", f"-L{root}/lib64", "-lascendcl", "-o",
        f"{out}/libnpu_sparse_kernels.so",
    ]  # fmt: skip
    host = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
    assert commands.pop("card.o") == [
        *host, f"-I{sources}/ascendc", *acl, "-c", f"{sources}/torch/card.cpp", "-o", f"{out}/card.o"
    ]  # fmt: skip
    assert commands.pop("binding.o") == [
        *host, "-DNPU_SPARSE_NAMESPACE=npu_sparse_npu", f"-I{tmp_path}/torch/include", f"-I{sources}/ascendc", "-c",
        f"{sources}/torch/binding.cpp", "-o", f"{out}/binding.o", "-DNPU_SPARSE_ON_CARD", *acl,
    ]  # fmt: skip
    (link,) = commands.values()
    torch_lib = f"{tmp_path}/torch/lib"
    assert link[:-1] == [
        "-shared", f"{out}/binding.o", f"{out}/card.o", f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10",
        f"-Wl,-rpath,{torch_lib}", f"{out}/libnpu_sparse_kernels.so", f"-L{tmp_path}/torch_npu/lib", "-ltorch_npu",
        f"-L{root}/lib64", "-lascendcl", "-o",
    ]  # fmt: skip


@pytest.mark.parametrize("version, macro", [("8.5.0", True), ("9.0.0", True), ("9.1.0-beta.2", False), ("10.0.0", False)])
def test_an_older_cann_gets_the_macro_in_place_of_attributes(toolkit, version, macro):
    record = toolkit(version)
    ascendc.build("npu", report=lambda line: None)
    (kernels,) = (call for call in calls(record) if call.startswith("bisheng"))
    assert ("-DNPU_SPARSE_TASK_TYPE_MACRO" in kernels.split()) == macro


def test_another_cann_makes_another_library(toolkit):
    paths = []
    for version in ("9.1.0", "9.2.0"):
        toolkit(version)
        paths.append(ascendc.library("npu"))
    assert paths[0] != paths[1]
    assert ascendc.library("emulated") == ascendc.library("emulated")


def test_a_cann_that_is_too_old_is_refused(toolkit, capsys):
    toolkit("8.3.RC1")
    assert cli.main(["build", "npu"]) == cli.FAILURE
    assert "error: CANN must be 8.5 or newer, got 8.3.RC1 in " in capsys.readouterr().err


@pytest.mark.parametrize("chip, built", [("Ascend 910B3", True), ("Ascend910", True), ("Ascend 310P3", False)])
def test_a_card_that_the_kernels_are_not_for_stops_the_build(toolkit, tmp_path, capsys, chip, built):
    toolkit("9.1.0")
    smi = tmp_path / "bin/npu-smi"
    smi.write_text(f'#!/bin/sh\necho "NPU ID  Chip ID  Chip Name"; echo "0  0  {chip}"; echo "0  1  Mcu"\n')
    smi.chmod(0o755)
    assert cli.main(["build", "npu"]) == (0 if built else cli.FAILURE)
    said = capsys.readouterr().err
    assert built or "the card must be an Ascend 910B (Atlas A2) or 910C (Atlas A3)" in said and "got Ascend 310P3" in said


# What the device compiler sees of the kernels


ENTRY = re.compile(r'extern "C" ([^;{}]*?)\bvoid npu_sparse_(\w+)\(([^)]*)\)\s*\{([^}]*)')
MIXED, BATCHED = "__global__ __mix__(1, 2)", "__schedmode__(1) __global__ __mix__(1, 2)"
ENTRIES = {
    "index_scores": (MIXED, 7, "IndexScoresTiling"),
    "index_partition": (MIXED, 6, "IndexPartitionTiling"),
    "select_tokens": ("__schedmode__(1) __global__ __mix__(0, 1)", 5, "SelectTokensTiling"),
    "select_by_index": (BATCHED, 8, "SelectByIndexTiling"),
    "sparse_attention": (MIXED, 8, "SparseAttentionTiling"),
    "attention_mass": (MIXED, 5, "AttentionMassTiling"),
}


@pytest.fixture
def preprocessed(tmp_path):
    """`preprocessed(*flags)`: launch_npu.cpp as bisheng reads it, without what CANN's own headers would put there."""
    if shutil.which("g++") is None:
        pytest.skip("sources are preprocessed by g++: not found")
    (tmp_path / "kernel_operator.h").write_text("")

    def run(*flags: str) -> str:
        source = ascendc.SOURCES / "torch/launch_npu.cpp"
        command = ["g++", "-E", "-P", "-std=c++17", *flags, f"-I{tmp_path}", f"-I{ascendc.SOURCES / 'ascendc'}", str(source)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run


def test_every_entry_has_its_attributes_and_its_tiling_by_value(preprocessed):
    text = preprocessed()
    entries = {}
    for attributes, op, parameters, body in ENTRY.findall(text):
        *addresses, tiling = [" ".join(parameter.split()) for parameter in parameters.split(",")]
        assert all(address.startswith("GM_ADDR ") for address in addresses) and "KERNEL_TASK_TYPE" not in body
        entries[op] = (" ".join(attributes.split()), len(addresses), tiling.removeprefix("npu_sparse_ascendc::").split()[0])
        launch = re.search(rf"npu_sparse_{op}<<<blocks, nullptr, stream>>>\((.*?), tiling\);", text).group(1)
        assert launch.split(", ") == [f"static_cast<GM_ADDR>(arguments[{i}].data)" for i in range(len(addresses))]
    assert entries == ENTRIES and set(entries) == set(ascendc.OPERATORS)


def test_kernels_whose_blocks_wait_for_each_other_start_together():
    for op, (attributes, *_) in ENTRIES.items():
        waits = "SyncAll" in (ascendc.SOURCES / f"ascendc/{op}/{op}.h").read_text()
        assert waits == ("__schedmode__(1)" in attributes), op


def test_with_the_older_macro_the_kernel_type_stands_in_the_body(preprocessed):
    entries = ENTRY.findall(preprocessed("-DNPU_SPARSE_TASK_TYPE_MACRO"))
    assert {op for _, op, _, _ in entries} == set(ascendc.OPERATORS)
    for attributes, op, _, body in entries:
        wanted = "KERNEL_TYPE_MIX_AIV_1_0" if op == "select_tokens" else "KERNEL_TYPE_MIX_AIC_1_2"
        assert attributes.split() == ["__global__", "__aicore__"] and f"KERNEL_TASK_TYPE_DEFAULT({wanted});" in body


def test_cmake_compiles_the_kernels_with_the_same_flags():
    text = (ascendc.SOURCES / "CMakeLists.txt").read_text()
    assert " ".join(ascendc._KERNELS) in " ".join(text.split())


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


def test_many_index_heads_with_a_large_k_are_refused_when_attaching(emulated):
    model = tiny_model("qwen3_5", dtype=torch.bfloat16)

    def attach(k):
        selector = selectors.ByIndexer(Indexer.for_model(model, heads=64, dim=64))
        return SparsePrefill.attach(model, selector, Budget(k=k, block=64), impl="kernel")

    refused = r"k must leave room in UB for the scores of 64 heads, got 4032 \(nearest: (\d+)\)"
    with pytest.raises(ValueError, match=refused) as refusal:
        attach(4032)
    nearest = int(re.search(refused, str(refusal.value)).group(1))
    attach(nearest).detach()
    qi, ki, w = index_inputs(1, 64, 4100, 4100, 16, dtype=torch.float16)
    valid = torch.ones(1, 4100, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape(str(refusal.value))):  # the operator says the same
        emulated.select_by_index(qi, ki, w, 4032, 64, "max", 0, 0, valid, None)
