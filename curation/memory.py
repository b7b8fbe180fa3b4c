"""Peak memory of a run: this process and all that it started, Ray's included.

Proportional set size where the kernel tells it (shared pages are counted once, so the object
store is not counted for every worker that maps it), else resident size. Sampled, so a spike
shorter than the interval can be missed; the kernel walks all pages for proportional sizes (a tenth
of a core at this interval), so they are asked for when the resident sizes have a new peak. On a
cluster it is this machine's share only.
"""

import contextlib
import threading
from collections.abc import Callable

import psutil

INTERVAL_S = 0.5


def _processes() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _sum(processes: list[psutil.Process], size_bytes: Callable[[psutil.Process], int]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += size_bytes(process)
    return total


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _proportional(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", full.rss))


class PeakMemory:
    """Samples in a thread between enter and exit."""

    def __init__(self) -> None:
        self._peak, self._resident_peak, self._stop = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, name="tilth-memory", daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.peak_bytes()

    def peak_bytes(self) -> int:
        """The peak so far, now included."""
        processes = _processes()
        resident = _sum(processes, _resident)
        if resident > self._resident_peak:
            self._resident_peak = resident
            self._peak = max(self._peak, _sum(processes, _proportional))
        return self._peak

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
