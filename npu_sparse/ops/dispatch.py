"""The whole back-end policy: which implementation of an operator runs, and the sentence a user gets where none can.

Every operator has two dispatcher entries with one schema: `npu_sparse::<op>` (the kernel: Triton or CUDA C++ under CUDA, AscendC
under PrivateUse1, the same AscendC on the host emulation under CPU) and `npu_sparse::<op>_reference` (eager PyTorch, any device).
"""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.utils._python_dispatch

from ..errors import ActionableError
from . import workspace

OPERATORS: dict[str, str] = {}  # name -> the folder that its Triton version is in
IMPLEMENTATIONS = ("auto", "reference", "kernel")
KERNEL_KEYS = {"cuda": "CUDA", "npu": "PrivateUse1", "cpu": "CPU"}
_KERNELS: dict[tuple[str, str], Callable] = {}
_DEVICES: dict[str, tuple[str, ...]] = {}  # operator -> the device types that it has kernels for
_NEEDS: dict[str, str] = {}  # operator -> the module that its Triton version calls beside Triton, which may be missing
_DIFFERENTIABLE: set[str] = set()  # operators with gradients
_LOADERS: dict[str, Callable[[], dict[str, Callable]]] = {}  # device type -> the function that returns its kernels by operator
_HOW = {
    "cuda": "its kernels need triton: run `pip install triton`, or pass impl='reference'",
    "npu": "the AscendC library is not built: run `npu-sparse build npu`, or pass impl='reference'",
    "cpu": "the host emulation of the AscendC kernels is not built: run `npu-sparse build emulated`, or pass impl='reference'",
}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# where a version of torch does not say, everything goes through the dispatcher
_in_mode = getattr(torch.utils._python_dispatch, "is_in_torch_dispatch_mode", lambda: True)
_in_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
_is_profiled = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_HOW_ELSEWHERE = "kernels exist for cuda, npu and cpu: pass impl='reference'"


@dataclass(frozen=True)
class Limits:
    """The sizes and dtypes that the kernels of a device take; each operator checks the rest itself.

    Attributes:
        dtypes: of queries, keys, values, index queries and keys.
        dim_multiple, most_dim: D, Dv and Di are multiples of the first, up to the second.
        most_block: queries that share a support.
        most_k: slots of a support, as far as the context has them.
    """

    dtypes: tuple[torch.dtype, ...]
    dim_multiple: int
    most_dim: int
    most_block: int
    most_k: int


ASCENDC = Limits((torch.float16, torch.bfloat16), dim_multiple=16, most_dim=256, most_block=128, most_k=4032)
LIMITS = {"npu": ASCENDC, "cpu": ASCENDC}  # the emulation runs the same sources


class KernelUnavailableError(ActionableError, RuntimeError):
    """A kernel was asked for and this machine has none; the message says what to do."""


