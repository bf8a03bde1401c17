"""Long contexts fit: never [Tq, Tk] for every head at once. Measured as the peak of a process of its own."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, torch
from npu_sparse import ops, testing
def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
torch.set_num_threads({threads})
q, k, v = testing.attention_inputs(1, 8, 2, 8192, 8192, 64, dtype=torch.bfloat16)
before = peak_gib()
{call}
print(json.dumps(peak_gib() - before))
"""
MASS = "out = ops.attention_mass(q, k, scale=0.125, reduce_block=64)"
SHARED = """
scores = torch.randn(1, 128, 8192).masked_fill_(torch.arange(8192) > torch.arange(63, 8192, 64)[:, None], -torch.inf)
out = ops.sparse_attention(q, k, v, ops.select_tokens(scores, k=512, block=64), scale=0.125)
"""
PER_QUERY = """
scores = torch.randn(1, 8192, 8192).masked_fill_(torch.ones(8192, 8192, dtype=torch.bool).triu_(1), -torch.inf)
support = ops.select_tokens(scores, k=256)
del scores
before = peak_gib()
out = ops.sparse_attention(q, k, v, support, scale=0.125)
"""
INDEX = """
qi, ki, w = testing.index_inputs(1, 4, 8192, 8192, 64, dtype=torch.bfloat16)
out = ops.select_by_index(qi, ki, w, k=256, block=1)
"""
KL = """
qi, ki, w = (x.requires_grad_() for x in testing.index_inputs(1, 4, 8192, 8192, 64, dtype=torch.bfloat16))
ops.index_kl(q, k, qi, ki, w, segments=[(0, 64), (4096, 8192)], scale=0.125).sum().backward()
"""
TWO_LEVEL = """
qi, ki, w = testing.index_inputs(1, 4, 8192, 8192, 64, dtype=torch.bfloat16)
out = ops.select_two_level(qi, ki, w, k=256, candidates=1024, block=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, most_gib",
    [(MASS, 1.5), (SHARED, 0.75), (PER_QUERY, 0.75), (INDEX, 2.5), (KL, 1.0), (TWO_LEVEL, 0.75)],
    ids=[
        "attention_mass", "sparse_attention shared", "sparse_attention per query", "select_by_index per query", "index_kl",
        "select_two_level per query",
    ],
)
def test_8192_tokens_stay_within_memory(call, most_gib):
    """One fp32 [Tq, Tk] for 8 heads would be 2 GiB, its softmax another 2."""
    import torch

    program = PROGRAM.format(call=call, threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < most_gib
