"""Curation: documents in, token shards out.

    import curation
    run = curation.open_run("runs/demo")
    run.documents, run.labels, run.clusters, run.quarantine     # lazy polars frames
    print(run.why(id))

Importing this module loads nothing heavy; each name loads what it needs when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curation.inspection import Run
    from curation.pipeline import curate
    from curation.recipe import Recipe

__all__ = ["Recipe", "Run", "curate", "open_run"]

_HOMES = {"Recipe": "curation.recipe", "Run": "curation.inspection", "curate": "curation.pipeline"}


def open_run(path: str) -> "Run":
    """The finished run in the folder `path`, with the detector's evidence in `Run.why`. Raises UserError
    when the folder holds no finished run."""
    from curation.inspection import open_run as open_files

    return open_files(path, explainer=_explainer)


def _explainer(model: str) -> Any:
    from curation.detect.fasttext import Detector

    return Detector.load(model).explain


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curation' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
