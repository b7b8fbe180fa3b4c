"""Which questions a corpus contains: how much of their wording occurs in one of its documents.

Words are those of `curation.overlap`: blind to case, punctuation, compatibility forms and invisible characters.
A question's *text* is its passage and question; options are looked at apart, since a corpus may have either.

*Containment*: the share of the text's distinct shingles of `ngram` words that occur in one document. 8 words, as
PaLM's audit has it (Chowdhery et al. 2022, arXiv 2204.02311, section 8), and not GPT-3's 13: a text here has some
50 words, of which each changed word would spoil 13 shingles. A text of fewer words than `ngram` is one shingle.
*Jaccard*: of the sets of 5-word shingles of text and document, as in dedup but exact, since only documents that share
a shingle are compared. It finds edited copies that are documents of their own: with each tenth word changed it is
0.33, and containment 0.2. It is low when the document goes on.
*Quoted option*: all words of an option, in a row.

Texts and options of fewer than MIN_WORDS words are not looked for, since people write "are you afraid of the dark"
without having seen the question. Measured on 8,116 crowdworkers' questions and 140 MB that has none of them, with
MIN_WORDS of 4, 5, 6, 7, 8: 311, 90, 35, 7, 0 questions "found". The highest containment there was 0.4, of a text of 12
words, the next 0.17; the highest Jaccard 0.033.
A question *overlaps* when its containment is at least MIN_CONTAINMENT, its Jaccard at least MIN_JACCARD, or one of its
options is quoted. A paraphrase shares no shingles: nothing here finds it. Of our 124 questions, planted with one word
in 25, 15, 10, 8 changed at random, 124, 113, 29, 8 are found inside real documents, and 124, 124, 123, 104 as documents
of their own.

In a run folder, documents that dedup removed are left out, since no arm can have them; the others are looked at
whether or not an arm drew them, and `Overlap.reached` says which arms did.

The questions' shingles are hashed to 64 bits (10^10 words against 10^5 shingles: 10^-4 chance matches to expect) into
one sorted table, and one pass over each document looks up its shingles of all the lengths in use. Options are then
compared byte by byte.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numba as nb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation import overlap, storage
from curation.errors import TilthError, UserError
from curation.manifest import ARMS, DEDUP, DOCUMENTS, RunFolder, read_manifest
from evaluation.questions import MAX_OPTIONS, Question, question_set_hash

NGRAM = 8
JACCARD_NGRAM = 5
MIN_WORDS = 8
MIN_CONTAINMENT = 0.5
MIN_JACCARD = 0.3

_BATCH_ROWS, _BLOCK_BYTES = 4096, 16 << 20
_CONTAINMENT, _JACCARD, _QUOTED = range(3)
_SPACE = 32
_WORD, _SHINGLE, _MIX = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F))
_HALF = np.uint64(32)

Uint8s = NDArray[np.uint8]
Uint32s = NDArray[np.uint32]
Uint64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Overlap:
    """What the corpus has of one question. Of documents that are as good the one with the smallest id is named."""

    question_id: str
    containment: float
    """Highest of any document, 0-1; 0 too for a text in `Audit.too_short`."""
    containment_document: str | None
    """Its id; None when the value is 0."""
    jaccard: float
    """Highest of any document, 0-1."""
    jaccard_document: str | None
    quoted_option: int | None
    """Index in `choices` of the longest option that a document quotes whole."""
    quoted_document: str | None
    num_overlapping: int
    """Documents over a threshold."""
    reached: tuple[str, ...]
    """ARM/PHASE that any of them was written to; see `Audit.arms`."""


@dataclass(frozen=True)
class Audit:
    """`audit`'s answer: the same whatever the order of questions, files and documents."""

    corpus: str
    question_set: str
    """`question_set_hash`."""
    ngram: int
    num_documents: int
    """Documents looked at."""
    size_bytes: int
    """Of their texts, UTF-8."""
    arms: tuple[str, ...]
    """Every ARM/PHASE of the run; empty for plain files and for runs that stopped before the mix."""
    rows: tuple[Overlap, ...]
    """One for each question, most contained first."""
    overlapping: tuple[str, ...]
    """Ids of the questions with a document over a threshold, sorted."""
    too_short: tuple[str, ...]
    """Ids of the questions whose text has fewer than MIN_WORDS words, so that only its Jaccard and options count."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, with the thresholds."""
        thresholds = {"containment": MIN_CONTAINMENT, "jaccard": MIN_JACCARD, "words": MIN_WORDS}
        return {**asdict(self), "jaccard_ngram": JACCARD_NGRAM, "thresholds": thresholds}


