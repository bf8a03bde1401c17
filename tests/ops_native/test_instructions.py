"""Every instruction of the emulation agrees with a scalar definition of its own, and refuses what the 910B does not have."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "ops" / "emulation" / "tests" / "instructions.cpp"
CASES = re.findall(r"^CASE\((\w+)\)", SOURCE.read_text(), re.MULTILINE)
COMPILER = ["g++", "-std=c++17", "-pthread", "-Wall", "-Wextra", f"-I{ROOT / 'ops' / 'emulation'}"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled by g++: not found")


@pytest.fixture(scope="session")
def instructions(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("instructions") / "instructions"
    subprocess.run([*COMPILER, "-Werror", "-O0", str(SOURCE), "-o", str(program)], check=True)
    return program


def test_cases_listed_here_are_those_of_the_program(instructions):
    listed = subprocess.run([instructions], check=True, capture_output=True, text=True).stdout.split()
    assert listed == sorted(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_instruction(instructions, case):
    result = subprocess.run([instructions, case], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


# A call that must not compile, and the words of the refusal.
REFUSED = {
    "Add(bf, bf, bf, 16)": "Add on dav-2201 takes half, float, int16_t, int32_t",
    "Muls(bf, bf, ToBfloat16(2), 16)": "Muls on dav-2201 takes half, float, int16_t, int32_t",
    "Div(s32, s32, s32, 16)": "Div on dav-2201 takes half, float",
    "Exp(bf, bf, 16)": "Exp on dav-2201 takes half, float",
    "Cast(h, bf, RoundMode::CAST_RINT, 16)": "not one that Cast converts on dav-2201",
    "Cast(f, u8, RoundMode::CAST_NONE, 16)": "not one that Cast converts on dav-2201",
    "Duplicate(u8, uint8_t(0), 32)": "Duplicate on dav-2201 takes",
    "Compare(u8, bf, bf, CMPMODE::LT, 128u)": "Compare on dav-2201 takes half, float, and int32_t for EQ",
    "Select(s32, u8, s32, s32, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64u)": "Select on dav-2201 takes half or float",
    "WholeReduceMax(s32, s32, 64, 1, 1, 1, 8)": "WholeReduce on dav-2201 takes half or float",
    "GatherMask(h, h, u32, false, 0, {1, 1, 8, 0}, kept)": "takes a uint16_t mask for 16-bit",
    "Sort32(bf, bf, u32, 1)": "Sort32 on dav-2201 takes half or float",
    "Mmad(f, h, bf, MmadParams())": "Mmad is emulated for half or bfloat16_t operands of one type",
    "bfloat16_t(1.0f) + bfloat16_t(1.0f)": "bfloat16_t",
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """`compiled(call)`: g++'s result for a function that makes this call. The header is compiled once, for all of them."""
    directory = tmp_path_factory.mktemp("calls")
    header = ROOT / "ops" / "emulation" / "kernel_operator.h"
    subprocess.run([*COMPILER, "-x", "c++-header", str(header), "-o", str(directory / "kernel_operator.h.gch")], check=True)
    names = "LocalTensor<bfloat16_t> bf; LocalTensor<half> h; LocalTensor<float> f; LocalTensor<int32_t> s32;"
    names += "LocalTensor<uint8_t> u8; LocalTensor<uint32_t> u32; uint64_t kept;"
    unused = "(void)bf, (void)h, (void)f, (void)s32, (void)u8, (void)u32, (void)kept;"

    def result(call: str) -> subprocess.CompletedProcess:
        source = directory / "call.cpp"
        source.write_text(f'#include "kernel_operator.h"\nusing namespace AscendC;\nvoid F() {{ {names} {unused} {call}; }}\n')
        command = [COMPILER[0], f"-I{directory}", *COMPILER[1:], "-Winvalid-pch", "-fsyntax-only", str(source)]
        return subprocess.run(command, capture_output=True, text=True)

    return result


@pytest.mark.parametrize("call", REFUSED)
def test_what_the_chip_lacks_does_not_compile(compiled, call):
    result = compiled(call)
    assert result.returncode != 0 and REFUSED[call] in result.stderr, result.stderr


def test_what_the_chip_has_compiles(compiled):
    result = compiled("Add(f, f, f, 8)")
    assert result.returncode == 0 and not result.stderr, result.stderr
