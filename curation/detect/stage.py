"""Detection as a stage: DOCUMENT rows in, row-aligned LABEL rows out. Adds rows, drops nothing."""

import pyarrow as pa

from curation import manifest
from curation.detect.blocklist import Blocklist
from curation.detect.fasttext import Detector
from curation.detect.normalise import normalise
from curation.recipe import Detect
from curation.schema import LABEL, STANCES


def label_table(documents: pa.Table, section: Detect) -> pa.Table:
    """schema.LABEL for the columns `id` and `text` of `documents`, row by row. Pure: the model and
    the blocklist are loaded once a process."""
    normalised = normalise(documents["text"])
    probability = Detector.load(section.fasttext.model).predict_normalised(normalised)
    flagged, hits = Blocklist.load(section.blocklist).scan_normalised(normalised)
    discourse = 1 - probability[:, 0]
    columns = {
        "id": documents["id"].combine_chunks(),
        **{f"p_{stance}": pa.array(probability[:, c]) for c, stance in enumerate(STANCES)},
        "p_discourse": pa.array(discourse),
        "discourse": pa.array(discourse >= section.fasttext.threshold),
        "blocklist": pa.array(flagged),
        "hits": hits,
    }
    return pa.table([columns[field.name].cast(field.type) for field in LABEL], schema=LABEL)


def section_fingerprint(section: Detect) -> str:
    """What labels depend on beside the documents: the hashes of blocklist and model, and the
    threshold. Raises UserError when either can't be loaded."""
    return manifest.fingerprint(
        {
            "blocklist": Blocklist.load(section.blocklist).fingerprint,
            "model": Detector.load(section.fasttext.model).fingerprint,
            "threshold": section.fasttext.threshold,
        }
    )
