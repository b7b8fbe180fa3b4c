"""Randomness as a function of (seed, names, document id), never of state or arrival order.

`key64` is xxh3_64 of the arguments, each prefixed by its length so that ("a", "bc") and
("ab", "c") differ. A uniform draw for a document is `key64(...) / 2**64`.
"""

from collections.abc import Sequence

import numpy as np
import xxhash


def _prefix(parts: tuple[object, ...]) -> bytes:
    encoded = [str(part).encode() for part in parts]
    return b"".join(len(raw).to_bytes(4, "little") + raw for raw in encoded)


def key64(*parts: object) -> int:
    """One uint64 for `parts`."""
    return xxhash.xxh3_64_intdigest(_prefix(parts))


def keys64(parts: tuple[object, ...], ids: Sequence[str]) -> np.ndarray:
    """uint64[len(ids)]: `key64(*parts, id)` for each document id."""
    head = _prefix(parts)
    digest = xxhash.xxh3_64_intdigest
    raw = [i.encode() for i in ids]
    return np.fromiter((digest(head + len(i).to_bytes(4, "little") + i) for i in raw), dtype=np.uint64, count=len(raw))
