"""Detect: documents in, LABEL rows out. Five stances from a fastText model, and a blocklist.

normalise.py   text -> words, byte for byte, shared by both detectors
blocklist.py   terms in nine categories, every hit with its offset
model_file.py  fastText's .bin and .ftz, read without the library
features.py    text -> the rows of a fastText model that it selects, and their sums: the kernels
folded.py      FoldedFastText: any fastText classifier as one logit row per feature
fasttext.py    Detector: the five stances by windows; load, predict, explain
train.py       labelled text -> model and card with held-out figures
metrics.py     precision, recall, calibration, intervals
stage.py       label_table: what the pipeline calls
"""

STAGE_VERSION = 2

from curation.detect.folded import FoldedFastText  # noqa: E402
from curation.detect.stage import label_table, section_fingerprint  # noqa: E402

__all__ = ["STAGE_VERSION", "FoldedFastText", "label_table", "section_fingerprint"]
