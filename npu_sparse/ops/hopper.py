"""Questions about a device and a tensor that the Hopper kernels of several operators share."""

import functools

import torch
from torch import Tensor

from . import nvrtc


def is_hopper(device: torch.device) -> bool:
    """Whether this is a CUDA device of compute capability 9.0 for which kernels can be compiled."""
    return device.type == "cuda" and _is_hopper(device.index)


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0) and nvrtc.is_available()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_readable(x: Tensor) -> bool:
    """Whether 16-byte copies can read the rows of a 16-bit tensor: rows are contiguous and begin at multiples of 16 bytes."""
    if x.dtype is not torch.bfloat16 and x.dtype is not torch.float16:
        return False
    *strides, last = x.stride()
    if last != 1 or x.data_ptr() % 16:
        return False
    for stride, size in zip(strides, x.shape):
        if stride % 8 and size > 1:
            return False
    return True
