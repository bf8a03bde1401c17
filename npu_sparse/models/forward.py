"""The state of one forward. It is made before the decoder runs, handed down to the layers as a keyword, and freed with them.

No state of a forward lives on the attachment or in a thread-local: forwards run side by side in threads, and gradient
checkpointing repeats a layer in autograd's own thread, with the keywords that it had.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..support import Support

FORWARD = "npu_sparse_forward"  # the keyword under which layers receive the ForwardContext
CANDIDATES = "npu_sparse_candidates"  # how many tokens at a forward's end are candidates of assisted decoding
PROMPT_LENGTH = "prompt_length"  # what a caller says: model(ids, prompt_length=n)
_NOTE = "npu_sparse_prompt_length"  # the same, on a cache


@dataclass(eq=False)
class ForwardContext:
    """One forward of a decoder.

    Attributes:
        start: position of its first query; 0 in a decode step, where it is not used.
        queries: tokens that it adds, padding included.
        prompt_length: tokens of the whole prompt, those in the cache included, where the caller said so; None: the prompt
            ends with this forward. Tokens from there on continue the prompt: they are decode steps, whatever their number.
        dense_below: a context shorter than this runs dense.
        keeps_supports: whether layers may run again after the forward (gradient checkpointing), and read supports again.
        supports: of layers that others read, by layer.
        finite: `(layer, what, bool tensor)`: whether what a sparse layer computes with, such as its hidden states, is finite.
        masks: masks of the model's own implementation, made for queries that run dense in a forward that is sparse elsewhere.
        positions: int32 `[B, R]` of exact rows, by the first, the one after the last, and B.
    """

    start: int
    queries: int
    prompt_length: int | None
    dense_below: int
    keeps_supports: bool = False
    supports: dict[int, Support] = field(default_factory=dict)
    finite: list[tuple[int, str, Tensor]] = field(default_factory=list)
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    positions: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def note(self, layer: int, what: str, finite: Tensor) -> None:
        """Keeps a bool tensor that says whether `what` of a layer is finite, for one look at all of them after the forward."""
        if not torch.compiler.is_compiling():
            self.finite.append((layer, what, finite))

    @property
    def length(self) -> int:
        """Tokens of the context after this forward."""
        return self.start + self.queries

    @property
    def end(self) -> int:
        """Where the prompt ends in this forward: after its last token, or before."""
        return self.length if self.prompt_length is None else min(self.length, self.prompt_length)

    @property
    def phase(self) -> str:
        """ "decode": one token. "continuation": several that continue a prompt. "prompt": from its first token on. "chunk":
        a later part of a prompt."""
        if self.queries == 1:
            return "decode"
        if self.end - self.start <= 1:
            return "continuation"
        return "prompt" if self.start == 0 else "chunk"

    @property
    def sparse_queries(self) -> int:
        """How many queries, the first ones, run sparse; those after the prompt's end run dense."""
        sparse = self.phase in ("prompt", "chunk") and self.end >= self.dense_below
        return self.end - self.start if sparse else 0

    @property
    def is_masked_sparse(self) -> bool:
        """Whether the layers make the masks of this forward, because the mask function does not know where the prompt ends."""
        return is_sparse(self.queries, self.length, self.dense_below)


def is_sparse(queries: int, length: int, dense_below: int) -> bool:
    """True where a forward of `queries` tokens that ends at `length` runs sparse, if all its queries are the prompt's."""
    return queries > 1 and length >= dense_below


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: then nothing may wait for the device, and there are no values to read from it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cache_of(arguments: Mapping):
    """The cache among a forward's keywords: its name is `past_key_values` until transformers 5.24."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def prompt_length_of(arguments: Mapping, cache, length: int) -> int | None:
    """The prompt's length in a forward that ends at `length`, if its caller or the owner of its cache gave it; else None.

    Assisted decoding gives it implicitly: it asks for the logits of its candidates by number.
    """
    said = arguments.get(PROMPT_LENGTH)
    if said is None:
        said = getattr(cache, _NOTE, None)
    if said is not None:
        return check_prompt_length(said)
    candidates = arguments.get(CANDIDATES, 0)
    return length - candidates if candidates else None


@contextmanager
def noted(cache, length: int) -> Iterator[None]:
    """Within this block, the cache knows the length of the prompt that it is being filled with."""
    before = getattr(cache, _NOTE, None)
    setattr(cache, _NOTE, check_prompt_length(length))
    try:
        yield
    finally:
        if before is None:
            delattr(cache, _NOTE)
        else:
            setattr(cache, _NOTE, before)


def check_prompt_length(length) -> int:
    """Returns `length`; raises TypeError or ValueError unless it is a number of tokens."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"prompt_length must be an integer, got {length!r}")
    if length < 1:
        raise ValueError(f"prompt_length must be >= 1, got {length}")
    return length
