"""Chunks that end at multiples of `block` have the supports of the whole prompt, whatever else a step holds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from npu_sparse import Budget, Indexer
from npu_sparse.integrations.vllm.chunks import aligned, check_room
from npu_sparse.integrations.vllm.options import budget_of

SPARSE = "k=32,block=16"
ALIGNED = "npu_sparse.integrations.vllm.scheduler.AlignedScheduler"


@pytest.mark.parametrize(
    "start, count, read, why",
    [
        (0, 100, 96, "the last multiple of 16"),
        (96, 100, 96, "from there on"),
        (96, 15, 0, "no room for a block: the next step has more"),
        (192, 8, 8, "the prompt's end"),
        (192, 20, 20, "the prompt's end, and what a preempted request had written"),
        (40, 100, 8, "a cached prefix ends within a block: the chunk ends with it"),
        (195, 20, 13, "within the last block, too"),
        (200, 3, 3, "what follows the prompt"),
        (207, 1, 1, "a decode step"),
    ],
)
def test_a_chunk_ends_at(start, count, read, why):
    assert aligned(start, count, 200, 16) == read, why


def test_every_prompt_is_read_to_its_end_in_steps_that_have_room_for_a_block():
    for prompt in range(1, 70):
        for first in range(0, prompt):
            start, steps = first, []
            while start < prompt:
                steps.append(aligned(start, min(prompt - start, 16 + len(steps) % 3), prompt, 16))
                assert steps[-1] > 0
                start += steps[-1]
                assert start == prompt or start % 16 == 0
            assert len(steps) <= (prompt - first) // 16 + 2


def test_settings_that_would_let_a_prompt_wait_for_ever_are_refused():
    check_room(64, 72, 8, 0)
    check_room(64, 72, 8, 64)
    with pytest.raises(ValueError, match=r"max-num-batched-tokens must be >= 72 for AlignedScheduler, 64 of a prompt .* got 71$"):
        check_room(64, 71, 8, 0)
    with pytest.raises(ValueError, match=r"long-prefill-token-threshold must be 0 or >= 64 for AlignedScheduler, got 63$"):
        check_room(64, 128, 8, 63)


def test_the_budget_is_the_engines_or_what_its_adapter_recommends():
    def engine(**extra):
        return SimpleNamespace(load_format="npu_sparse", model_loader_extra_config={"adapter": "smollm2-135m", **extra})

    assert budget_of(engine(budget=SPARSE)) == Budget.parse(SPARSE)
    recommended = Indexer.from_pretrained("smollm2-135m").budget
    assert recommended and budget_of(engine()) == Budget.from_dict(recommended)
    with pytest.raises(ValueError, match="load-format must be npu_sparse for AlignedScheduler, got auto"):
        budget_of(SimpleNamespace(load_format="auto", model_loader_extra_config={}))


def in_one_piece(served):
    """The same request, as if its prompt had been read in one step."""
    return replace(served, steps=[(0, len(served.prompt)), *(step for step in served.steps if step[0] >= len(served.prompt))])


def shifted(served) -> int:
    """Chunks of a prompt whose blocks lie elsewhere than in one piece."""
    return sum(0 < start < len(served.prompt) and start % 16 > 0 for start, _ in served.steps)


@pytest.mark.vllm
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_prompt_in_aligned_chunks_has_the_supports_of_one_piece(asynchronous, engine, checkpoints, reference, prompts):
    """Decode steps of earlier requests take tokens of the steps that the later prompts are read in."""
    served_by = engine("llama", SPARSE, scheduler_cls=ALIGNED, async_scheduling=asynchronous)
    served = served_by.serve(prompts(37, 150, 300, 90, 200), max_tokens=12)
    assert served_by.mixed_batches() > 0 and max(one.chunks for one in served) >= 3
    assert not any(shifted(one) for one in served)
    check = reference(checkpoints("llama"), SPARSE).check
    for one in served:
        check(in_one_piece(one))


@pytest.mark.vllm
def test_without_it_chunks_begin_anywhere_and_their_blocks_lie_elsewhere(engine, checkpoints, reference, prompts):
    served = engine("llama", SPARSE).serve(prompts(37, 150, 300, 90, 200), max_tokens=12)
    moved = [one for one in served if shifted(one)]
    assert moved
    with pytest.raises(AssertionError):
        for one in moved:
            reference(checkpoints("llama"), SPARSE).check(in_one_piece(one))


@pytest.mark.vllm
def test_a_cached_prefix_that_ends_within_a_block_is_followed_by_the_rest_of_it(engine, checkpoints, reference, prompts):
    """Pages of 32 tokens and blocks of 64."""
    budget = "k=32,block=64"
    served_by = engine("llama", budget, scheduler_cls=ALIGNED, block_size=32)
    (first,) = served_by.serve(prompts(110), max_tokens=4)
    (second,) = served_by.serve([first.prompt[:100] + prompts(120, seed=5)[0]], max_tokens=4)
    assert second.steps[:3] == [(96, 32), (128, 92), (220, 1)]
    reference(checkpoints("llama"), budget).check(second, before=first)


@pytest.mark.vllm
def test_an_engine_whose_steps_have_no_room_is_refused(engine):
    with pytest.raises(Exception, match="max-num-batched-tokens must be >= 72 for AlignedScheduler"):
        engine("llama", "k=32,block=64", scheduler_cls=ALIGNED, max_num_batched_tokens=64)
