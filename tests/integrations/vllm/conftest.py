"""vLLM's CPU engine in this process, what it did step by step, and the same steps through transformers.

A request's *steps* are what the scheduler gave it: (tokens computed before, tokens computed now). `Reference.check` walks them
with `SparsePrefill` around the transformers model and compares every sampled token and its log-probability.
"""

import gc
import os
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from npu_sparse import Budget, Indexer, SparsePrefill
from npu_sparse.testing import tiny_model

NOISE = 1e-4  # of float32 log-probabilities: the two programs add in different orders
CHANGES = {
    "llama": dict(head_dim=32),
    "qwen2": dict(hidden_size=128),
    "qwen3": dict(head_dim=32),
    "gemma3": dict(head_dim=32),
    # sizes that the CPU engine's Gated DeltaNet takes
    "qwen3_5": dict(head_dim=32, linear_key_head_dim=128, linear_value_head_dim=128, dtype=torch.bfloat16),
}


@pytest.fixture(scope="session")
def vllm():
    """vLLM with the plugin registered; skips where it is not installed."""
    os.environ |= dict(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1",
    )  # fmt: skip
    module = pytest.importorskip("vllm", reason="vLLM is not installed: run `make test-vllm`")
    from npu_sparse.integrations.vllm import register

    register()
    return module


