"""Token shards as trainers read them: writers, readers, and the check of what was written.

Both formats are raw little-endian token ids and an index of documents. For the same ids the
bytes are those of datatrove 0.10.1 (TokenizedFile, MegatronTokenizedFile), whose readers, like
nanotron's and megatron-core's, are the reason for the formats:

    nanotron  STEM.ds           ids, uint16 or uint32
              STEM.ds.index     uint64 for each document: one past its last token, in tokens
              STEM.ds.metadata  "NAME|TOKEN_BYTES", tokens, tokens for people; no final newline
    megatron  STEM.bin          ids, uint16 or int32
              STEM.idx          b"MMIDIDX\\0\\0", u64 1, u8 dtype code, u64 n, u64 n + 1,
                                i32[n] lengths, i64[n] byte offsets, i64[n + 1] document starts

Ids go from the caller's array to the file without a copy. Readers map local files and trust
nothing: the sizes of files, index and metadata must agree.
"""

import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import xxhash

from curation import storage
from curation.errors import TilthError
from curation.manifest import File, RunFolder
from curation.schema import PROVENANCE
from curation.tokenise.tokenizer import TokenizerSpec

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_VERSION = 1
MEGATRON_DTYPE_CODES = {2: 8, 4: 4}  # token bytes -> megatron-core's code: uint16, int32 (it has no uint32)
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1


def write_nanotron(run: RunFolder, stem: str, ids: np.ndarray, ends: np.ndarray, spec: TokenizerSpec) -> list[File]:
    """Commit a shard. `stem` is relative to the run; ids: spec.dtype; ends: int64[documents], exclusive,
    in tokens. Raises TilthError for a shard or document without tokens, or ids of another type."""
    _check(stem, ids, ends, spec)
    metadata = f"{spec.name}|{spec.token_bytes}\n{len(ids)}\n{_for_people(len(ids))}"
    return [
        _commit_array(run, f"{stem}.ds", ids),
        _commit_array(run, f"{stem}.ds.index", ends.astype("<u8")),
        run.commit_bytes(f"{stem}.ds.metadata", metadata.encode()),
    ]


def write_megatron(run: RunFolder, stem: str, ids: np.ndarray, ends: np.ndarray, spec: TokenizerSpec) -> list[File]:
    """Commit a shard; arguments and errors as in write_nanotron. Each document is one sequence."""
    _check(stem, ids, ends, spec)
    lengths = np.diff(ends, prepend=0)
    code = MEGATRON_DTYPE_CODES[spec.token_bytes]
    index = b"".join(
        [
            MEGATRON_HEADER.pack(MEGATRON_MAGIC, MEGATRON_VERSION, code, len(ends), len(ends) + 1),
            lengths.astype("<i4").tobytes(),
            ((ends - lengths) * spec.token_bytes).astype("<i8").tobytes(),
            np.arange(len(ends) + 1, dtype="<i8").tobytes(),
        ]
    )
    return [_commit_array(run, f"{stem}.bin", ids), run.commit_bytes(f"{stem}.idx", index)]


