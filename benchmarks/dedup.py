"""Read -> clusters: ours and peers on the same files, with recall and precision beside the seconds.

    python -m benchmarks.dedup [--tools NAME …] [--documents N] [--megabytes N] [--json]

128 permutations, 16 bands of 8, shingles of five words, for all. The documents: ../shared/corpus and
../shared/neardup, as JSON lines. Every tool does them in a process of its own, after 64 documents in others,
whose time is its start-up (imports, engines, compiled code) and is taken off; of tools on Ray, the start of Ray, a
second more or less by chance, is taken off each run. Start-ups and what takes less than a minute run twice, and the
faster one counts. Daft and ours also do --megabytes of copies of the corpus with true near-copies (benchmarks.corpus).

Truth is the Jaccard similarity of sets of shingles (benchmarks.truth), the words as `curation.overlap` has them.
Data-Juicer, text-dedup, Daft and datatrove join whatever shares a band, without verification.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus, peers
from benchmarks.truth import RECALL_AT, VERIFY, Scores, Truth
from curation.records import read_records

WORKERS, PARTS, TINY = 2, 8, 64
SHORT = 60  # seconds
TOOLS: dict[str, tuple[str, str, list[str]]] = {  # name: environment, script, arguments
    "tilth": ("tilth", "peer_tilth.py", ["{in}", "{out}", "{workers}"]),
    "daft": ("minhash", "peer_daft.py", ["{in}", "{out}", "bare"]),
    "daft_normalised": ("minhash", "peer_daft.py", ["{in}", "{out}", "normalised"]),
    "datatrove": ("datatrove", "peer_datatrove.py", ["dedup", "{in}", "{out}", "{workers}", "english"]),
    "datatrove_split": ("datatrove", "peer_datatrove.py", ["dedup", "{in}", "{out}", "{workers}", "split"]),
    "text_dedup": ("textdedup", "peer_textdedup.py", ["{in}", "{out}", "{workers}"]),
    "data_juicer": ("datajuicer", "peer_datajuicer.py", ["{in}", "{out}", "{workers}", "python"]),
    "data_juicer_cpp": ("datajuicer", "peer_datajuicer.py", ["{in}", "{out}", "{workers}", "cpp"]),
}
FAST = ("tilth", "daft", "daft_normalised")


class Timer:
    """Runs tools; what a tool's start-up takes is measured once."""

    def __init__(self, work: Path, cores: int):
        self._work, self._cores = work, cores
        self._startup: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}

    def run(self, tool: str, source: Path, megabytes: float) -> tuple[dict[str, Any], dict[str, str]] | None:
        """(seconds and speed, the kept document of each removed one); None for a tool that does not run here."""
        if tool in self.unavailable:
            return None
        peers.say(f"{tool}: {source.name}, {megabytes:.0f} MB, {self._cores} cores")
        try:
            if tool not in self._startup:
                self._startup[tool] = peers.startup(lambda: _without_ray(self._once(tool, self._work / "tiny")[0]))
            found, removed = self._once(tool, source)
            if found["seconds"] < SHORT:
                found, removed = min((found, removed), self._once(tool, source), key=lambda run: _without_ray(run[0]))
        except peers.Unavailable as error:
            self.unavailable[tool] = str(error)
            return None
        beyond = max(_without_ray(found) - self._startup[tool], 0.01)
        row = {**found, "startup_seconds": self._startup[tool], "beyond_startup_seconds": beyond}
        return {k: round(v, 2) for k, v in {**row, "mb_per_second": megabytes / beyond}.items()}, removed

    def _once(self, tool: str, source: Path) -> tuple[dict[str, Any], dict[str, str]]:
        environment, script, arguments = TOOLS[tool]
        out = self._work / f"{tool}.json"
        values = {"{in}": source, "{out}": out, "{workers}": self._cores}
        with peers.on_cores(self._cores):
            found = peers.run(environment, script, *(values.get(part, part) for part in arguments))
        return found, json.loads(out.read_text())


def _without_ray(found: dict[str, Any]) -> float:
    return float(found["seconds"] - found.get("start_ray", 0))


