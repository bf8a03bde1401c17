"""Which requests of a batch run sparse."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """Some queries of one request in this batch, all of them but where its prompt ends among them.

    Attributes:
        row: its row in the batch.
        start, stop: these queries are rows [start, stop) of the batch's tokens.
        length: tokens of its context, these queries included.
        prompt: tokens of its whole prompt, None = the model runner did not say.
    """

    row: int
    start: int
    stop: int
    length: int
    prompt: int | None = None

    @property
    def queries(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs sparse in a batch.

    Attributes:
        requests: those that do.
        block_table: int32 `[requests of the batch, pages]` of the keys and values.
        dense: the backend's metadata of all other requests, None where there is none.
        dense_rows: int64 rows of their tokens.
    """

    requests: tuple[Request, ...]
    block_table: Tensor
    dense: object = None
    dense_rows: Tensor | None = None


def run_plan(plan: Plan, dense, layer, query, key, value, kv_cache, output) -> None:
    """Writes all rows of `output` `[T, Hq, D]`: those of a Plan's requests by the layer's branch, the others by `dense`, which is
    the backend's own forward and takes `(layer, query, key, value, kv_cache, metadata, output)`."""
    if plan.dense is not None:
        rows = plan.dense_rows
        part = output.new_empty((len(rows), *output.shape[1:]))
        dense(layer, query[rows], key[rows], value[rows], kv_cache, plan.dense, part)
        output[rows] = part
    for request in plan.requests:
        layer.npu_sparse.attend(request, plan, query, key, value, kv_cache, output)


def make_plan(common, dense_below: int, build, prompts=lambda: None) -> Plan | None:
    """The Plan of a batch by vLLM's CommonAttentionMetadata; None where nothing of it runs sparse.

    A request runs sparse while its prompt is read, by more than one token at a time, at a context of at least `dense_below`
    tokens. `build(common)` is the backend's own metadata of the other requests; `prompts()` gives the tokens of each
    request's prompt, or None.
    """
    if common.max_query_len <= 1 or common.max_seq_len < dense_below:
        return None
    sparse, dense = divided(
        common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist(),
        None if common.is_prefilling is None else common.is_prefilling.tolist(), common.num_reqs, dense_below, prompts(),
    )  # fmt: skip
    if not sparse:
        return None
    if not dense:
        return Plan(sparse, common.block_table_tensor)
    rows, subset = part_of(common, dense)
    return Plan(sparse, common.block_table_tensor, build(subset), rows)


def divided(
    starts, lengths, prefilling, requests: int, dense_below: int, prompts: Sequence[int] | None = None
) -> tuple[tuple[Request, ...], tuple[Request, ...]]:
    """`(what runs sparse, what runs dense)`; a row without tokens is neither, and one whose prompt ends in it may be both.

    prefilling: whether each request still reads its prompt, None = all do. prompts: tokens of their prompts, None = not known.
    What follows a prompt, as when a preempted request is read again, was decoded: it runs dense, as then.
    """
    sparse, dense = [], []
    for row in range(requests):
        start, stop = starts[row], starts[row + 1]
        if start == stop:
            continue
        length, prompt = lengths[row], None if prompts is None else prompts[row]
        end = length if prompt is None else min(length, prompt)
        middle = stop - (length - end)  # rows from here on follow the prompt
        if middle - start > 1 and end >= dense_below and (prefilling is None or prefilling[row]):
            sparse.append(Request(row, start, middle, end, prompt))
            start = middle
        if start < stop:
            dense.append(Request(row, start, stop, length, prompt))
    return tuple(sparse), tuple(dense)


def packed(common, chosen: tuple[Request, ...]):
    """`(rows of their tokens, rows of the requests, where each begins among the first, tokens of each)`, on the host."""
    rows = torch.cat([torch.arange(one.start, one.stop) for one in chosen])
    counts = torch.tensor([one.queries for one in chosen], dtype=common.query_start_loc_cpu.dtype)
    begins = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=counts.dtype)])
    return rows, torch.tensor([one.row for one in chosen]), begins, counts


def part_of(common, chosen: tuple[Request, ...]):
    """`(rows of their tokens, the metadata)` of some requests of a batch, or of the last queries of some."""
    device = common.query_start_loc.device
    rows, on_host, begins, counts = packed(common, chosen)
    lengths = common.seq_lens_cpu_upper_bound[on_host]
    rows, on_device = rows.to(device), on_host.to(device)
    changes = dict(
        query_start_loc=begins.to(device), query_start_loc_cpu=begins, seq_lens=common.seq_lens[on_device],
        seq_lens_cpu_upper_bound=lengths, num_reqs=len(chosen), num_actual_tokens=len(rows), max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()), block_table_tensor=common.block_table_tensor[on_device],
        slot_mapping=common.slot_mapping[rows],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[on_host],
        positions=None if common.positions is None else common.positions[..., rows],
    )  # fmt: skip
    # what earlier builders remembered of the whole batch, and deprecated copies of it
    remembered = ("_num_computed_tokens_cache", "_token_to_req_indices_cache", "_seq_lens_cpu", "_num_computed_tokens_cpu")
    changes |= {name: None for name in remembered if hasattr(common, name)}
    return rows, common.replace(**changes)