def uses_kernel(impl: str, device_type: str) -> bool:
    """True where `impl` means the kernel on this device: "auto" is the kernel on cuda and npu, the reference elsewhere."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl == "kernel" or (impl == "auto" and device_type in ("cuda", "npu"))


def call(op: str, impl: str, device_type: str, *args):
    """Runs `op` through the dispatcher, as kernel or as reference. An operator without gradients, such as a selection, is a
    constant to autograd. Autocast is off inside: it would round the references' fp32 products to 16 bits.

    The kernel is called directly where the dispatcher would only look it up: without gradients, modes and profilers. That saves
    tens of microseconds a call, which count in short prompts.
    """
    if _is_plain(device_type, args) and uses_kernel(impl, device_type):
        kernel = _KERNELS.get((op, device_type)) or _kernel(op, device_type)
        if kernel is None:
            raise _unavailable(op, device_type)
        return kernel(*args)
    run = getattr(torch.ops.npu_sparse, op if uses_kernel(impl, device_type) else f"{op}_reference")
    gradients = nullcontext() if op in _DIFFERENTIABLE else torch.no_grad()
    cast = torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()
    with gradients, cast:
        return run(*args, workspace=workspace.size())


def _is_plain(device_type: str, args: tuple) -> bool:
    """Whether no mode, transform or profiler would miss this call, and no argument is a tensor subclass."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _in_mode() or _in_transform() or _is_profiled():
        return False
    if autocasts(device_type):
        return False
    for arg in args:
        if type(arg) not in _PLAIN and isinstance(arg, torch.Tensor):
            return False
    return True


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this kind of device."""
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace is_autocast_available; every device it compiles for has autocast
        return torch.is_autocast_enabled(device_type)
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@functools.cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def define(
    op: str, signature: str, reference: Callable, fake: Callable, folder: str | None = None,
    devices: tuple[str, ...] = tuple(KERNEL_KEYS), needs: str | None = None,
) -> None:  # fmt: skip
    """Declares an operator's two dispatcher entries, its fake, its reference and its kernel keys.

    `folder`: the folder that it lives in, if not `op`. `devices`: the devices that it has a kernel for; asking for one elsewhere
    is refused. `needs`: a module that its kernel calls; without it there is no kernel. It is a constant to autograd until
    `differentiate` is called. Both entries take one more argument than `signature` says: the bytes of a slice (`workspace=`).
    0, the default, means this thread's own size.
    """
    arguments, result = signature.split(") ->")
    for name in (op, f"{op}_reference"):
        torch.library.define(f"npu_sparse::{name}", f"{arguments}, *, int workspace=0) ->{result}")
        torch.library.register_fake(f"npu_sparse::{name}", lambda *args, workspace=0: fake(*args))
    torch.library.impl(f"npu_sparse::{op}_reference", "CompositeExplicitAutograd", _in_slices(reference))
    for device_type, key in KERNEL_KEYS.items():
        torch.library.impl(f"npu_sparse::{op}", key, _in_slices(_kernel_or_error(op, device_type)))
    OPERATORS[op] = folder or op
    _DEVICES[op] = devices
    if needs is not None:
        _NEEDS[op] = needs


def differentiate(op: str, remember: Callable, backward: Callable) -> None:
    """Gives both entries of an operator gradients, through torch.library.register_autograd's `setup_context` and `backward`.
    `backward(suffix)` makes the latter for each entry. A backward pass works in slices of its forward's size."""

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.workspace = keyword_only_inputs["workspace"] or workspace.size()
        remember(ctx, inputs, output)

    def sized(run: Callable) -> Callable:
        def in_slices(ctx, *gradients):
            with workspace.sized(ctx.workspace):
                return run(ctx, *gradients)

        return in_slices

    for suffix in ("", "_reference"):
        torch.library.register_autograd(f"npu_sparse::{op}{suffix}", sized(backward(suffix)), setup_context=setup_context)
    _DIFFERENTIABLE.add(op)


def has_kernels_for(op: str, device_type: str) -> bool:
    """True where `op` has a kernel for this kind of device, whether or not this machine can run it."""
    return device_type in _DEVICES[op]


def runs_kernel(op: str, impl: str, device_type: str) -> bool:
    """True where `impl` means a kernel on this device and `op` has one that this machine can run."""
    return uses_kernel(impl, device_type) and _kernel(op, device_type) is not None


def synchronize(device: torch.device) -> None:
    """Waits for everything queued on an accelerator; does nothing on the CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def register_kernel(op: str, device_type: str, kernel: Callable) -> None:
    """Makes `kernel` the implementation of `op` on "cuda", "npu" or "cpu" (the emulation)."""
    _KERNELS[op, device_type] = kernel


def register_triton(device_type: str) -> None:
    """Makes the Triton kernels those of a device, "cuda" as a rule; does nothing where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return
    for op, folder in OPERATORS.items():
        if not has_kernels_for(op, "cuda"):
            continue
        if op in _NEEDS and (device_type != "cuda" or importlib.util.find_spec(_NEEDS[op]) is None):
            continue
        register_kernel(op, device_type, getattr(importlib.import_module(f"npu_sparse.ops.{folder}.triton"), op))


