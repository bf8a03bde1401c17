"""Sparse prefill: one patching interface for every supported model and device.

Through transformers' own seams only. `AttentionMaskInterface` decides per forward whether this prefill is sparse and then hands
a 2-D padding mask (or None) down, never S x S; a forward pre-hook on each full-attention layer turns its hidden states into
index queries and keys; `AttentionInterface` selects a Support and attends to it. Everything else - sliding-window layers,
decode steps, contexts below `dense_below` - goes to the model's original implementation with the mask it would have had.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch

from . import crossover, ops
from .architectures import attention_modules, attention_selection, describe, text_config
from .budget import Budget
from .index_cache import IndexKeyCache
from .indexer import Indexer as IndexerModule
from .ops import workspace
from .ops.dispatch import check_limits, require_kernel, require_kernels, uses_kernel
from .ops.masks import keys_seen
from .selectors import Indexer, LayerInputs, Selector, learns_partition
from .support import Support

_PREFIX = "npu_sparse"  # of the names that attached models select their attention and mask functions by
_UNHOOKED = object()


class SparsePrefill:
    """A model whose prefill is sparse, from `attach` to `detach`.

        with SparsePrefill.attach(model, selector, Budget(k=512, block=64)):
            model.generate(...)

    Attributes:
        model, selector, budget: as attached.
        architecture: the model's Architecture.
    """

    def __init__(
        self, model, selector: Selector, budget: Budget, impl: str, stage: Callable, observe: Callable | None, workspace_mib: int
    ):  # fmt: skip
        self.model, self.selector, self.budget = model, selector, budget
        self.architecture = describe(model.config)
        self.impl, self.stage, self.observe, self.workspace_mib = impl, stage, observe, workspace.check(workspace_mib)
        self.native = text_config(model)._attn_implementation
        self.indexer: IndexerModule | None = None  # the selector's, as a copy with the model's dtype and device
        self._handles = []
        self._finite: list[tuple[int, torch.Tensor]] = []
        layers = self.architecture.layers
        self._selects = {layer: layers[n - n % budget.share_layers] for n, layer in enumerate(layers)}
        self._support: Support | None = None  # of the last layer that selected, where others read it too

    @classmethod
    def attach(
        cls,
        model,
        selector: Selector | IndexerModule,
        budget: Budget | None = None,
        *,
        impl: str = "auto",
        stage: Callable | None = None,
        observe: Callable | None = None,
        workspace_mib: int = workspace.DEFAULT_MIB,
    ) -> "SparsePrefill":
        """Makes the prefill of `model` sparse until `detach()` (or the end of a with block).

        Args:
            model: a causal language model of a supported architecture, on any device.
            selector: a Selector, or an npu_sparse.Indexer (its base must be this model).
            budget: None = the adapter's recommended budget, else Budget().
            impl: which operators run, "auto", "reference" or "kernel"; limits are checked here, before the first token.
            stage: `stage(name)` gives a context manager around projection, scoring, top-k and attention, for timing.
            observe: called as `observe(inputs: LayerInputs, support: Support, out)` after every sparse layer.
            workspace_mib: MiB of a slice of scores; an operator holds up to five times as much. Smaller is slower, and no result
                depends on it. A prefill that is out of memory says which to choose (torch.OutOfMemoryError).

        Raises UnsupportedArchitectureError, AdapterError, KernelUnavailableError or ValueError.
        """
        if isinstance(selector, IndexerModule):
            selector = Indexer(selector)
        if budget is None:
            recommended = selector.indexer.budget if selector.indexer is not None else None
            budget = Budget.from_dict(recommended) if recommended else Budget()
        if not isinstance(budget, Budget):
            raise TypeError(f"budget must be a Budget, got {type(budget).__name__}")
        if budget.dense_below == "auto":
            budget = budget.replace(dense_below=crossover.dense_below(model, budget))
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
        self.model.set_attn_implementation(attention_selection(self.model, self.native))

    def __enter__(self) -> "SparsePrefill":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def is_sparse(self, queries: int, length: int) -> bool:
        """True where a forward of `queries` new tokens at a context of `length` (the new ones included) runs sparse."""
        return _is_sparse(queries, length, self.budget.dense_below)

    def _check(self) -> None:
        if self.native.startswith(_PREFIX):
            raise ValueError("model must not be attached twice: detach() the first SparsePrefill")
        unknown = set(self.budget.per_layer) - set(self.architecture.layers)
        if unknown:
            raise ValueError(
                f"per_layer must name full-attention layers {list(self.architecture.layers)}, got {sorted(unknown)}"
            )
        followers = sorted(layer for layer in self.budget.per_layer if self._selects[layer] != layer)
        if followers:
            raise ValueError(
                f"per_layer must name layers that select for themselves (share_layers {self.budget.share_layers}), "
                f"got {followers}"
            )
        if self.budget.candidates and self.selector.indexer is None:
            raise ValueError(
                f"candidates must be 0 for a selector without an indexer, got {self.budget.candidates} for {self.selector.name!r}"
            )
        self._learns = learns_partition(self.budget, self.selector.indexer)
        if uses_kernel(self.impl, self.model.device.type):
            require_kernels(self.model.device.type)
            if self.budget.tail:
                require_kernel("sparse_attention_with_tail", self.model.device.type, "or Budget(tail=False)")
            if self.budget.candidates:
                require_kernel("select_two_level", self.model.device.type, "or Budget(candidates=0)")
            if self._takes_exact_partitions():
                require_kernel("index_partition", self.model.device.type, "or learn the partition, or Budget(reduce='max')")
            self._check_limits()
        indexer = self.selector.indexer
        if indexer is not None:
            indexer.check_base(self.model)
            self.indexer = indexer.copy_for(self.model)

    def _takes_exact_partitions(self) -> bool:
        shared = self.budget.reduce == "softmax_max" and self.budget.block > 1
        return shared and self.selector.indexer is not None and not self._learns

    def _check_limits(self) -> None:
        tiers = self.budget.k if isinstance(self.budget.k, Mapping) else (0,)
        most_k = max(self.budget.k_for(start, layer) for start in tiers for layer in self.architecture.layers)
        check_limits(
            self.model.device.type, dtype=self.model.dtype, block=self.budget.block, k=most_k,
            head_dim=self.architecture.head_dim, reduce="max" if self.selector.indexer is None else self.budget.reduce,
        )  # fmt: skip

    def _patch(self) -> None:
        modules = attention_modules(self.model)
        name = _register(self.native, self.budget.dense_below)
        self.model.set_attn_implementation(attention_selection(self.model, name))
        for layer, module in modules.items():
            hook = self._layer_hook(layer)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(lambda *_: self._finite.clear()))
        self._handles.append(self.model.register_forward_hook(self._check_finite))

    def _layer_hook(self, layer: int):
        selects = self._selects[layer] == layer
        head = None if self.indexer is None or not selects else self.indexer.layers[str(layer)]

        def before_attention(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name until transformers 5.24
            queries = hidden.shape[1]
            seen = 0 if cache is None or queries == 1 else int(cache.get_seq_length(layer))
            length = seen + queries
            self._check_length(queries, length)
            sparse = self.is_sparse(queries, length)
            if not sparse:
                if head is not None and cache is not None:
                    IndexKeyCache.of(cache, layer).remember(hidden, cos, sin, head)
                return args, {**kwargs, "sparse_ctx": None}
            index = learns_from = None
            if head is not None:
                with self.stage("projection"):
                    qi, ki, w = head(hidden, cos, sin)
                    if cache is not None:
                        ki = IndexKeyCache.of(cache, layer).extend(ki, seen, head)
                    index = (qi, ki, w)
                learns_from = hidden if self._learns else None
            if not torch.compiler.is_compiling():
                self._finite.append((layer, _total(hidden).isfinite()))
            return args, {**kwargs, "sparse_ctx": (self, layer, length, index, learns_from)}

        return before_attention

    def _check_length(self, queries: int, length: int) -> None:
        if queries == 0:
            raise ValueError("prompt must hold at least one token, got none")
        limit = self.architecture.max_positions
        if length > limit:
            raise ValueError(f"prompt must fit the model's {limit} positions, got {length} tokens")

    def _check_finite(self, module, args, output) -> None:
        if self._finite and not bool(torch.stack([flag for _, flag in self._finite]).all()):
            layer = next(layer for layer, flag in self._finite if not bool(flag))
            raise FloatingPointError(f"hidden states of layer {layer} must be finite, got NaN or Inf")


def _total(hidden: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, in a dtype that finite fp16 does not overflow."""
    return hidden.sum(dtype=torch.float32) if hidden.dtype == torch.float16 else hidden.sum()