def read_nanotron(path_stem: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint16|uint32, ends int64) of PATH_STEM.ds; token size from its metadata.
    Raises TilthError when the three files are damaged, missing or do not fit each other."""
    path = f"{path_stem}.ds"
    lines = _read(f"{path}.metadata").decode(errors="replace").split("\n")
    try:
        token_bytes, num_tokens = int(lines[-3].rpartition("|")[2]), int(lines[-2])
    except (IndexError, ValueError):
        raise _damaged(f"{path}.metadata", "is not a name|size line, a count and its short form") from None
    if token_bytes not in MEGATRON_DTYPE_CODES:
        raise _damaged(f"{path}.metadata", f"gives {token_bytes} bytes a token, not 2 or 4")
    raw = _read(f"{path}.index")
    if len(raw) % 8:
        raise _damaged(f"{path}.index", f"has {len(raw):,} bytes, not 8 a document")
    ends = np.frombuffer(raw, "<u8").astype(np.int64)
    if not _are_ends(ends, num_tokens):
        raise _damaged(f"{path}.index", f"does not rise to the {num_tokens:,} tokens of the metadata")
    return _read_ids(path, np.dtype(f"<u{token_bytes}"), num_tokens), ends


def read_megatron(path_stem: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint16|uint32, ends int64) of PATH_STEM.bin; token size from its .idx.
    Raises TilthError when the files are damaged, missing or do not fit each other."""
    path = f"{path_stem}.idx"
    raw = _read(path)
    if len(raw) < MEGATRON_HEADER.size:
        raise _damaged(path, "ends within its header")
    magic, version, code, num_sequences, num_starts = MEGATRON_HEADER.unpack_from(raw)
    token_bytes = next((size for size, known in MEGATRON_DTYPE_CODES.items() if known == code), None)
    if (magic, version) != (MEGATRON_MAGIC, MEGATRON_VERSION) or token_bytes is None:
        raise _damaged(path, "is no Megatron index of uint16 or int32 tokens")
    if num_starts != num_sequences + 1 or len(raw) != MEGATRON_HEADER.size + 12 * num_sequences + 8 * num_starts:
        raise _damaged(path, f"has {len(raw):,} bytes, which {num_sequences:,} sequences do not fill")
    at = MEGATRON_HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at)
    offsets = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences)
    starts = np.frombuffer(raw, "<i8", num_starts, at + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    num_tokens = int(ends[-1]) if num_sequences else 0
    if (
        not _are_ends(ends, num_tokens)
        or not np.array_equal(offsets, (ends - lengths) * token_bytes)
        or not np.array_equal(starts, np.arange(num_starts))
    ):
        raise _damaged(path, "has lengths, offsets and document starts that do not fit each other")
    return _read_ids(f"{path_stem}.bin", np.dtype(f"<u{token_bytes}"), num_tokens), ends


Writer = Callable[[RunFolder, str, np.ndarray, np.ndarray, TokenizerSpec], list[File]]
Reader = Callable[[str], tuple[np.ndarray, np.ndarray]]
WRITERS: dict[str, Writer] = {"nanotron": write_nanotron, "megatron": write_megatron}
READERS: dict[str, Reader] = {"nanotron": read_nanotron, "megatron": read_megatron}


def verify_shard(run: RunFolder, form: str, stem: str, ids: np.ndarray, ends: np.ndarray) -> None:
    """Read a shard again; raises TilthError unless it holds exactly these ids and document ends."""
    found_ids, found_ends = READERS[form](run.path(stem))
    if not np.array_equal(found_ends, ends):
        raise TilthError(f"{run.path(stem)} ({form}) has other document ends than were written: run it again")
    if _digest(found_ids) != _digest(ids):
        raise TilthError(f"{run.path(stem)} ({form}) has other token ids than were written: run it again")


def write_provenance(run: RunFolder, stem: str, table: pa.Table) -> File:
    """Commit STEM.provenance.parquet: schema.PROVENANCE, a row for each document of the shard, in
    its order. Raises TilthError unless the rows cover the tokens from 0 on without gap or overlap."""
    start, end = table["start"].to_numpy(), table["end"].to_numpy()
    if not _are_ends(end, int(end[-1]) if len(end) else 0) or not np.array_equal(start[1:], end[:-1]) or start[0]:
        raise TilthError(f"the provenance of {stem} does not cover its tokens one document after the other")
    return run.commit_table(f"{stem}.provenance.parquet", table.select(PROVENANCE.names).cast(PROVENANCE))


def _check(stem: str, ids: np.ndarray, ends: np.ndarray, spec: TokenizerSpec) -> None:
    if ids.dtype != spec.dtype:
        raise TilthError(f"shard {stem}: ids are {ids.dtype}, the tokenizer's are {spec.dtype}")
    if not _are_ends(ends, len(ids)):
        raise TilthError(f"shard {stem}: every document needs a token, and the last one ends with the shard")


def _are_ends(ends: np.ndarray, num_tokens: int) -> bool:
    """Whether `ends` cuts `num_tokens` tokens into documents of at least one token."""
    return len(ends) > 0 and int(ends[-1]) == num_tokens and bool((np.diff(ends, prepend=0) > 0).all())


def _commit_array(run: RunFolder, path: str, array: np.ndarray) -> File:
    raw = np.ascontiguousarray(array).data.cast("B")
    return File(path, *storage.commit(run.path(path), lambda handle: handle.write(raw)))


def _for_people(num_tokens: int) -> str:
    """`humanize.metric(num_tokens, "T")` of humanize 4.17, which datatrove writes: three digits and a prefix."""
    exponent = len(str(num_tokens)) - 1
    value = num_tokens / 1000 ** (exponent // 3)
    if round(value, 2 - exponent % 3) >= 10 ** (exponent % 3 + 1):  # 999,999 is 1.00 M, not 1000 k
        exponent += 1
        value = value if exponent % 3 else value / 1000
    return f"{value:.{2 - exponent % 3}f} {('', 'k', 'M', 'G', 'T', 'P')[exponent // 3]}T"


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None


def _read_ids(path: str, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    """The ids, mapped where the file is local."""
    try:
        size_bytes = storage.size_bytes(path)
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    if size_bytes != num_tokens * dtype.itemsize:
        raise _damaged(path, f"has {size_bytes:,} bytes, not those of {num_tokens:,} {dtype} tokens")
    if storage.is_local(path):
        return np.memmap(storage.filesystem(path)[1], dtype, "r")
    return np.frombuffer(storage.read_bytes(path), dtype)


def _digest(ids: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids).data.cast("B"))


def _damaged(path: str, what: str) -> TilthError:
    return TilthError(f"{path} {what}: the shard is damaged, write it again with `tilth curate`")
