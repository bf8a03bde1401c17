"""Every field of a budget means in vLLM what it means in transformers."""

import pytest

from npu_sparse import ops

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    "budget, partition",
    [
        ("k=32,block=16,share_layers=2", False),
        ("k=32,block=16,anchors=0+2,per_layer=2:64", False),
        ("k=32,block=16,exact_last=24", False),
        ("k=32,block=16,reduce=softmax_max", True),
        ("k=0:48+200:32,block=16,tail,sink=4,recent=8", False),
        ("k=32,block=16,candidates=64,key_block=16,exact_last=8", False),
        ("k=32,block=1,reduce=mean", False),
    ],
)
def test_a_budget_gives_what_it_gives_in_transformers(budget, partition, engine, checkpoints, reference, prompts):
    served_by = engine("llama", budget, partition=partition)
    served = served_by.serve(prompts(40, 150, 260))
    assert served_by.mixed_batches() > 0 and max(one.chunks for one in served) >= 3
    check = reference(checkpoints("llama", partition), budget).check
    for one in served:
        check(one)


def test_layers_that_read_others_supports_have_no_index_keys(engine):
    served_by = engine("llama", "k=32,block=16,share_layers=2")
    layers = served_by.core.vllm_config.compilation_config.static_forward_context
    selecting = [name for name in layers if name.endswith(".npu_sparse")]
    assert selecting == ["model.layers.0.self_attn.attn.npu_sparse", "model.layers.2.self_attn.attn.npu_sparse"]


def test_the_last_of_a_prompt_is_exact_wherever_its_chunks_end(engine, prompts, monkeypatch):
    """A last chunk shorter than `exact_last` is not enough: the end of the chunk before it is exact, too."""
    served_by, exact, dense_rows = engine("llama", "k=32,block=16,exact_last=24"), set(), ops.dense_rows

    def watched(q, k, v, positions, **options):
        exact.update(positions.flatten().tolist())
        return dense_rows(q, k, v, positions, **options)

    monkeypatch.setattr(ops, "dense_rows", watched)
    (served,) = served_by.serve(prompts(133), max_tokens=1)
    assert served.steps == [(0, 128), (128, 5)]
    assert exact == {*range(128 - 24, 128), *range(128, 133)}
