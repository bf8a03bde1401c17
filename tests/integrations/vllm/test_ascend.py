"""The branch for vLLM-Ascend on stand-ins of its classes, which say of themselves what its sources say. Not run on a card."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from npu_sparse.integrations.vllm import ascend, versions
from npu_sparse.integrations.vllm.pages import read_kv
from npu_sparse.integrations.vllm.plan import Request
from npu_sparse.integrations.vllm.refusals import check_engine

from .test_configuration import engine

HQ, HKV, D, PAGES = 4, 2, 8, 12
SCALE = D**-0.5


class Support(int):
    """AttentionCGSupport's order."""

    @property
    def value(self):
        return int(self)


Support.UNIFORM_BATCH, Support.ALWAYS = Support(2), Support(3)


@dataclasses.dataclass
class Common:
    """AscendCommonAttentionMetadata, as far as it is read: lengths on the host under three names."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor
    seq_lens_cpu: Tensor
    _seq_lens_cpu: Tensor
    num_computed_tokens_cpu: Tensor
    num_reqs: int
    num_actual_tokens: int
    num_input_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    is_prefilling: Tensor | None
    actual_seq_lengths_q: list
    positions: Tensor | None = None
    graph_pad_size: int = 7

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class AscendAttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names, self.vllm_config = layer_names, vllm_config

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return Support.ALWAYS

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common, lengths = common_attn_metadata, None
        for lengths in (common._seq_lens_cpu, common.seq_lens_cpu, common.seq_lens):  # in this order
            if lengths is not None:
                break
        return SimpleNamespace(
            starts=common.query_start_loc_cpu.tolist(), lengths=lengths[: common.num_reqs].tolist(),
            tables=common.block_table_tensor, slots=common.slot_mapping[: common.num_actual_tokens],
            num_actual_tokens=common.num_actual_tokens,
        )  # fmt: skip


class AscendAttentionBackendImpl:
    """Writes the batch's keys and values, then attends to the pages, request by request."""

    def reshape_and_cache(self, query, key, value, kv_cache, attn_metadata, output):
        for new, pages in zip((key, value), kv_cache):
            pages.view(-1, HKV, D)[attn_metadata.slots] = new[: attn_metadata.num_actual_tokens]
        return query, key, value, output

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
        self.reshape_and_cache(query, key, value, kv_cache, attn_metadata, output)
        for row, length in enumerate(attn_metadata.lengths):
            rows = slice(attn_metadata.starts[row], attn_metadata.starts[row + 1])
            k, v = ascend.read_kv(kv_cache, attn_metadata.tables[row], length)
            output[rows] = causal(query[rows], k, v)
        return output


class AscendAttentionBackend:
    get_name = staticmethod(lambda: "CUSTOM")
    get_builder_cls = staticmethod(lambda: AscendAttentionMetadataBuilder)
    get_impl_cls = staticmethod(lambda: AscendAttentionBackendImpl)


AscendAttentionBackend.__module__ = "vllm_ascend.attention.attention_v1"


