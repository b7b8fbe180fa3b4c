"""The default detector on hand labels that it never saw, beside the blocklist and always-yes.

    python -m benchmarks.detector [--shared FOLDER] [--json]

FOLDER (default: ../shared beside the repository) holds labels/labelled.jsonl (by document id),
labels/hard.jsonl (with text) and corpus/*.jsonl.zst. Each sample is reported by itself, since
their rates differ, and the five stances (the most probable one; no AI discourse is unrelated) over
labelled.jsonl; brackets are 95 % bootstrap intervals over documents.

*False alarms*: of the corpus's documents of each domain that have none of AI_WORDS, which AI texts use, and gave the
default model no passage, the share that is called discourse. That needs no label: nearly all of these decisions are
wrong.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from curation.detect import metrics
from curation.detect.blocklist import Blocklist
from curation.detect.fasttext import Detector
from curation.inspection.agreement import agreement
from curation.records import read_records
from curation.schema import STANCES

SHARED = Path(__file__).resolve().parents[2] / "shared"
PASSAGES = Path(__file__).resolve().parents[1] / "examples/labels/passages.jsonl"
AI_WORDS = re.compile(
    r"\b(a\.?i|artificial|intelligen\w*|robot\w*|android\w*|cyborg\w*|automat\w*|machine\w*|comput\w*|"
    r"program\w*|algorithm\w*|neural|network\w*|gpt\w*|chatgpt|llms?|chatbots?|bots?|models?|learning|agents?|"
    r"aligned|alignment|misalign\w*|turing|asimov|hal|singularity|conscious\w*|sentien\w*|mind|minds)\b",
    re.IGNORECASE,
)
THRESHOLD = 0.5
FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "precision": metrics.precision,
    "recall": metrics.recall,
    "f1": metrics.f1,
    "accuracy": metrics.accuracy,
}


def samples(shared: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """Texts and truth (bool[n]) of each sample."""
    labelled = [r for _, r in read_records(str(shared / "labels/labelled.jsonl"))]
    wanted = {r["id"] for r in labelled}
    texts = {
        r["id"]: r["text"]
        for path in sorted((shared / "corpus").glob("*.jsonl.zst"))
        for _, r in read_records(str(path))
        if r["id"] in wanted
    }
    rows: dict[str, list[tuple[str, bool]]] = {}
    for r in labelled:
        rows.setdefault(r["sample"], []).append((texts[r["id"]], r["is_ai_discourse"]))
    rows["hard"] = [(r["text"], r["is_ai_discourse"]) for _, r in read_records(str(shared / "labels/hard.jsonl"))]
    return {name: ([t for t, _ in found], np.array([y for _, y in found])) for name, found in rows.items()}


def figures(texts: list[str], truth: np.ndarray) -> dict[str, dict[str, metrics.Interval]]:
    """Each figure of each method on one sample."""
    array = pa.array(texts, pa.large_string())
    decisions = {
        "detector": 1 - Detector.load().predict(array)[:, 0] >= THRESHOLD,
        "blocklist": Blocklist.load().scan(array)[0],
        "always yes": np.ones(len(truth), dtype=bool),
    }
    return {
        method: {name: metrics.bootstrap(figure, truth, decided, seed=0) for name, figure in FIGURES.items()}
        for method, decided in decisions.items()
    }


def stances(shared: Path) -> dict[str, Any]:
    """Agreement of the most probable stance with the labels of labelled.jsonl."""
    labelled = {r["id"]: r for _, r in read_records(str(shared / "labels/labelled.jsonl"))}
    found = [
        (labelled[r["id"]], r["text"])
        for path in sorted((shared / "corpus").glob("*.jsonl.zst"))
        for _, r in read_records(str(path))
        if r["id"] in labelled
    ]
    truth = pl.Series([r["stance"] if r["is_ai_discourse"] else "unrelated" for r, _ in found])
    probability = Detector.load().predict(pa.array([text for _, text in found], pa.large_string()))
    return asdict(agreement(truth, pl.Series([STANCES[k] for k in probability.argmax(axis=1)])))


def false_alarms(shared: Path) -> dict[str, dict[str, float]]:
    """Of each domain the documents without any of AI_WORDS, and the share of them that is called discourse."""
    texts: dict[str, list[str]] = {}
    trained = {record["id"] for _, record in read_records(str(PASSAGES))}
    for path in sorted((shared / "corpus").glob("*.jsonl.zst")):
        for _, r in read_records(str(path)):
            if r["id"] not in trained and not AI_WORDS.search(r["text"]):
                texts.setdefault(r["domain"], []).append(r["text"])
    rows = {}
    for domain, found in texts.items():
        p_discourse = 1 - Detector.load().predict(pa.array(found, pa.large_string()))[:, 0]
        rows[domain] = {"documents": len(found), "share": float((p_discourse >= THRESHOLD).mean())}
    return rows


def report(shared: Path) -> dict[str, Any]:
    found = samples(shared)
    return {
        "model": Detector.load().fingerprint,
        "blocklist": Blocklist.load().fingerprint,
        "threshold": THRESHOLD,
        "samples": {
            name: {"documents": len(texts), "discourse": int(truth.sum()), "methods": figures(texts, truth)}
            for name, (texts, truth) in found.items()
        },
        "stances": stances(shared),
        "false_alarms": false_alarms(shared),
    }


def show(result: dict[str, Any]) -> None:
    for name, sample in result["samples"].items():
        print(f"\n{name}: {sample['documents']} documents, {sample['discourse']} AI discourse")
        for method, row in sample["methods"].items():
            cells = [f"{k} {v.value:.2f} [{v.low:.2f}, {v.high:.2f}]" for k, v in row.items()]
            print(f"  {method:<10} " + "  ".join(cells))
    five = result["stances"]
    rows = {name: five[name] for name in ("macro_f1", "accuracy", "kappa")}
    rows |= {f"F1 of {one['name']} ({one['num_truth']})": one["f1"] for one in five["classes"]}
    print(f"\nfive stances: {five['num_documents']} documents")
    for name, row in rows.items():
        print(f"  {name:<22} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    print("\nfalse alarms: called AI discourse without a word of AI")
    for domain, row in result["false_alarms"].items():
        print(f"  {domain:<22} {row['share']:6.1%} of {row['documents']:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    asked = parser.parse_args()
    if not (asked.shared / "labels").is_dir():
        print(f"skipped: there are no labels in {asked.shared} (give --shared FOLDER)", file=sys.stderr)
        if asked.json:
            print(json.dumps({"skipped": f"no labels in {asked.shared}"}))
        return
    result = report(asked.shared)
    if asked.json:
        print(json.dumps(_plain(result)))
    else:
        show(result)


def _plain(value: Any) -> Any:
    """Intervals as objects, and undefined figures (nan) as null."""
    if isinstance(value, metrics.Interval):
        return {k: _plain(v) for k, v in value._asdict().items()}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


if __name__ == "__main__":
    main()
