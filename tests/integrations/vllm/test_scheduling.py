"""What the scheduler does to requests - preempts, aborts, mixes many of them - changes no result."""

import pytest

pytestmark = pytest.mark.vllm
SPARSE = "k=32,block=16"


@pytest.mark.parametrize(
    "name, pages, lengths",
    [("llama", 17, (150, 151, 152)), ("qwen3", 17, (150, 151, 152)), ("gemma3", 26, (90, 91, 92))],
)
def test_preempted_requests_go_on_as_if_read_again(name, pages, lengths, engine, checkpoints, reference, prompts):
    """Three requests whose last pages do not fit: what is recomputed is a prompt, index keys and all."""
    served_by = engine(name, SPARSE, block_size=32, num_gpu_blocks_override=pages, max_model_len=192, max_num_batched_tokens=512)
    served = served_by.serve(prompts(*lengths), max_tokens=24)
    assert sum(one.restarts for one in served) > 0, "memory was short"
    for one in served:
        reference(checkpoints(name), SPARSE).check(one)


def test_an_aborted_request_leaves_nothing_to_those_that_take_its_pages(engine, checkpoints, reference, prompts):
    served_by = engine("llama", SPARSE, block_size=32, num_gpu_blocks_override=24, max_model_len=512, enable_prefix_caching=False)

    first, second, third = prompts(400, 200, 300)
    served = served_by.begin([first, second])
    for _ in range(2):
        served_by.step(served)
    aborted = next(iter(served))
    served_by.llm.llm_engine.abort_request([aborted])
    lost, *rest = served_by.end(served | served_by.begin([third]))
    assert not lost.finished and 0 < sum(count for _, count in lost.steps) < 400, "it was in the middle of its prompt"
    for one in rest:
        reference(checkpoints("llama"), SPARSE).check(one)


def test_short_contexts_run_dense_and_long_ones_sparse_in_one_batch(engine, checkpoints, reference, prompts):
    budget = f"{SPARSE},dense_below=100"
    served_by = engine("llama", budget, max_num_batched_tokens=256)
    served = served_by.serve(prompts(99, 40, 100, 230))
    for one in served:
        reference(checkpoints("llama"), budget).check(one)
    for one in served[:2]:
        reference(checkpoints("llama"), None).check(one)
    with pytest.raises(AssertionError):
        reference(checkpoints("llama"), None).check(served[3])


def test_thirty_two_requests_of_mixed_lengths_at_once(engine, checkpoints, reference, prompts):
    lengths = [5 + 17 * n % 331 for n in range(32)]
    served_by = engine("qwen3", SPARSE, max_num_seqs=32, max_num_batched_tokens=512)
    served = served_by.serve(prompts(*lengths), max_tokens=8)
    assert served_by.mixed_batches() >= 8 and max(map(len, served_by.batches)) >= 16
    check = reference(checkpoints("qwen3"), SPARSE).check
    for one in served:
        check(one)


def test_a_second_turn_selects_among_tokens_that_were_decoded(engine, checkpoints, reference, prompts):
    served_by = engine("llama", SPARSE, block_size=32)
    (first,) = served_by.serve(prompts(90), max_tokens=70)
    (second,) = served_by.serve([first.prompt + first.tokens + prompts(60, seed=5)[0]])
    assert second.steps[0][0] >= 128, "pages that decode steps wrote are among those of the prefix"
    reference(checkpoints("llama"), SPARSE).check(second, before=first)