def causal(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[T, Hq, D]`: the last T tokens of a context attend to it."""
    T, length = len(query), k.shape[2]
    mask = torch.arange(length) <= torch.arange(length - T, length)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True, scale=SCALE
    )
    return out[0].transpose(0, 1)


class Branch:
    """Stands for an IndexBranch whose budget holds every key: it reads the pages that the real one reads."""

    def __init__(self, dense_below: int):
        self.attached = SimpleNamespace(budget=SimpleNamespace(dense_below=dense_below))
        self.served = []

    def attend(self, request, plan, query, key, value, kv_cache, output):
        self.served.append((request.row, request.queries, request.length))
        k, v = read_kv(ascend.NAME, kv_cache, plan.block_table[request.row], request.length)
        output[request.start : request.stop] = causal(query[request.start : request.stop], k, v)


@dataclasses.dataclass
class Batch:
    """Requests with what they have in their pages, and this step's queries, keys and values."""

    common: Common
    query: Tensor
    key: Tensor
    value: Tensor
    pages: tuple[Tensor, Tensor]
    contexts: list[tuple[Tensor, Tensor]]  # the whole keys and values of each request


def batch(queries, lengths, prefilling, padding: int = 0, page: int = 4) -> Batch:
    """`padding` tokens stand behind the last request, as one that the runner adds."""
    torch.manual_seed(0)
    contexts = [torch.randn(2, length, HKV, D).unbind(0) for length in lengths]
    pages = tuple(torch.full((PAGES, page, HKV, D), float("nan")) for _ in "kv")
    table, free = torch.zeros(len(lengths), 6, dtype=torch.int32), iter(torch.randperm(PAGES - 1) + 1)
    slots, new = [], [[], []]
    for row, (count, length) in enumerate(zip(queries, lengths)):
        for n in range(-(-length // page)):
            table[row, n] = next(free)
        for t in range(length):
            slot = int(table[row, t // page]) * page + t % page
            if t >= length - count:
                slots.append(slot)
            for n in range(2):
                if t >= length - count:
                    new[n].append(contexts[row][n][t])
                else:
                    pages[n].view(-1, HKV, D)[slot] = contexts[row][n][t]
    starts = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32)
    tokens, lengths = int(starts[-1]), torch.tensor(lengths, dtype=torch.int32)
    prefilling = torch.tensor(prefilling)
    if padding:
        starts = torch.cat([starts, starts[-1:] + padding])
        prefilling = torch.cat([prefilling, torch.tensor([False])])
    tail = torch.zeros(padding, HKV, D)
    common = Common(
        starts.clone(), starts, lengths, lengths.clone(), lengths.clone(), lengths.clone(), lengths - torch.tensor(queries),
        len(starts) - 1, tokens, tokens + padding, max(queries), int(lengths.max()), table,
        torch.tensor(slots + [-1] * padding), prefilling, starts[1:].tolist(), torch.arange(tokens + padding),
    )  # fmt: skip
    return Batch(
        common, torch.randn(tokens + padding, HQ, D), torch.cat([torch.stack(new[0]), tail]),
        torch.cat([torch.stack(new[1]), tail]), pages, contexts,
    )  # fmt: skip


def served(batch: Batch, dense_below: int):
    """`(output, branch)` of the batch through the subclass of the backend."""
    sparse, branch = ascend.sparse_backend(AscendAttentionBackend), Branch(dense_below)
    layer = SimpleNamespace(npu_sparse=branch)
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layer": layer}))
    metadata = sparse.get_builder_cls()(None, ["layer"], config, None).build(0, batch.common)
    output = torch.full((len(batch.query), HQ, D), float("nan"))
    impl = sparse.get_impl_cls()()
    impl.forward(layer, batch.query, batch.key, batch.value, batch.pages, metadata, output)
    return output, branch


def expected(batch: Batch) -> Tensor:
    starts = batch.common.query_start_loc_cpu.tolist()
    return torch.cat([
        causal(batch.query[starts[row] : starts[row + 1]], k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        for row, (k, v) in enumerate(batch.contexts)
    ])  # fmt: skip


@pytest.mark.parametrize("padding", [0, 3])
def test_a_mixed_batch_reads_what_every_request_wrote(padding):
    """A decode, a short prompt, a long prompt and a later chunk: two run sparse; all get their own context's attention."""
    step = batch([1, 3, 9, 5], [6, 3, 9, 13], [False, True, True, True], padding)
    output, branch = served(step, dense_below=8)
    assert branch.served == [(2, 9, 9), (3, 5, 13)]
    tokens = step.common.num_actual_tokens
    torch.testing.assert_close(output[:tokens], expected(step))
    for row, context in enumerate(step.contexts):
        k, v = read_kv(ascend.NAME, step.pages, step.common.block_table_tensor[row], len(context[0]))
        assert torch.equal(k[0].transpose(0, 1), context[0]) and torch.equal(v[0].transpose(0, 1), context[1])


def test_tokens_that_fill_up_a_batch_are_nobodys_request():
    step = batch([1, 9], [6, 9], [False, True], padding=3)
    held = {"seq_lens": 6, "seq_lens_cpu": 6, "_seq_lens_cpu": 6, "seq_lens_cpu_upper_bound": 6}  # left by an earlier request
    longer = {name: torch.cat([getattr(step.common, name), torch.tensor([value])]) for name, value in held.items()}
    plan = ascend.make_plan(step.common.replace(**longer), 0, build=lambda part: part)
    assert [one.row for one in plan.requests] == [1]
    assert plan.dense.num_reqs == 1 and plan.dense_rows.tolist() == [0]


def test_a_batch_of_decodes_goes_to_the_backend_alone():
    step = batch([1, 1], [6, 9], [False, False])
    output, branch = served(step, dense_below=0)
    torch.testing.assert_close(output, expected(step))
    assert not branch.served


def test_a_batch_of_prompts_is_planned_without_the_backend():
    step = batch([5, 8], [5, 8], [True, True])
    plan = ascend.make_plan(step.common, 0, build=None)
    assert [(one.row, one.length) for one in plan.requests] == [(0, 5), (1, 8)] and plan.dense is None


def test_part_of_a_batch_has_its_own_lengths_wherever_they_are_kept():
    step = batch([1, 3, 9, 1], [6, 3, 9, 7], [False, True, True, False])
    rows, part = ascend.part_of(step.common, (Request(1, 1, 4, 3), Request(3, 13, 14, 7)))
    assert rows.tolist() == [1, 2, 3, 13]
    for name in ("seq_lens", "seq_lens_cpu", "_seq_lens_cpu", "seq_lens_cpu_upper_bound"):
        assert getattr(part, name).tolist() == [3, 7], name
    assert part.num_computed_tokens_cpu.tolist() == [0, 6]
    assert (part.num_reqs, part.num_actual_tokens, part.num_input_tokens) == (2, 4, 4)
    assert part.actual_seq_lengths_q == [3, 4] and part.graph_pad_size == -1
    assert torch.equal(part.slot_mapping, step.common.slot_mapping[rows]) and part.positions.tolist() == rows.tolist()
    assert torch.equal(part.block_table_tensor, step.common.block_table_tensor[[1, 3]])


def test_full_graphs_are_left_to_uniform_batches():
    builder = ascend.sparse_backend(AscendAttentionBackend).get_builder_cls()
    assert builder.get_cudagraph_support(None, None) == Support.UNIFORM_BATCH


def test_another_backend_of_ascend_is_refused():
    class AscendFAImpl(AscendAttentionBackendImpl):
        pass

    other = type("AscendFABackend", (AscendAttentionBackend,), {"get_impl_cls": staticmethod(lambda: AscendFAImpl)})
    assert ascend.owns(other) and ascend.owns(AscendAttentionBackend) and not ascend.owns(Branch)
    with pytest.raises(ValueError, match="must be AscendAttentionBackend with .* got AscendFABackend with AscendFAImpl:"):
        ascend.sparse_backend(other)


def test_index_keys_have_the_spec_of_ascends_own_indexers(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class AscendSFAIndexerCacheSpec:
        block_size: int
        num_kv_heads: int
        head_size: int
        dtype: torch.dtype

    module = ModuleType("vllm_ascend.core.kv_cache_interface")
    module.AscendSFAIndexerCacheSpec = AscendSFAIndexerCacheSpec
    for name in ("vllm_ascend", "vllm_ascend.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = ascend.index_spec(128, 64, torch.bfloat16)
    assert dataclasses.asdict(spec) == {"block_size": 128, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    generic = type("KeyPages", (), {"get_name": staticmethod(lambda: "NPU_SPARSE_INDEX")})
    pages = ascend.key_pages_backend(generic)
    assert pages.get_supported_kernel_block_sizes() == [128] and pages.get_name() == "NPU_SPARSE_INDEX"
    assert ascend.key_pages_backend(generic) is pages, "layers are grouped by their backend"


def on_ascend(**changes):
    config = engine(**{"cache_config__block_size": 128} | changes)
    config.device_config = SimpleNamespace(device_type="npu")
    return config


def test_what_ascend_does_not_serve_is_refused_there_only():
    check_engine(on_ascend())
    with pytest.raises(ValueError, match="must have no linear-attention layers .* got qwen3.5$"):
        check_engine(on_ascend(model_config__is_hybrid=True, model_config__model="qwen3.5"))
    with pytest.raises(ValueError, match="block-size must be a multiple of 128 .* got 64$"):
        check_engine(on_ascend(cache_config__block_size=64))
    check_engine(engine(model_config__is_hybrid=True))


def test_the_version_that_was_read_is_taken_under_ascend_only(monkeypatch):
    (read,) = versions.READ
    with pytest.raises(ValueError, match=f"{read} .*commit 182b75e: read, not run on a card.* got {read}$"):
        versions.check(read)
    monkeypatch.setattr(versions, "find_spec", lambda name: name)
    versions.check(read)
    for tested in versions.TESTED:
        with pytest.raises(ValueError, match=f"got {tested}$"):
            versions.check(tested)


@pytest.mark.vllm
def test_index_keys_lie_in_the_one_tensor_that_the_runner_binds():
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    from npu_sparse.integrations.vllm.key_cache import IndexKeys, KeyPages

    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type="npu"), model_config=SimpleNamespace(dtype=torch.float32),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )  # fmt: skip
    keys = IndexKeys("model.layers.0.self_attn.attn.npu_sparse", 8, config)
    assert keys.get_attn_backend().get_supported_kernel_block_sizes() == [128]
    assert keys.get_attn_backend().get_kv_cache_shape(5, 128, 1, 8) == (5, 128, 8)
    keys.kv_cache = (torch.zeros(5, 128, 8),)  # vLLM-Ascend sets the attribute itself
    written = torch.randn(130, 8)
    slots = torch.cat([torch.arange(256, 384), torch.tensor([512, 513])])
    where = KeyPages(torch.tensor([[2, 4, 0]], dtype=torch.int32), slots)
    keys.write(written, where)
    assert torch.equal(keys.read(where, 0, 130)[0], written)
