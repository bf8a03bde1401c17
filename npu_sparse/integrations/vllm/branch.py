"""What stands beside one full-attention layer: hidden states -> index queries and keys -> support -> output.

A hook in front of the attention module calls a custom op that projects its hidden states, writes index keys to their pages and
keeps index queries for the attention that follows. What a forward remembers lives in vLLM's ForwardContext of that forward.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from ...budget import Budget
from ...indexer import Indexer, IndexHead
from ...layer import attend_sparsely
from ...models.forward import ForwardContext
from ...ops import workspace
from ...ops.masks import keys_seen
from ...selectors import ByIndexer, LayerInputs
from ...support import Support
from . import ascend
from .key_cache import IndexKeys
from .pages import read_kv
from .plan import Plan, Request
from .prompts import Prompts

OP = "npu_sparse_vllm::index"
_OURS = "npu_sparse"  # the key in a ForwardContext


@dataclass(frozen=True, eq=False)
class Attached:
    """What all branches of a model share.

    Attributes:
        indexer: in the model's dtype, on its device.
        budget: with `dense_below` as a number.
        selects: `checks.selecting_layers`.
        learns: whether the budget reads learned log-partitions.
        reserve: bytes that a layer's selection may hold; vLLM's memory profile sees them taken.
        prompts: how long the prompts of a batch are, where the model runner says it.
    """

    indexer: Indexer
    budget: Budget
    selects: Mapping[int, int]
    impl: str
    workspace_mib: int
    learns: bool
    reserve: int
    prompts: Prompts = field(default_factory=Prompts)


@dataclass(eq=False)
class Step:
    """One forward: index queries, head weights and hidden states of a layer until it attends, and what other layers read."""

    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cos and sin of its tokens, by rotary embedding
    index: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = field(default_factory=dict)
    supports: dict[int, dict[int, Support]] = field(default_factory=dict)  # by layer, by row


class IndexBranch(nn.Module):
    """One layer's. Where the layer reads another's support it has no head and no pages."""

    def __init__(self, attached: Attached, layer: int, attention, rotary, vllm_config):
        super().__init__()
        self.attached, self.layer, self.layer_name = attached, layer, attention.layer_name
        backend = attention.attn_backend
        self.backend, self.scale = ascend.NAME if ascend.owns(backend) else backend.get_name(), attention.impl.scale
        self.isa: str | None = None  # what a CPU's pages are laid out for; the metadata's builder says
        self.selects = attached.selects[layer] == layer
        self.shared = self.selects and layer in [of for one, of in attached.selects.items() if one != of]
        self.head: IndexHead | None = attached.indexer.layers[str(layer)] if self.selects else None
        self.keys = IndexKeys(f"{self.layer_name}.npu_sparse", self.head.dim, vllm_config) if self.selects else None
        self.keys_name = f"{self.layer_name}.npu_sparse"
        self._rotary = (rotary,)  # the model's: not registered here again

    def project(self, hidden: Tensor, positions: Tensor) -> None:
        """Index keys of all tokens go to their pages; where something runs sparse, index queries are kept for `attend`.

        hidden: `[T, hidden_size]`; positions: `[T]`, or `[3, T]` whose rows are equal for text.
        """
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):
            self._take_reserve(hidden.device)
            return
        cos, sin = self._tables(_step(context), positions)
        plan, hidden = getattr(context.attn_metadata[self.layer_name], "npu_sparse", None), hidden[None]
        if plan is None:
            keys = self.head.keys(hidden, cos, sin)
        else:
            queries, keys, weights = self.head(hidden, cos, sin)
            learns_from = hidden.clone() if self.attached.learns else None
            _step(context).index[self.layer] = queries, weights, learns_from
        self.keys.write(keys[0], context.attn_metadata[self.keys_name])

    def attend(self, request: Request, plan: Plan, query, key, value, kv_cache, output: Tensor) -> None:
        """Writes one request's rows of the output `[T, Hq, D]`."""
        context, attached = get_forward_context(), self.attached
        step, rows = _step(context), slice(request.start, request.stop)
        if request.queries == request.length:  # the pages hold nothing that is not in key and value
            k, v = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
        else:
            k, v = read_kv(self.backend, kv_cache, plan.block_table[request.row], request.length, self.isa)
        index = partition = None
        if self.selects:
            queries, weights, hidden = step.index[self.layer]
            ki = self.keys.read(context.attn_metadata[self.keys_name], request.row, request.length)
            index = queries[:, :, rows], ki.to(queries.dtype), None if weights is None else weights[:, rows]
            if hidden is not None:
                partition = self.head.partition(hidden[:, rows], keys_seen(request.queries, request.length, None, hidden.device))
        inputs = LayerInputs(
            self.layer, query[rows].transpose(0, 1)[None], k, v, self.scale, None, index, attached.impl, partition=partition
        )
        # Without a prompt's length a chunk takes its own end for the prompt's: exact rows then end every chunk, so that the
        # prompt's last are exact wherever the chunks end.
        forward = ForwardContext(request.length - request.queries, request.queries, request.prompt, attached.budget.dense_below)
        with workspace.sized(attached.workspace_mib << 20):
            out = attend_sparsely(inputs, forward, attached.budget, lambda chosen: self._support(chosen, request, step))
        output[rows] = out[0].transpose(0, 1)

    def _support(self, inputs: LayerInputs, request: Request, step: Step) -> Support:
        attached = self.attached
        if not self.selects:
            return step.supports[attached.selects[self.layer]][request.row]
        budget = attached.budget
        if inputs.k.shape[2] < request.length and isinstance(budget.k, Mapping):  # k is the context's, whatever is left out
            budget = budget.replace(k=budget.k_for(request.length))
        support = ByIndexer(attached.indexer).select(inputs, budget)
        if self.shared:
            if self.layer not in step.supports:
                step.supports.clear()  # nobody reads those of earlier layers any more
                step.supports[self.layer] = {}
            step.supports[self.layer][request.row] = support
        return support

    def _tables(self, step: Step, positions: Tensor) -> tuple[Tensor, Tensor]:
        rotary = self._rotary[0]
        if id(rotary) not in step.tables:
            half = rotary.cos_sin_cache[positions[0] if positions.ndim == 2 else positions].chunk(2, -1)
            step.tables[id(rotary)] = tuple(torch.cat([one, one], -1)[None] for one in half)
        return step.tables[id(rotary)]

    def _take_reserve(self, device: torch.device) -> None:
        """While vLLM measures what a forward needs, before there are pages, this takes what a selection would."""
        if device.type == "cuda" and not self.keys.kv_cache.numel():
            torch.empty(self.attached.reserve, dtype=torch.uint8, device=device)


def _step(context) -> Step:
    return context.additional_kwargs.setdefault(_OURS, Step())


def _index(hidden: Tensor, positions: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].npu_sparse.project(hidden, positions)


# It "mutates" hidden states without changing them: the projections of q, k and v read them afterwards, so that no compiler moves
# it behind the attention that needs its index queries and keys. A plain dispatcher entry: every layer of every step calls it.
_LIBRARY = torch.library.Library(OP.partition("::")[0], "FRAGMENT")
_LIBRARY.define("index(Tensor(a!) hidden, Tensor positions, str layer_name) -> ()")
_LIBRARY.impl("index", _index, "CompositeExplicitAutograd")
torch.library.register_fake(OP, lambda hidden, positions, layer_name: None, lib=_LIBRARY)


def hook(module):
    """The forward pre-hook of an attention module, whose arguments are read by name."""
    names = tuple(inspect.signature(module.forward).parameters)
    layer_name = module.attn.layer_name

    def before_attention(module, args, kwargs):
        given = dict(zip(names, args)) | kwargs
        torch.ops.npu_sparse_vllm.index(given["hidden_states"], given["positions"], layer_name)

    return before_attention
