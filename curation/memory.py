"""Peak memory of a run: this process and all that it started, Ray's included.

Proportional set size where the kernel tells it (shared pages are counted once, so the object
store is not counted for every worker that maps it), else resident size. Sampled, so a spike
shorter than the interval can be missed. On a cluster it is this machine's share only.
"""

import threading

import psutil

INTERVAL_S = 0.5


def _bytes() -> int:
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class PeakMemory:
    """Samples in a thread between enter and exit."""

    def __init__(self) -> None:
        self._peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, name="tilth-memory", daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._peak = max(self._peak, _bytes())

    def peak_bytes(self) -> int:
        self._peak = max(self._peak, _bytes())
        return self._peak

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
