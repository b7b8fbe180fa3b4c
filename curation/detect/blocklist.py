"""The blocklist: terms in nine categories, found word by word in one pass over normalised bytes.

A category's rule is `instant` (any hit flags the document) or one side of a co-occurrence: at
least one `entity` hit AND at least one `negative` hit anywhere in the document. Every hit is
recorded, also those of one side alone. Texts and terms go through `normalise`, so that matching
ignores case and punctuation (`self-aware` = `Self aware`, `A.I.` = `ai`). A term is a path of words
in a trie, so it may be broken over lines, and word boundaries are the words' own.

Words and their hashes are those of `features`. Few begin a term: a table of 2**16 bits says which may,
and only these are looked up.

A blocklist of one's own is a folder with `blocklist.yaml` and the term files it names; the
default one, in blocklists/default, is an example of the format.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml
from numba import njit

from curation import manifest, storage
from curation.detect import features
from curation.detect.features import same
from curation.detect.normalise import Bytes, normalise, normalise_text
from curation.errors import UserError
from curation.schema import HIT

RULES = ("instant", "entity", "negative")
INDEX = "blocklist.yaml"
_DEFAULT = Path(__file__).parent / "blocklists" / "default"


@dataclass(frozen=True)
class Term:
    """One line of a term file."""

    text: str
    category: str
    rule: str  # one of RULES


class _Trie(NamedTuple):
    """Terms as paths of words: node n > 0 is the word blob[bounds[n]:bounds[n + 1]] behind its parent, 0 the root."""

    begins: np.ndarray  # bool[65536]: by the upper half of a word's hash, whether a term may begin with it
    slots: np.ndarray  # int32[a power of two]: open addressing by hash of (parent, word), node or 0
    parents: np.ndarray  # int32[nodes]
    bounds: np.ndarray  # int64[nodes + 1]
    blob: np.ndarray  # uint8
    term_of: np.ndarray  # int32[nodes]: the term that ends here, or -1


class Blocklist:
    """A compiled blocklist. `version` is its author's; `fingerprint` is a sha256 over its terms and rules."""

    def __init__(self, terms: tuple[Term, ...], version: int):
        self.terms, self.version = terms, version
        self.fingerprint = manifest.fingerprint([version, [(t.text, t.category, t.rule) for t in terms]])
        self._term_names = pa.array([t.text for t in terms], pa.string())
        self._categories = pa.array([t.category for t in terms], pa.string())
        self._rules = np.array([RULES.index(t.rule) for t in terms])
        self._trie = _trie([_words(t.text) for t in terms])

    @staticmethod
    def load(path: str = "default") -> "Blocklist":
        """The blocklist in the folder `path`, or the one that ships with Tilth. Raises UserError
        for a missing or malformed file."""
        return _load(str(_DEFAULT) if path == "default" else path)

    def scan(self, texts: pa.Array) -> tuple[np.ndarray, pa.ListArray]:
        """For each text whether it is flagged (bool[n]), and its hits (list<schema.HIT>) in order
        of offset, in UTF-8 bytes from the start of the text."""
        return self.scan_normalised(normalise(texts))

    def scan_normalised(self, normalised: Bytes) -> tuple[np.ndarray, pa.ListArray]:
        """`scan` of what `normalise` made of the texts."""
        data, offsets = normalised
        found = [np.zeros((0, 3), np.int64)]
        for first, last in features.batches(offsets):
            of_batch = _find(*features.words(data, offsets[first : last + 1]), *self._trie)
            found.append(of_batch + np.array([first, offsets[first], 0]))
        documents, starts, term_of = np.concatenate(found).T
        starts = starts - offsets[documents]
        order = np.lexsort((term_of, starts, documents))
        documents, starts, term_of = documents[order], starts[order], term_of[order]
        hits = pa.StructArray.from_arrays(
            [self._term_names.take(pa.array(term_of)), self._categories.take(pa.array(term_of)), pa.array(starts)],
            fields=list(HIT),
        )
        num_documents = len(normalised.offsets) - 1
        bounds = np.searchsorted(documents, np.arange(num_documents + 1)).astype(np.int32)
        return self._flags(documents, term_of, num_documents), pa.ListArray.from_arrays(pa.array(bounds), hits)

    def _flags(self, documents: np.ndarray, term_of: np.ndarray, num_documents: int) -> np.ndarray:
        seen = np.zeros((num_documents, len(RULES)), dtype=bool)
        seen[documents, self._rules[term_of]] = True
        instant, entity, negative = seen.T
        return instant | (entity & negative)


