"""A run folder as lazy polars frames.

Frames scan exactly the Parquet files that manifest.json names, never a glob, so that parts of
an unfinished or earlier run are not mixed in; a `part` column says which one a row is from.
Sidecars are row-aligned with the documents, so labels get the documents' columns by appending
them: no join, and only the columns that a query asks for are read.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from curation.errors import TilthError, UserError
from curation.manifest import ARMS, DEDUP, DETECT, DOCUMENTS, LABELS, QUARANTINE, RunFolder, read_manifest
from curation.rng import keys64
from curation.schema import (
    CLUSTER,
    DOCUMENT,
    LABEL,
    LLM_LABEL,
    PROVENANCE,
    REJECT,
    STANCES,
    discourse_expression,
    stance_expression,
)

if TYPE_CHECKING:
    from curation.inspection.agreement import Agreement
    from curation.inspection.prevalence import Prevalence, Recall
    from curation.inspection.why import Why

# The detector's evidence in a text: (start_char, end_char, contribution), any order.
Explain = Callable[[str], Sequence[tuple[int, int, float]]]
# The Explain of the model that a recipe names (`default` or a path).
Explainer = Callable[[str], Explain]

DISCOURSE = discourse_expression("stance")
GIVEN, MODEL, STUDENT = "given", "the language model's", "the student's"


def whose_expression(*, labelled: bool) -> pl.Expr:
    """Whose the effective `stance` in a frame of `Run.labels` is, null where there is none; `labelled` is the run's."""
    given = pl.when(pl.col("given_stance").is_not_null()).then(pl.lit(GIVEN))
    model = [pl.when(pl.col("llm_stance").is_not_null()).then(pl.lit(MODEL))] if labelled else []
    return pl.coalesce(given, *model, pl.when(pl.col("stance").is_not_null()).then(pl.lit(STUDENT)))


def open_run(path: str | Path, explainer: Explainer | None = None) -> "Run":
    """The run in the folder `path` (any fsspec path). `explainer` gives `Run.why` its fastText
    evidence; it is called with the recipe's model when first needed. Raises UserError when the
    folder holds no finished run."""
    folder = RunFolder(str(path))
    return Run(folder, read_manifest(folder), explainer)


