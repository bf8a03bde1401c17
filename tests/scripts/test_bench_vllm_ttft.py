"""scripts/bench_vllm_ttft.py: its figures by stand-ins of both engines, whose times are known."""

import importlib.util
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
        self.llm_engine = self

    def add_request(self, name, prompt, sampling):
        assert sampling.max_tokens == 1
        self.waiting.append(name)
        self.prompts.append(prompt["prompt_token_ids"])

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
    monkeypatch.setattr(ttft, "time", SimpleNamespace(perf_counter=lambda: state[0]))
    return state


def test_a_request_waits_from_the_arrival_of_its_round_to_its_own_first_token(clock):
    assert ttft.first_tokens(Engine(clock, 2.0), [[1], [2], [3]]) == [2.0, 4.0, 6.0]


def test_speedup_is_that_of_interleaved_rounds_of_the_same_prompts(clock):
    options = ttft.parse([*COMMON, "--rounds", "4", "--lengths", "5,9", "--requests", "1,3"])
    both = [Engine(clock, 3.0), Engine(clock, 2.0)]
    cells = ttft.measure(options, both, vocabulary=50)
    assert [(cell["length"], cell["requests"]) for cell in cells] == [(5, 1), (5, 3), (9, 1), (9, 3)]
    assert all(cell["speedup"]["value"] == pytest.approx(1.5) for cell in cells)
    assert cells[1]["samples"]["dense"]["mean_s"] == pytest.approx([6.0] * 4)
    assert cells[1]["samples"]["dense"]["last_s"] == pytest.approx([9.0] * 4)
    assert both[0].prompts == both[1].prompts and [len(one) for one in both[0].prompts[:6]] == [5] * 6
    assert len({str(one) for one in both[0].prompts}) == len(both[0].prompts), "no prompt can be served from a cache"
    firsts = clock[1][:12:2]
    assert {firsts.count(one) for one in both} == {3}, "each first every other time"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lengths", "0,8"], "lengths must be >= 1, got 0"),
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
        (["--check", "64", "--batched", "32"], "check must not exceed batched, so that it is one chunk, got 64 and 32"),
    ],
)
def test_mistakes_are_sentences(words, sentence, capsys):
    with pytest.raises(SystemExit):
        ttft.parse([*COMMON, *words])
    assert sentence in capsys.readouterr().err
