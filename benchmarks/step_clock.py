"""The duration of each part of a training step on the device, the idle time of the GPU, and the memory of a run."""

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import wait
from benchmarks.phases import anonymous_bytes

Moment = torch.cuda.Event | float
"""An event in the GPU's queue, or a time in seconds."""

_POLL_SECONDS = 0.02


@dataclass
class Step:
    """The finished stretches of one step as (name, beginning, end)."""

    begun: Moment
    stretches: list[tuple[str, Moment, Moment]] = field(default_factory=list)
    num_flops: int = 0
    num_pictures: int = 0


class StepClock:
    """Times named stretches of steps: on a GPU by events in its queue, which do not disturb it, otherwise by the clock.

    After `num_warm_up` steps `num_measured` are timed. On a GPU another `NUM_TRACED` are traced.
    """

    NUM_TRACED = 2

    def __init__(self, device: torch.device, *, num_warm_up: int, num_measured: int):
        self._device = device
        self._num_warm_up = num_warm_up
        self._num_measured = num_measured
        self._open: dict[str, Moment] = {}
        self._steps: list[Step] = []
        self._end: Moment | None = None
        self._begun = time.perf_counter()
        self.first_step_seconds = 0.0
        self.memory = MemoryWatch(device)
        self.trace = GpuTrace() if device.type == "cuda" else None

    @property
    def num_steps(self) -> int:
        """The number of steps that the run must have."""
        return self._num_warm_up + self._num_measured + (0 if self.trace is None else self.NUM_TRACED)

    @property
    def is_running(self) -> bool:
        """Whether the first step has begun."""
        return bool(self._steps)

    @contextmanager
    def stretch(self, name: str) -> Iterator[None]:
        """Count the block as part `name` of the step."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, name: str) -> None:
        """Begin a stretch; the first one also begins the first step."""
        self._open[name] = self._now()
        if not self._steps:
            self._begun = time.perf_counter()
            self.memory.begin()
            self._steps.append(Step(self._open[name]))

    def end(self, name: str) -> None:
        """End a stretch; a part may have several of them in a step."""
        self._steps[-1].stretches.append((name, self._open.pop(name), self._now()))

    def count(self, num_flops: int, num_pictures: int) -> None:
        """Add to the operations and the images of the step."""
        self._steps[-1].num_flops += num_flops
        self._steps[-1].num_pictures += num_pictures

    def end_step(self) -> None:
        """End the step and begin the next one."""
        now = self._now()
        if len(self._steps) == 1:
            wait(self._device)
            self.first_step_seconds = time.perf_counter() - self._begun
        if len(self._steps) == self._num_warm_up + self._num_measured:
            self._end = now
            if self.trace is not None:
                self.trace.begin()
        if len(self._steps) == self.num_steps and self.trace is not None:
            self.trace.end(self.NUM_TRACED)
        self._steps.append(Step(now))

    def figures(self) -> dict[str, float]:
        """Return the mean step in milliseconds, whole and by parts, its FLOP and images."""
        assert self._end is not None
        wait(self._device)
        measured = self._steps[self._num_warm_up : self._num_warm_up + self._num_measured]
        milliseconds = {"step": _between(measured[0].begun, self._end)}
        for name, begin, end in (stretch for step in measured for stretch in step.stretches):
            milliseconds[name] = milliseconds.get(name, 0.0) + _between(begin, end)
        milliseconds["rest"] = 2 * milliseconds["step"] - sum(milliseconds.values())
        found = {f"{name}_ms": total / len(measured) for name, total in milliseconds.items()}
        found["flops"] = sum(step.num_flops for step in measured) / len(measured)
        found["pictures"] = sum(step.num_pictures for step in measured) / len(measured)
        found["first_step_s"] = self.first_step_seconds
        if self.trace is not None:
            found |= {
                "idle_ms": max(0.0, found["step_ms"] - self.trace.busy_ms),
                "waits": self.trace.num_waits,
                "launches": self.trace.num_launches,
            }
        return found | self.memory.peaks()

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Moment, end: Moment) -> float:
    """Return the milliseconds from one moment to another."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return (end - begin) * 1e3
    return begin.elapsed_time(end)


class MemoryWatch:
    """Peak memory since `begin`: allocated and reserved by torch on a GPU, otherwise anonymous memory (Linux)."""

    def __init__(self, device: torch.device):
        self._device = device
        self._peak_anonymous = 0
        self._is_over = threading.Event()

    def begin(self) -> None:
        """Start measuring."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            threading.Thread(target=self._watch, daemon=True).start()

    def peaks(self) -> dict[str, float]:
        """Stop measuring and return the peaks in GiB."""
        self._is_over.set()
        if self._device.type != "cuda":
            return {"peak_gib": self._peak_anonymous / 2**30}
        return {
            "peak_gib": torch.cuda.max_memory_allocated(self._device) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved(self._device) / 2**30,
        }

    def _watch(self) -> None:
        while not self._is_over.wait(_POLL_SECONDS):
            self._peak_anonymous = max(self._peak_anonymous, anonymous_bytes())


class GpuTrace:
    """A trace of a few steps: how long the GPU computes, how much is launched, and how often the host waits for it."""

    def __init__(self) -> None:
        self.busy_ms = 0.0
        self.num_waits = 0.0
        self.num_launches = 0.0
        self._profile: Any = profile(activities=[ProfilerActivity.CUDA])
        self._warnings: Any = warnings.catch_warnings(record=True)
        self._seen: list[warnings.WarningMessage] = []

    def begin(self) -> None:
        """Start the trace."""
        self._seen = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._profile.start()

    def end(self, num_steps: int) -> None:
        """End the trace of `num_steps` steps."""
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        self._profile.stop()
        self._warnings.__exit__(None, None, None)
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        self.busy_ms = covered(kernels) / 1e3 / num_steps
        self.num_launches = len(kernels) / num_steps
        self.num_waits = sum("synchroniz" in str(each.message) for each in self._seen) / num_steps


def covered(stretches: list[tuple[float, float]]) -> float:
    """Return the length that the stretches cover together, counting overlaps once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(stretches):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
