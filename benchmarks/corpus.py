"""What the benchmarks read: the documents at hand, and corpora of any size made from them.

A copy of the corpus has one word in five replaced, word by word by hash, so that its documents share about a third
of their shingles of five words with the first ones (Jaccard 0.2) and few with each other: new documents for a
dedup, with the words, lengths and boilerplate of real ones. One document in twenty is followed by a true
near-copy, `near:ID`, with one word in a hundred replaced (Jaccard 0.9). The same bytes on every machine.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import orjson
import xxhash
import zstandard

from benchmarks.peers import ENVIRONMENTS, ROOT
from curation import tokenise
from curation.records import read_records

SHARED = ROOT.parent / "shared"
CORPUS = SHARED / "corpus" if (SHARED / "corpus").is_dir() else ROOT / "examples/corpus"  # ours is small
PART_BYTES = 32 << 20  # of text, in a part of a grown corpus
NEAR_COPIES = 20  # one document in so many is followed by one
REPLACED, CHANGED = 5, 100  # one word in so many is another: in a copy of the corpus, in a near-copy

Rows = Iterable[dict[str, str]]


def documents() -> Iterator[dict[str, str]]:
    """`id` and `text` of every document of CORPUS."""
    for path in sorted(CORPUS.glob("*.jsonl*")):
        for _, record in read_records(str(path)):
            yield {"id": record["id"], "text": record["text"]}


def sample(megabytes: float) -> list[str]:
    """Texts of about `megabytes`, from all over the corpus."""
    texts = [row["text"] for row in documents()]
    step = max(1, int(sum(map(len, texts)) / (megabytes * 1e6)))
    return texts[::step]


def tokenizer() -> Path:
    """A byte-level BPE of 16,384 ids, trained on every tenth document: made once, under .bench."""
    path = ENVIRONMENTS / "tokenizer.json"
    if not path.exists():
        ENVIRONMENTS.mkdir(exist_ok=True)
        tokenise.train((row["text"] for row in islice(documents(), 0, None, 10)), 16_384, str(path))
    return path


def near_duplicates() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Versions of documents one after the other, and pairs that were read by hand (`a`, `b`, `label`): of
    ../shared/neardup, or else of documents of ours and copies with changed words, without pairs."""
    if not (SHARED / "neardup").is_dir():
        own = list(islice(documents(), 300))
        replace = _Replacer(own)
        texts = [text for row in own for text in (row["text"], replace(row["text"], row["id"], CHANGED))]
        return [{"id": f"neardup:{k}", "text": text} for k, text in enumerate(texts)], []
    groups = [record for _, record in read_records(str(SHARED / "neardup/neardup_groups.jsonl.zst"))]
    rows = [{"id": f"neardup:{k}", "text": record["text"]} for k, record in enumerate(groups)]
    pairs = []
    for _, record in read_records(str(SHARED / "neardup/neardup_pairs.jsonl.zst")):
        pair = {"label": record["label"], **{side: f"{record['pair']}:{side}" for side in "ab"}}
        rows += [{"id": pair[side], "text": record[f"text_{side}"]} for side in "ab"]
        pairs.append(pair)
    return rows, pairs


def write(folder: Path, rows: Rows, num_parts: int) -> int:
    """Deal `rows` out to `num_parts` files of JSON lines in `folder`, zstd. Returns the bytes of text."""
    folder.mkdir(parents=True)
    size_bytes = 0
    parts = [zstandard.open(folder / f"{k:05d}.jsonl.zst", "wb") for k in range(num_parts)]
    for k, row in enumerate(rows):
        size_bytes += len(row["text"].encode())
        parts[k % num_parts].write(orjson.dumps(row) + b"\n")
    for part in parts:
        part.close()
    return size_bytes


def grown(megabytes: int) -> Path:
    """A folder of `megabytes` of text made from the corpus: made once, under .bench."""
    folder = ENVIRONMENTS / f"corpus-{megabytes}mb"
    if not folder.exists():
        print(f"making {folder}", file=sys.stderr)
        making = Path(tempfile.mkdtemp(dir=ENVIRONMENTS), folder.name)
        size_bytes = megabytes * 1_000_000
        write(making, _until(size_bytes, _copies()), max(4, size_bytes // PART_BYTES))
        making.rename(folder)
        making.parent.rmdir()
    return folder


def _until(size_bytes: int, rows: Rows) -> Iterator[dict[str, str]]:
    for row in rows:
        if size_bytes <= 0:
            return
        size_bytes -= len(row["text"].encode())
        yield row


def _copies() -> Iterator[dict[str, str]]:
    """The corpus, shuffled, and its copies without end; near-copies behind their documents."""
    rows = sorted(documents(), key=lambda row: _hash(row["id"]))
    replace = _Replacer(rows)
    for copy in count():
        for row in rows:
            name = f"{copy}:{row['id']}"
            text = replace(row["text"], name, REPLACED) if copy else row["text"]
            yield {"id": name, "text": text}
            if _hash(name) % NEAR_COPIES == 0:
                yield {"id": f"near:{name}", "text": replace(text, f"near:{name}", CHANGED)}


def _hash(name: str) -> int:
    return int(xxhash.xxh3_64_intdigest(name.encode()))


class _Replacer:
    """Replaces words at places, and by words, that the hash of a name chooses."""

    def __init__(self, rows: Rows):
        random = np.random.RandomState(0)
        vocabulary = sorted({word for row in rows for word in row["text"].split(" ")})
        self._vocabulary = [vocabulary[k] for k in random.permutation(len(vocabulary)).tolist()]
        self._dice = random.randint(0, 1 << 30, 1 << 22, dtype=np.int32)

    def __call__(self, text: str, name: str, one_in: int) -> str:
        words, key = text.split(" "), _hash(name)
        start = key % (len(self._dice) // 2)  # no document has half as many words as there are dice
        dice = self._dice[start : start + len(words)]
        at = key % len(self._vocabulary)
        for k, place in enumerate(np.flatnonzero(dice % one_in == 0).tolist()):
            words[place] = self._vocabulary[(at + k) % len(self._vocabulary)]
        return " ".join(words)