def _trie(terms: Sequence[list[bytes]]) -> _Trie:
    """The terms, each a list of words."""
    nodes: dict[tuple[int, bytes], int] = {}  # the root has no entry: its number is 0
    term_at = {}
    for number, words in enumerate(terms):
        node = 0
        for word in words:
            node = nodes.setdefault((node, word), len(nodes) + 1)
        term_at[node] = number
    blob = np.frombuffer(b"".join(word for _, word in nodes), np.uint8)
    bounds = np.cumsum([0, 0, *(len(word) for _, word in nodes)])
    parents = np.array([0, *(parent for parent, _ in nodes)], np.int32)
    hashes = np.array([0, *(features.fnv(np.frombuffer(word, np.uint8)) for _, word in nodes)], np.uint32)
    begins = np.zeros(1 << 16, bool)
    begins[[hashes[node] >> 16 for node in range(1, len(parents)) if not parents[node]]] = True
    slots = np.zeros(1 << (4 * len(parents)).bit_length(), np.int32)
    for node in range(1, len(parents)):
        slot = _place(parents[node], hashes[node]) & (len(slots) - 1)
        while slots[slot]:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = node
    term_of = np.array([term_at.get(node, -1) for node in range(len(parents))], np.int32)
    return _Trie(begins, slots, parents, bounds, blob, term_of)


@njit(cache=True, nogil=True, inline="always")
def _place(parent: int, value: np.uint32) -> np.int64:
    """Where the word of this hash behind the node `parent` is looked for."""
    return np.int64(np.uint32(value ^ (np.uint32(parent) * np.uint32(2654435761))))


@njit(cache=True, nogil=True)
def _find(
    data: np.ndarray, keys: np.ndarray, hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, bounds: np.ndarray,
    begins: np.ndarray, slots: np.ndarray, parents: np.ndarray, word_bounds: np.ndarray, blob: np.ndarray,
    term_of: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """int64[hits, 3]: of each hit the document, its first byte in `data`, and the term."""
    found, count, mask = np.empty((256, 3), np.int64), 0, len(slots) - 1
    for document in range(len(bounds) - 1):
        end = bounds[document + 1]
        for first in range(bounds[document], end):
            if not begins[hashes[first] >> np.uint32(16)]:
                continue
            node = 0
            for at in range(first, end):
                slot = _place(node, hashes[at]) & mask
                length = ends[at] - starts[at]
                while slots[slot] and not (
                    parents[slots[slot]] == node and same(data, starts[at], length, blob, word_bounds, slots[slot])
                ):
                    slot = (slot + 1) & mask
                node = slots[slot]
                if not node:
                    break
                if term_of[node] >= 0:
                    if count == len(found):
                        found = np.concatenate((found, np.empty_like(found)))
                    found[count, 0], found[count, 1], found[count, 2] = document, starts[first], term_of[node]
                    count += 1
    return found[:count]


def _words(term: str) -> list[bytes]:
    return normalise_text(term).split()


@functools.lru_cache(maxsize=4)
def _load(folder: str) -> Blocklist:
    index_path = storage.join(folder, INDEX)
    index = _mapping(index_path)
    version, categories = index.get("version"), index.get("categories")
    if not isinstance(version, int) or not isinstance(categories, dict) or not categories:
        raise UserError(f"{index_path} needs `version` (a whole number) and `categories` (name: {{rule, file}})")
    terms = [term for name, entry in categories.items() for term in _category(folder, index_path, str(name), entry)]
    first: dict[tuple[bytes, ...], Term] = {}
    for term in terms:
        twin = first.setdefault(tuple(_words(term.text)), term)
        if twin is not term:
            raise UserError(
                f"{index_path}: `{term.text}` ({term.category}) is the same term as `{twin.text}` ({twin.category}), "
                "keep one of them"
            )
    return Blocklist(tuple(terms), version)


def _category(folder: str, index_path: str, name: str, entry: Any) -> list[Term]:
    if not isinstance(entry, dict) or entry.get("rule") not in RULES or not isinstance(entry.get("file"), str):
        raise UserError(f"{index_path}: category {name} needs `rule` ({', '.join(RULES)}) and `file`, not {entry!r}")
    path = storage.join(folder, entry["file"])
    lines = [line.partition("#")[0].strip() for line in _text(path).splitlines()]
    terms = [Term(line, name, entry["rule"]) for line in lines if line]
    if not terms:
        raise UserError(f"{path} has no terms: write one a line, or remove category {name} from {INDEX}")
    for term in terms:
        if not _words(term.text):
            raise UserError(f"{path}: the term {term.text!r} has no letter or digit")
    return terms


def _text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no blocklist file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _mapping(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must be a mapping with `version` and `categories`")
    return data
