"""How large the slices are that operators work in where a result would need more memory than a long context leaves.

`SparsePrefill.attach(workspace_mib=...)` makes it that of a model's forwards, each in its own thread, and of their backward
passes. Every operator is called with it, so that a compiled graph has the size that it was traced with. No result depends on
it. It is the size of one slice of scores; with what is made of it, an operator holds up to five times as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

DEFAULT_MIB = 256
SIZE = DEFAULT_MIB << 20  # bytes of a slice by default
_SAID: ContextVar[int | None] = ContextVar("npu_sparse_workspace", default=None)


@contextmanager
def sized(size: int) -> Iterator[None]:
    """Slices are of `size` bytes within this block, and for this thread only."""
    token = _SAID.set(size)
    try:
        yield
    finally:
        _SAID.reset(token)


def while_traced(size: int) -> int:
    """Makes slices of `size` bytes in what torch.compile traces next, which cannot say it by `sized`; returns the size before, to
    be given back the same way. What the compiled graph calls has its size as an argument."""
    global SIZE
    before, SIZE = SIZE, size
    return before


def size() -> int:
    """Bytes of a slice."""
    import torch

    said = None if torch.compiler.is_dynamo_compiling() else _SAID.get()
    return SIZE if said is None else said


def elements() -> int:
    """4-byte numbers of a slice."""
    return size() // 4


def check(mib) -> int:
    """`mib`; raises TypeError or ValueError where it is no size of a workspace."""
    if isinstance(mib, bool) or not isinstance(mib, int):
        raise TypeError(f"workspace_mib must be an integer, got {mib!r}")
    if mib < 1:
        raise ValueError(f"workspace_mib must be >= 1, got {mib}")
    return mib


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, is out of memory; not every back-end has a type for it."""
    import torch

    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in said for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def out_of_memory(layer: int, tokens: int, rows: int) -> Exception:
    """The error of a sparse layer that is out of memory: what to choose instead.

    tokens: of the context; rows: the fewest 4-byte numbers of a slice, below which a smaller workspace changes nothing.
    """
    import torch

    now = size() >> 20
    smaller = max(1, now // 4)
    advice = f"attach with workspace_mib={smaller} (--workspace-mib {smaller}), or prefill fewer tokens at a time"
    if smaller >= now or 4 * rows >= size():
        advice = "no smaller workspace would help, prefill fewer tokens at a time"
    return torch.OutOfMemoryError(
        f"out of memory in the sparse attention of layer {layer} at {tokens} tokens with workspace_mib={now}: {advice}"
    )
