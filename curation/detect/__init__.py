"""Detect: documents in, LABEL rows out. Five stances from a fastText model, and a blocklist.

normalise.py   text -> words, byte for byte, shared by both detectors
blocklist.py   terms in nine categories, every hit with its offset
folded.py      a fastText model as one logit row per feature; the inference kernel
fasttext.py    load, predict, explain
train.py       labelled text -> model and card with held-out figures
metrics.py     precision, recall, calibration, intervals
stage.py       label_table: what the pipeline calls
"""

STAGE_VERSION = 1

from curation.detect.stage import label_table, section_fingerprint  # noqa: E402

__all__ = ["STAGE_VERSION", "label_table", "section_fingerprint"]