def require_kernels(device_type: str) -> None:
    """Raises KernelUnavailableError unless every operator has a kernel on this device. Operators without kernels for this kind of
    device are exempt: others replace them, or they serve options of the budget (`require_kernel`). So are those whose kernel
    needs another package."""
    for op in OPERATORS:
        elsewhere = op in _NEEDS or (device_type in KERNEL_KEYS and not has_kernels_for(op, device_type))
        if not elsewhere and _kernel(op, device_type) is None:
            raise _unavailable(op, device_type)


def require_kernel(op: str, device_type: str, advice: str) -> None:
    """Raises KernelUnavailableError, with one more piece of advice, unless `op` has a kernel on this device."""
    if _kernel(op, device_type) is None:
        raise KernelUnavailableError(f"{_unavailable(op, device_type)}, {advice}")


def check_limits(device_type: str, *, dtype: torch.dtype, block: int, k: int, **dims: int) -> None:
    """Raises TypeError or ValueError where the kernels of this device do not take these sizes; `dims` by their names.

    Callers ask this before there are tensors; a kernel checks its inputs again.
    """
    limits = LIMITS.get(device_type)
    if limits is None:
        return
    if dtype not in limits.dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in limits.dtypes)
        raise TypeError(f"dtype must be {wanted} for the kernels on {device_type!r}, got {dtype}")
    for name, dim in dims.items():
        if dim % limits.dim_multiple or not 0 < dim <= limits.most_dim:
            nearest = min(max(round(dim / limits.dim_multiple), 1) * limits.dim_multiple, limits.most_dim)
            raise ValueError(
                f"{name} must be a multiple of {limits.dim_multiple} up to {limits.most_dim} for the kernels on "
                f"{device_type!r}, got {dim} (nearest: {nearest})"
            )
    for name, value, most in (("block", block, limits.most_block), ("k", k, limits.most_k)):
        if value > most:
            raise ValueError(f"{name} must be at most {most} for the kernels on {device_type!r}, got {value}")


def check_selection(device_type: str, *, heads: int, dim: int, k: int, block: int, reduce: str) -> None:
    """Raises ValueError where the kernels of this device cannot select by an index of these sizes, whatever the prompt.

    Sizes that are served one at a time may not fit together, such as many index heads and a large k. The kernels' library knows.
    """
    tell = _kernel("selection_refusal", device_type)
    if tell is not None and (refusal := tell(heads, dim, k, block, reduce)):
        raise ValueError(refusal)


def register_loader(device_type: str, load: Callable[[], dict[str, Callable]]) -> None:
    """Registers `load`, which returns the available kernels of a device by operator and may be called again."""
    _LOADERS[device_type] = load


def _kernel(op: str, device_type: str) -> Callable | None:
    """The registered kernel; the first call for a device loads the library of its kernels."""
    if (op, device_type) not in _KERNELS:
        if device_type == "cuda":
            register_triton(device_type)
        elif device_type in _LOADERS:
            for name, kernel in _LOADERS[device_type]().items():
                _KERNELS.setdefault((name, device_type), kernel)  # a kernel that a caller registered stays
    return _KERNELS.get((op, device_type))


def _in_slices(run: Callable) -> Callable:
    def sized(*args, **sizes):
        with workspace.sized(sizes.get("workspace") or workspace.size()):
            return run(*args)

    return sized


def _kernel_or_error(op: str, device_type: str) -> Callable:
    def run(*args):
        kernel = _kernel(op, device_type)
        if kernel is None:
            raise _unavailable(op, device_type)
        return kernel(*args)

    return run


def _unavailable(op: str, device_type: str) -> KernelUnavailableError:
    how = _HOW.get(device_type, _HOW_ELSEWHERE)
    if device_type in KERNEL_KEYS and not has_kernels_for(op, device_type):
        how = f"it has kernels for {', '.join(_DEVICES[op])} only: pass impl='reference'"
    elif op in _NEEDS and device_type in KERNEL_KEYS:
        how = f"its kernel needs triton and {_NEEDS[op]}: install them, or pass impl='reference'"
    return KernelUnavailableError(f"{op} has no kernel on {device_type!r}: {how}")
