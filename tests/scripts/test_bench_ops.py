import importlib.util
import json
from pathlib import Path

import pytest
import torch

from npu_sparse import Support


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_ops", Path(__file__).parents[2] / "scripts" / "bench_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record():
    name = "sparse k 2048, b_sel 64"
    return {
        "length": 4096, "evidence": "untrained", "refused": {"dense cudnn": "no such backend"},
        "milliseconds": {"dense fa3": [8.0, 10.0, 12.0], name: [2.0, 2.5, 3.0]}, "machine": {"card": "a card"},
        "peaks": {"dense fa3": 1 << 30, name: 1 << 29},
        "rates": {"tflops": 500.0, "gb_s": 2000.0},
        "parts": {name: {
            "stages": {"projection": 0.1, "scoring and top-k": 1.0, "attention": 1.4},
            "overlap": {"union_of_32_queries": 1.5, "neighbours_jaccard": None},
            "kernels": {"filter_scores": 0.8, "select_candidates": 0.1, "sample_scores": 0.1, "attend_supports": 1.4},
            "work": {"scoring": {"flops": 2e11, "bytes": 1e6}, "attention": {"flops": 1e9, "bytes": 1.4e9}},
        }},
    }  # fmt: skip


def test_speed_ups_are_ratios_of_medians(bench, record):
    rows, _ = bench.tabulate(record, seed=0)
    sparse = next(row for row in rows if row["what"].startswith("sparse"))
    assert sparse["over_fa3"]["value"] == pytest.approx(4.0) and "over_cudnn" not in sparse
    assert sparse["evidence"] == "untrained" and rows[0]["evidence"] == "dense"


def test_roofline_is_the_larger_of_arithmetic_and_memory(bench, record):
    _, kernels = bench.tabulate(record, seed=0)
    rows = {row["operator"].partition(" ")[0]: row for row in kernels}
    assert rows["scoring"]["% of roofline"] == pytest.approx(100 * 0.4 / 0.8)  # 2e11 FLOPs at 500 TFLOP/s
    assert rows["attention"]["% of roofline"] == pytest.approx(100 * 0.7 / 1.4)  # 1.4e9 bytes at 2000 GB/s
    assert rows["top-k"]["ms"] == pytest.approx(0.2) and rows["scoring"]["TFLOP/s"] == pytest.approx(250)


def test_overlap_of_equal_and_of_disjoint_supports(bench):
    equal = torch.arange(4, dtype=torch.int32).expand(1, 1, 40, 4).contiguous()
    count = torch.full((1, 1, 40), 4, dtype=torch.int32)
    assert bench.overlap(Support(equal, count, 1)) == {"union_of_32_queries": 1.0, "neighbours_jaccard": 1.0}
    apart = torch.arange(160, dtype=torch.int32).view(1, 1, 40, 4)
    assert bench.overlap(Support(apart, count, 1)) == {"union_of_32_queries": 32.0, "neighbours_jaccard": 0.0}


def test_work_counts_causal_pairs_only(bench):
    class Layer:
        q, k, v = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)

    support = Support(torch.zeros(1, 1, 1, 3, dtype=torch.int32), torch.full((1, 1, 1), 3, dtype=torch.int32), 4)
    index = torch.zeros(1, 1, 4, 16), torch.zeros(1, 4, 16), None
    work = bench.work(Layer, index, support)
    assert work["attention"]["flops"] == 4 * (1 + 2 + 3 + 3) * 2 * 8  # at most the support, at most what is visible
    assert work["scoring"]["flops"] == 2 * (1 + 2 + 3 + 4) * 16


def test_work_in_two_levels_counts_ranked_blocks_and_scored_keys(bench):
    class Layer:
        q, k, v = torch.zeros(1, 2, 400, 8), torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8)

    support = Support(torch.zeros(1, 1, 7, 3, dtype=torch.int32), torch.full((1, 1, 7), 3, dtype=torch.int32), 64)
    index = torch.zeros(1, 1, 400, 16), torch.zeros(1, 400, 16), None
    scored = sum(min(t + 1, 32 + 3 * 16) for t in range(400))
    work = bench.work(Layer, index, support, candidates=32, key_block=16)
    assert work["scoring"]["flops"] == pytest.approx(2 * 16 * (2 * 400 * 401 / 2 / 16 + scored))


def test_a_budget_may_have_candidates(bench):
    assert bench.budgets("2048:64,2048:64:8192") == [(2048, 64, 0), (2048, 64, 8192)]
    assert bench.sparse_name(2048, 64, 0) == "sparse k 2048, b_sel 64"
    assert bench.sparse_name(2048, 64, 8192) == "sparse k 2048, b_sel 64, candidates 8192"
    with pytest.raises(ValueError, match="budgets must be k:b_sel or k:b_sel:candidates, got 2048"):
        bench.budgets("2048")


def test_report_is_made_of_finished_lengths_without_a_gpu(bench, record, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--lengths", "4096", "--sparse", "2048:64", "--output", str(output)]
    args = bench.parse(options)
    config = json.loads(json.dumps({k: v for k, v in vars(args).items() if k != "output"}))
    bench.open_run(output, {"stage": "bench-ops", **config})
    (output / "records").mkdir()
    record["machine"] = bench.machine()
    bench.write_json(output / "records" / "4096.json", record)
    assert bench.main(options) == 0
    text = (output / "report.md").read_text()
    assert "4.00x" in text and "Not run: dense cudnn at 4096 tokens (no such backend)" in text and "untrained" in text
    assert (output / "report.png").stat().st_size > 1000
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_an_adapter_needs_its_checkpoint(bench, tmp_path):
    with pytest.raises(ValueError, match="adapter and checkpoint must be given together"):
        bench.main(["--adapter", "gemma3-270m", "--output", str(tmp_path)])
