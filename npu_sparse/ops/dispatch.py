"""The whole back-end policy: which implementation of an operator runs, and the sentence a user gets where none can.

Every operator has two dispatcher entries with one schema: `npu_sparse::<op>` (the kernel: Triton under CUDA, AscendC under
PrivateUse1, the same AscendC on the host emulation under CPU) and `npu_sparse::<op>_reference` (eager PyTorch, any device).
"""

from collections.abc import Callable

import torch

OPERATORS: list[str] = []
IMPLEMENTATIONS = ("auto", "reference", "kernel")
KERNEL_KEYS = {"cuda": "CUDA", "npu": "PrivateUse1", "cpu": "CPU"}
_KERNELS: dict[tuple[str, str], Callable] = {}
_HOW = {
    "cuda": "this version has no Triton kernel for it yet: pass impl='reference'",
    "npu": "no AscendC library is loaded for 'npu': pass impl='reference'",
    "cpu": "the AscendC emulation is not part of this version: pass impl='reference'",
}


class KernelUnavailableError(RuntimeError):
    """A kernel was asked for and this machine has none; the message says what to do."""


def uses_kernel(impl: str, device_type: str) -> bool:
    """True where `impl` means the kernel on this device: "auto" is the kernel on cuda and npu, the reference elsewhere."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl == "kernel" or (impl == "auto" and device_type in ("cuda", "npu"))


def call(op: str, impl: str, device_type: str, *args):
    """Runs `op` through the dispatcher, as kernel or as reference."""
    name = op if uses_kernel(impl, device_type) else f"{op}_reference"
    return getattr(torch.ops.npu_sparse, name)(*args)


def define(op: str, signature: str, reference: Callable, fake: Callable) -> None:
    """Declares an operator's two dispatcher entries, its fake, its reference and its kernel keys."""
    for name in (op, f"{op}_reference"):
        torch.library.define(f"npu_sparse::{name}", signature)
        torch.library.register_fake(f"npu_sparse::{name}", fake)
    torch.library.impl(f"npu_sparse::{op}_reference", "CompositeExplicitAutograd", reference)
    for device_type, key in KERNEL_KEYS.items():
        torch.library.impl(f"npu_sparse::{op}", key, _kernel_or_error(op, device_type))
    OPERATORS.append(op)


def register_kernel(op: str, device_type: str, kernel: Callable) -> None:
    """Makes `kernel` the implementation of `op` on "cuda", "npu" or "cpu" (the emulation)."""
    _KERNELS[op, device_type] = kernel


def require_kernels(device_type: str) -> None:
    """Raises KernelUnavailableError unless every operator has a kernel on this device."""
    for op in OPERATORS:
        if (op, device_type) not in _KERNELS:
            raise _unavailable(op, device_type)


def _kernel_or_error(op: str, device_type: str) -> Callable:
    def run(*args, **kwargs):
        kernel = _KERNELS.get((op, device_type))
        if kernel is None:
            raise _unavailable(op, device_type)
        return kernel(*args, **kwargs)

    return run


def _unavailable(op: str, device_type: str) -> KernelUnavailableError:
    return KernelUnavailableError(f"{op} has no kernel on {device_type!r}: {_HOW.get(device_type, _HOW['cpu'])}")


def check_tensor(name: str, tensor, shape: tuple, dtypes: tuple, device=None) -> None:
    """Raises TypeError or ValueError unless `tensor` has this shape (None = any), one of the dtypes and the device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if tensor.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {tensor.device}")
