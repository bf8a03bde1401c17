"""The emulation catches every planted fault, names rule, kernel, core and line, and passes each fault's honest twin."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "ops" / "emulation" / "tests" / "faults.cpp"
ENTRIES = re.findall(r'^    \{"(\w+)", (\d+), k\w+, (?:\[\]|[A-Z]\w+, )', SOURCE.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled by g++: not found")

NOT_IN_A_LINE = {  # steps that no instruction of the kernel shows
    "red_zone": "past its end",  # a raw store is found when the launch ends
    "launch_on_other_cores": "must be for the cores of __mix__(1, 2), got MIX_AIV_1_0",
    "launch_on_twice_the_vector_cores": "must be for the cores of __mix__(1, 1), got MIX_AIC_1_2",
    "entry_without_attributes": "must say its cores by __mix__(cube, vector), got none",
}


def compile_faults(directory: Path, *flags: str) -> Path:
    program = directory / "faults"
    command = ["g++", "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'ops' / 'emulation'}", *flags]
    subprocess.run([*command, str(SOURCE), "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True, timeout=300).stdout.strip()


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    return compile_faults(tmp_path_factory.mktemp("emulation"), "-O1")


@pytest.fixture(scope="session")
def planted(faults) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in run(faults, "all", "planted").splitlines())


def body(name: str) -> range:
    """Line numbers of a case in the source."""
    lines = SOURCE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f'    {{"{name}"'))
    end = next(i for i in range(start, len(lines)) if re.match(r"    \}(\}|, \d)", lines[i]))
    return range(start + 1, end + 2)


def test_cases_listed_here_are_those_of_the_program(faults):
    assert [f"{name} {rule}" for name, rule in ENTRIES] == run(faults, "--list").splitlines()
    assert {int(rule) for _, rule in ENTRIES} == set(range(1, 10))


@pytest.mark.parametrize(("name", "rule"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_planted_fault_is_caught_at_its_line(planted, name, rule):
    caught, text = planted[name].split(": ", 1)
    assert caught == rule, text
    assert text.startswith(f"rule {rule} (") and f"kernel {name}, " in text and "core " in text
    if where := NOT_IN_A_LINE.get(name):
        assert where in text
        return
    line = int(re.search(r"; kernel \w+, \S*faults\.cpp:(\d+), core AI[CV] [\d.]+$", text).group(1))
    source = SOURCE.read_text().splitlines()[line - 1]
    assert source.endswith(f"// caught: {name}") or (line in body(name) and source.endswith("// caught"))


@pytest.mark.parametrize("seed", ["0", "1", "2", "3", "4", "5"])
def test_honest_twins_pass_in_program_order_and_in_random_orders(faults, seed):
    lines = run(faults, "all", "honest", seed).splitlines()
    assert lines == [f"{name}: clean" for name, _ in ENTRIES]


@pytest.mark.parametrize("order", ["pipe_order", "core_order"])
def test_hundred_seeds_agree_exactly_when_the_kernel_is_ordered(faults, order):
    assert int(run(faults, order, "honest")) == 1
    assert int(run(faults, order, "planted")) > 1  # the seed does change the order


def test_event_ids_that_are_the_systems_are_a_warning(faults):
    told = run(faults, "warnings", "planted").splitlines()
    wanted = "V_MTE3> id %d should be left to the system: take it from AllocEventID; kernel warnings, "
    assert [any(wanted % id in line for line in told) for id in (6, 7)] == [True, True] and len(told) == 4  # sets and waits
    assert run(faults, "warnings", "honest") == ""


def test_16_bit_results_round_to_nearest_even(faults):
    assert run(faults, "rounding", "honest") == "0 0"
    assert all(int(wrong) > 0 for wrong in run(faults, "rounding", "planted").split())


def test_trace_holds_every_instruction_and_the_flags_that_order_it(faults, tmp_path):
    run(faults, "--trace", "gm_between_cores", str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert [core["name"] for core in trace["cores"]] == ["AIC 0", "AIV 0.0", "AIV 0.1", "AIC 1", "AIV 1.0", "AIV 1.1"]
    steps = [[dict(zip(trace["columns"], step)) for step in core["steps"]] for core in trace["cores"]]
    gm, ub, l1 = (trace["spaces"].index(space) for space in ("GM", "UB", "L1"))
    store = next(step for step in steps[1] if step["opcode"] == "DataCopy")
    load = next(step for step in steps[0] if step["opcode"] == "DataCopy")
    assert (store["pipe"], store["read"][ub], store["written"][gm]) == ("MTE3", 1024, 1024)
    assert (load["pipe"], load["read"][gm], load["written"][l1], load["bursts"], load["burst_bytes"]) == (
        "MTE2",
        1024,
        1024,
        1,
        1024,
    )
    wait = next(step for step in steps[0] if step["step"] == "cross_wait" and step["id"] == 0)
    assert steps[0].index(wait) < steps[0].index(load)
    sources = [(core, steps[core][index]) for core, index in wait["after"]]
    assert [core for core, _ in sources] == [1, 2]  # both vector cores of the block
    assert all((s["step"], s["pipe"], s["id"]) == ("cross_set", "MTE3", 0) for _, s in sources)
    assert steps[1].index(store) < steps[1].index(sources[0][1])


def test_wait_of_a_queue_points_at_its_set(faults, tmp_path):
    run(faults, "--trace", "free_before_use", str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    steps = [dict(zip(trace["columns"], step)) for step in trace["cores"][0]["steps"]]
    waits = [step for step in steps if step["step"] == "wait"]
    pairs = [(steps[index]["pipe"], step["pipe"]) for step in waits for _, index in step["after"]]
    once = [("MTE2", "V"), ("MTE2", "MTE3"), ("MTE3", "V")]
    assert pairs == [*once, ("V", "MTE2"), *once]
    assert all(steps[index]["step"] == "set" and steps[index]["id"] == step["id"] for step in waits for _, index in step["after"])


@pytest.mark.slow
def test_honest_twins_are_clean_under_the_sanitizers(tmp_path, monkeypatch):
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # looking for leaks takes ptrace, which containers forbid
    program = compile_faults(tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for seed in ("0", "7"):
        assert run(program, "all", "honest", seed).splitlines() == [f"{name}: clean" for name, _ in ENTRIES]


# Rule 10. The device compiler takes C++ without a library, heap, exceptions or double precision; g++ would take all of it.
HOST_ONLY = {
    "std::": r"\bstd\s*::",
    "new or delete": r"\b(new|delete)\b",
    "malloc or free": r"\b(malloc|calloc|realloc|free)\s*\(",
    "double": r"\bdouble\b",
    "a double literal": r"(?<![\w.])(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?(?![\w.])",
    "exceptions": r"\b(throw|try|catch)\b",
    "virtual functions or RTTI": r"\b(virtual|dynamic_cast|typeid)\b",
    "function pointers": r"\(\s*\*\s*\w+\s*\)\s*\(",
    "a standard header": r"#\s*include\s*<(?!cstdint>|stdint\.h>)",
    "mutable static data": r"\b(thread_local|(?<!inline )static\s+(?!constexpr|const\b|inline|__aicore__)\w)",
    "ASCEND_IS_AIC or ASCEND_IS_AIV but as `if ASCEND_IS_AIC`": r"(?<!\bif )\bASCEND_IS_AI[CV]\b",
    "a variable named as a type": r"\b(?!return\b|typename\b|const\b)\w+[&*]?\s+(half|bfloat16_t)\s*(=|;|\{|,)",
    "the emulation's own interface": r"\bemulation\s*::|\.\s*(Data|Bytes|Whole|Owner|Address)\s*\(",
}


def host_constructs(source: str) -> list[str]:
    """`line: construct` for all in a kernel source that only a host compiler accepts; comments and strings do not count."""
    blank = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.DOTALL)
    matches = ((match, name) for name, pattern in HOST_ONLY.items() for match in re.finditer(pattern, blank))
    uses = [(blank.count("\n", 0, match.start()) + 1, name) for match, name in matches]
    return [f"{line}: {name}" for line, name in sorted(uses)]


def recursion(source: str) -> list[str]:
    """Names of the functions of a kernel source that call themselves."""
    recursive = []
    for match in re.finditer(r"\b(\w+)\s*\([^;{}()]*(?:\([^()]*\)[^;{}()]*)*\)\s*(?:const\s*)?\{", source):
        if match.group(1) in {"if", "for", "while", "switch"}:
            continue
        depth, end = 1, match.end()
        while depth and end < len(source):
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        if re.search(rf"(?<![.:>])\b{match.group(1)}\s*\(", source[match.end() : end]):
            recursive.append(match.group(1))
    return recursive


def kernel_sources() -> list[Path]:
    """The files that make up the kernels: those that include kernel_operator.h, and all of ours that they include."""
    everything = {path.resolve(): path.read_text() for path in (ROOT / "ops" / "ascendc").rglob("*.h")}

    def included(path: Path) -> set[Path]:
        names = re.findall(r'#\s*include\s*"([^"]+)"', everything[path])
        candidates = [base / name for name in names for base in (path.parent, ROOT / "ops" / "ascendc")]
        return {c.resolve() for c in candidates if c.resolve() in everything}

    kernels = {path for path, text in everything.items() if "kernel_operator.h" in text}
    while users := {path for path in everything if included(path) & kernels} - kernels:
        kernels |= users
    while more := {other for path in kernels for other in included(path)} - kernels:
        kernels |= more
    return sorted(kernels)


@pytest.mark.parametrize(
    ("source", "construct"),
    [
        ("std::max(a, b);", "std::"),
        ("float* p = new float[4];", "new or delete"),
        ("void* p = malloc(4);", "malloc or free"),
        ("double x = y;", "double"),
        ("float x = 0.5 * y;", "a double literal"),
        ("float x = 1e-6;", "a double literal"),
        ("throw 1;", "exceptions"),
        ("virtual void f();", "virtual functions or RTTI"),
        ("void (*f)(int) = g;", "function pointers"),
        ("#include <vector>", "a standard header"),
        ("static int calls = 0;", "mutable static data"),
        ("if (!ASCEND_IS_AIC) {}", "ASCEND_IS_AIC or ASCEND_IS_AIV but as `if ASCEND_IS_AIC`"),  # it expands to constexpr (...)
        ("for (uint32_t half = 0; half < 2; ++half) {}", "a variable named as a type"),
        ("emulation::Require(true);", "the emulation's own interface"),
        ("x = tensor.Data();", "the emulation's own interface"),
    ],
)
def test_host_construct_in_a_kernel_is_found(source, construct):
    assert construct in {line.split(": ", 1)[1] for line in host_constructs(f"int a;\n{source}\n")}


def test_device_code_passes_the_check_for_host_constructs():
    honest = """#include <cstdint>
    // std::vector, new, 0.5: prose does not count
    static constexpr uint32_t kRows = 16;
    __aicore__ inline half Zero() { return half{}; }
    __aicore__ inline static void Nothing() { if ASCEND_IS_AIC { } else if ASCEND_IS_AIV { } }
    __aicore__ inline float Half(float x) { const float y = 0.5f * x + 1e-6f; return x == 1.0f ? y : 1.f; }
    """
    assert host_constructs(honest) == [] and recursion(honest) == []
    assert recursion("int f(int n) { return n ? f(n - 1) : 0; }") == ["f"]


def test_kernels_use_only_what_the_device_compiler_takes():
    sources = kernel_sources()
    uses = {str(path.relative_to(ROOT)): host_constructs(path.read_text()) + recursion(path.read_text()) for path in sources}
    assert {path: constructs for path, constructs in uses.items() if constructs} == {}
