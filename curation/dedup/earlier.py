"""Earlier runs that a run is deduplicated against, by the signatures that they left.

What they kept leads every document of this run that is verified against it. Their texts are not
read: a copy is known by its text's hash, a near-duplicate by the share of equal signature values.
"""

from dataclasses import dataclass

import pyarrow.parquet as pq

from curation import storage
from curation.dedup.signatures import about
from curation.errors import UserError
from curation.manifest import SIGNATURES, RunFolder, fingerprint, read_manifest
from curation.recipe import Dedup


@dataclass(frozen=True)
class Earlier:
    """A finished run: its parts, and the hash of what dedup reads of them."""

    run: RunFolder
    parts: tuple[str, ...]
    fingerprint: str


def open_earlier(root: str, section: Dedup) -> Earlier:
    """The run in the folder `root`. Raises UserError when there is none, when it did not finish, or when its
    signatures do not compare with those of `section`."""
    run = RunFolder(root)
    stages = read_manifest(run)["stages"]
    parts = tuple(sorted(part["name"] for part in stages["signatures"]["parts"]))
    wanted = about(section)
    for name in parts[:1]:
        with storage.open_read(run.path(SIGNATURES, f"{name}.parquet")) as handle:
            metadata = pq.read_schema(handle).metadata or {}
        found = {key: metadata.get(key.encode(), b"none").decode() for key in wanted}
        if found != wanted:
            raise UserError(
                f"dedup.against: {root} has signatures of {_phrase(found)}, this recipe makes {_phrase(wanted)}: give "
                "both runs the same ngram and the same bands x rows, with one version of Tilth"
            )
    files = [[part["files"] for part in stages[stage]["parts"]] for stage in ("ingest", "signatures", "dedup")]
    return Earlier(run, parts, fingerprint(files))


def _phrase(found: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())
