"""Clocks: synchronised wall time, time per stage, dense attention's share, peak memory."""

import gc
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..ops.dispatch import synchronize

BUSY_CYCLES = 20_000_000  # that the device has something to do while a layer is issued: 10 ms at 2 GHz


class StageTimer:
    """Seconds spent in named stages, as `SparsePrefill.attach(stage=...)` takes it: `with timer("scoring"): ...`.

    Both ends of a stage wait for the device. That stops work from overlapping, so a run with a StageTimer is slower
    than the run it explains: time to first token is measured without one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        synchronize(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - started


class EventTimer:
    """`StageTimer` by events on an accelerator: nothing waits before `seconds` is read, so that short stages overlap as usual."""

    def __init__(self, device: torch.device):
        self.device, self._marks = device, []

    @contextmanager
    def __call__(self, name: str):
        started = self._mark()
        try:
            yield
        finally:
            self._marks.append((name, started, self._mark()))

    @property
    def seconds(self) -> dict[str, float]:
        synchronize(self.device)
        totals: dict[str, float] = defaultdict(float)
        for name, started, ended in self._marks:
            totals[name] += started.elapsed_time(ended) / 1e3
        return totals

    def _mark(self):
        event = getattr(torch, self.device.type).Event(enable_timing=True)
        event.record()
        return event


class HostTimer:
    """`StageTimer` that waits for nothing: on an accelerator, the time that the host takes to issue a stage."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


@contextmanager
def layers_issued(modules: list, device: torch.device):
    """Gives a list that receives, for every forward of `modules`, the seconds in which the host issued it.

    Before each the device is emptied and then kept busy, so that the queue is neither empty nor full: nothing waits within.
    """
    handles, seconds, started = [], [], []

    def before(*_):
        synchronize(device)
        if device.type == "cuda":
            torch.cuda._sleep(BUSY_CYCLES)
        started.append(time.perf_counter())

    def after(*_):
        seconds.append(time.perf_counter() - started.pop())

    for module in modules:
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def stage_timer(device: torch.device) -> StageTimer | EventTimer:
    """The timer that disturbs least: events on CUDA, else a clock that waits."""
    return EventTimer(device) if device.type == "cuda" else StageTimer(device)


@contextmanager
def modules_timed(modules: dict[str, list], stage):
    """Runs the forwards of `{stage name: modules}` within `stage(name)`; leaving takes the hooks off again."""
    handles = []

    def timed(name, module):
        running = []

        def before(*_):
            running.append(stage(name))
            running[-1].__enter__()

        def after(*_):
            running.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after))

    for name, parts in modules.items():
        for module in parts:
            timed(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def dense_attention_timed(model, stage):
    """Runs the model's own attention function within `stage("attention")` on full-attention layers, the ones made
    sparse.

    Through transformers' registries only; leaving restores the model.
    """
    from ..models.architectures import attention_modules, attention_selection, text_config
    from ..models.attention import register_around

    implementation = text_config(model)._attn_implementation
    timed = set(attention_modules(model).values())

    def around(dense, module, *args, **kwargs):
        with stage("attention") if module in timed else nullcontext():
            return dense(module, *args, **kwargs)

    name = register_around(implementation, "timed", around)
    model.set_attn_implementation(attention_selection(model, name))
    try:
        yield
    finally:
        model.set_attn_implementation(attention_selection(model, implementation))


def amdahl_ceiling(total_s: float, attention_s: float) -> float:
    """The largest speed-up that making attention free can give: `total_s / (total_s - attention_s)`."""
    if not 0 <= attention_s < total_s:
        raise ValueError(f"attention_s must lie in [0, total_s = {total_s}), got {attention_s}")
    return total_s / (total_s - attention_s)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: of the device's allocator, or on the CPU (Linux) of the process's resident memory."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak_memory`, weights included; None where the system does not say."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def release_memory(device: torch.device) -> None:
    """Frees unused memory: Python's reference cycles, and the blocks that the allocator keeps."""
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


@contextmanager
def collected_often():
    """Makes `gc.collect` cheap within this block: it looks only at newer objects, and not at all the loaded modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
