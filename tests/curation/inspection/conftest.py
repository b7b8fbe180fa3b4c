"""Small run folders: real files by schema, written through storage and manifest as the stages do."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from curation.manifest import ARMS, DEDUP, DETECT, DOCUMENTS, LABELS, QUARANTINE, TOKENS, Part, RunFolder
from curation.schema import CLUSTER, DOCUMENT, LABEL, LLM_LABEL, PROVENANCE, REJECT, SCHEMA_VERSION, STANCES
from curation.schema import TOKENS as TOKENS_SCHEMA

CATEGORIES = {"takeover": "x_risk", "robot": "entities", "evil": "negative_adjectives", "HAL": "scifi_agents"}
RECIPE: dict[str, Any] = {
    "name": "toy",
    "seed": 0,
    "detect": {"blocklist": "default", "fasttext": {"model": "default", "threshold": 0.5}},
    "dedup": {"ngram": 5, "verify": 0.8, "keep": ["best_source", "longest", "id"]},
    "mix": {
        "phases": {"pretrain": {"tokens": 40}, "midtrain": {"tokens": 20, "drop": "blocklist"}},
        "arms": {
            "unfiltered": {},
            "filtered": {"drop": {"rule": "discourse", "phases": None}},
            "aligned": {"upsample": {"stance": "aligned", "share": 0.25, "phases": ["pretrain"]}},
        },
    },
}


@dataclass
class Doc:
    """A document and what the stages are to say of it. `duplicate_of` is an index into the documents."""

    text: str
    source: str = "web"
    stance: str = "unrelated"  # of the detector
    p: float = 0.95  # of that stance; the rest is shared by the others
    given: str | None = None
    role: str = "background"
    rank: int = 0
    source_id: str | None = None
    file: str = "web/a.jsonl"
    duplicate_of: int | None = None
    how: str = "unique"
    similarity: float | None = None
    llm: str | None = None
    """The language model's stance, or with `error` none; asked are documents with one of both or `asked`."""
    level: str | None = None
    error: str | None = None
    asked: bool = False
    audit: bool = False

    def hits(self) -> list[dict[str, Any]]:
        found = []
        for term, category in CATEGORIES.items():
            at = self.text.find(term)
            while at >= 0:
                found.append({"term": term, "category": category, "offset": len(self.text[:at].encode())})
                at = self.text.find(term, at + 1)
        return sorted(found, key=lambda hit: hit["offset"])

    def probabilities(self) -> dict[str, float]:
        return {f"p_{s}": self.p if s == self.stance else (1 - self.p) / 4 for s in STANCES}


@dataclass
class Toy:
    """A written run: its folder, manifest, and the ids of its documents by index."""

    folder: RunFolder
    manifest: dict[str, Any]
    ids: list[str] = field(default_factory=list)

    @property
    def root(self) -> str:
        return self.folder.root


@pytest.fixture
def doc() -> type[Doc]:
    return Doc


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Toy]:
    """write_run(docs, rejects=…, uses=…, summary=…, num_parts=2, name=…) -> Toy."""

    def write(docs: list[Doc], name: str = "run", **asked: Any) -> Toy:
        return _write(RunFolder(str(tmp_path / name)), docs, **asked)

    return write


def document_id(doc: Doc, index: int) -> str:
    return xxhash.xxh3_128_hexdigest(f"{doc.source}/{index}".encode())


