import importlib.util
import json
import sys
from pathlib import Path

import pytest

from npu_sparse.schedule.frontend.c import parse_c

ROOT = Path(__file__).resolve().parents[2]
SCALE = """
void init_scale(int n, double x[n]) { for (int i = 0; i < n; i++) x[i] = i + 1; }
void kernel_scale(int n, double x[n]) {
#pragma scop
  for (int i = 0; i < n; i++) x[i] *= 1.5;
#pragma endscop
}
"""
POLYBENCH = {
    "utilities/polybench.h": """
#include <stdlib.h>
#define POLYBENCH_PADDING_FACTOR 0
#ifdef POLYBENCH_USE_C99_PROTO
# define POLYBENCH_C99_SELECT(x, y) y
#else
# define POLYBENCH_C99_SELECT(x, y) x
#endif
#define POLYBENCH_1D(v, d1, dd1) v[POLYBENCH_C99_SELECT(d1, dd1) + POLYBENCH_PADDING_FACTOR]
#define POLYBENCH_LOOP_BOUND(x, y) POLYBENCH_C99_SELECT(x, y)
""",
    "linear-algebra/scale-up/scale-up.h": """
#ifdef SMALL_DATASET
# define N 40
#endif
#ifdef MEDIUM_DATASET
# define N 400
#endif
#ifdef LARGE_DATASET
# define N 4000
#endif
#define _PB_N POLYBENCH_LOOP_BOUND(N,n)
#define DATA_TYPE double
#define SCALAR_VAL(x) x
""",
    "linear-algebra/scale-up/scale-up.c": """
#include <stdio.h>
#include <math.h>
#include <polybench.h>
#include "scale-up.h"
static
void init_array(int n,
\t\tDATA_TYPE *alpha,
\t\tDATA_TYPE POLYBENCH_1D(x,N,n))
{
  int i;
  *alpha = 1.5;
  for (i = 0; i < n; i++)
    x[i] = (DATA_TYPE) (i % 7) / n;
}
static
void print_array(int n, DATA_TYPE POLYBENCH_1D(y,N,n)) { fprintf(stderr, "%d", n); }
static
void kernel_scale_up(int n, DATA_TYPE alpha, DATA_TYPE POLYBENCH_1D(x,N,n), DATA_TYPE POLYBENCH_1D(y,N,n))
{
  int i;
#pragma scop
  for (i = 0; i < _PB_N; i++)
    y[i] = alpha * x[i] + SCALAR_VAL(2.0);
#pragma endscop
}
int main(int argc, char** argv) { return 0; }
""",
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_polybench", ROOT / "scripts" / "bench_polybench.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_polybench"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_polybench"]


def run(bench, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_polybench.py", "--tuning", "1", "--repeats", "2", *map(str, arguments)])
    bench.main()


def test_report_of_polybench_sources(bench, monkeypatch, tmp_path, capsys):
    for name, text in POLYBENCH.items():
        (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sources" / name).write_text(text)
    kernels = bench.polybench(tmp_path / "sources", "small")
    assert {name: kernel.values for name, kernel in kernels.items()} == {"scale_up": {"n": 40, "alpha": 1.5}}
    options = ["--polybench", tmp_path / "sources", "--size", "small", "--strategies", "pluto", "--tiles", "0 32"]
    run(bench, monkeypatch, "--output", tmp_path / "runs", *options)
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert report["failures"] == [] and (tmp_path / "runs" / "report.png").stat().st_size > 1000
    [record] = report["kernels"]
    assert record["kernel"] == "scale_up" and set(record["speedup"]) == {"pluto", bench.PARALLEL, bench.ISL, "tuned"}
    assert all(len(times["wall_s"]) == 2 for times in record["times"].values())
    expected = record["times"]["original"]["wall"] / record["times"][record["chosen"]["pluto"]]["wall"]
    assert record["speedup"]["pluto"] == expected and report["means"]["pluto"]["geomean"] == pytest.approx(expected)
    cpu = record["times"]["original"]["cpu"] / record["times"][record["chosen"]["pluto"]]["cpu"]
    assert report["means"]["pluto"]["cpu_geomean"] == pytest.approx(cpu)
    assert "| scale_up |" in capsys.readouterr().out
    assert "| geomean |" in (tmp_path / "runs" / "report.md").read_text()


def test_stock_polybench_sources_keep_their_types_and_allocations(bench, tmp_path):
    kernel = POLYBENCH["linear-algebra/scale-up/scale-up.c"]
    own = "typedef char base;\n#define match(a) ((a) == 3 ? 2 : 1)\nstatic"
    kernel = kernel.replace("static", own, 1)
    work = "base *w = (base *)polybench_alloc_data(n, sizeof(base));\n  w[0] = 1;"
    kernel = kernel.replace("  int i;\n#pragma", f"  int i;\n  {work}\n#pragma")
    kernel = kernel.replace("y[i] = alpha * x[i]", "y[i] = x[i] = match(i) * alpha * x[i]")
    files = {**POLYBENCH, "linear-algebra/scale-up/scale-up.c": kernel, "utilities/template-for-new-benchmark.c": kernel,
             "linear-algebra/scale-up/scale-up.orig.c": kernel}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for size, n in (("small", 40), ("medium", 400)):
        [found] = bench.polybench(tmp_path, size).values()
        assert found.values == {"n": n, "alpha": 1.5}
        scop = parse_c(found.text)
        new = bench.candidate(scop, found.text, "cpu-vector", "0")
        results = bench.run(scop, {"original": found.text, "new": new}, found.values, repeats=1, threads=(2,))
        assert [result.difference for result in results] == ["", ""]


def test_wrong_and_broken_candidates_win_nothing(bench, monkeypatch):
    kernel = bench.Kernel("scale", SCALE, {"n": 30})

    def candidate(scop, text, scheduler, tile):
        if scheduler == bench.ISL:
            raise ValueError("no schedule")
        if scheduler == "pluto":
            return text.replace("1.5;", "2.5;")
        return text if scheduler == bench.PARALLEL else text.replace("x[i] *=", "__builtin_trap(); x[i] *=")

    monkeypatch.setattr(bench, "candidate", candidate)
    monkeypatch.setattr(sys, "argv", ["x", "--strategies", "pluto,feautrier", "--tiles", "0", "--tuning", "1", "--repeats", "1"])
    record = bench.measure(kernel, bench._arguments())
    failed = {failure.split(":")[0] for failure in record["failures"]}
    assert {"pluto 0", "feautrier 0", "isl's scheduler 0"} <= failed and "original, parallel 0" not in failed
    assert record["speedup"]["pluto"] is record["speedup"]["feautrier"] is record["speedup"][bench.ISL] is None
    assert record["chosen"]["tuned"] in ("original", "original, parallel 0")


def test_unknown_kernel_and_empty_directory_are_refused(bench, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--kernels must be of .* got gem$"):
        run(bench, monkeypatch, "--output", tmp_path / "runs", "--kernels", "gem")
    with pytest.raises(SystemExit, match="--polybench must be a directory of PolyBench/C sources"):
        run(bench, monkeypatch, "--output", tmp_path / "runs", "--polybench", tmp_path)
    assert not list(tmp_path.iterdir())
