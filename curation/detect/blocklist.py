"""The blocklist: terms in nine categories, found by one Aho-Corasick pass over normalised bytes.

A category's rule is `instant` (any hit flags the document) or one side of a co-occurrence: at
least one `entity` hit AND at least one `negative` hit anywhere in the document. Every hit is
recorded, also those of one side alone. Texts and terms go through `normalise`, so that matching
ignores case and punctuation (`self-aware` = `Self aware`, `A.I.` = `ai`); runs of spaces are squeezed
to one, so that a term may be broken over lines; and word boundaries are the spaces that each
pattern carries at both ends.

Measured on one core on 59 MB of reviews and Usenet, automaton alone, same hits: ahocorasick_rs 226
MB/s, polars 220, pyahocorasick 130. Bare terms with boundaries checked afterwards are a little
faster (270), but need that second step; the whole scan runs at 72 MB/s, most of it not here.

A blocklist of one's own is a folder with `blocklist.yaml` and the term files it names; the
default one, in blocklists/default, is an example of the format.
"""

import functools
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from ahocorasick_rs import BytesAhoCorasick, Implementation
from numba import njit

from curation import manifest, storage
from curation.detect.normalise import normalise, normalise_text
from curation.errors import UserError
from curation.schema import HIT

RULES = ("instant", "entity", "negative")
INDEX = "blocklist.yaml"
_SPACE = np.uint8(32)
_DEFAULT = Path(__file__).parent / "blocklists" / "default"


@dataclass(frozen=True)
class Term:
    """One line of a term file."""

    text: str
    category: str
    rule: str  # one of RULES


class Blocklist:
    """A compiled blocklist. `version` is its author's; `fingerprint` is a sha256 over its terms and rules."""

    def __init__(self, terms: tuple[Term, ...], version: int):
        self.terms, self.version = terms, version
        self.fingerprint = manifest.fingerprint([version, [(t.text, t.category, t.rule) for t in terms]])
        self._term_names = pa.array([t.text for t in terms], pa.string())
        self._categories = pa.array([t.category for t in terms], pa.string())
        self._rules = np.array([RULES.index(t.rule) for t in terms])
        self._automaton = BytesAhoCorasick(_patterns(terms), implementation=Implementation.DFA)

    @staticmethod
    def load(path: str = "default") -> "Blocklist":
        """The blocklist in the folder `path`, or the one that ships with Tilth. Raises UserError
        for a missing or malformed file."""
        return _load(str(_DEFAULT) if path == "default" else path)

    def scan(self, texts: pa.Array) -> tuple[np.ndarray, pa.ListArray]:
        """For each text whether it is flagged (bool[n]), and its hits (list<schema.HIT>) in order
        of offset, in UTF-8 bytes from the start of the text."""
        normalised = normalise(texts)
        squeezed, bounds = _squeeze(*normalised)
        whole = squeezed.tobytes()
        found = [self._automaton.find_matches_as_indexes(whole[a:b], overlapping=True) for a, b in pairwise(bounds)]
        counts = np.fromiter(map(len, found), np.int64, len(found))
        flat = np.fromiter(chain.from_iterable(chain.from_iterable(found)), np.int64, 3 * counts.sum()).reshape(-1, 3)
        documents, term_of, starts = np.repeat(np.arange(len(found)), counts), flat[:, 0], flat[:, 1]
        order = np.lexsort((term_of, starts, documents))
        term_of, starts = term_of[order], starts[order]
        offsets = _unsqueezed(*normalised, documents, starts)
        hits = pa.StructArray.from_arrays(
            [self._term_names.take(pa.array(term_of)), self._categories.take(pa.array(term_of)), pa.array(offsets)],
            fields=list(HIT),
        )
        hit_bounds = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        return self._flags(documents, term_of, len(found)), pa.ListArray.from_arrays(hit_bounds, hits)

    def _flags(self, documents: np.ndarray, term_of: np.ndarray, num_documents: int) -> np.ndarray:
        seen = np.zeros((num_documents, len(RULES)), dtype=bool)
        seen[documents, self._rules[term_of]] = True
        instant, entity, negative = seen.T
        return instant | (entity & negative)


@njit(cache=True, nogil=True)
def _squeeze(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each document's words between single spaces, with one before the first and after the last."""
    num_documents = len(offsets) - 1
    out = np.empty(len(data) + 2 * num_documents, dtype=np.uint8)
    bounds = np.zeros(num_documents + 1, dtype=np.int64)
    to = 0
    for document in range(num_documents):
        out[to] = _SPACE
        to += 1
        for at in range(offsets[document], offsets[document + 1]):
            if data[at] != _SPACE or out[to - 1] != _SPACE:
                out[to] = data[at]
                to += 1
        if out[to - 1] != _SPACE:
            out[to] = _SPACE
            to += 1
        bounds[document + 1] = to
    return out[:to], bounds


@njit(cache=True, nogil=True)
def _unsqueezed(data: np.ndarray, offsets: np.ndarray, documents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The byte offset in its document of the word after each squeezed position `starts`, which is
    that of a space. Hits are ordered by document and position, so one walk a document is enough."""
    found = np.empty(len(starts), dtype=np.int64)
    walked, at, position, before = -1, 0, 0, _SPACE
    for hit in range(len(starts)):
        if documents[hit] != walked:
            walked, at, position, before = documents[hit], offsets[documents[hit]], 0, _SPACE
        # `position` counts the squeezed bytes before data[at]; the first is the padding.
        while data[at] == _SPACE or position != starts[hit]:
            if data[at] != _SPACE or before != _SPACE:
                position += 1
            before = data[at]
            at += 1
        found[hit] = at - offsets[documents[hit]]
    return found


def _patterns(terms: tuple[Term, ...]) -> list[bytes]:
    return [b" %b " % _words(t.text) for t in terms]


def _words(term: str) -> bytes:
    return b" ".join(normalise_text(term).split())


@functools.lru_cache(maxsize=4)
def _load(folder: str) -> Blocklist:
    index_path = storage.join(folder, INDEX)
    index = _mapping(index_path)
    version, categories = index.get("version"), index.get("categories")
    if not isinstance(version, int) or not isinstance(categories, dict) or not categories:
        raise UserError(f"{index_path} needs `version` (a whole number) and `categories` (name: {{rule, file}})")
    terms = [term for name, entry in categories.items() for term in _category(folder, index_path, str(name), entry)]
    first: dict[bytes, Term] = {}
    for term in terms:
        twin = first.setdefault(_words(term.text), term)
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
