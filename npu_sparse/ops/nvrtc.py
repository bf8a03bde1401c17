"""CUDA C++ kernels without a CUDA toolkit: NVRTC, which torch brings, compiles them once into the user's cache, and the driver
launches them. For kernels that Triton cannot express well; everything else is Triton."""

import ctypes
import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from .. import compiled as compiled_code
from ..checkpoints import cache_dir
from .dispatch import KernelUnavailableError

HEADERS = ("hopper.cuh", "ranking.cuh", "block.cuh")
_FOLDER = Path(__file__).parent
_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CudaError(RuntimeError):
    """The driver or NVRTC refused; the message is theirs."""


def compiled(source: str, macros: dict[str, int], architecture: str) -> bytes:
    """The cubin of `source` (a path below this folder) for an architecture such as "sm_90a", from the cache or by NVRTC.

    Raises KernelUnavailableError where NVRTC is missing, CudaError with the compiler's log where the source is refused.
    """
    made_of = hashlib.sha256(repr((_version(_nvrtc()), architecture, sorted(macros.items()))).encode())
    for name in (source, *HEADERS):
        made_of.update((_FOLDER / name).read_bytes())
    path = cache_dir() / "cuda" / f"{Path(source).stem}-{made_of.hexdigest()[:24]}.cubin"
    if kept := compiled_code.read(path):
        return kept
    cubin, _ = compile_source(source, macros, architecture)
    with suppress(OSError):  # without a usable cache, every process compiles for itself
        compiled_code.write(path, cubin)
    return cubin


def compile_source(source: str, macros: dict[str, int], architecture: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """`(cubin, the compiler's log)`; errors as `compiled`."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    text = (_FOLDER / source).read_bytes()
    names = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    contents = (ctypes.c_char_p * len(HEADERS))(*((_FOLDER / name).read_bytes() for name in HEADERS))
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    options = (f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", *defined, *options)
    if made := nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), len(HEADERS), contents, names):
        raise CudaError(f"NVRTC could not read {source}: error {made}")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        log = _text(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0\n")
        if failed:
            raise CudaError(f"NVRTC refused {source} ({' '.join(options)}):\n{log}")
        return _text(nvrtc, "CUBIN", program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def kernel(source: str, name: str, macros: tuple[tuple[str, int], ...], shared_bytes: int, device: int):
    """`launch(grid, threads, arguments, stream)` of one `extern "C"` kernel on a device; `arguments` is a ctypes.Structure."""
    import torch

    driver = _driver()
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        image = compiled(source, dict(macros), f"sm_{major}{minor}{'a' if major >= 9 else ''}")
        torch.cuda.current_stream(device).synchronize()  # the device's context is there, and current
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver, driver.cuModuleLoadData(ctypes.byref(module), image))
        _check(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        if shared_bytes:
            _check(driver, driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED_BYTES, shared_bytes))

    start, pointers, current_device = driver.cuLaunchKernel, ctypes.c_void_p * 1, torch.cuda.current_device
    raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream)

    def launch(grid: tuple[int, ...], threads: int, arguments: ctypes.Structure) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        if not x or not y or not z:
            return
        here = function, x, y, z, threads, 1, 1, shared_bytes, ctypes.c_void_p(raw_stream(device))
        parameters = pointers(ctypes.addressof(arguments))
        if current_device() == device:
            status = start(*here, parameters, None)
        else:
            with torch.cuda.device(device):
                status = start(*here, parameters, None)
        if status:
            _check(driver, status)

    return launch


def structure(name: str, **fields) -> type[ctypes.Structure]:
    """A ctypes.Structure; a field's type is `"p"` (pointer), `"q"` (int64), `"i"` (int32), `"f"` (float32), or a Structure."""
    kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kinds.get(kind, kind)) for field, kind in fields.items()]})


def is_available() -> bool:
    """Whether kernels can be compiled here."""
    try:
        _nvrtc()
    except KernelUnavailableError:
        return False
    return True


def _text(nvrtc, what: str, program) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _version(nvrtc) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _nvrtc():
    """libnvrtc: beside torch's own CUDA libraries as a rule, else a toolkit's."""
    installed = [Path(folder) for folder in sys.path if os.path.isabs(folder)]  # never the directory that we happen to be in
    libraries = [path for folder in installed for path in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.1[0-9]*"))]
    for place in (*libraries, *map(Path, ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"))):
        try:
            for builtins in place.parent.glob("libnvrtc-builtins.so.*") if place in libraries else ():
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, and does not look beside itself
            return ctypes.CDLL(str(place))
        except OSError:
            continue
    raise KernelUnavailableError("CUDA C++ kernels need NVRTC: run `pip install nvidia-cuda-nvrtc`, or pass impl='reference'")


@functools.cache
def _driver():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelUnavailableError(f"CUDA kernels need NVIDIA's driver ({error})") from error
    driver.cuModuleLoadData.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    return driver


def _check(driver, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")