@dataclass
class Checkpoint:
    """A tiny random model on disk, as transformers has it, and its untrained indexer."""

    name: str
    model: torch.nn.Module
    indexer: Indexer
    path: str
    adapter: str


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints(name, partition=False)` -> Checkpoint."""
    made = {}

    def get(name: str, partition: bool = False) -> Checkpoint:
        if (name, partition) not in made:
            directory = tmp_path_factory.mktemp(name)
            model = tiny_model(name, max_position_embeddings=2048, **CHANGES[name])
            indexer = Indexer.for_model(model, dim=64, partition=partition)
            if partition:  # fitted ones are not log n
                generator = torch.Generator().manual_seed(3)
                for head in indexer.layers.values():
                    head.partition.direction.data = torch.randn(model.config.hidden_size, generator=generator) * 0.3
            model.save_pretrained(directory / "model")
            indexer.save_pretrained(directory / "adapter")
            indexer = Indexer.from_pretrained(directory / "adapter")  # as stored
            made[name, partition] = Checkpoint(name, model, indexer, str(directory / "model"), str(directory / "adapter"))
        return made[name, partition]

    return get


@dataclass
class Served:
    """One request: its prompt, what was sampled, and its steps. A step whose start is not the last one's end is a restart."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    finished: bool = False

    @property
    def chunks(self) -> int:
        return sum(start < len(self.prompt) for start, _ in self.steps)

    @property
    def restarts(self) -> int:
        ends = [0, *(start + count for start, count in self.steps)]
        return sum(step[0] != end for step, end in zip(self.steps[1:], ends[1:]))


class Engine:
    """An engine of vLLM whose scheduler is watched."""

    def __init__(self, vllm, checkpoint: Checkpoint, budget: str, *, dtype: str = "float32", **options):
        options = dict(max_model_len=1024, max_num_batched_tokens=128, max_num_seqs=8, enforce_eager=True) | options
        self.vllm, self.checkpoint = vllm, checkpoint
        self.llm = vllm.LLM(
            checkpoint.path, load_format="npu_sparse", dtype=dtype, skip_tokenizer_init=True, seed=0, disable_log_stats=True,
            model_loader_extra_config={"adapter": checkpoint.adapter, "budget": budget}, **options,
        )  # fmt: skip
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.batches: list[dict[str, tuple[int, int]]] = []
        self._watch()
        self._requests = 0

    def _watch(self):
        schedule = self.core.scheduler.schedule

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            before = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
            before |= dict(zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens))
            batch = {name: (before[name], count) for name, count in output.num_scheduled_tokens.items()}
            if batch:
                self.batches.append(batch)
            return output

        self.core.scheduler.schedule = watched

    def begin(self, prompts: list[list[int]], max_tokens: int = 8) -> dict[str, Served]:
        """Adds requests; `step` works on them."""
        greedy = self.vllm.SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
        served = {}
        for prompt in prompts:
            self._requests += 1
            served[f"request{self._requests}"] = Served(prompt)
            self.llm.llm_engine.add_request(f"request{self._requests}", {"prompt_token_ids": prompt}, greedy)
        return served

    def step(self, served: dict[str, Served]) -> None:
        """One step of the engine; what it sampled is noted."""
        for output in self.llm.llm_engine.step():
            one = served[_known(output.request_id, served)]
            one.tokens = list(output.outputs[0].token_ids)
            one.logprobs = [next(iter(position.values())).logprob for position in output.outputs[0].logprobs]
            one.finished = output.finished

    def end(self, served: dict[str, Served]) -> list[Served]:
        """Runs all requests to their ends, and notes their steps."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step(served)
        for batch in self.batches:
            for name, step in batch.items():
                served[_known(name, served)].steps.append(step)
        return list(served.values())

    def serve(self, prompts: list[list[int]], max_tokens: int = 8) -> list[Served]:
        """All prompts at once, to their ends."""
        self.batches.clear()
        return self.end(self.begin(prompts, max_tokens))

    def mixed_batches(self) -> int:
        """Batches in which some request reads several tokens and another one."""
        return sum(len({count > 1 for _, count in batch.values()}) == 2 for batch in self.batches)

    def layer(self):
        """The attention layer of vLLM's first sparse layer."""
        layers = self.core.vllm_config.compilation_config.static_forward_context
        return next(layer for layer in layers.values() if hasattr(layer, "npu_sparse"))

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.core, self.llm
        gc.collect()


def _known(name: str, served: dict[str, Served]) -> str:
    """The request's own name: inside, the engine adds to it."""
    (known,) = [one for one in served if name == one or name.startswith(f"{one}-")]
    return known


@pytest.fixture
def engine(vllm, checkpoints):
    """`engine(name, budget, **options)` -> Engine, closed after the test."""
    opened = []

    def open_engine(name: str, budget: str, *, partition: bool = False, **options) -> Engine:
        opened.append(Engine(vllm, checkpoints(name, partition), budget, **options))
        return opened[-1]

    yield open_engine
    for one in opened:
        one.close()


class Reference:
    """The transformers model with the same steps.

    said: whether every forward is told the prompt's length, as an engine's attention is where its worker says it.
    """

    def __init__(self, checkpoint: Checkpoint, budget: str | None, *, said: bool = False):
        self.checkpoint, self.budget, self.said = checkpoint, None if budget is None else Budget.parse(budget), said

    @torch.no_grad()
    def walk(self, parts: list[tuple[Served, list[tuple[int, int]]]]) -> dict[int, torch.Tensor]:
        """`{tokens computed: log-probabilities of the next one}` after each step of the last part.

        Each part is a run of steps of one request; it begins with the tokens that are kept of the part before it.
        """
        from transformers import DynamicCache

        model, cache, rows = self.checkpoint.model, DynamicCache(), {}  # sliding layers keep all, so that they can be cropped
        attached = nullcontext() if self.budget is None else SparsePrefill.attach(model, self.checkpoint.indexer, self.budget)
        with attached:
            for served, steps in parts:
                tokens, rows = served.prompt + served.tokens, {}
                if steps[0][0] < cache.get_seq_length():
                    cache.crop(steps[0][0])
                for start, count in steps:
                    assert start == cache.get_seq_length()
                    ids = torch.tensor([tokens[start : start + count]])
                    # past its prompt a request decodes, whatever the number of tokens: recomputed ones may be several
                    decodes = self.budget is not None and start >= len(served.prompt) and count > 1
                    length = len(served.prompt) if self.said else start if decodes else None
                    told = {} if length is None or self.budget is None else {"prompt_length": length}
                    rows[start + count] = model(ids, past_key_values=cache, **told).logits[0, -1].float().log_softmax(-1)
        return rows

    def check(self, served: Served, *, before: Served | None = None, noise: float = NOISE) -> float:
        """Asserts that every sampled token is the most likely one, with its log-probability. Returns the largest difference.

        before: the request whose pages this one begins with.
        """
        assert served.finished and len(served.tokens) == len(served.logprobs) > 0
        rows, parts = {}, []
        if before is not None:
            start = served.steps[0][0]
            assert (before.prompt + before.tokens)[:start] == served.prompt[:start]
            parts = [(before, segment) for segment in segments(before.steps)]
        for segment in segments(served.steps):
            parts = [*(parts if segment[0][0] else []), (served, segment)]
            rows = self.walk(parts) | rows
        worst = 0.0
        for n, (token, logprob) in enumerate(zip(served.tokens, served.logprobs)):
            expected = rows[len(served.prompt) + n]
            assert int(expected.argmax()) == token, f"token {n}"
            worst = max(worst, abs(float(expected[token]) - logprob))
        assert worst <= noise
        return worst


def segments(steps: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Steps cut where one does not go on from the last."""
    parts = defaultdict(list)
    number, end = 0, None
    for start, count in steps:
        number += end is not None and start != end
        parts[number].append((start, count))
        end = start + count
    return list(parts.values())


@pytest.fixture(scope="session")
def reference():
    return Reference


@pytest.fixture(scope="session")
def prompts():
    """`prompts(*lengths, seed=0)` -> lists of random token ids."""

    def make(*lengths: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(1, 99, (length,), generator=generator).tolist() for length in lengths]

    return make
