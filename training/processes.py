"""Several processes of one training on this machine, with torchrun's environment and plain exit codes.

torchrun itself works too (`torchrun --nproc-per-node 8 -m tilth train …`) and is what several nodes need; it
answers a failure with a traceback of its own, which a person who mistyped a path should not have to read.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

POLL_S = 0.1
GRACE_S = 20.0


def run(argv: list[str], processes: int) -> int:
    """Run `argv` in `processes` processes; returns 0, or the exit code of the first that failed, after the
    others were ended. The first process writes where we write; another's stderr is shown when it fails first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads,
    }  # fmt: skip
    # A scheduler's way to stop: end the others too. Noted only, since an exception from within Popen would leave a
    # process that nobody knows of.
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    children: list[subprocess.Popen[bytes]] = []
    said: list[IO[bytes] | None] = []
    try:
        for rank in range(processes):
            said.append(None if rank == 0 else tempfile.TemporaryFile())  # noqa: SIM115 closed below
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            quiet = None if rank == 0 else subprocess.DEVNULL
            children.append(subprocess.Popen(argv, env=environment, stdout=quiet, stderr=said[-1]))
        while not asked_to_stop:
            codes = [child.poll() for child in children]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                return _report(failed, children[failed], said[failed])
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_S)
        sys.exit(143)
    finally:
        _end(children)
        for handle in said:
            if handle is not None:
                handle.close()


def _report(rank: int, child: subprocess.Popen[bytes], said: IO[bytes] | None) -> int:
    if said is not None:
        said.seek(0)
        sys.stderr.write(f"process {rank}: {said.read().decode(errors='replace').strip()[-4000:]}\n")
    elif child.returncode < 0:
        sys.stderr.write(f"failed: process {rank} was ended by signal {-child.returncode}: the same command goes on\n")
    return child.returncode if child.returncode > 0 else 1


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
