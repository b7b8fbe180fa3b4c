"""The steps of a run on one part or one shard: read, call the stages, commit. No Ray in here.

Each step is a function of one picklable item. It looks first whether its part exists with the
chain that it would have now, so that a step that was done is not done again, and a step that
was cut off is done whole.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import dedup, detect, ingest, mix, storage, tokenise
from curation.detect.fasttext import Detector
from curation.ingest import Chunk, Split
from curation.label import stage as label
from curation.manifest import (
    ARMS,
    DEDUP,
    DETECT,
    DOCUMENTS,
    QUARANTINE,
    SIGNATURES,
    TOKENS,
    File,
    Part,
    RunFolder,
    fingerprint,
)
from curation.mix import arms
from curation.recipe import Dedup, Detect, Recipe
from curation.schema import SCHEMA_VERSION, STANCES, effective_discourse, effective_stance
from curation.tokenise import shards
from curation.tokenise.tokenizer import Encoder, TokenizerSpec

SPLITS = f"{DOCUMENTS}/splits"  # one record for each split whose parts are all there
_SPANS = 1_000  # of the detector's evidence in a document, for choosing what of it a language model reads


@dataclass(frozen=True)
class Chains:
    """The chains of a split's parts, from the split's own identity and the recipe's sections."""

    ingest: str
    detect: str
    signatures: str

    def places(self) -> tuple[tuple[str, str], ...]:
        """(folder, chain) of what is made of each part in one pass over the input."""
        return (DOCUMENTS, self.ingest), (DETECT, self.detect), (SIGNATURES, self.signatures)

    @staticmethod
    def of(split: Split, detect_fingerprint: str, section: Dedup) -> "Chains":
        first = fingerprint(["ingest", SCHEMA_VERSION, ingest.STAGE_VERSION, split.fingerprint])
        second = fingerprint(["detect", detect.STAGE_VERSION, detect_fingerprint, first])
        return Chains(first, second, fingerprint(["signatures", dedup.STAGE_VERSION, signing(section), second]))


def split_parts(run: RunFolder, split: Split, chains: Chains) -> list[str] | None:
    """The names of a split's parts, or None when it was not read to its end as it is now."""
    done = run.current(SPLITS, split.name, chains.ingest)
    return done.about["parts"] if done else None


def signing(section: Dedup) -> dict[str, int]:
    """What of the dedup section a signature depends on."""
    return {"ngram": section.ngram, "num_perm": section.bands * section.rows}


@dataclass(frozen=True)
class Reading:
    """A split to be read, and how what comes out of it is worked on."""

    run: RunFolder
    split: Split
    chains: Chains
    detect: Detect
    dedup: Dedup


@dataclass(frozen=True)
class Work:
    """One part on its way through ingest, detect and signatures; `chunk` is None when it was ingested before."""

    reading: Reading
    name: str
    chunk: Chunk | None


def read_split(reading: Reading) -> Iterator[Work]:
    """The parts of a split, each with its bytes unless it was ingested before."""
    run, split = reading.run, reading.split
    names = split_parts(run, split, reading.chains)
    if names and all(run.current(DOCUMENTS, name, reading.chains.ingest) for name in names):
        yield from (Work(reading, name, None) for name in names)
        return
    for chunk in ingest.chunks(split):
        yield Work(reading, chunk.name, chunk)


@dataclass(frozen=True)
class Worked:
    """What a step says of a part to the driver; `seconds` by stage."""

    split: str
    name: str
    seconds: dict[str, float]


def work_part(work: Work) -> Worked:
    """Ingest, detect and sign one part; each is committed by itself."""
    clock = _Clock()
    run, chains, name = work.reading.run, work.reading.chains, work.name
    documents = _documents(work)
    clock.lap("ingest")
    done = run.current(DETECT, name, chains.detect)
    if done:
        labels = run.read(f"{DETECT}/{name}.parquet")
    else:
        labels = detect.label_table(documents, work.reading.detect)
        file = run.commit_table(f"{DETECT}/{name}.parquet", labels)
        run.commit_part(Part(DETECT, name, chains.detect, (file,), _label_counts(documents, labels)))
    clock.lap("detect")
    if not run.current(SIGNATURES, name, chains.signatures):
        table = dedup.signature_table(documents, labels, work.reading.dedup)
        file = run.commit_table(f"{SIGNATURES}/{name}.parquet", table)
        run.commit_part(Part(SIGNATURES, name, chains.signatures, (file,)))
    clock.lap("signatures")
    return Worked(work.reading.split.name, name, clock.seconds)