def audit(
    questions: Sequence[Question],
    corpus: str,
    *,
    ngram: int = NGRAM,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look for the wording of `questions` in `corpus`: the folder of a `tilth curate` run, or a file or glob of
    Parquet or JSON lines (also .zst, .gz, .bz2) with a `text` column; without `id` a document is called FILE:ROW.

    `on_progress(files done, files)`. One thread; memory is that of a batch (4,096 documents of a Parquet file, 16 MiB
    of JSON lines). UserError: no corpus there, no `text`, no document in it, a file that cannot be read."""
    if ngram < JACCARD_NGRAM:
        raise UserError(f"ngram {ngram} is too short to tell questions apart: give {JACCARD_NGRAM} or more")
    sources, run = _sources(str(corpus))
    index = _index(questions, ngram)
    best = _Best(len(questions))
    num_documents = size_bytes = 0
    over: list[pl.DataFrame] = []
    for done, source in enumerate(sources):
        if on_progress:
            on_progress(done, len(sources))
        for ids, texts in source:
            num_documents += len(ids)
            size_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
            over.append(best.update(ids, _scan_batch(index, ids, texts, best.values[_JACCARD])))
    if on_progress:
        on_progress(len(sources), len(sources))
    if not num_documents:
        raise UserError(f"{corpus} holds no documents, so nothing was looked at: check the path")
    schema = {"question": pl.Int64, "id": pl.String}
    pairs = pl.concat([pl.DataFrame(schema=schema), *over]).unique()
    arms, reached = _reach(run, pairs) if run else ((), {})
    counts = dict(pairs.group_by("question").len().iter_rows())
    rows = [
        Overlap(q.question_id, *best.of(i), counts.get(i, 0), tuple(sorted(reached.get(i, ()))))
        for i, q in enumerate(questions)
    ]
    return Audit(
        corpus=str(corpus),
        question_set=question_set_hash(questions),
        ngram=ngram,
        num_documents=num_documents,
        size_bytes=size_bytes,
        arms=arms,
        rows=tuple(sorted(rows, key=lambda row: (-row.containment, -row.jaccard, row.question_id))),
        overlapping=tuple(sorted(row.question_id for row in rows if row.num_overlapping)),
        too_short=tuple(sorted(questions[i].question_id for i in index.too_short)),
    )


# --- the corpus -------------------------------------------------------------------------------------------------------

Batch = tuple[pa.Array, pa.Array]  # ids (string), texts (large_string)


def _sources(corpus: str) -> tuple[list[Iterator[Batch]], RunFolder | None]:
    """One iterator of batches a file, and the run folder if it is one."""
    fs, inner = storage.filesystem(corpus)
    if fs.isdir(inner):
        if not any(storage.exists(storage.join(corpus, name)) for name in ("manifest.json", DOCUMENTS)):
            raise UserError(f"the folder {corpus} is no `tilth curate` run: name its files, as in '{corpus}/*.jsonl'")
        run = RunFolder(corpus)
        kept = set(_files(run, DEDUP))
        return [_documents(run, path, kept) for path in _files(run, DOCUMENTS)], run
    paths = [inner] if fs.isfile(inner) else sorted(path for path in fs.glob(inner) if fs.isfile(path))
    if not paths:
        raise UserError(f"there is no corpus {corpus}: name a run folder, a file or a quoted glob")
    return [_plain(str(fs.unstrip_protocol(path)).removeprefix("file://")) for path in paths], None


def _files(run: RunFolder, folder: str, suffix: str = ".parquet") -> list[str]:
    """Data files of the parts that the manifest has in `folder` or below, sorted."""
    parts = (part for stage in read_manifest(run)["stages"].values() for part in stage["parts"])
    return sorted(
        file["path"]
        for part in parts
        if part["folder"] == folder or (folder == ARMS and part["folder"].startswith(f"{ARMS}/"))
        for file in part["files"]
        if file["path"].endswith(suffix)
    )


def _documents(run: RunFolder, path: str, deduped: set[str]) -> Iterator[Batch]:
    """A part's documents, without those that dedup removed; all of them where the run stopped before dedup."""
    name = path.rpartition("/")[2]
    sidecar = f"{DEDUP}/{name}"
    kept = run.read(sidecar, ["kept"])["kept"].combine_chunks() if sidecar in deduped else None
    row = 0
    for ids, texts in _parquet(run.path(path)):
        if kept is None:
            yield ids, texts
            continue
        mask = kept.slice(row, len(ids))
        if len(mask) != len(ids):
            raise TilthError(f"{run.path(sidecar)} has fewer rows than {path}: run `tilth curate` again")
        row += len(ids)
        yield ids.filter(mask), texts.filter(mask)


def _plain(path: str) -> Iterator[Batch]:
    num_rows = 0
    has_text = False
    for ids, texts in _parquet(path) if path.endswith(".parquet") else _json_lines(path):
        numbers = pa.array([f"{path}:{num_rows + k}" for k in range(len(ids))]) if ids.null_count else ids
        num_rows += len(ids)
        has_text = has_text or texts.null_count < len(texts)
        yield pc.coalesce(ids, numbers), texts
    if num_rows and not has_text:
        raise UserError(f"{path} has no `text`: rename the field that holds the documents")


def _parquet(path: str) -> Iterator[Batch]:
    try:
        with storage.open_read(path) as handle:
            file = pq.ParquetFile(handle)
            names = [name for name in ("id", "text") if name in file.schema_arrow.names]
            if "text" not in names:
                raise UserError(f"{path} has no `text` column: rename the one that holds the documents")
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                ids = batch["id"].cast(pa.string()) if "id" in names else pa.nulls(len(batch), pa.string())
                yield ids, batch["text"].cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({_line(error)}): replace it or leave it out") from None


def _json_lines(path: str) -> Iterator[Batch]:
    fs, inner = storage.filesystem(path)
    rest = b""
    try:
        with fs.open(inner, "rb", compression="infer") as handle:
            while block := handle.read(_BLOCK_BYTES):
                whole, newline, tail = block.rpartition(b"\n")
                if not newline:
                    rest += block
                    continue
                yield _records(rest + whole)
                rest = tail
        yield _records(rest)
    except (pl.exceptions.PolarsError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines ({_line(error)}): mend it or leave it out") from None


def _records(block: bytes) -> Batch:
    # With a schema, fields that are missing are null and numbers become strings.
    frame = pl.read_ndjson(block, schema={"id": pl.String, "text": pl.String})
    return frame["id"].to_arrow().cast(pa.string()), frame["text"].to_arrow().cast(pa.large_string())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _reach(run: RunFolder, pairs: pl.DataFrame) -> tuple[tuple[str, ...], dict[int, set[str]]]:
    """(every ARM/PHASE, question -> those that one of its documents is in). Reads the ids of the provenance, some
    32 bytes a document and arm."""
    arms: set[str] = set()
    reached: dict[int, set[str]] = {}
    for path in _files(run, ARMS, ".provenance.parquet"):
        arm = "/".join(path.split("/")[1:-1])
        arms.add(arm)
        if len(pairs):
            used = pl.DataFrame(run.read(path, ["id"])).unique()
            for question in pairs.join(used, on="id", how="semi")["question"].unique():
                reached.setdefault(question, set()).add(arm)
    return tuple(sorted(arms)), reached


# --- the questions ----------------------------------------------------------------------------------------------------


class _Index(NamedTuple):
    """The questions' shingles. Slot q counts text q's shingles of `ngram` words, Q + q its 5-word shingles, 2Q + p
    stands for phrase p, an option, which is found through its first shingle."""

    lengths: Int64s
    """Words of a shingle, all that occur."""
    table: Uint64s
    """Sorted distinct hashes of shingles."""
    buckets: Uint32s
    """Hashes with top bits b are table[buckets[b]:buckets[b + 1]]."""
    shift: np.uint64
    """64 less the number of top bits."""
    starts: Int64s
    """Shingle k counts for slots[starts[k]:starts[k + 1]]."""
    slots: Int64s
    sizes: Int64s
    """[2Q] distinct shingles of a slot."""
    phrases: Uint8s
    """Words of all phrases; phrase p is phrases[phrase_offsets[p]:phrase_offsets[p + 1]]."""
    phrase_offsets: Int64s
    phrase_question: Int64s
    phrase_value: Int64s
    """More words first, then the option that comes first."""
    too_short: tuple[int, ...]


def _index(questions: Sequence[Question], ngram: int) -> _Index:
    num_questions = len(questions)
    texts = overlap.words(pa.array([f"{q.passage}\n{q.question}" for q in questions], pa.large_string()))
    owners = [(i, k) for i, q in enumerate(questions) for k in range(len(q.choices))]
    options = overlap.words(pa.array([questions[i].choices[k] for i, k in owners], pa.large_string()))
    text_words, option_words = _num_words(texts), _num_words(options)

    every, fives = np.arange(num_questions), np.full(num_questions, JACCARD_NGRAM)
    long, listed = (np.flatnonzero(words >= MIN_WORDS) for words in (text_words, option_words))
    text_ngram, option_ngram = (np.minimum(words, ngram) for words in (text_words, option_words))
    found = (
        _shingles(*texts, long, text_ngram, long, False),
        _shingles(*texts, every, fives, every + num_questions, False),
        _shingles(*options, listed, option_ngram, listed + 2 * num_questions, True),
    )
    hashes, slots = (np.concatenate([each[k] for each in found]) for k in range(2))
    order = np.lexsort((slots, hashes))
    hashes, slots = hashes[order], slots[order]
    is_new = np.ones(len(hashes), np.bool_)  # a text that repeats a shingle has it once
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (slots[1:] != slots[:-1])
    hashes, slots = hashes[is_new], slots[is_new]
    table, starts = np.unique(hashes, return_index=True)

    # About four buckets a hash: most lookups of other documents' shingles end at an empty bucket.
    bits = max(len(table), 1).bit_length() + 2
    shift = np.uint64(64 - bits)
    counts = np.bincount((table >> shift).astype(np.int64), minlength=1 << bits)
    lengths = {JACCARD_NGRAM, *text_ngram[long].tolist(), *option_ngram[listed].tolist()}
    return _Index(
        lengths=np.array(sorted(lengths), np.int64),
        table=table,
        buckets=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        shift=shift,
        starts=np.append(starts, len(slots)).astype(np.int64),
        slots=slots,
        sizes=np.bincount(slots[slots < 2 * num_questions], minlength=2 * num_questions).astype(np.int64),
        phrases=options.data,
        phrase_offsets=options.offsets,
        phrase_question=np.array([i for i, _ in owners], np.int64),
        phrase_value=_quote_value(option_words, np.array([k for _, k in owners], np.int64)),
        too_short=tuple(np.flatnonzero(text_words < MIN_WORDS).tolist()),
    )


def _quote_value(num_words: Int64s, option: Int64s) -> Int64s:
    return num_words * MAX_OPTIONS + (MAX_OPTIONS - 1 - option)


def _quoted(value: float) -> int | None:
    return MAX_OPTIONS - 1 - int(value) % MAX_OPTIONS if value else None


def _num_words(folded: overlap.Folded) -> Int64s:
    spaces = np.concatenate([[0], np.cumsum(folded.data == _SPACE)])[folded.offsets]
    return np.diff(spaces) + (np.diff(folded.offsets) > 0)


# --- the pass ---------------------------------------------------------------------------------------------------------


class _Best:
    """Highest value of each measure for each question so far, and the smallest id that has it."""

    def __init__(self, num_questions: int):
        self.values = np.zeros((3, num_questions))
        self.ids: list[list[str | None]] = [[None] * num_questions for _ in range(3)]

    def update(self, ids: pa.Array, scanned: tuple[Float64s, Int64s, Int64s]) -> pl.DataFrame:
        """Take in what was found in the batch with these ids; returns (question, id) of what overlaps."""
        values, rows, pairs = scanned
        for measure, question in np.argwhere((values > 0) & (values >= self.values)).tolist():
            document = ids[rows[measure, question]].as_py()
            known = self.ids[measure][question]
            if values[measure, question] > self.values[measure, question] or known is None or document < known:
                self.values[measure, question] = values[measure, question]
                self.ids[measure][question] = document
        return pl.DataFrame(
            {"question": pairs[:, 0], "id": pl.Series(ids.take(pa.array(pairs[:, 1])).to_pylist(), dtype=pl.String)}
        )

    def of(self, question: int) -> tuple[float, str | None, float, str | None, int | None, str | None]:
        containment, jaccard, quoted = self.values[:, question].tolist()
        first, second, third = (ids[question] for ids in self.ids)
        return containment, first, jaccard, second, _quoted(quoted), third


def _scan_batch(index: _Index, ids: pa.Array, texts: pa.Array, floor: Float64s) -> tuple[Float64s, Int64s, Int64s]:
    """(float64[3, Q] best values, int64[3, Q] their rows, int64[pairs, 2] (question, row) over a threshold)."""
    data, offsets = overlap.words(texts)
    # Documents come by id, and the first with a value stays: so it is the smallest id.
    order = pc.sort_indices(ids).to_numpy().astype(np.int64)
    # too_short is a tuple of any length, a type of its own each time to numba.
    return _scan(data, offsets, order, *index[:-1], floor)  # type: ignore[no-any-return]


@nb.njit(nogil=True, cache=True)
def _prefixes(data: Uint8s, lo: int, hi: int, prefix: Uint64s, at: Int64s) -> int:
    """prefix[k]: polynomial in _SHINGLE of the first k words' hashes; at[k]: where word k begins, and one past the
    space that would end the last. Returns the number of words of data[lo:hi], which are normalised."""
    count, h = 0, np.uint64(0)
    prefix[0], at[0] = 0, lo
    if lo == hi:
        return 0
    for i in range(lo, hi + 1):
        if i < hi and data[i] != _SPACE:
            h = (h ^ np.uint64(data[i])) * _WORD
            continue
        h ^= h >> _HALF
        prefix[count + 1] = prefix[count] * _SHINGLE + h * _MIX
        count += 1
        at[count] = i + 1
        h = np.uint64(0)
    return count


@nb.njit(nogil=True, cache=True)
def _power(length: int) -> np.uint64:
    power = np.uint64(1)
    for _ in range(length):
        power *= _SHINGLE
    return power


@nb.njit(nogil=True, cache=True, inline="always")
def _span(prefix: Uint64s, i: int, length: int, power: np.uint64) -> np.uint64:
    """Hash of words i … i + length - 1; `power` is _power(length)."""
    h = prefix[i + length] - prefix[i] * power
    return (h ^ (h >> _HALF)) * _MIX


@nb.njit(nogil=True, cache=True)
def _shingles(
    data: Uint8s, offsets: Int64s, which: Int64s, lengths: Int64s, slots: Int64s, first_only: bool
) -> tuple[Uint64s, Int64s]:
    """(hash, slot) of every shingle of the texts `which`, of lengths[text] words; slots[k] is which[k]'s."""
    size = 0
    for text in which:
        size += (offsets[text + 1] - offsets[text] + 1) // 2
    hashes, owners = np.empty(size, np.uint64), np.empty(size, np.int64)
    prefix, at = np.empty(len(data) + 2, np.uint64), np.empty(len(data) + 2, np.int64)
    found = 0
    for k in range(len(which)):
        text = which[k]
        length = lengths[text]
        count = _prefixes(data, offsets[text], offsets[text + 1], prefix, at)
        power = _power(length)
        last = min(count - length, 0) if first_only else count - length
        for i in range(last + 1):
            hashes[found], owners[found] = _span(prefix, i, length, power), slots[k]
            found += 1
    return hashes[:found], owners[:found]


@nb.njit(nogil=True, cache=True)
def _scan(
    data: Uint8s,
    offsets: Int64s,
    order: Int64s,
    lengths: Int64s,
    table: Uint64s,
    buckets: Uint32s,
    shift: np.uint64,
    starts: Int64s,
    slots: Int64s,
    sizes: Int64s,
    phrases: Uint8s,
    phrase_offsets: Int64s,
    phrase_question: Int64s,
    phrase_value: Int64s,
    floor: Float64s,
) -> tuple[Float64s, Int64s, Int64s]:
    num_questions = len(sizes) // 2
    values, rows = np.zeros((3, num_questions)), np.zeros((3, num_questions), np.int64)
    pairs, num_pairs = np.empty((64, 2), np.int64), 0
    most = 1
    for doc in range(len(offsets) - 1):
        most = max(most, (offsets[doc + 1] - offsets[doc] + 1) // 2)  # a word needs a byte and a space
    prefix, at = np.empty(most + 1, np.uint64), np.empty(most + 1, np.int64)
    shared = np.zeros(2 * num_questions + len(phrase_value), np.int64)
    touched = np.empty(len(shared), np.int64)
    seen = np.full(len(table), -1, np.int64)
    paired = np.full(num_questions, -1, np.int64)

    for doc in order:
        hi = offsets[doc + 1]
        count = _prefixes(data, offsets[doc], hi, prefix, at)
        num_touched = 0
        for length in lengths:
            power = _power(length)
            for i in range(count - length + 1):
                h = _span(prefix, i, length, power)
                bucket = np.int64(h >> shift)
                for k in range(buckets[bucket], buckets[bucket + 1]):
                    if table[k] != h:
                        continue
                    is_new = seen[k] != doc
                    seen[k] = doc
                    for slot in slots[starts[k] : starts[k + 1]]:
                        phrase = slot - 2 * num_questions
                        if phrase >= 0:
                            counts = not shared[slot] and _is_at(data, at[i], hi, phrases, phrase_offsets, phrase)
                        else:
                            counts = is_new
                        if counts:
                            if not shared[slot]:
                                touched[num_touched] = slot
                                num_touched += 1
                            shared[slot] += 1

        num_distinct = -1  # 5-word shingles of the document: a sort, for those only that could matter
        for t in range(num_touched):
            slot = touched[t]
            common = shared[slot]
            shared[slot] = 0
            if slot < num_questions:
                measure, question = _CONTAINMENT, slot
                value = common / sizes[slot]
                is_over = value >= MIN_CONTAINMENT
            elif slot < 2 * num_questions:
                measure, question = _JACCARD, slot - num_questions
                bound = common / sizes[slot]
                if bound < MIN_JACCARD and bound <= max(values[_JACCARD, question], floor[question] - 1e-12):
                    continue
                if num_distinct < 0:
                    num_distinct = _num_distinct(prefix, count)
                value = common / (sizes[slot] + num_distinct - common)
                is_over = value >= MIN_JACCARD
            else:
                phrase = slot - 2 * num_questions
                measure, question = _QUOTED, phrase_question[phrase]
                value = float(phrase_value[phrase])
                is_over = True
            if value > values[measure, question]:
                values[measure, question], rows[measure, question] = value, doc
            if is_over and paired[question] != doc:
                paired[question] = doc
                if num_pairs == len(pairs):
                    pairs = np.concatenate((pairs, np.empty_like(pairs)))
                pairs[num_pairs, 0], pairs[num_pairs, 1] = question, doc
                num_pairs += 1
    return values, rows, pairs[:num_pairs]


@nb.njit(nogil=True, cache=True)
def _is_at(data: Uint8s, lo: int, hi: int, phrases: Uint8s, phrase_offsets: Int64s, phrase: int) -> bool:
    """Whether the words of the phrase begin at data[lo], the start of a word of a document that ends at `hi`."""
    start = phrase_offsets[phrase]
    length = phrase_offsets[phrase + 1] - start
    if lo + length > hi or (lo + length < hi and data[lo + length] != _SPACE):
        return False
    for k in range(length):  # noqa: SIM110  # numba has no any() over a generator
        if data[lo + k] != phrases[start + k]:
            return False
    return True


@nb.njit(nogil=True, cache=True)
def _num_distinct(prefix: Uint64s, count: int) -> int:
    """Distinct 5-word shingles of a document of `count` words."""
    power = _power(JACCARD_NGRAM)
    hashes = np.empty(max(count - JACCARD_NGRAM + 1, 0), np.uint64)
    for i in range(len(hashes)):
        hashes[i] = _span(prefix, i, JACCARD_NGRAM, power)
    hashes.sort()
    distinct = min(len(hashes), 1)
    for i in range(1, len(hashes)):
        distinct += hashes[i] != hashes[i - 1]
    return distinct