class Run:
    """A finished run. `documents`, `labels`, `clusters` and `quarantine` are lazy polars frames:
    filter and select first, then `.collect()`."""

    def __init__(self, folder: RunFolder, manifest: dict[str, Any], explainer: Explainer | None = None):
        self.folder, self.manifest = folder, manifest
        self._explainer = explainer

    @property
    def recipe(self) -> dict[str, Any]:
        """The validated recipe."""
        return self.manifest.get("recipe") or {}

    @property
    def summary(self) -> dict[str, Any]:
        """What `tilth curate --json` printed."""
        return self.manifest.get("summary") or {}

    @property
    def documents(self) -> pl.LazyFrame:
        """schema.DOCUMENT and `part`."""
        return self._scan(DOCUMENTS, DOCUMENT)

    @property
    def labels(self) -> pl.LazyFrame:
        """schema.LABEL, the documents' `source`, `role` and `given_stance`, what a language model said where one was
        asked (schema.LLM_LABEL), the effective `stance` (null = none), and `part`."""
        about = self.documents.select("source", "role", "given_stance")
        sidecars = [self._scan(DETECT, LABEL), about]
        if self.labelled:
            sidecars.append(self._scan(LABELS, LLM_LABEL).drop("id", "part"))
        labels = pl.concat(sidecars, how="horizontal")
        return labels.with_columns(stance=stance_expression(labelled=self.labelled))

    @property
    def labelled(self) -> bool:
        """Whether a language model read documents."""
        return "label" in (self.manifest.get("stages") or {})

    @property
    def clusters(self) -> pl.LazyFrame:
        """schema.CLUSTER and `part`."""
        return self._scan(DEDUP, CLUSTER)

    @property
    def quarantine(self) -> pl.LazyFrame:
        """schema.REJECT and `part`; no rows when nothing was quarantined."""
        return self._scan(QUARANTINE, REJECT)

    @property
    def provenance(self) -> pl.LazyFrame:
        """schema.PROVENANCE of every shard, with `arm`, `phase` and `shard`."""
        steps = pl.col("path").str.split("/").list
        frame = self._scan_files(self._files(ARMS, ".provenance.parquet"), PROVENANCE)
        return frame.with_columns(
            arm=steps.get(-3, null_on_oob=True),
            phase=steps.get(-2, null_on_oob=True),
            shard=steps.last().str.strip_suffix(".provenance.parquet"),
        ).drop("path")

    @property
    def arms(self) -> pl.DataFrame:
        """Asked versus achieved, one row for each arm and phase."""
        rows = self.summary.get("arms") or []
        plain = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in rows]
        return pl.DataFrame(plain, infer_schema_length=None)

    def sample(self, stance: str | None = None, n: int = 10, seed: int = 0) -> pl.DataFrame:
        """`n` documents of an effective stance (any when None) with their text, stance and
        probabilities. The same `seed` gives the same documents, whatever the number of parts."""
        if stance is not None and stance not in STANCES:
            close = get_close_matches(str(stance), STANCES, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(STANCES)}"
            raise UserError(f"{stance!r} is no stance: {hint}")
        wanted = self.labels if stance is None else self.labels.filter(pl.col("stance") == stance)
        key = pl.col("id").map_batches(
            lambda ids: pl.Series(keys64((seed, "sample"), ids.to_list())), pl.UInt64, is_elementwise=True
        )
        drawn = collect(wanted.select("id", key=key).bottom_k(n, by=["key", "id"]))
        among = pl.col("id").is_in(drawn["id"].implode())
        texts, labels = collect(self.documents.filter(among)), collect(self.labels.filter(among))
        labels = labels.drop("source", "role", "given_stance", "part")
        return drawn.join(texts, on="id").join(labels, on="id").sort("key", "id").drop("key")

    def why(self, key: str) -> "Why":
        """Everything the run knows about the document with the id `key`, or the unique one whose
        id starts with it or whose source_id it is. Raises UserError when there is none, or more."""
        from curation.inspection.why import look_up

        return look_up(self, key)

    def agreement(self, human: str | Path) -> "Agreement":
        """The run's labels against human ones: JSON lines with `id` (or source_id) and `stance` (`human.py`).
        Raises UserError when the file is wrong or none of its labels belongs to a document here."""
        from curation.inspection.human import run_agreement

        return run_agreement(self, str(human))

    def prevalence(self, human: str | Path | None = None) -> "Prevalence":
        """The share of each stance among the background documents that dedup kept: as labelled and, with human labels
        of a random sample (rates may differ by label and by side of the threshold), corrected with intervals."""
        from curation.inspection.human import run_prevalence

        return run_prevalence(self, None if human is None else str(human))

    def recall_lost(self, human: str | Path) -> tuple["Recall", ...]:
        """The share of the true AI discourse that passes the detector, and dedup, with intervals."""
        from curation.inspection.human import run_recall

        return run_recall(self, str(human))

    def disagreements(self, human: str | Path) -> pl.DataFrame:
        """Documents whose label is not the human one, the most confident first: id, source_id, text (its beginning),
        truth, label, whose it is, the student's `probability` or the language model's `level` (null for another's)."""
        from curation.inspection.human import disagreements

        return disagreements(self, str(human))

    @cached_property
    def explain(self) -> Explain | None:
        """The detector's evidence function; None for a run that was opened without an explainer."""
        if self._explainer is None:
            return None
        return self._explainer((self.recipe.get("detect") or {}).get("fasttext", {}).get("model", "default"))

    def _files(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Paths of the manifest's data files in `folder`: sorted, so that sidecars line up."""
        stages = (self.manifest.get("stages") or {}).values()
        paths = {file["path"] for stage in stages for part in stage["parts"] for file in part["files"]}
        return sorted(p for p in paths if p.startswith(f"{folder}/") and p.endswith(suffix))

    def _scan(self, folder: str, schema: pa.Schema) -> pl.LazyFrame:
        direct = [path for path in self._files(folder) if path.rpartition("/")[0] == folder]
        frame = self._scan_files(direct, schema)
        return frame.with_columns(part=pl.col("path").str.extract(r"([^/\\]+)\.parquet$")).drop("path")

    def _scan_files(self, paths: list[str], schema: pa.Schema) -> pl.LazyFrame:
        if not paths:
            empty = pl.from_arrow(schema.empty_table())
            assert isinstance(empty, pl.DataFrame)
            return empty.lazy().with_columns(path=pl.lit(None, pl.String))
        return pl.scan_parquet([self.folder.path(p) for p in paths], include_file_paths="path", glob=False)

    def __repr__(self) -> str:
        name = self.recipe.get("name", self.folder.root)
        return f"Run({name}: {', '.join(f'{value} {what}' for what, value in self._counts())})"

    def _repr_html_(self) -> str:
        from curation.inspection.pages import render

        arms = self.summary.get("arms") or []
        return render("run.html.j2", root=self.folder.root, counts=self._counts(), arms=arms)

    def _counts(self) -> list[tuple[str, str]]:
        summary = self.summary
        known = {
            "documents": summary.get("documents_read"),
            "AI discourse": summary.get("discourse"),
            "quarantined": summary.get("quarantined_total"),
            "kept after dedup": summary.get("kept"),
            "arm-phases": len(summary["arms"]) if summary.get("arms") else None,
        }
        return [(what, f"{value:,}") for what, value in known.items() if value is not None]


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """`frame` in memory, with a damaged or missing file of the run as a TilthError. Streamed: memory
    grows with the answer, not with the run."""
    try:
        return frame.collect(engine="streaming")
    except (OSError, pl.exceptions.ComputeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TilthError(f"a file of the run cannot be read ({reason}): ask `tilth verify` what is damaged") from error