def _documents(work: Work) -> pa.Table:
    run, name, chain = work.reading.run, work.name, work.reading.chains.ingest
    if run.current(DOCUMENTS, name, chain):
        return run.read(f"{DOCUMENTS}/{name}.parquet")
    assert work.chunk is not None, "a part without bytes was ingested before"
    parsed = ingest.parse(work.chunk)
    files = [run.commit_table(f"{DOCUMENTS}/{name}.parquet", parsed.documents)]
    if parsed.rejects.num_rows:
        files.append(run.commit_table(f"{QUARANTINE}/{name}.parquet", parsed.rejects))
    else:
        storage.remove(run.path(QUARANTINE, f"{name}.parquet"))  # of an earlier content of the same file
    reasons = parsed.rejects["reason"].value_counts().to_pylist()
    counts = {
        "records": parsed.num_records,
        "bytes": parsed.num_bytes,
        "documents": parsed.documents.num_rows,
        **{f"quarantine:{r['values']}": r["counts"] for r in reasons},
    }
    about = {"source": work.reading.split.input.source, "file": work.reading.split.relative}
    run.commit_part(Part(DOCUMENTS, name, chain, tuple(files), counts, about))
    return parsed.documents


def finish_split(reading: Reading, names: list[str]) -> None:
    """Record that all parts of a split are there, so that a later run need not read it again."""
    reading.run.commit_part(Part(SPLITS, reading.split.name, reading.chains.ingest, (), about={"parts": sorted(names)}))


def _label_counts(documents: pa.Table, labels: pa.Table) -> dict[str, int]:
    stances = effective_stance(documents, labels)
    discourse = effective_discourse(stances, labels)
    by_stance = {f"stance:{s}": pc.sum(pc.equal(stances, s)).as_py() or 0 for s in STANCES}
    return {
        "documents": documents.num_rows,
        "discourse": pc.sum(discourse).as_py() or 0,
        "blocklist": pc.sum(labels["blocklist"]).as_py() or 0,
        **by_stance,
    }


def label_work(
    recipe: Recipe, run: RunFolder, names: list[str], parents: list[str], address: str | None = None
) -> label.Work:
    """What the label stage is given. `parents`: chains of the parts before it. `address`: of the Ray cluster."""
    assert recipe.label is not None
    return label.Work(run, tuple(names), recipe.label, recipe.seed, tuple(parents), explainer(recipe), address)


def explainer(recipe: Recipe) -> label.Explain:
    """What the recipe's detector finds telling in a text, for the windows of long documents."""
    detector = Detector.load(recipe.detect.fasttext.model)
    return lambda text: [(s.start, s.end, s.contribution) for s in detector.explain(text, limit=_SPANS)]


@dataclass(frozen=True)
class TokenItem:
    """A part to be tokenised."""

    run: RunFolder
    name: str
    chain: str
    spec: TokenizerSpec


@lru_cache(maxsize=2)
def _encoder(spec: TokenizerSpec) -> Encoder:
    return Encoder(spec)


def tokenise_part(item: TokenItem) -> Worked:
    """The token ids of a part's representatives: PART.bin and where each document is in it."""
    clock = _Clock()
    run, name = item.run, item.name
    if not run.current(TOKENS, name, item.chain):
        documents = run.read(f"{DOCUMENTS}/{name}.parquet", ["id", "text"])
        clusters = run.read(f"{DEDUP}/{name}.parquet", ["id", "kept"])
        ids, places = tokenise.tokens_table(documents, clusters, _encoder(item.spec))
        files = (
            run.commit_bytes(f"{TOKENS}/{name}.bin", ids.tobytes()),
            run.commit_table(f"{TOKENS}/{name}.parquet", places),
        )
        run.commit_part(Part(TOKENS, name, item.chain, files, {"tokens": int(ids.size)}))
    clock.lap("tokenise")
    return Worked("", name, clock.seconds)


@dataclass(frozen=True)
class WriteShard:
    """A shard to be written in every format asked for, as a part of its arm-phase folder."""

    rows: arms.ShardItem
    folder: str  # 60_arms/ARM/PHASE
    name: str
    chain: str
    formats: tuple[str, ...]
    spec: TokenizerSpec


def write_shard(item: WriteShard) -> Part:
    """Gather, sort and write one shard, read it again, and commit it with its provenance."""
    run = item.rows.run
    stem = f"{item.folder}/{item.name}"
    rows = arms.shard_rows(item.rows)
    pieces = arms.shard_token_ids(run, rows, item.spec.dtype)
    ids = np.concatenate(pieces)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    files: list[File] = []
    for form in item.formats:
        written = shards.WRITERS[form](run, stem, ids, ends, item.spec)
        shards.verify_shard(run, form, stem, ids, ends)
        files += written
    files.append(shards.write_provenance(run, stem, arms.provenance(rows)))
    part = Part(item.folder, item.name, item.chain, tuple(files), {"tokens": int(ids.size), "documents": len(rows)})
    return run.commit_part(part)


def arm_folder(arm: str, phase: str) -> str:
    return f"{ARMS}/{arm}/{phase}"


def mix_chain(section: dict[str, Any], parents: list[str]) -> str:
    return fingerprint(["mix", mix.STAGE_VERSION, tokenise.STAGE_VERSION, section, parents])


class _Clock:
    """Seconds by name since the lap before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
