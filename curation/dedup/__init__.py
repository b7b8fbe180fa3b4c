"""Which documents say the same: exact groups, MinHash clusters, one kept document for each.

`signature_table` is made for each part while the part is in memory. `cluster` is the barrier that
sees all parts; it writes one CLUSTER row for each document and removes nothing itself.
"""

from curation.dedup.barrier import REJECTS_PART, Outcome, cluster
from curation.dedup.earlier import Earlier, open_earlier
from curation.dedup.signatures import signature_table

STAGE_VERSION = 2

__all__ = ["REJECTS_PART", "STAGE_VERSION", "Earlier", "Outcome", "cluster", "open_earlier", "signature_table"]
