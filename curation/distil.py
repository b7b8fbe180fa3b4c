"""The next detector from what a language model said in a run: `tilth detect train --from-run RUN`.

A row is a document that the model labelled and what it read of it: the whole text, or the windows of a long one (label/
windows.py), which are found again by the run's own detector. Rejects of the audit sample are among them, so the
detector learns from what it wrongly left out too. Documents of a human file are never trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from curation import open_run
from curation.detect.fasttext import Detector
from curation.detect.train import Row, train
from curation.errors import UserError
from curation.inspection.agreement import agreement
from curation.inspection.human import match
from curation.inspection.run import Run, collect
from curation.label.windows import choose
from curation.manifest import DOCUMENTS
from curation.recipe import Recipe
from curation.schema import STANCES
from curation.steps import explainer


def distil(
    root: str, out: str, *, labelled: Sequence[str] = (), human: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Train on the labels of the run `root` and on the files `labelled`; returns the model's card with "gain", the
    run's detector against the new one on held-out labels of the run, and with `human` also on those documents
    ("human": agreement of both, with intervals). Raises UserError when the run has no labels."""
    run = open_run(root)
    if not run.labelled:
        raise UserError(
            f"{root} has no labels of a language model: add a `label` section to its recipe and curate again"
        )
    recipe = Recipe.model_validate(run.recipe)
    before = Detector.load(recipe.detect.fasttext.model)
    truth = match(run, human).rows.select("id", "truth") if human else None
    rows = list(_rows(run, recipe, set() if truth is None else set(truth["id"])))
    card = train(labelled, out, seed, more=rows, before=before)
    if truth is not None:
        texts = collect(run.documents.filter(pl.col("id").is_in(truth["id"].implode())).select("id", "text"))
        card["human"] = _against(truth.join(texts, on="id").sort("id"), before, Detector.load(out))
    return card


def _rows(run: Run, recipe: Recipe, left_out: set[str]) -> Iterator[Row]:
    """A part at a time, so that only what is trained on is held."""
    assert recipe.label is not None
    explain = explainer(recipe)
    size, at_most = recipe.label.window_characters, recipe.label.max_windows
    labelled = run.labels.filter(pl.col("llm_stance").is_not_null()).select("id", "part", "llm_stance")
    for (part,), found in sorted(collect(labelled).group_by("part")):
        stances = dict(found.select("id", "llm_stance").iter_rows())
        documents = run.folder.read(f"{DOCUMENTS}/{part}.parquet", ["id", "text"])
        for identity, text in zip(documents["id"].to_pylist(), documents["text"].to_pylist(), strict=True):
            if identity in stances and identity not in left_out:
                spans = list(explain(text)) if len(text) > size else []
                read = " ".join(text[a:b] for a, b in choose(text, spans, characters=size, at_most=at_most))
                yield Row(read, stances[identity])


def _against(rows: pl.DataFrame, before: Detector, after: Detector) -> dict[str, Any]:
    texts = pa.array(rows["text"].to_list(), pa.large_string())

    def figures(detector: Detector) -> dict[str, Any]:
        probability = detector.predict(texts)
        labels = pl.Series([STANCES[k] for k in probability.argmax(axis=1)], dtype=pl.String)
        confidence = pl.Series(probability.max(axis=1).clip(0, 1).astype(np.float64))
        return asdict(agreement(rows["truth"], labels, confidence))

    return {"documents": rows.height, "before": figures(before), "after": figures(after)}
