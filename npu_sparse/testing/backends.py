"""Where an operator's tests run."""

import os
from dataclasses import dataclass, fields, replace

import torch

from ..ops.dispatch import LIMITS, Limits, register_triton, require_kernels

BACKENDS = {
    "reference": ("reference", "cpu"),
    "reference-cuda": ("reference", "cuda"),
    "cuda": ("kernel", "cuda"),
    "npu": ("kernel", "npu"),
    "emulated": ("kernel", "cpu"),
    "interpreted": ("kernel", "cpu"),
}
INTERPRETED = Limits((torch.float16,), dim_multiple=1, most_dim=256, most_block=1 << 20, most_k=1 << 20)  # no bf16 products


@dataclass(frozen=True)
class Backend:
    """Where an operator's tests run: its name, the `impl` to pass, the device of the inputs, the limits of its kernels.

    Tests are written for any dtype and dimension; where a back-end has limits, `fit` and its parts give the nearest that it
    takes, and what it does not take is tested to be refused.
    """

    name: str
    impl: str
    device: str
    limits: Limits | None = None

    def dtype(self, wanted: torch.dtype = torch.float32) -> torch.dtype:
        """`wanted` where the kernels take it, else the last dtype that they do."""
        return wanted if self.limits is None or wanted in self.limits.dtypes else self.limits.dtypes[-1]

    def dim(self, wanted: int) -> int:
        """The next dimension from `wanted` on that the kernels take."""
        return wanted if self.limits is None else -(-wanted // self.limits.dim_multiple) * self.limits.dim_multiple

    def fit(self, case):
        """A test case, a dataclass, with its `dtype` and its dimensions `D`, `Dv`, `Di` made to fit."""
        changes = {field.name: self.dim(getattr(case, field.name)) for field in fields(case) if field.name in ("D", "Dv", "Di")}
        if hasattr(case, "dtype"):
            changes["dtype"] = self.dtype(case.dtype)
        return replace(case, **changes)


def open_backend(name: str) -> Backend:
    """The Backend of a name in BACKENDS. Raises what a user would get where this machine cannot run it.

    That is KernelUnavailableError for a kernel that is missing, and torch's own error for a device that is.
    """
    impl, device = BACKENDS[name]
    torch.empty(0, device=device)
    if impl == "reference":
        return Backend(name, impl, device)
    if name == "interpreted":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton interprets its kernels on the CPU only under TRITON_INTERPRET=1: run `make test-triton`")
        register_triton(device)
        require_kernels(device)
        return Backend(name, impl, device, INTERPRETED)
    require_kernels(device)
    return Backend(name, impl, device, LIMITS.get(device))
