"""Sparse prefill: one interface that attaches to every supported model on every device.

It uses transformers' own seams only (models/attention.py). A hook in front of the decoder makes one ForwardContext a forward. The
mask function hands a 2-D padding mask or None down, never S x S. A hook on each full-attention layer turns its hidden states into
index queries and keys, and the attention function selects a Support and attends to it. Everything else - sliding-window layers,
decode steps, contexts below `dense_below` - goes to the model's original implementation with its usual mask.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import calibration
from .budget import Budget
from .checks import check_kernels, check_layers, selecting_layers
from .indexer import Indexer, IndexHead
from .layer import attend_sparsely
from .models import crossover
from .models.architectures import attention_modules, attention_selection, decoder, describe, text_config, unwrapped
from .models.attention import LAYER, PREFIX, register_sparse
from .models.forward import (
    CANDIDATES,
    FORWARD,
    PROMPT_LENGTH,
    ForwardContext,
    cache_of,
    is_capturing,
    is_sparse,
    noted,
    prompt_length_of,
)
from .models.index_cache import IndexKeyCache
from .models.index_head import FusedIndexHead, Index
from .ops import workspace
from .ops.dispatch import autocasts, runs_kernel
from .ops.masks import keys_seen
from .ops.slices import upto
from .selectors import ByIndexer, LayerInputs, Selector, learns_partition
from .support import Support


class SparsePrefill:
    """A model whose prefill is sparse, from `attach` to `detach`.

        with SparsePrefill.attach(model, selector, Budget(k=512, block=64)):
            model.generate(...)

    Attributes:
        model: the transformers model: the one attached, or that inside PEFT's wrapper.
        selector, budget: as attached.
        architecture: the model's Architecture.
    """

    def __init__(
        self, model, selector: Selector, budget: Budget, impl: str, stage: Callable, observe: Callable | None, workspace_mib: int
    ):  # fmt: skip
        self.model, self.selector, self.budget = model, selector, budget
        self.architecture = describe(model.config)
        self.impl, self.stage, self.observe, self.workspace_mib = impl, stage, observe, workspace.check(workspace_mib)
        self.implementation = text_config(model)._attn_implementation
        self.indexer: Indexer | None = None  # the selector's, as a copy with the model's dtype and device
        self._handles = []
        self._selects = selecting_layers(budget, self.architecture.layers)
        self._shares = any(selects != layer for layer, selects in self._selects.items())

    @classmethod
    def attach(
        cls,
        model,
        selector: Selector | Indexer,
        budget: Budget | None = None,
        *,
        impl: str = "auto",
        stage: Callable | None = None,
        observe: Callable | None = None,
        workspace_mib: int = workspace.DEFAULT_MIB,
    ) -> "SparsePrefill":
        """Makes the prefill of `model` sparse until `detach()` (or the end of a with block).

        Args:
            model: a causal language model of a supported architecture, on any device; PEFT may be around it.
            selector: a Selector, or an npu_sparse.Indexer (its base must be this model).
            budget: None = the adapter's recommended budget, else Budget().
            impl: which operators run, "auto", "reference" or "kernel"; limits are checked here, before the first token.
            stage: `stage(name)` gives a context manager around projection, scoring, top-k, attention and the exact end, for
                timing.
            observe: called as `observe(inputs: LayerInputs, support: Support, out)` after every sparse layer, with the queries
                that a support was selected for; not where all of them are exact (`Budget.exact_last`).
            workspace_mib: MiB of a slice of scores; an operator holds up to five times as much. Smaller is slower, and no result
                depends on it. A prefill that is out of memory says which to choose (torch.OutOfMemoryError).

        Raises UnsupportedArchitectureError, AdapterError, KernelUnavailableError or ValueError.
        """
        model = unwrapped(model)
        if isinstance(selector, Indexer):
            selector = ByIndexer(selector)
        if budget is None:
            recommended = selector.indexer.budget if selector.indexer is not None else None
            budget = Budget.from_dict(recommended) if recommended else Budget()
        if not isinstance(budget, Budget):
            raise TypeError(f"budget must be a Budget, got {type(budget).__name__}")
        if budget.dense_below == "auto":
            budget = budget.replace(dense_below=_decided(model, selector, budget, impl, workspace_mib))
        attached = cls(model, selector, budget, impl, stage or (lambda name: nullcontext()), observe, workspace_mib)
        attached._check()
        attached._patch()
        return attached

    def detach(self) -> None:
        """Restores the model bit for bit. Detaching twice does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.set_attn_implementation(attention_selection(self.model, self.implementation))

    def __enter__(self) -> "SparsePrefill":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def is_sparse(self, queries: int, length: int) -> bool:
        """True where a forward of `queries` new tokens at a context of `length` (the new ones included) runs sparse."""
        return is_sparse(queries, length, self.budget.dense_below)

    def prompt(self, cache, length: int) -> AbstractContextManager[None]:
        """A context manager; within it, `cache` is being filled with a prompt of `length` tokens.

            with attached.prompt(cache, length=ids.shape[1]):
                model.generate(ids, past_key_values=cache, prefill_chunk_size=4096)

        Every chunk then knows where the prompt ends, and tokens after its end are decode steps (dense), whatever their number.
        `model(ids, prompt_length=n)` says the same of one forward. `length` counts the tokens that the cache already holds.
        Raises TypeError or ValueError where it is no number of tokens.
        """
        return noted(cache, length)

    def _check(self) -> None:
        if self.implementation.startswith(PREFIX):
            raise ValueError("model must not be attached twice: detach() the first SparsePrefill")
        check_layers(self.budget, self.architecture.layers)
        if self.budget.candidates and self.selector.indexer is None:
            raise ValueError(
                f"candidates must be 0 for a selector without an indexer, got {self.budget.candidates} for {self.selector.name!r}"
            )
        self._learns = learns_partition(self.budget, self.selector.indexer)
        indexer = self.selector.indexer
        check_kernels(self.budget, self.impl, self.model.device.type, self.model.dtype, self.architecture, indexer)
        if indexer is not None:
            indexer.check_base(self.model)
            self.indexer = indexer.copy_for(self.model)

    def _patch(self) -> None:
        modules, text = attention_modules(self.model), decoder(self.model)
        _forget_copied_hooks(self.model)
        name = register_sparse(self.implementation, self.budget.dense_below)
        self.model.set_attn_implementation(attention_selection(self.model, name))
        self._decoder_arguments = tuple(inspect.signature(text.forward).parameters)
        self._attached_as = name, _kind(text)
        self._handles += [
            self.model.register_forward_pre_hook(_Hook(_before_model), with_kwargs=True),
            text.register_forward_pre_hook(_Hook(self._before_decoder), with_kwargs=True),
            text.register_forward_hook(_Hook(_check_finite), with_kwargs=True),
        ]
        for layer, module in modules.items():
            hook = _Hook(self._layer_hook(layer))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _check_unchanged(self, text) -> None:
        """Refuses changes to the model since it was attached that would have no effect or break a layer."""
        name, kind = self._attached_as
        if text.config._attn_implementation != name:
            raise ValueError(
                f"model must keep its attention implementation while attached, got {text.config._attn_implementation!r}: "
                "detach(), set_attn_implementation(), and attach again"
            )
        if self.indexer is not None and _kind(text) != kind:
            was, now = (" on ".join(map(str, one)) for one in (kind, _kind(text)))
            raise ValueError(f"model must stay {was} while attached, got {now}: detach(), change it, and attach again")

    def _before_decoder(self, module, args, kwargs):
        """Makes the ForwardContext of a forward and hands it to the layers, through transformers' own keywords."""
        self._check_unchanged(module)
        given = dict(zip(self._decoder_arguments, args)) | kwargs
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if tokens is None:
            return None  # transformers says what is missing
        queries, cache = tokens.shape[1], cache_of(given)
        start = 0 if cache is None or queries == 1 else int(cache.get_seq_length(self.architecture.layers[0]))
        self._check_length(queries, start + queries)
        forward = ForwardContext(
            start, queries, prompt_length_of(given, cache, start + queries), self.budget.dense_below,
            keeps_supports=torch.is_grad_enabled(),
        )  # fmt: skip
        passed = {name: value for name, value in kwargs.items() if name not in (PROMPT_LENGTH, CANDIDATES)}
        return args, {**passed, FORWARD: forward}

    def _layer_hook(self, layer: int):
        selects = self._selects[layer] == layer
        head = None if self.indexer is None or not selects else self.indexer.layers[str(layer)]
        maker = None if head is None else head.key_maker()
        fused = None
        if head is not None and runs_kernel("index_heads", self.impl, self.model.device.type):
            fused = FusedIndexHead(head, self.impl)

        def before_attention(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            forward, cache = kwargs[FORWARD], cache_of(kwargs)
            first = forward.sparse_queries
            if not first:
                if head is not None and cache is not None:
                    IndexKeyCache.of(cache, layer).remember(hidden, cos, sin, head, maker)
                return args, {**kwargs, LAYER: None}
            index = learns_from = partition = None
            if head is None:
                forward.note(layer, "hidden states", _is_finite(hidden))
            else:
                with self.stage("projection"), torch.no_grad():
                    made = fused(hidden, cos, sin, forward.start) if fused is not None else _made(head, hidden, cos, sin)
                    for what, finite in made.finite:
                        forward.note(layer, what, finite)
                    qi, ki, w = made.queries, made.keys, made.weights
                    if cache is not None:
                        ki = IndexKeyCache.of(cache, layer).extend(ki, forward.start, head, maker)
                    if ki.dtype != qi.dtype or (w is not None and w.dtype != qi.dtype):  # autocast leaves norms in fp32
                        ki, w = ki.to(qi.dtype), None if w is None else w.to(qi.dtype)
                    index = (upto(qi, first, 2), upto(ki, forward.end, 1), None if w is None else upto(w, first, 1))
                if self._learns:
                    learns_from = upto(hidden, first, 1)
                    partition = None if made.partition is None else upto(made.partition, first, 1)
            return args, {**kwargs, LAYER: _Layer(self, layer, forward, index, learns_from, partition)}

        return before_attention

    def _check_length(self, queries: int, length: int) -> None:
        if queries == 0:
            raise ValueError("prompt must hold at least one token, got none")
        limit = self.architecture.max_positions
        if length > limit:
            raise ValueError(f"prompt must fit the model's {limit} positions, got {length} tokens")

    def _support(self, inputs: LayerInputs, forward: ForwardContext) -> Support:
        """The support of a layer: its own, or that of the layer it reads."""
        selecting = self._selects[inputs.layer]
        if selecting != inputs.layer:
            return forward.supports[selecting]
        budget = self.budget
        if inputs.k.shape[2] < forward.end and isinstance(budget.k, Mapping):  # k is the context's, whatever is left out
            budget = budget.replace(k=budget.k_for(forward.end))
        support = self.selector.select(inputs, budget)
        if self._shares:
            if not forward.keeps_supports:
                forward.supports.clear()  # nobody reads them any more
            forward.supports[selecting] = support
        return support


def _decided(model, selector: Selector, budget: Budget, impl: str, workspace_mib: int) -> int:
    """What `dense_below="auto"` stands for: measured on this device, on a CPU looked up."""
    if not calibration.measures(model.device):
        return crossover.dense_below(model, budget)
    attach = SparsePrefill.attach
    return calibration.dense_below(model, selector, budget, attach=attach, impl=impl, workspace_mib=workspace_mib)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One full-attention layer in one forward: what the attention function calls."""

    attached: SparsePrefill
    layer: int
    forward: ForwardContext
    index: tuple[Tensor, Tensor, Tensor | None] | None
    learns_from: Tensor | None  # the hidden states that log-partitions are predicted from, where they are
    unpadded: Tensor | None = None  # those log-partitions, where they are known already and nothing is padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"sparse prefill takes a 2-D padding mask (batch, length), got {mask.ndim} dimensions")
        size = self.attached.workspace_mib << 20
        if torch.compiler.is_dynamo_compiling():
            before = workspace.while_traced(size)
            out = self._attend(q, k, v, mask, scale)
            workspace.while_traced(before)
            return out
        with workspace.sized(size):
            return self._attend(q, k, v, mask, scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        attached = self.attached
        valid = None if mask is None else upto(mask, k.shape[2], 1)
        partition = self.unpadded if valid is None else None
        if self.learns_from is not None and partition is None:
            with attached.stage("projection"), torch.no_grad():
                head = attached.indexer.layers[str(self.layer)].partition
                partition = head(self.learns_from.detach(), keys_seen(q.shape[2], k.shape[2], valid, q.device))
        note = partial(self.forward.note, self.layer)
        q, k, v = _of_one_dtype(q, k, v)
        inputs = LayerInputs(self.layer, q, k, v, scale, valid, self.index, attached.impl, attached.stage, partition, note)
        try:
            out = attend_sparsely(
                inputs, self.forward, attached.budget, lambda chosen: attached._support(chosen, self.forward), attached.observe
            )
            return out.transpose(1, 2).contiguous()
        except (RuntimeError, MemoryError) as error:
            if not workspace.is_exhausted(error):
                raise
            raise workspace.out_of_memory(self.layer, k.shape[2], rows=k.shape[0] * k.shape[2]) from error


class _Hook:
    """A hook of an attached model. It belongs to this model alone: deep copies refuse to run, and it is never saved."""

    def __init__(self, run: Callable, is_copy: bool = False):
        self.run, self.is_copy = run, is_copy

    def __call__(self, *what):
        return self.run(*what)

    def __deepcopy__(self, memo):
        return _Hook(_refuse_copy, is_copy=True)

    def __reduce__(self):
        raise ValueError("model must be detached before it is pickled, got one that is attached: detach() first")


def _refuse_copy(module, *what) -> None:
    config = getattr(module.config, "get_text_config", lambda: module.config)()
    if config._attn_implementation.startswith(PREFIX):
        raise ValueError(
            "model must be copied before attach() or after detach(), got a copy of one that was attached: "
            "set_attn_implementation() makes this copy dense"
        )


def _forget_copied_hooks(model) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.is_copy]:
                del hooks[key]


def _kind(text) -> tuple[torch.dtype, torch.device]:
    return text.norm.weight.dtype, text.norm.weight.device


def _before_model(module, args, kwargs):
    """Assisted decoding gives a forward the prompt, or the last token, and candidates; it asks for the candidates' logits."""
    wanted = kwargs.get("logits_to_keep", 0)
    if isinstance(wanted, int) and wanted > 1 and cache_of(kwargs) is not None:
        kwargs = {**kwargs, CANDIDATES: wanted - 1}
    return args, kwargs


def _check_finite(module, args, kwargs, output) -> None:
    forward = kwargs.get(FORWARD)
    if forward is None or not forward.finite:
        return
    if is_capturing(module.norm.weight.device):
        return  # what is recorded must not wait for the device
    if not bool(torch.cat([flag.flatten() for _, _, flag in forward.finite]).all()):
        layer, what = next((layer, what) for layer, what, flag in forward.finite if not bool(flag.all()))
        raise FloatingPointError(f"{what} of layer {layer} must be finite, got NaN or Inf")


def _made(head: IndexHead, hidden: Tensor, cos: Tensor, sin: Tensor) -> Index:
    """What an index head makes, step by step."""
    qi, ki, w = head(hidden, cos, sin)
    finite = _is_finite(qi, ki, *(() if w is None else (w,)))
    return Index(qi, ki, w, None, (("hidden states", _is_finite(hidden)), ("index queries and keys", finite)))


def _is_finite(*tensors: Tensor) -> Tensor:
    """Whether all tensors are finite, as a bool tensor: by their sums, in a dtype that sums of finite fp16 do not overflow."""
    with torch.no_grad():
        sums = [x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum() for x in tensors]
        return torch.stack([x.float() for x in sums]).isfinite().all()


def _of_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors in the dtype that PyTorch's own attention takes: autocast's where it is on, since norms and rotations leave it."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if autocasts(device) else v.dtype
    if q.dtype == k.dtype == v.dtype == dtype:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)
