"""scripts/bench_vllm_idle.py: its figures by stand-ins of both engines, whose times are known."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("bench_vllm_idle", ROOT / "scripts" / "bench_vllm_idle.py")
idle = importlib.util.module_from_spec(specification)
specification.loader.exec_module(idle)

COMMON = ["--model", "m", "--adapter", "a", "--output", "o"]


class Engine:
    """Takes `seconds` a round of a clock that only engines move, and writes what `token` says."""

    def __init__(self, clock: list, seconds: float, token: int = 7):
        self.clock, self.seconds, self.token, self.rounds = clock, seconds, token, []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 50))

    def generate(self, prompts, sampling, use_tqdm):
        self.clock[0] += self.seconds
        self.clock[1].append(self)
        self.rounds.append([one["prompt_token_ids"] for one in prompts])
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[self.token] * sampling.max_tokens)]) for _ in prompts]


@pytest.fixture
def clock(monkeypatch):
    """`[seconds, engines in the order in which they served]`."""
    state = [0.0, []]
    module = ModuleType("vllm")
    module.SamplingParams, module.__version__ = SimpleNamespace, "0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(idle, "time", SimpleNamespace(perf_counter=lambda: state[0], process_time=lambda: state[0] / 2))
    return state


def test_ratio_is_that_of_interleaved_rounds_of_the_same_prompts(clock):
    options = idle.parse([*COMMON, "--rounds", "6", "--requests", "2", "--prompt", "5", "--new", "3"])
    both = [Engine(clock, 2.0), Engine(clock, 2.5)]
    report = idle.measure(options, both)
    assert report["ratio"]["wall_s"]["value"] == pytest.approx(1.25) == report["ratio"]["cpu_s"]["value"]
    assert report["samples"]["vLLM"] == {"wall_s": [2.0] * 6, "cpu_s": [1.0] * 6}
    assert both[0].rounds == both[1].rounds and len(both[0].rounds) == 7, "a warm-up before"
    assert all([len(prompt) for prompt in prompts] == [5, 5] for prompts in both[0].rounds)
    assert len({str(prompts) for prompts in both[0].rounds}) == 7, "no round can be served from a cache"
    firsts = clock[1][::2]
    assert {firsts.count(one) for one in both} == {3, 4}, "each first every other time"
    assert "| time | 2.000 s (IQR 0.000) | 2.500 s (IQR 0.000) | 1.250 [1.250, 1.250] |" in idle.page(report)


def test_engines_that_write_different_tokens_are_refused(clock):
    options = idle.parse([*COMMON, "--rounds", "1", "--requests", "2"])
    with pytest.raises(RuntimeError, match="must write the same tokens"):
        idle.measure(options, [Engine(clock, 1.0), Engine(clock, 1.0, token=8)])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--requests", "8", "--seqs", "8"], "requests must be fewer than seqs, got 8 and 8"),
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
    ],
)
def test_mistakes_are_sentences(words, sentence, capsys):
    with pytest.raises(SystemExit):
        idle.parse([*COMMON, *words])
    assert sentence in capsys.readouterr().err
