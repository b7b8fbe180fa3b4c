"""Functions that the workers of a graph import: small tasks that leave files behind."""

import os
import signal
import time
from pathlib import Path


def stamp(argument: tuple[str, str, tuple[str, ...], float]) -> list[str]:
    """Wait, then leave a file of that name; returns which of `before` were not there at the start."""
    folder, name, before, seconds = argument
    missing = [other for other in before if not Path(folder, other).exists()]
    time.sleep(seconds)
    Path(folder, name).touch()
    return missing


def meet(argument: tuple[str, str, str]) -> bool:
    """Leave a file and wait for the other's: true only when both run at once."""
    folder, name, other = argument
    Path(folder, name).touch()
    return _appears(Path(folder, other))


def fail(argument: tuple[type[Exception], str, str | None]) -> None:
    """Raise an exception of that class, after a file is there."""
    kind, message, after = argument
    if after is not None:
        _appears(Path(after))
    raise kind(message)


def beat(path: str) -> None:
    """Append to a file until killed, 30 s at most."""
    for _ in range(600):
        with open(path, "ab") as file:
            file.write(b".")
        time.sleep(0.05)


def square(number: int) -> tuple[int, int]:
    """Also by whom it was computed."""
    return number * number, os.getpid()


def _appears(path: Path, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists():
            return True
        time.sleep(0.02)
    return False


def die(_: object) -> None:
    """As the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
