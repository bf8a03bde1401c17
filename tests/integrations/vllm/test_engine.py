"""vLLM's engine with the plugin against the transformers path: the same tokens and log-probabilities, whatever the batches."""

import pytest

pytestmark = pytest.mark.vllm
MODELS = ("llama", "qwen2", "qwen3", "gemma3")
SPARSE = "k=32,block=16"


@pytest.mark.parametrize("name", MODELS)
def test_k_of_the_whole_context_is_dense(name, engine, checkpoints, reference, prompts):
    served = engine(name, "k=4096,block=16").serve(prompts(37, 150, 300, 90))
    assert any(one.chunks > 1 for one in served)
    for one in served:
        reference(checkpoints(name), None).check(one)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_mixed_batches_give_what_transformers_gives(name, engine, checkpoints, reference, prompts):
    served_by = engine(name, SPARSE)
    served = served_by.serve(prompts(37, 150, 300, 90))
    assert served_by.mixed_batches() > 0 and max(one.chunks for one in served) >= 3
    for one in served:
        reference(checkpoints(name), SPARSE).check(one)
    with pytest.raises(AssertionError):
        reference(checkpoints(name), None).check(served[2])  # the budget is far from dense
    # the next turn begins with pages of the last one, index keys among them
    last = served[2]
    again = served_by.serve([last.prompt + last.tokens + prompts(70, seed=5)[0]])[0]
    assert again.steps[0][0] >= 256, "the prefix cache was hit"
    reference(checkpoints(name), SPARSE).check(again, before=last)


def test_a_traced_model_gives_the_same(engine, checkpoints, reference, prompts):
    """Dynamo's graph holds the index op in front of the attention that needs it."""
    served_by = engine("llama", SPARSE, enforce_eager=False, compilation_config={"mode": 2, "backend": "eager"})
    assert "npu_sparse_vllm::index" in served_by.core.vllm_config.compilation_config.splitting_ops
    for one in served_by.serve(prompts(37, 150, 300)):
        reference(checkpoints("llama"), SPARSE).check(one)
