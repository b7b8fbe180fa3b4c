"""The blocklist: terms in nine categories, found by one Aho-Corasick pass over normalised bytes.

A category's rule is `instant` (any hit flags the document) or one side of a co-occurrence: at
least one `entity` hit AND at least one `negative` hit anywhere in the document. Every hit is
recorded, also those of one side alone. Texts and terms go through `normalise`, so that matching
ignores case and punctuation (`self-aware` = `Self aware`, `A.I.` = `ai`), and word boundaries
are the spaces that each pattern carries at both ends. Such a pass over ` term ` patterns costs
half of matching bare terms and checking boundaries afterwards, since short terms (`ai`) occur
inside many words (`said`).

A blocklist of one's own is a folder with `blocklist.yaml` and the term files it names; the
default one, in blocklists/default, is an example of the format.
"""

import functools
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from ahocorasick_rs import BytesAhoCorasick, Implementation

from curation import manifest, storage
from curation.detect.normalise import normalise, normalise_text
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
        found = [self._automaton.find_matches_as_indexes(d, overlapping=True) for d in _padded(texts)]
        counts = np.fromiter(map(len, found), np.int64, len(found))
        flat = np.fromiter(chain.from_iterable(chain.from_iterable(found)), np.int64, 3 * counts.sum()).reshape(-1, 3)
        documents, term_of, starts = np.repeat(np.arange(len(found)), counts), flat[:, 0], flat[:, 1]
        order = np.lexsort((term_of, starts, documents))
        term_of, starts = term_of[order], starts[order]
        # A pattern begins with the space before its term, which is also the padding before the document.
        hits = pa.StructArray.from_arrays(
            [self._term_names.take(pa.array(term_of)), self._categories.take(pa.array(term_of)), pa.array(starts)],
            fields=list(HIT),
        )
        bounds = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        return self._flags(documents, term_of, len(found)), pa.ListArray.from_arrays(bounds, hits)

    def _flags(self, documents: np.ndarray, term_of: np.ndarray, num_documents: int) -> np.ndarray:
        seen = np.zeros((num_documents, len(RULES)), dtype=bool)
        seen[documents, self._rules[term_of]] = True
        instant, entity, negative = seen.T
        return instant | (entity & negative)


def _padded(texts: pa.Array) -> list[bytes]:
    """Each normalised text between two spaces, so that its first and last word have boundaries too."""
    data, offsets = normalise(texts)
    whole = data.tobytes()
    return [b" %b " % whole[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


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
