"""What the thirty kernels compute, against their definitions in NumPy."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

import npu_sparse.schedule
from npu_sparse.schedule.frontend.c import parse_c

KERNELS = Path(npu_sparse.schedule.__file__).parent / "kernels"
MANIFEST = yaml.safe_load((KERNELS / "manifest.yaml").read_text())
TYPES = {"int": np.int32, "float": np.float32, "double": np.float64}

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler: install gcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    sources = sorted(map(str, KERNELS.glob("*.c")))
    flags = ["-std=c99", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", str(path), *sources, "-lm"], check=True)
    return ctypes.CDLL(str(path))


def call(library, name, which):
    """Arguments before and after the kernel, by name; sizes and coefficients among them."""
    scop, entry = parse_c(KERNELS / f"{name}.c"), MANIFEST[name]
    values = {**entry["small"], **entry.get("scalars", {})}
    arguments, arrays = [], {}
    for argument in scop.arguments:
        if argument.shape:
            shape = [eval(extent, {}, values) for extent in argument.shape]
            arrays[argument.name] = np.full(shape, -77, TYPES[argument.ctype])
            arguments.append(arrays[argument.name].ctypes.data_as(ctypes.c_void_p))
        else:
            arguments.append({"int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double}[argument.ctype](
                values[argument.name]))
    getattr(library, f"init_{name}")(*arguments)
    before = {key: array.copy() for key, array in arrays.items()}
    assert not any((array == -77).all() for array in arrays.values())
    getattr(library, f"kernel_{name}")(*arguments)
    return values | before, arrays, [a.name for a in scop.arrays.values() if a.live_out]


def correlation(b):
    deviation = b["data"].std(0)
    z = (b["data"] - b["data"].mean(0)) / np.where(deviation > 0.1, deviation, 1)
    corr = z.T @ z / b["n"]
    np.fill_diagonal(corr, 1)
    return {"corr": corr}


def durbin(b):
    r, n = b["r"], b["n"]
    toeplitz = np.array([[1 if i == j else r[abs(i - j) - 1] for j in range(n)] for i in range(n)])
    return {"y": np.linalg.solve(toeplitz, -r)}


def deriche(b):
    """By the recursion's definition on one axis, in float64, once for every axis."""
    alpha, decay = b["alpha"], np.exp(-b["alpha"])
    gain = (1 - decay) ** 2 / (1 + 2 * alpha * decay - decay * decay)
    ahead = np.array([gain, gain * decay * (alpha - 1)])
    back = np.array([0, gain * decay * (alpha + 1), -gain * decay**2])

    def recursive(x, weights):
        y = np.zeros_like(x)
        for t in range(len(x)):
            y[t] = sum(w * x[t - k] for k, w in enumerate(weights) if t >= k)
            y[t] += 2 * decay * y[t - 1] if t >= 1 else 0
            y[t] -= decay**2 * y[t - 2] if t >= 2 else 0
        return y

    def smooth(x):
        return recursive(x, ahead) + recursive(x[::-1], back)[::-1]
    return {"out": smooth(smooth(b["in"].astype(float).T).T)}


def nussinov(b):
    """By counting over all ways to fold, with memory: j is unpaired, or paired with some k."""
    base, n, memory = b["base"], b["n"], {}

    def best(i, j):
        if j <= i:
            return 0
        if (i, j) not in memory:
            pairs = [best(i, k - 1) + best(k + 1, j - 1) + 1 for k in range(i, j - 1) if base[k] + base[j] == 3]
            memory[i, j] = max([best(i, j - 1), *pairs])
        return memory[i, j]
    return {"best": np.array([[best(i, j) for j in range(n)] for i in range(n)])}


def adi(b):
    u, v, n, ratio = b["u"].copy(), b["v"].copy(), b["n"], b["n"] ** 2 / b["tsteps"]

    def solve(right, c):
        matrix = np.eye(n)
        for j in range(1, n - 1):
            matrix[j, j - 1: j + 2] = [-c, 1 + 2 * c, -c]
        return np.linalg.solve(matrix, np.concatenate([[1], right, [1]]))
    for _ in range(b["tsteps"]):
        for i in range(1, n - 1):
            v[:, i] = solve(u[1:-1, i] + ratio / 2 * (u[1:-1, i - 1] - 2 * u[1:-1, i] + u[1:-1, i + 1]), ratio)
        for i in range(1, n - 1):
            u[i] = solve(v[i, 1:-1] + ratio * (v[i - 1, 1:-1] - 2 * v[i, 1:-1] + v[i + 1, 1:-1]), ratio / 2)
    return {"u": u}


def fdtd_2d(b):
    ex, ey, hz = b["ex"].copy(), b["ey"].copy(), b["hz"].copy()
    for t in range(b["tmax"]):
        ey[0] = b["source"][t]
        ey[1:] -= 0.5 * np.diff(hz, axis=0)
        ex[:, 1:] -= 0.5 * np.diff(hz, axis=1)
        hz[:-1, :-1] -= 0.7 * (np.diff(ex, axis=1)[:-1] + np.diff(ey, axis=0)[:, :-1])
    return {"ex": ex, "ey": ey, "hz": hz}


def heat_3d(b):
    def step(a):
        out = a.copy()
        inner = (slice(1, -1),) * 3
        out[inner] += 0.125 * sum((np.roll(a, 1, d) - 2 * a + np.roll(a, -1, d))[inner] for d in range(3))
        return out
    a, other = b["A"], b["B"]
    for _ in range(b["tsteps"]):
        other = step(a)
        a = step(other)
    return {"A": a, "B": other}


