import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from npu_sparse.schedule import builder, npu_vector
from npu_sparse.schedule.scheduler import schedule
from npu_sparse.schedule.scop import ScopError

ROOT = Path(__file__).resolve().parents[2]
HARNESS = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "emulation/launch.h"
#include "kernel.h"

// Arguments: blocks, seed, then a file for every GM argument: read:FLOATS or write:FLOATS; then scalars.
int main(int argc, char** argv) {
    std::vector<std::vector<float>> data;
    std::vector<float> scalars;
    for (int n = 3; n < argc; ++n) {
        char kind = argv[n][0];
        if (kind == 's') { scalars.push_back(std::atof(argv[n] + 1)); continue; }
        data.emplace_back(std::atoi(argv[n] + 1));
        if (kind == 'r') {
            char name[32];
            std::snprintf(name, sizeof name, "gm%zu.bin", data.size() - 1);
            FILE* file = std::fopen(name, "rb");
            if (std::fread(data.back().data(), 4, data.back().size(), file) != data.back().size()) return 3;
            std::fclose(file);
        }
    }
    auto gm = [&](int n) {
        int seen = -1, at = 2;
        while (seen < n) seen += argv[++at][0] != 's';
        auto use = argv[at][0] == 'r' ? emulation::GmUse::Read : emulation::GmUse::Write;
        return emulation::Gm(data[n].data(), data[n].size() * 4, "gm" + std::to_string(n), use);
    };
    emulation::LaunchOptions options;
    options.blocks = std::atoi(argv[1]);
    options.seed = std::atoi(argv[2]);
    options.type = KERNEL_TYPE_AIV_ONLY;
    try {
        emulation::Launch(options, NAMESPACE::Run, ARGUMENTS);
    } catch (const emulation::Fault& fault) {
        std::fprintf(stderr, "%s\\n", fault.what());
        return 1;
    }
    for (size_t n = 0; n < data.size(); ++n) {
        char name[32];
        std::snprintf(name, sizeof name, "gm%zu.bin", n);
        FILE* file = std::fopen(name, "wb");
        std::fwrite(data[n].data(), 4, data[n].size(), file);
        std::fclose(file);
    }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the emulation")


def emulate(directory: Path, scop, sizes, arrays: dict, scalars=(), blocks=(1, 3), seeds=(0, 1, 2)):
    """Results (by name) of the generated kernel, after the same bits for every number of cores and every order of events."""
    code = npu_vector.generate(schedule(scop, "npu-vector"), sizes)
    (directory / "kernel.h").write_text(code)
    names = npu_vector.arguments(scop)
    calls = ", ".join([*(f"gm({n})" for n in range(len(names))), *(f"scalars[{n}]" for n in range(len(scalars)))])
    text = HARNESS.replace("NAMESPACE", f"{scop.name}_generated").replace("ARGUMENTS", calls)
    (directory / "main.cpp").write_text(text)
    flags = ["-std=c++17", "-O1", "-pthread", "-Werror=narrowing", f"-I{ROOT / 'ops/emulation'}", f"-I{directory}"]
    done = subprocess.run(["g++", *flags, "main.cpp", "-o", "main"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    found = None
    for count in blocks:
        for seed in seeds:
            for n, name in enumerate(names):
                arrays[name].astype(np.float32).tofile(directory / f"gm{n}.bin")
            kinds = ["w" if scop.arrays[name].live_out else "r" for name in names]
            words = [f"{kind}{arrays[name].size}" for kind, name in zip(kinds, names)] + [f"s{value}" for value in scalars]
            done = subprocess.run(["./main", str(count), str(seed), *words], cwd=directory, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            results = {
                name: np.fromfile(directory / f"gm{n}.bin", np.float32).reshape(arrays[name].shape)
                for n, name in enumerate(names) if kinds[n] == "w"
            }  # fmt: skip
            if found is not None:
                assert all(np.array_equal(found[name], results[name]) for name in found), (count, seed)
            found = results
    return found


def close(result, expected):
    assert np.sqrt(np.mean((result - expected) ** 2)) <= 1e-6 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("rows, columns", [(5, 100), (1, 8), (7, 1001)])
def test_softmax(rows, columns, tmp_path):
    x = np.random.default_rng(rows).standard_normal((rows, columns)) * 5
    found = emulate(tmp_path, builder.softmax(), {"R": rows, "C": columns}, {"x": x, "y": np.zeros_like(x)})
    x = x.astype(np.float32).astype(np.float64)
    power = np.exp(x - x.max(1, keepdims=True))
    close(found["y"], power / power.sum(1, keepdims=True))


def test_rms_norm_residual(tmp_path):
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((6, 200)) for name in ("x", "residual", "h", "y")}
    arrays["weight"] = random.standard_normal(200)
    found = emulate(tmp_path, builder.rms_norm_residual(), {"R": 6, "C": 200}, arrays, scalars=(1e-5,))
    x, residual, weight = (arrays[name].astype(np.float32).astype(np.float64) for name in ("x", "residual", "weight"))
    close(found["h"], x + residual)
    close(found["y"], (x + residual) / np.sqrt(np.mean((x + residual) ** 2, 1, keepdims=True) + 1e-5) * weight)


def test_elementwise_expression(tmp_path):
    b = builder.ScopBuilder("gate", "R C", "R >= 1 and C >= 1")
    for name in ("x", "z"):
        b.array(name, "R", "C")
    b.array("bias", "C")
    b.array("limit")
    b.array("y", "R", "C", live_out=True)
    with b.loop("i", 0, "R"), b.loop("j", 0, "C"):
        swish = "(2.0f - x[i][j]) / (1.0f + expf(-z[i][j]))"
        b.statement(f"y[i][j] = {swish} + fmaxf(x[i][j] * bias[j], limit) - 3.0f * fabsf(x[i][j]) / 7.0f")
    random = np.random.default_rng(1)
    arrays = {"x": random.standard_normal((4, 37)), "z": random.standard_normal((4, 37)), "bias": random.standard_normal(37)}
    found = emulate(tmp_path, b.build(), {"R": 4, "C": 37}, {**arrays, "y": np.zeros((4, 37))}, scalars=(0.25,))
    x, z, bias = (arrays[name].astype(np.float32).astype(np.float64) for name in ("x", "z", "bias"))
    close(found["y"], (2 - x) / (1 + np.exp(-z)) + np.maximum(x * bias, 0.25) - 3 * abs(x) / 7)


def test_rows_that_do_not_fit_are_refused():
    plan = schedule(builder.softmax(), "npu-vector")
    npu_vector.generate(plan, {"R": 2, "C": 5000})
    with pytest.raises(ScopError, match="softmax: rows must fit in .* bytes of UB, got"):
        npu_vector.generate(plan, {"R": 2, "C": 8000})


@pytest.mark.parametrize("operator", ["lu_decomp", "trsmL", "rope", "indexer"])
def test_other_operators_are_refused(operator):
    scop = builder.OPERATORS[operator]()
    with pytest.raises(ScopError, match=f"{operator} must be a row operator: "):
        npu_vector.generate(schedule(scop, "npu-vector"), {name: 8 for name in scop.parameters})


def test_missing_size_and_reserved_names_are_refused():
    with pytest.raises(ScopError, match="sizes must give C$"):
        npu_vector.generate(schedule(builder.softmax(), "npu-vector"), {"R": 2})
    b = builder.ScopBuilder("copy", "R C", "R >= 1 and C >= 1")
    b.array("row", "R", "C")
    b.array("y", "R", "C", live_out=True)
    with b.loop("i", 0, "R"), b.loop("j", 0, "C"):
        b.statement("y[i][j] = row[i][j]")
    with pytest.raises(ScopError, match="arrays must not be called .* got row"):
        npu_vector.generate(schedule(b.build(), "npu-vector"), {"R": 2, "C": 8})
