"""agreement.html: how good a run's labels are, as one page that needs no network and no script.

`human.judge` has the numbers; this module puts them into the shapes that the template draws. The page's size is
bounded: disagreements and their texts are cut, whatever the corpus and the human labels.
"""

from typing import Any, NamedTuple

from curation.errors import UserError
from curation.inspection.agreement import Figure
from curation.inspection.human import Judged, disagreeing, run_prevalence
from curation.inspection.pages import count, decimal, percent, render
from curation.inspection.prevalence import Prevalence
from curation.inspection.run import MODEL, Run

PAGE = "agreement.html"
MAX_DISAGREEMENTS = 20


class Tile(NamedTuple):
    """A headline number."""

    value: str
    label: str
    note: str


def write_agreement(run: Run, judged: Judged) -> str:
    """Commit `agreement.html` into the run folder; returns its path. Raises TilthError when a file of the run cannot
    be read."""
    run.folder.commit_bytes(PAGE, render("agreement.html.j2", **_view(run, judged)).encode())
    return run.folder.path(PAGE)


def _view(run: Run, judged: Judged) -> dict[str, Any]:
    rows = judged.matched.rows
    return {
        "name": run.recipe.get("name") or "unnamed",
        "root": run.folder.root,
        "human": judged.human,
        "matching": judged.matched.matching,
        "found": judged.agreement,
        "origins": _origins(judged),
        "model": (run.recipe.get("label") or {}).get("model"),
        "model_whose": MODEL,
        "has_model": run.labelled,
        "tiles": _tiles(judged),
        "shares": judged.prevalence or _uncorrected(run),
        "prevalence_reason": judged.prevalence_reason,
        "stages": judged.recalls,
        "disagreements": disagreeing(run, rows, MAX_DISAGREEMENTS).to_dicts(),
        "num_disagreements": int((rows["truth"] != rows["label"]).sum()),
        "root_python": repr(run.folder.root),
        "human_python": repr(judged.human),
    }


def _origins(judged: Judged) -> list[tuple[str, int]]:
    """How many of the labels are whose, the most frequent first."""
    counts = judged.matched.rows.group_by("whose").len().iter_rows()
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))


def _uncorrected(run: Run) -> Prevalence | None:
    try:
        return run_prevalence(run)
    except UserError:  # no background document: then there is nothing to have a share of
        return None


def _tiles(judged: Judged) -> list[Tile]:
    found, two = judged.agreement, judged.agreement.binary
    right = sum(found.confusion[k][k] for k in range(len(found.stances)))
    tiles = [
        Tile(percent(right / found.num_documents), "labels right", f"{count(right)} of {count(found.num_documents)}")
    ]
    if two is not None:
        tiles += [
            Tile(decimal(two.precision.value), "precision, AI discourse", _note(two.precision, "the run has none")),
            Tile(decimal(two.recall.value), "recall, AI discourse", _note(two.recall, "people have none")),
        ]
    if found.calibration is not None:
        tiles.append(
            Tile(decimal(found.calibration.error.value), "calibration error", "of the student’s probabilities")
        )
    if judged.prevalence is not None and (share := judged.prevalence.discourse.corrected) is not None:
        note = f"corrected: {percent(share.low)} to {percent(share.high)}"
        tiles.append(Tile(percent(share.value), "of the corpus is AI discourse", note))
    return tiles


def _note(figure: Figure, unknown: str) -> str:
    return unknown if figure.value is None else f"{decimal(figure.low)} to {decimal(figure.high)}"
