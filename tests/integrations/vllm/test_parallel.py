"""Two ranks, by tensors or by layers, serve what one does: the indexer is replicated, keys, values and layers are not."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SPARSE = "k=32,block=16"


@pytest.fixture
def spawned(monkeypatch):
    """Workers in processes of their own, which vLLM starts; each finds the plugin by its entry point."""
    from importlib.metadata import entry_points

    if not any(point.name == "npu_sparse" for point in entry_points(group="vllm.general_plugins")):
        pytest.skip("the plugin must be installed for vLLM's workers to find it: run `make test-vllm`")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@pytest.mark.parametrize(
    "ranks",
    [
        dict(tensor_parallel_size=2),
        # without a warm-up, which an eager engine leaves out, this version's CPU engine has no buffers for a second stage
        dict(pipeline_parallel_size=2, enforce_eager=False, compilation_config={"mode": 2, "backend": "eager"}),
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ranks(ranks, spawned, engine, checkpoints, reference, prompts):
    served_by = engine("qwen3", SPARSE, distributed_executor_backend="mp", **ranks)
    served = served_by.serve(prompts(40, 150, 260))
    assert served_by.mixed_batches() > 0 and max(one.chunks for one in served) >= 3
    check = reference(checkpoints("qwen3"), SPARSE).check
    for one in served:
        check(one)
