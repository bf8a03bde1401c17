"""Qwen3.5: linear attention, full attention and index keys in page groups of their own.

vLLM's CPU engine takes it in bfloat16 only, where two programs' hidden states differ by more than any of this could show: the
layers' own tensors are compared instead, chunk by chunk with the whole prompt.
"""

import os
from pathlib import Path

import pytest
import torch

from npu_sparse import Budget, ops
from npu_sparse.testing import assert_accurate

pytestmark = pytest.mark.vllm
STAND_INS = str(Path(__file__).parent / "stand_ins")
PROMPT = 300


@pytest.fixture
def torchvision(monkeypatch):
    """Importable, here and in the process in which vLLM looks at a model's class."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([STAND_INS, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def calls(vllm, monkeypatch):
    """`(inputs, output)` of every sparse call of every layer."""
    from npu_sparse.integrations.vllm import branch

    seen, attend = [], branch.attend_sparsely

    def watched(inputs, *rest):
        seen.append((inputs, attend(inputs, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(branch, "attend_sparsely", watched)
    return seen


@pytest.mark.parametrize("budget", ["k=32,block=16", "k=4096,block=16"])
def test_chunks_select_and_attend_as_the_whole_prompt(budget, vllm, torchvision, calls, engine, prompts):
    (served,) = engine("qwen3_5", budget, dtype="bfloat16").serve(prompts(PROMPT), max_tokens=4)
    assert served.steps[:3] == [(0, 128), (128, 128), (256, 44)] and len(served.steps) == 6
    parsed = Budget.parse(budget)
    for layer in (1, 3):
        chunks = [(inputs, out) for inputs, out in calls if inputs.layer == layer]
        assert [inputs.q.shape[2] for inputs, _ in chunks] == [128, 128, 44]
        whole = chunks[-1][0]
        for inputs, _ in chunks:  # pages return what was computed when they were written
            length = inputs.k.shape[2]
            assert torch.equal(whole.k[:, :, :length], inputs.k) and torch.equal(whole.v[:, :, :length], inputs.v)
            assert torch.equal(whole.index[1][:, :length], inputs.index[1])
        q = torch.cat([inputs.q for inputs, _ in chunks], 2)
        qi = torch.cat([inputs.index[0] for inputs, _ in chunks], 2)
        support = ops.select_by_index(qi, whole.index[1], None, k=parsed.k, block=16, reduce="max", impl="reference")
        exact = ops.sparse_attention(
            q.double(), whole.k.double(), whole.v.double(), support, scale=whole.scale, impl="reference"
        )
        reference = ops.sparse_attention(q, whole.k, whole.v, support, scale=whole.scale, impl="reference")
        out = torch.cat([out for _, out in chunks], 2)
        assert_accurate(out, exact, reference)
        if parsed.k >= PROMPT:
            groups = q.shape[1] // whole.k.shape[1]
            k, v = (x.double().repeat_interleave(groups, 1) for x in (whole.k, whole.v))
            dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, is_causal=True, scale=whole.scale)
            assert_accurate(out, dense, reference)


def test_index_keys_have_a_page_group_of_their_own(vllm, torchvision, engine):
    served_by = engine("qwen3_5", "k=32,block=16", dtype="bfloat16")
    config = served_by.core.scheduler.kv_cache_config
    groups = [{name.endswith(".npu_sparse") for name in group.layer_names} for group in config.kv_cache_groups]
    assert {True} in groups and {False} in groups and {True, False} not in groups
