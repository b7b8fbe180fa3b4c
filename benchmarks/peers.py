"""What the benchmarks share: peers in environments of their own, cores, clocks, claims.

    python(name, requirements)   .bench/NAME with these packages, made once
    run(name, script, *args)     a benchmarks/peer_*.py in it; what its one JSON line says
    on_cores(n)                  this process and those that it starts, on n cores with n threads
    claim(...), show(...)        a ratio beside what is wanted; a benchmark's result as JSON or for people

A peer that cannot be installed or run is Unavailable, with its error, and the benchmark goes on.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".bench"
THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "DAFT_NUM_THREADS",
)  # fmt: skip

# The newest of each that installs here. text-dedup 0.4.1 wants Python 3.12; datatrove 0.10 takes no xxhash 4.
REQUIREMENTS = {
    "minhash": ["daft==0.7.26", "rensa==0.5.0", "datasketch==2.0.0", "xxhash<4"],
    "datatrove": [
        "datatrove==0.10.1", "xxhash<4", "regex", "orjson", "zstandard", "spacy>=3.8", "tokenizers==0.23.3",
        "fasttext-numpy2-wheel", "fasteners",
    ],
    "datajuicer": ["py-data-juicer[distributed]==1.6.1"],
    "textdedup": ["text-dedup==0.4.0"],
}  # fmt: skip


class Unavailable(Exception):
    """A peer that cannot be installed or run here, with the last line of what it said."""


def python(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of .bench/NAME, which holds `requirements`: made when it is not there or held others.
    Raises Unavailable with pip's last error line."""
    home, stamp = ENVIRONMENTS / name, ENVIRONMENTS / name / ".installed"
    interpreter, wanted = home / "bin/python", "\n".join(requirements)
    ENVIRONMENTS.mkdir(exist_ok=True)
    with open(ENVIRONMENTS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benchmarks may want the same peer
        if stamp.exists() and stamp.read_text() == wanted:
            return interpreter
        print(f"installing {name}: {' '.join(requirements)}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(_last_error(done.stderr))
        stamp.write_text(wanted)
    return interpreter


def run(name: str, script: str, *args: object) -> dict[str, Any]:
    """Run benchmarks/SCRIPT in the environment `name` ("tilth": this one); what the last line that is a JSON object
    says (libraries may print after it). The script counts its seconds from BENCH_STARTED, so that the start of Python
    and its imports are among them. Raises Unavailable with the last line of its errors."""
    interpreter = sys.executable if name == "tilth" else python(name, REQUIREMENTS[name])
    command = [str(interpreter), str(ROOT / "benchmarks" / script), *map(str, args)]
    # Not the script's folder on the path: benchmarks/fasttext.py is not fastText.
    found = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), "BENCH_STARTED": str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **found})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        if name == "tilth":  # ours is not a peer that may be missing
            sys.exit(f"{script}: {done.stderr[-2000:]}")
        died = f"ended by signal {-done.returncode}, " if done.returncode < 0 else ""
        raise Unavailable(f"{script}: {died}{_last_error(done.stderr)}")
    return dict(json.loads(lines[-1]))


def versions(name: str) -> dict[str, str]:
    """What is installed in the environment `name` of what was asked for."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    packages = [
        requirement.split("[")[0].split("=")[0].split("<")[0].split(">")[0] for requirement in REQUIREMENTS[name]
    ]
    command = [str(ENVIRONMENTS / name / "bin/python"), "-c", code, *packages]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def best(work: Callable[[], object], least_s: float = 2.0, rounds: int = 5) -> float:
    """Seconds of the fastest of up to `rounds` rounds, fewer when they take more than `least_s`."""
    found: list[float] = []
    while len(found) < rounds and sum(found) < least_s:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def startup(run: Callable[[], float]) -> float:
    """Seconds of a job on next to nothing: of two runs the faster, since the first one fills caches."""
    return min(run(), run())


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process, and what it starts, on `count` of its cores with as many threads."""
    before = {name: os.environ.get(name) for name in THREADS}
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(dict.fromkeys(THREADS, str(count)))
    if allowed:
        os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if allowed:
            os.sched_setaffinity(0, allowed)


def claim(
    work: str, ours: object, peer: object, ratio: float, wanted: float, *, at_most: bool = False
) -> dict[str, Any]:
    """A row of RESULTS.md: `ratio` is to be at least `wanted` (or `at_most`)."""
    reached = ratio <= wanted if at_most else ratio >= wanted
    sign = "≤" if at_most else "≥"
    shown = round(ratio, 4 if ratio < 10 else 1)
    return {
        "work": work,
        "ours": str(ours),
        "peer": str(peer),
        "ratio": shown,
        "wanted": f"{sign} {wanted:g}",
        "reached": reached,
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a benchmark's result: `ratio` is that of its first claim."""
    result["ratio"] = result["claims"][0]["ratio"] if result["claims"] else None
    if as_json:
        print(json.dumps(result))
        return
    print(json.dumps({k: v for k, v in result.items() if k != "claims"}, indent=1))
    for row in result["claims"]:
        mark = "reached" if row["reached"] else "NOT reached"
        print(f"{row['work']}: {row['ours']} against {row['peer']}: {row['ratio']} ({row['wanted']}, {mark})")


def _last_error(text: str) -> str:
    """The last line that says ERROR, else the last line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines)[-1][:300]
