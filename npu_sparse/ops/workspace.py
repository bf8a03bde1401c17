"""The workspace: the size of the slices in which operators work, so that a long context leaves room for them.

`SparsePrefill.attach(workspace_mib=...)` sets it for a model's forwards, each in its own thread, and for their backward passes.
It is an argument of every operator, so that a compiled graph keeps the size that it was traced with. No result depends on it.
It is the size of one slice of scores; with intermediate results an operator holds up to five times as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

DEFAULT_MIB = 256
SIZE = DEFAULT_MIB << 20  # bytes of a slice by default
_SAID: ContextVar[int | None] = ContextVar("npu_sparse_workspace", default=None)


@contextmanager
def sized(size: int) -> Iterator[None]:
    """Slices have `size` bytes within this block, in this thread only."""
    token = _SAID.set(size)
    try:
        yield
    finally:
        _SAID.reset(token)


def while_traced(size: int) -> int:
    """Sets the slice size for what torch.compile traces next, since it cannot trace `sized`. Returns the size before, which the
    caller restores the same way. Operators in the compiled graph have their size as an argument."""
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
    """Returns `mib`; raises TypeError or ValueError unless it is a valid workspace size."""
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
    """The error for a sparse layer that runs out of memory; it says what to choose instead.

    tokens: length of the context. rows: the fewest 4-byte numbers of a slice; a workspace smaller than that changes nothing.
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
