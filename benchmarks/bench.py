"""Runs the benchmarks and writes benchmarks/RESULTS.md: what `make bench` does.

    python -m benchmarks.bench [NAME …] [--arguments "…"]

Installs the peers, then runs what is named, or all; the arguments are handed on. A run's JSON is kept as
.bench/results/NAME.json, so that one benchmark can be repeated by name and the page still shows all. What the page
says under KEPT is left as it is.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import peers

NAMES = ("fasttext", "minhash", "dedup", "tokenise", "curate", "scaling", "ray_overhead")
PAGE = Path(__file__).with_name("RESULTS.md")
KEPT = "# Measured before, in environments of their own"
FOLDER = peers.ENVIRONMENTS / "results"
OURS = ("tilth", "ray", "numpy", "numba", "polars", "pyarrow", "fastokens", "tokenizers", "fasttext-community")


def measure(name: str, arguments: list[str]) -> None:
    """Run one benchmark and keep what it says; one that fails keeps its last error line."""
    peers.say(f"== {name}")
    started = time.time()
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    found = {"failed": done.returncode} if done.returncode or not lines else json.loads(lines[-1])
    kept = {
        **found,
        "command": shlex.join(["python", *command[1:-1]]),
        "date": f"{datetime.date.today()}",
        "took_seconds": round(time.time() - started),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(kept, indent=1))


def install() -> dict[str, str]:
    """Every peer's environment; the errors of those that could not be made."""
    problems = {}
    for name, requirements in peers.REQUIREMENTS.items():
        try:
            peers.python(name, requirements)
        except peers.Unavailable as error:
            problems[name] = str(error)
    return problems


def page(results: dict[str, dict[str, Any]], problems: dict[str, str]) -> str:
    """The page up to KEPT."""
    about = "Written by `make bench`. A row is one run of us and the peer on the same documents, start-up taken off."
    lines = ["# Results", "", about, ""]
    lines += table(("work", "ours", "peer", "ratio", "wanted", "", "command"), claims(results))
    missing = dict(problems)
    for name, result in results.items():
        missing.update(result.get("unavailable", {}))
        rows = {peer: row["error"] for peer, row in result.items() if isinstance(row, dict) and "error" in row}
        missing.update({peer: error for peer, error in rows.items() if isinstance(error, str)})
        if "failed" in result:
            lines += ["", f"`benchmarks.{name}` failed with {result['failed']}."]
    if missing:
        lines += ["", "## Not run here", "", *table(("peer", "error"), [[k, f"`{v}`"] for k, v in missing.items()])]
    lines += ["", "## Machine and versions", "", machine(), "", *table(("environment", "versions"), versions())]
    for name, result in results.items():
        shown = {k: v for k, v in result.items() if k not in ("claims", "unavailable", "ratio", "command")}
        lines += ["", f"## {name}", "", f"`{result['command']}`", "", *details(shown)]
    return "\n".join(lines) + "\n"


def claims(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for result in results.values():
        for row in result.get("claims", ()):
            mark = "reached" if row["reached"] else "**not reached**"
            cells = [row["work"], row["ours"], row["peer"], row["ratio"], row["wanted"], mark]
            rows.append([*map(str, cells), f"`{result['command']}`"])
    return rows


def details(result: dict[str, Any]) -> list[str]:
    """Rows of equal keys as a table, and the rest as a list."""
    lines: list[str] = []
    for key, value in result.items():
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            columns = list(dict.fromkeys(name for row in value.values() for name in row))
            rows = [[name, *(plain(row.get(column, "")) for column in columns)] for name, row in value.items()]
            lines += ["", *table((key, *columns), rows), ""]
        elif isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            lines += ["", f"**{key}**", "", *details(value), ""]
        else:
            lines.append(f"- {key}: {plain(value)}")
    return lines


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return str(value)


def table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *rows)]


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}."


def versions() -> list[list[str]]:
    rows = [["tilth", ", ".join(f"{one} {importlib.metadata.version(one)}" for one in OURS)]]
    for name in peers.REQUIREMENTS:
        if (peers.ENVIRONMENTS / name / ".installed").exists():
            rows.append([name, ", ".join(f"{one} {found}" for one, found in peers.versions(name).items())])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--arguments", default="", help="for those that are named")
    options = parser.parse_args()
    names = options.names or NAMES
    if unknown := set(names).difference(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(NAMES)}")
    problems = install()
    for name in names:
        measure(name, shlex.split(options.arguments))
    files = {name: FOLDER / f"{name}.json" for name in NAMES}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    _, heading, kept = PAGE.read_text().partition(f"\n{KEPT}\n")
    PAGE.write_text(page(results, problems) + heading + kept)
    print(PAGE.read_text().partition("\n## ")[0])


if __name__ == "__main__":
    main()