def documents(limit: int | None) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The documents, and the pairs among them that were read by hand."""
    extra, pairs = corpus.near_duplicates()
    return [*extra, *islice(corpus.documents(), limit)], pairs


def templates(truth: Truth, pairs: list[dict[str, str]], removed: dict[str, str]) -> dict[str, int]:
    """Of the pairs of one form and other facts: how many are under and over the threshold, and were joined."""
    traps = [pair for pair in pairs if pair["label"] == "distinct_template"]
    similarity = truth.similarity(np.array([[truth.index[pair[side]] for side in "ab"] for pair in traps], np.int64))
    joined = np.array([removed.get(pair["a"], pair["a"]) == removed.get(pair["b"], pair["b"]) for pair in traps])
    over = similarity >= VERIFY
    return {
        "under": int((~over).sum()),
        "under_joined": int((joined & ~over).sum()),
        "over": int(over.sum()),
        "over_joined": int((joined & over).sum()),
    }


def planted(source: Path) -> list[tuple[str, str]]:
    """The near-copies of a grown corpus, each with its document, that are as similar as recall is asked of."""
    rows = {r["id"]: r["text"] for path in sorted(source.iterdir()) for _, r in read_records(str(path))}
    pairs = [(one, one.removeprefix("near:")) for one in rows if one.startswith("near:")]
    ids = [one for pair in pairs for one in pair]
    similarity = Truth(ids, [rows[one] for one in ids]).similarity(np.arange(len(ids)).reshape(-1, 2))
    return [pair for pair, jaccard in zip(pairs, similarity, strict=True) if jaccard >= RECALL_AT]


def on_corpus(work: Path, timer: Timer, tools: list[str], limit: int | None) -> dict[str, Any]:
    rows, pairs = documents(limit)
    corpus.write(work / "tiny", rows[:TINY], PARTS)
    megabytes = corpus.write(work / "corpus", rows, PARTS) / 1e6
    found = {tool: done for tool in tools if (done := timer.run(tool, work / "corpus", megabytes))}
    peers.say("brute force")
    truth = Truth([row["id"] for row in rows], [row["text"] for row in rows])
    scores = Scores(truth)
    return {
        "documents": len(rows),
        "megabytes": round(megabytes, 1),
        "similar_pairs": len(scores.similar),
        "tools": {
            tool: {**row, **scores.of(removed), "templates": templates(truth, pairs, removed)}
            for tool, (row, removed) in found.items()
        },
    }


def on_copies(timer: Timer, tools: list[str], megabytes: int) -> dict[str, Any]:
    source = corpus.grown(megabytes)
    pairs = planted(source)
    found = {tool: done for tool in tools if tool in FAST and (done := timer.run(tool, source, megabytes))}
    return {
        "megabytes": megabytes,
        "near_copies": len(pairs),
        "tools": {
            tool: {**row, "recall": float(np.mean([removed.get(a, a) == removed.get(b, b) for a, b in pairs]))}
            for tool, (row, removed) in found.items()
        },
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    small, large = result["corpus"]["tools"], result["copies"]["tools"]
    rows = []

    def against(where: dict[str, Any], peer: str, wanted: float, what: str) -> None:
        if "tilth" in where and peer in where:
            ours, theirs = (where[tool]["beyond_startup_seconds"] for tool in ("tilth", peer))
            rows.append(
                peers.claim(
                    f"read -> clusters, {WORKERS} cores, {what}", f"{ours} s", f"{theirs} s", theirs / ours, wanted
                )
            )

    size, grown = f"{result['corpus']['megabytes']:.0f} MB", f"{result['copies']['megabytes']} MB"
    against(small, "datatrove", 50, f"datatrove, {size}")
    against(large, "daft", 3, f"Daft, {grown}")
    against(large, "daft_normalised", 3, f"Daft with `normalize`, {grown}")
    against(small, "data_juicer", 20, f"Data-Juicer, {size}")
    if "tilth" in small:
        ours, others = small["tilth"], {tool: row for tool, row in small.items() if tool != "tilth"}

        def beside(key: str) -> str:
            return ", ".join(f"{tool} {row[key]:.3f}" for tool, row in others.items())

        rows.append(
            peers.claim(
                f"recall at Jaccard {RECALL_AT}: not both kept", ours["recall"], beside("recall"), ours["recall"], 0.98
            )
        )
        rows.append(
            peers.claim(f"precision at {VERIFY}", ours["precision"], beside("precision"), ours["precision"], 0.99)
        )
        traps = ours["templates"]
        shown = f"{traps['under_joined']} of {traps['under']} joined; over it {traps['over_joined']} of {traps['over']}"
        rows.append(
            peers.claim(
                "other facts in one form, under the threshold", shown, "", traps["under_joined"], 0, at_most=True
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--documents", type=int, help="of the corpus; default all")
    parser.add_argument("--megabytes", type=int, default=1000, help="of copies for ours and Daft")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        all_cores, one_core = Timer(Path(folder), WORKERS), Timer(Path(folder), 1)
        result: dict[str, Any] = {"corpus": on_corpus(Path(folder), all_cores, options.tools, options.documents)}
        megabytes = result["corpus"]["megabytes"]
        alone = {t: one_core.run(t, Path(folder, "corpus"), megabytes) for t in options.tools if t in FAST}
        result["one_core"] = {tool: done[0] for tool, done in alone.items() if done}
        result["copies"] = on_copies(all_cores, options.tools, options.megabytes)
        result["unavailable"] = all_cores.unavailable
    result["claims"] = claims(result)
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
