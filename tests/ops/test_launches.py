"""What a sparse layer on Hopper launches and allocates: every launch costs the host microseconds, and prompts of some thousand
tokens are made of nothing else. Launches are recorded here and not made, so that no card is needed."""

import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npu_sparse.ops import nvrtc
from npu_sparse.testing import attention_inputs, index_inputs, normal, random_support

selection = importlib.import_module("npu_sparse.ops.index_scores.hopper")
attention = importlib.import_module("npu_sparse.ops.sparse_attention.hopper")
VIEWS = ("view", "slice", "select", "transpose", "expand", "detach", "alias", "unsqueeze", "as_strided", "split", "t")


class Seen(TorchDispatchMode):
    """Records the operators that PyTorch runs, but for views, and the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.made = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
            self.made += [result] if isinstance(result, torch.Tensor) else []
        return result


@contextmanager
def recorded(monkeypatch):
    """`(launches, Seen)`: what is launched on a device that looks like Hopper, and what PyTorch does beside it."""
    launches = []

    def kernel(source, name, macros, shared_bytes, device):
        return lambda grid, threads, arguments: launches.append(
            SimpleNamespace(name=name, grid=grid, threads=threads, a=arguments, macros=dict(macros), shared=shared_bytes)
        )

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    for module in (selection, attention):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
        monkeypatch.setattr(module, "processors", lambda device: 132)
    for cached in (selection._scorer, selection._after):
        cached.cache_clear()
    seen = Seen()
    with seen:
        yield launches, seen
    for cached in (selection._scorer, selection._after):
        cached.cache_clear()


def within(pointer: int, size: int, tensors) -> bool:
    """Whether `size` bytes from a pointer on lie in the memory of one of the tensors."""
    rooms = [tensor.untyped_storage() for tensor in tensors]
    return any(room.data_ptr() <= pointer and pointer + size <= room.data_ptr() + room.nbytes() for room in rooms)


@pytest.mark.parametrize("B, partition", [(1, True), (2, False), (3, True)])
def test_a_selection_is_five_launches_three_allocations_and_two_results(monkeypatch, B, partition):
    qi, ki, _ = index_inputs(B, 1, 8192, 8192, 128, dtype=torch.bfloat16)
    own = normal(B, 8192) if partition else None
    with recorded(monkeypatch) as (launches, seen):
        indices, count = selection.select_by_index(qi, ki, None, 512, 64, "softmax_max" if partition else "max", 0, 0, None, own)
    names = ["sample_scores", "estimate_thresholds", "filter_scores", "select_candidates", "rescue_rows"]
    assert [one.name for one in launches] == names
    assert sorted(seen.names) == ["empty"] * 5
    sample, estimate, score, select, rescue = (one.a for one in launches)
    lines, capacity = B * 128, score.capacity
    assert score.threshold == estimate.threshold == sample.threshold
    assert (estimate.held, estimate.failed) == (score.held, select.failed) == (select.held, rescue.failed)
    assert (sample.sample, sample.samples) == (estimate.sample, estimate.samples)
    assert not sample.candidate and not score.sample  # null pointers
    assert (estimate.first_row, estimate.all_rows, estimate.row.rows) == (0, 128, 128)
    parts = [  # each in memory of its own, none overlapping another
        (score.candidate, 8 * lines * capacity), (score.threshold, 8 * lines), (score.held, 4 * lines),
        (select.failed, 4 * (lines + 1)), (sample.sample, 4 * lines * sample.samples), (rescue.scores, 4 * 32 * 8192),
        (indices.data_ptr(), 4 * lines * 512), (count.data_ptr(), 4 * lines),
    ]  # fmt: skip
    assert all(within(*part, seen.made) for part in parts)
    parts.sort()
    assert all(start + size <= after for (start, size), (after, _) in zip(parts, parts[1:]))
    assert (select.indices, select.count) == (rescue.indices, rescue.count) == (indices.data_ptr(), count.data_ptr())
    assert {one.a.shift for one in (launches[0], launches[2], launches[4])} == {own.data_ptr() if partition else None}
    assert score.shift_scale == rescue.shift_scale == pytest.approx(128**0.5)


def test_samples_that_are_made_in_pieces_fill_the_thresholds_of_all(monkeypatch):
    from npu_sparse.ops import workspace

    qi, ki, _ = index_inputs(2, 1, 8192, 65536, 64, dtype=torch.bfloat16)
    with workspace.sized(4 * 2 * 4096 * 20), recorded(monkeypatch) as (launches, seen):  # samples of twenty rows
        selection.select_by_index(qi, ki, None, 512, 64, "max", 0, 0, None, None)
    wholes = [one.a for one in launches if one.name == "filter_scores"]
    assert len(wholes) > 1 and sum(one.rows for one in wholes) == 128
    for whole in wholes:
        pieces = [one.a for one in launches if one.name == "estimate_thresholds" and one.a.threshold == whole.threshold]
        covered = [row for one in pieces for row in range(one.first_row, one.first_row + one.row.rows)]
        assert covered == list(range(whole.rows)) and (len(pieces) > 1 or whole.rows <= 20)
        assert {(one.all_rows, one.held) for one in pieces} == {(whole.rows, whole.held)}
        assert within(whole.threshold, 8 * 2 * whole.rows, seen.made)


def test_a_short_selection_needs_no_sample_and_clears_its_counts(monkeypatch):
    qi, ki, _ = index_inputs(1, 1, 700, 700, 128, dtype=torch.bfloat16)
    with recorded(monkeypatch) as (launches, seen):
        selection.select_by_index(qi, ki, None, 512, 64, "max", 0, 0, None, None)
    assert [one.name for one in launches] == ["filter_scores", "select_candidates"]
    room = max(seen.made, key=lambda tensor: tensor.untyped_storage().nbytes())
    room = room.new_empty(0).set_(room.untyped_storage())
    lines, capacity = 11, launches[0].a.capacity
    assert bool((room[lines * capacity :][:lines] == selection.ANY).all()) and not bool(room[lines * (capacity + 1) :].any())
    assert launches[0].a.threshold == room.data_ptr() + 8 * lines * capacity
    assert launches[1].a.failed == launches[0].a.held + 4 * lines == launches[0].a.threshold + 12 * lines


def test_attention_over_shared_supports_is_one_launch(monkeypatch):
    q, k, v = attention_inputs(1, 14, 2, 256, 256, 64, dtype=torch.bfloat16)
    support = random_support(1, 1, 256, 256, k=32, block=64)
    with recorded(monkeypatch) as (launches, seen):
        assert attention.serves(q, k, v, 64, 0.125)
        attention.attend(q, k, v, support.indices, support.count, 64, 0.125, None)
    assert [one.name for one in launches] == ["attend_supports"] and seen.names in (["new_empty"], ["empty"])
