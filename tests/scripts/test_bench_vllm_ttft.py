"""scripts/bench_vllm_ttft.py: its figures by stand-ins of both engines, whose times are known."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("bench_vllm_ttft", ROOT / "scripts" / "bench_vllm_ttft.py")
ttft = importlib.util.module_from_spec(specification)
specification.loader.exec_module(ttft)

COMMON = ["--model", "m", "--adapter", "a", "--output", "o"]


class Engine:
    """Serves one request a step, each in `seconds` of a clock that only engines move."""

    def __init__(self, clock: list, seconds: float):
        self.clock, self.seconds, self.waiting, self.prompts = clock, seconds, [], []
        self.llm_engine = self.engine_core = self
        self.scheduler, self.held = SimpleNamespace(max_num_scheduled_tokens=None), []
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 50)

    def add_request(self, name, prompt, sampling):
        assert sampling.max_tokens == 1
        self.waiting.append(name)
        self.prompts.append(prompt["prompt_token_ids"])
        self.held.append(self.scheduler.max_num_scheduled_tokens)

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        self.clock[0] += self.seconds
        self.clock[1].append(self)
        return [SimpleNamespace(request_id=self.waiting.pop(0), finished=True)]


@pytest.fixture
def clock(monkeypatch):
    """`[seconds, engines in the order in which they served]`."""
    state = [0.0, []]
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    module.__version__ = "0.26.0"
    monkeypatch.setattr(ttft, "time", SimpleNamespace(perf_counter=lambda: state[0], monotonic=lambda: state[0]))
    return state


def test_a_request_waits_from_the_arrival_of_its_round_to_its_own_first_token(clock):
    assert ttft.first_tokens(Engine(clock, 2.0), [[1], [2], [3]]) == [2.0, 4.0, 6.0]


def test_speedup_is_that_of_interleaved_rounds_of_the_same_prompts(clock, tmp_path):
    options = ttft.parse([*COMMON, "--rounds", "4", "--lengths", "5,9", "--requests", "1,3", "--batched", "64,8", "--check", "0"])
    both = [Engine(clock, 3.0), Engine(clock, 2.0)]
    kept = ttft.cells(options, tmp_path)
    ttft.fill(options, kept, both, vocabulary=50)
    cells = list(kept.records().values())
    assert [(cell["length"], cell["requests"], cell["batched"]) for cell in cells] == [
        (length, requests, batched) for batched in (64, 8) for requests in (1, 3) for length in (9, 5)
    ]
    assert all(cell["speedup"]["value"] == pytest.approx(1.5) for cell in cells)
    assert cells[2]["samples"]["dense"]["mean_s"] == pytest.approx([6.0] * 4)
    assert cells[2]["samples"]["dense"]["last_s"] == pytest.approx([9.0] * 4)
    assert both[0].held == both[1].held == [64] * (2 + 6) * 6 + [8] * (2 + 6) * 6
    assert both[0].prompts == both[1].prompts and [len(one) for one in both[0].prompts[:6]] == [9] * 6
    assert len({str(one) for one in both[0].prompts}) == len(both[0].prompts), "no prompt can be served from a cache"
    firsts = clock[1][:12:2]
    assert {firsts.count(one) for one in both} == {3}, "each first every other time"


def test_what_would_end_too_late_is_left_to_the_same_command(clock, tmp_path, monkeypatch, capsys):
    """A measurement of 2 + 4 rounds takes 30 s: three fit into 100 s, and a process that goes on makes the others."""
    command = [*COMMON[:-1], str(tmp_path / "run"), "--rounds", "4", "--lengths", "9", "--requests", "1", "--check", "0",
               "--batched", "64,32,16,8"]  # fmt: skip
    made = []

    def engines(options):
        made.append(options)
        return [Engine(clock, 3.0), Engine(clock, 2.0)]

    monkeypatch.setattr(ttft, "engines", engines)
    assert ttft.main([*command, "--budget-s", "100"]) == 0
    assert "Not measured yet: 9x1-8." in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in (tmp_path / "run" / "cells").iterdir()}
    assert sorted(first) == ["9x1-16.json", "9x1-32.json", "9x1-64.json"]
    assert ttft.main(command) == 0
    assert "Not measured" not in capsys.readouterr().out
    assert all((tmp_path / "run" / "cells" / name).read_bytes() == data for name, data in first.items())
    assert ttft.main(command) == 0 and len(made) == 2, "a finished run makes no engines"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["cells"]) == ["9x1-64", "9x1-32", "9x1-16", "9x1-8"] and report["missing"] == []


def test_the_page_says_which_attention_and_runner_answered_as_transformers():
    one = {"tokens": [1, 2], "transformers": [1, 3], "same": 1, "logprob_difference": 0.5}
    engines = {"dense": {"attention": "FLASH_ATTN 3", "runner": 2}, "sparse": {"attention": "FLASH_ATTN 3", "runner": 2}}
    config = vars(ttft.parse(COMMON))
    machine = ttft.machine()
    check = {"check": 2048, "found": dict.fromkeys(ttft.ENGINES, one), "engines": engines}
    page = ttft.page({"config": config, "vllm": "0.26.0", "machine": machine, "check": check, "cells": {}, "missing": ["9x1-8"]})
    assert "sparse, FLASH_ATTN 3, model runner 2: 1 of 2 greedy tokens are transformers' after 2048 tokens" in page
    assert "Nothing was measured yet." in page


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lengths", "0,8"], "lengths must be >= 1, got 0"),
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
        (["--memory", "0.5"], "memory must be > 0 and < 0.5, a share for each of two engines, got 0.5"),
        (["--check", "64", "--batched", "32"], "check must not exceed batched, so that it is one chunk, got 64 and 32"),
    ],
)
def test_mistakes_are_sentences(words, sentence, capsys):
    with pytest.raises(SystemExit):
        ttft.parse([*COMMON, *words])
    assert sentence in capsys.readouterr().err