def _is_sparse(queries: int, length: int, dense_below: int) -> bool:
    return queries > 1 and length >= dense_below


def _register(native: str, dense_below: int) -> str:
    """Registers the attention and mask functions that fall back to implementation `native`; returns their name.

    The functions hold no model: what they need to know is in their name, and torch.compile can follow them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{_PREFIX}_{native}_from_{dense_below}"

    def attention(module, query, key, value, attention_mask, *, scaling=None, sparse_ctx=_UNHOOKED, **kwargs):
        if sparse_ctx is _UNHOOKED and kwargs.get("sliding_window") is None:
            raise ValueError("model shares its config with one that is attached: make it with copy.deepcopy(config)")
        if sparse_ctx is _UNHOOKED or sparse_ctx is None:
            dense = dense_attention(native, module)
            return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return _sparse_attention(sparse_ctx, query, key, value, attention_mask, scaling), None

    def mask(**kwargs):
        return _mask(native, dense_below, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def dense_attention(native: str, module) -> Callable:
    """transformers' attention function of implementation `native` for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if native == "eager":
        import sys

        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[native]


def _mask(native: str, dense_below: int, **kwargs):
    """The mask of one forward: native where it runs dense, else 2-D `[B, length]` bool where padded, or None."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    queries, offset = kwargs["q_length"], kwargs["q_offset"]
    length = queries if queries == 1 else int(offset) + queries
    windowed = kwargs.get("local_size") is not None
    if windowed or not _is_sparse(queries, length, dense_below):
        return ALL_MASK_ATTENTION_FUNCTIONS[native](**kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        raise ValueError(
            "sparse prefill takes one causal sequence per row; packed or custom masks are not supported "
            "(a compiled prefill without a cache needs an attention_mask, if only of ones, to show that nothing is packed)"
        )
    padding = kwargs["attention_mask"]
    if padding is None:
        return None
    if padding.shape[1] < length:
        raise ValueError(
            f"attention_mask must cover all {length} tokens, those in the cache too, got {tuple(padding.shape)}"
        )
    padding = padding[:, :length].bool()
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def _sparse_attention(ctx, q, k, v, mask, scale):
    attached, layer, length, index, learns_from = ctx
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"sparse prefill takes a 2-D padding mask (batch, length), got {mask.ndim} dimensions")
    k, v = k[:, :, :length], v[:, :, :length]  # a static cache hands over its whole buffer
    partition = None
    if learns_from is not None:
        with attached.stage("projection"):
            head = attached.indexer.layers[str(layer)].partition
            partition = head(learns_from, keys_seen(q.shape[2], length, mask, q.device))
    inputs = LayerInputs(layer, q, k, v, scale, mask, index, attached.impl, attached.stage, partition)
    workspace.use(attached.workspace_mib)
    try:
        support, out = _select_and_attend(attached, inputs)
        if attached.observe is not None:
            attached.observe(inputs, support, out)
        return out.transpose(1, 2).contiguous()
    except (RuntimeError, MemoryError) as error:
        if not workspace.is_exhausted(error):
            raise
        raise workspace.out_of_memory(layer, length, rows=k.shape[0] * length) from error


def _select_and_attend(attached: SparsePrefill, inputs: LayerInputs) -> tuple[Support, torch.Tensor]:
    """The support of a layer, its own or the one it reads, and the attention over it."""
    if attached._selects[inputs.layer] == inputs.layer:
        support = attached.selector.select(inputs, attached.budget)
        attached._support = support if attached.budget.share_layers > 1 else None
    else:
        support = attached._support
    options = dict(scale=inputs.scale, impl=attached.impl)
    with attached.stage("attention"):
        if attached.budget.tail:
            return support, ops.sparse_attention_with_tail(
                inputs.q, inputs.k, inputs.v, support, valid=inputs.valid, **options
            )
        return support, ops.sparse_attention(inputs.q, inputs.k, inputs.v, support, **options)