def jacobi(b, dims):
    a, other, inner = b["A"].copy(), b["B"].copy(), (slice(1, -1),) * dims
    for _ in range(b["tsteps"]):
        for source, target in ((a, other), (other, a)):
            total = source + sum(np.roll(source, s, d) for s in (1, -1) for d in range(dims))
            target[inner] = total[inner] / (1 + 2 * dims)
    return {"A": a, "B": other}


def seidel_2d(b):
    a = b["A"].copy()
    for _ in range(b["tsteps"]):
        for i in range(1, b["n"] - 1):
            for j in range(1, b["n"] - 1):
                a[i, j] = a[i - 1: i + 2, j - 1: j + 2].mean()
    return {"A": a}


def floyd_warshall(b):
    path = b["path"].astype(float)
    for _ in range(b["n"]):  # Bellman's recursion, to its fixed point
        path = np.minimum(path, (path[:, :, None] + path[None]).min(1))
    return {"path": path}


def gemver(b):
    a = b["A"] + np.outer(b["u1"], b["v1"]) + np.outer(b["u2"], b["v2"])
    return {"w": b["alpha"] * a @ (b["beta"] * a.T @ b["y"] + b["z"])}


def lower(c, value):
    """The lower triangle of value, above it c."""
    return np.tril(value) + np.triu(c, 1)


DEFINITIONS = {
    "2mm": lambda b: {"D": b["beta"] * b["D"] + b["alpha"] * b["A"] @ b["B"] @ b["C"]},
    "3mm": lambda b: {"G": b["A"] @ b["B"] @ (b["C"] @ b["D"])},
    "adi": adi,
    "atax": lambda b: {"y": b["A"].T @ (b["A"] @ b["x"])},
    "bicg": lambda b: {"s": b["A"].T @ b["r"], "q": b["A"] @ b["p"]},
    "cholesky": lambda b: {"A": lower(b["A"], np.linalg.cholesky(b["A"]))},
    "correlation": correlation,
    "covariance": lambda b: {"cov": np.cov(b["data"].T)},
    "deriche": deriche,
    "doitgen": lambda b: {"A": b["A"] @ b["C"]},
    "durbin": durbin,
    "fdtd_2d": fdtd_2d,
    "floyd_warshall": floyd_warshall,
    "gemm": lambda b: {"C": b["beta"] * b["C"] + b["alpha"] * b["A"] @ b["B"]},
    "gemver": gemver,
    "gesummv": lambda b: {"y": b["alpha"] * b["A"] @ b["x"] + b["beta"] * b["B"] @ b["x"]},
    "heat_3d": heat_3d,
    "jacobi_1d": lambda b: jacobi(b, 1),
    "jacobi_2d": lambda b: jacobi(b, 2),
    "ludcmp": lambda b: {"x": np.linalg.solve(b["A"], b["b"])},
    "mvt": lambda b: {"x1": b["x1"] + b["A"] @ b["y1"], "x2": b["x2"] + b["A"].T @ b["y2"]},
    "nussinov": nussinov,
    "seidel_2d": seidel_2d,
    "symm": lambda b: {"C": b["beta"] * b["C"] + b["alpha"] * (np.tril(b["A"]) + np.tril(b["A"], -1).T) @ b["B"]},
    "syr2k": lambda b: {"C": lower(b["C"], b["beta"] * b["C"] + b["alpha"] * (b["A"] @ b["B"].T + b["B"] @ b["A"].T))},
    "syrk": lambda b: {"C": lower(b["C"], b["beta"] * b["C"] + b["alpha"] * b["A"] @ b["A"].T)},
    "trisolv": lambda b: {"x": np.linalg.solve(np.tril(b["L"]), b["b"])},
    "trmm": lambda b: {"B": b["alpha"] * (np.tril(b["A"], -1) + np.eye(b["m"])).T @ b["B"]},
}


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_kernel_computes_its_definition(library, name):
    before, after, live = call(library, name, "small")
    expected = DEFINITIONS[name](before)
    assert set(expected) == set(live)
    for array, value in expected.items():
        tolerance = 1e-5 if after[array].dtype == np.float32 else 1e-10
        np.testing.assert_allclose(after[array], value, rtol=tolerance, atol=tolerance * np.abs(value).max())
        assert (after[array] != before[array]).mean() > 0.3  # the kernel has work to do


def test_lu_multiplies_to_the_matrix(library):
    before, after, _ = call(library, "lu", "small")
    np.testing.assert_allclose((np.tril(after["A"], -1) + np.eye(before["n"])) @ np.triu(after["A"]), before["A"], atol=1e-12)


def test_gramschmidt_gives_orthonormal_columns(library):
    before, after, _ = call(library, "gramschmidt", "small")
    np.testing.assert_allclose(after["Q"] @ after["R"], before["A"], atol=1e-12)
    np.testing.assert_allclose(after["Q"].T @ after["Q"], np.eye(before["n"]), atol=1e-10)
    assert np.allclose(after["R"], np.triu(after["R"])) and (np.diag(after["R"]) > 0).all()


def test_every_kernel_has_a_definition():
    assert {*DEFINITIONS, "lu", "gramschmidt"} == {path.stem for path in KERNELS.glob("*.c")}
