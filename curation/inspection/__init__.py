"""Looking at a finished run: reads its files, writes only pages about them.

run.py       open_run: a run folder as lazy polars frames, samples
why.py       Run.why: everything the run knows about one document
agreement.py labels against the truth: confusion, kappa, calibration, with intervals
prevalence.py shares of a corpus corrected for errors, recall lost by a stage
human.py     human labels of a run's documents, and what the two above say of them
quality.py   agreement.html
excerpts.py  pieces of document text that are safe and short enough to show
facts.py     the aggregates that the report shows
report.py    report.html
cards.py     README.md of every arm-phase
pages.py     the templates' environment: escaping and number formats

Document text, file names and ids come from strangers. They reach a page only through `pages`
(escaped) and a terminal only through `excerpts.visible` (no control characters).
"""

from curation.inspection.run import Run, open_run

__all__ = ["Run", "open_run"]