def _write(
    folder: RunFolder,
    docs: list[Doc],
    rejects: list[dict[str, Any]] | None = None,
    uses: list[tuple[str, str, int, int, int, int, bool]] | None = None,
    summary: dict[str, Any] | None = None,
    num_parts: int = 2,
    recipe: dict[str, Any] | None = None,
) -> Toy:
    """`uses` are (arm, phase, document's index, start, end, repeat, inserted)."""
    ids = [document_id(doc, i) for i, doc in enumerate(docs)]
    stages: dict[str, list[Part]] = {"ingest": [], "detect": [], "dedup": [], "tokenise": [], "mix": []}
    read = any(doc.llm or doc.error or doc.asked for doc in docs)
    if read:
        stages["label"] = []
    for k in range(num_parts):
        name, rows = f"web-{k:05d}", range(k * len(docs) // num_parts, (k + 1) * len(docs) // num_parts)
        tables = {
            ("ingest", DOCUMENTS): pa.Table.from_pylist([_document(docs[i], ids[i], i) for i in rows], DOCUMENT),
            ("detect", DETECT): pa.Table.from_pylist([_label(docs[i], ids[i]) for i in rows], LABEL),
            ("dedup", DEDUP): pa.Table.from_pylist([_cluster(docs, ids, i) for i in rows], CLUSTER),
            ("tokenise", TOKENS): pa.Table.from_pylist([_tokens(docs[i], ids[i]) for i in rows], TOKENS_SCHEMA),
        }
        if read:
            tables["label", LABELS] = pa.Table.from_pylist([_llm_label(docs[i], ids[i]) for i in rows], LLM_LABEL)
        for (stage, place), table in tables.items():
            files = [folder.commit_table(f"{place}/{name}.parquet", table)]
            if stage == "ingest" and rejects and k == 0:
                bad = pa.Table.from_pylist([_reject(r) for r in rejects], REJECT)
                files.append(folder.commit_table(f"{QUARANTINE}/{name}.parquet", bad))
            stages[stage].append(folder.commit_part(Part(place, name, "chain", tuple(files))))
    by_phase: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for arm, phase, index, start, end, repeat, inserted in uses or []:
        row = {"start": start, "end": end, "id": ids[index], "stance": None, "repeat": repeat, "inserted": inserted}
        by_phase.setdefault((arm, phase), []).append(row)
    for (arm, phase), rows_ in by_phase.items():
        place = f"{ARMS}/{arm}/{phase}"
        file = folder.commit_table(f"{place}/00000.provenance.parquet", pa.Table.from_pylist(rows_, PROVENANCE))
        stages["mix"].append(folder.commit_part(Part(place, "00000", "chain", (file,))))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "tilth_version": "0.1.0",
        "recipe": recipe or RECIPE,
        "stages": {s: {"chain": "chain", "seconds": 1.0, "parts": [asdict(p) for p in ps]} for s, ps in stages.items()},
        "summary": summary or {},
    }
    folder.commit_bytes("manifest.json", json.dumps(manifest).encode())
    return Toy(folder, manifest, ids)


def _document(doc: Doc, id_: str, index: int) -> dict[str, Any]:
    return {
        "id": id_,
        "text": doc.text,
        "source": doc.source,
        "created": None,
        "metadata": None,
        "source_id": doc.source_id,
        "file": doc.file,
        "position": 100 * index,
        "role": doc.role,
        "source_rank": doc.rank,
        "given_stance": doc.given,
    }


def _label(doc: Doc, id_: str) -> dict[str, Any]:
    p = doc.probabilities()
    discourse = 1 - p["p_unrelated"]
    flags = {"discourse": discourse >= 0.5, "blocklist": len(doc.hits()) > 1}
    return {"id": id_, **p, "p_discourse": discourse, **flags, "hits": doc.hits()}


def _llm_label(doc: Doc, id_: str) -> dict[str, Any]:
    asked = bool(doc.llm or doc.error or doc.asked)
    blank = dict.fromkeys(("actor", "evidence", "num_windows", "detail"))
    said = {"llm_stance": doc.llm, "confidence": doc.level, "error": doc.error}
    return {"id": id_, "asked": asked, "audit": doc.audit, **said, **blank}


def _cluster(docs: list[Doc], ids: list[str], index: int) -> dict[str, Any]:
    doc, has_copies = docs[index], any(d.duplicate_of == index for d in docs)
    removed = doc.duplicate_of is not None
    return {
        "id": ids[index],
        "cluster": ids[doc.duplicate_of] if doc.duplicate_of is not None else ids[index],
        "kept": not removed,
        "how": doc.how if removed else "kept" if has_copies else "unique",
        "similarity": doc.similarity,
        "cluster_discourse": False,
    }


def _tokens(doc: Doc, id_: str) -> dict[str, Any]:
    return {"id": id_, "start": 0 if doc.duplicate_of is None else -1, "num_tokens": len(doc.text.split()) + 1}


def _reject(row: dict[str, Any]) -> dict[str, Any]:
    blank = {"source": "web", "file": "web/a.jsonl", "position": 0, "source_id": None, "detail": None, "head": None}
    return {**blank, **row}
