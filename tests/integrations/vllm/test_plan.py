"""Which requests of a batch run sparse, and what of the batch is left to the backend."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from npu_sparse.integrations.vllm.plan import divided, make_plan
from npu_sparse.models.forward import ForwardContext


@dataclass
class Common:
    """As vLLM's CommonAttentionMetadata, as far as a plan reads it."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    is_prefilling: Tensor | None = None
    positions: Tensor | None = None
    _num_computed_tokens_cache: Tensor | None = None

    def replace(self, **changes):
        return replace(self, **changes)


def batch(queries, lengths, prefilling):
    starts = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32)
    tokens, lengths = int(starts[-1]), torch.tensor(lengths, dtype=torch.int32)
    return Common(
        starts.clone(), starts, lengths, lengths.clone(), len(queries), tokens, max(queries), int(lengths.max()),
        torch.arange(len(queries) * 3, dtype=torch.int32).view(-1, 3), torch.arange(100, 100 + tokens),
        torch.tensor(prefilling), torch.arange(tokens) * 7, torch.ones(1),
    )  # fmt: skip


def test_a_batch_of_decodes_has_no_plan():
    assert make_plan(batch([1, 1, 1], [40, 50, 1], [False, False, True]), 0, build=None) is None


def test_a_batch_of_short_contexts_has_no_plan():
    assert make_plan(batch([30, 1], [30, 63], [True, False]), 64, build=None) is None
    assert make_plan(batch([30, 1], [30, 64], [True, False]), 64, build=None) is None, "only the decode reaches 64"


def test_a_batch_of_prompts_needs_no_metadata_of_the_backend():
    common = batch([5, 7], [5, 20], [True, True])
    plan = make_plan(common, 0, build=None)
    assert [(r.row, r.start, r.stop, r.length, r.queries) for r in plan.requests] == [(0, 0, 5, 5, 5), (1, 5, 12, 20, 7)]
    assert plan.dense is None and plan.dense_rows is None and plan.block_table is common.block_table_tensor


def test_decodes_short_prompts_and_later_turns_of_a_batch_are_left_to_the_backend():
    #               decode, prompt, short prompt, padding, continuation, last token of a prompt, chunk
    common = batch([1, 8, 3, 0, 2, 1, 6], [90, 64, 3, 0, 80, 70, 99], [False, True, True, False, False, True, True])
    plan = make_plan(common, 64, build=lambda part: part)
    assert [r.row for r in plan.requests] == [1, 6]
    assert plan.dense_rows.tolist() == [0, 9, 10, 11, 12, 13, 14]
    rest = plan.dense
    assert rest.num_reqs == 4 and rest.num_actual_tokens == 7 and rest.max_query_len == 3 and rest.max_seq_len == 90
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 1, 4, 6, 7]
    assert rest.query_start_loc.dtype == rest.query_start_loc_cpu.dtype == torch.int32
    assert rest.seq_lens.tolist() == rest.seq_lens_cpu_upper_bound.tolist() == [90, 3, 80, 70]
    assert rest.block_table_tensor[:, 0].tolist() == [0, 6, 12, 15]
    assert rest.slot_mapping.tolist() == [100, 109, 110, 111, 112, 113, 114]
    assert rest.positions.tolist() == [0, 63, 70, 77, 84, 91, 98]
    assert rest.is_prefilling.tolist() == [False, True, False, True]
    assert rest._num_computed_tokens_cache is None, "what was remembered of the whole batch is not the part's"


def test_a_prompt_that_ends_in_a_batch_is_cut_there():
    """A preempted request is read again in one go: 6 tokens of its prompt and 3 that it had written; the next one read its prompt
    before; the prompt of the last one goes on."""
    common = batch([9, 4, 5], [9, 40, 30], [True, True, True])
    plan = make_plan(common, 0, build=lambda part: part, prompts=lambda: [6, 36, 100])
    assert [(r.row, r.start, r.stop, r.length, r.prompt) for r in plan.requests] == [(0, 0, 6, 6, 6), (2, 13, 18, 30, 100)]
    assert plan.dense_rows.tolist() == [6, 7, 8, 9, 10, 11, 12]
    rest = plan.dense
    assert rest.num_reqs == 2 and rest.query_start_loc.tolist() == [0, 3, 7] and rest.max_query_len == 4
    assert rest.seq_lens.tolist() == [9, 40] and rest.slot_mapping.tolist() == [106, 107, 108, 109, 110, 111, 112]
    assert rest.block_table_tensor[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize("dense_below", [0, 20])
def test_a_request_runs_sparse_where_a_forward_of_transformers_would(dense_below):
    """Chunks that begin and end anywhere around a prompt's end."""
    for before, queries, prompt in itertools.product((0, 5, 18, 19, 20, 23), (1, 2, 3, 25), (None, 1, 2, 19, 20, 21, 60)):
        forward = ForwardContext(before, queries, prompt, dense_below)
        chosen, dense = divided([3, 3 + queries], [before + queries], [True], 1, dense_below, prompt and [prompt])
        assert sum(r.queries for r in chosen) == forward.sparse_queries, (before, queries, prompt)
        assert [r.length for r in chosen] == ([forward.end] if chosen else [])
        assert [row for r in chosen + dense for row in range(r.start, r.stop)] == [*range(3, 3 + queries)]


@pytest.mark.parametrize("dense_below, sparse", [(0, [0, 1]), (20, [1]), (21, [])])
def test_every_request_reads_its_prompt_where_vllm_does_not_say(dense_below, sparse):
    chosen, dense = divided([0, 5, 12], [5, 20], None, 2, dense_below)
    assert [r.row for r in chosen] == sparse and len(chosen) + len(dense) == 2
