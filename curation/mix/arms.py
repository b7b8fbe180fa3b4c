"""The rows of every shard, in two passes over the parts that hold no more than a part or a shard.

Pass 1 reads the scalars of the parts (no text, no tokens), a batch of parts a task: it sums
tokens per `select` bucket for `budget` and, once the cuts are known, writes the rows of each
arm-phase, marked with the shard that their `order` = h(seed, "order", phase, repeat, id) falls
into: the order space is cut into equal ranges, one a shard. Pass 2 is a task for each shard: it
gathers its rows from all batches, sorts them by `order`, and reads their tokens. How parts are
batched changes no row; it keeps the number of files that a shard looks into small.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from curation import storage
from curation.manifest import ARMS, DEDUP, DETECT, DOCUMENTS, LABELS, TOKENS, RunFolder
from curation.mix.budget import BUCKET_SHIFT, NUM_BUCKETS, ArmPhase, Stretch, Turns, plan_arms
from curation.mix.policy import NUM_CATEGORIES, background_categories, category
from curation.recipe import Mix
from curation.rng import keys64
from curation.schema import PROVENANCE, STANCES, effective_discourse, effective_stance
from curation.stage import Mapper

WORK = f"{ARMS}/work"
BATCH_DOCUMENTS = 32_768
_PROBABILITIES = [f"p_{s}" for s in STANCES]


@dataclass(frozen=True)
class Batch:
    """Some parts of the run, and what is asked of them."""

    run: RunFolder
    number: int
    names: tuple[str, ...]
    seed: int
    labelled: bool = False  # a language model read documents
    repeats: tuple[int, ...] = ()  # for histograms
    buckets: tuple[tuple[int, int], ...] = ()  # (repeat, bucket) for turns
    plan: tuple[ArmPhase, ...] = ()  # for select_rows
    shards: tuple[int, ...] = ()  # shards of each arm-phase of the plan

    def path(self, what: str) -> str:
        return self.run.path(WORK, f"{what}-{self.number:06d}.arrow")


def batches(run: RunFolder, num_documents: dict[str, int], seed: int, labelled: bool = False) -> list[Batch]:
    """The parts in the order of their names, at most BATCH_DOCUMENTS to a batch (or one larger part)."""
    groups: list[list[str]] = []
    size = BATCH_DOCUMENTS
    for name in sorted(num_documents):
        size += num_documents[name]
        if size > BATCH_DOCUMENTS or not groups:
            groups.append([])
            size = num_documents[name]
        groups[-1].append(name)
    return [Batch(run, number, tuple(names), seed, labelled) for number, names in enumerate(groups)]


def gather(batch: Batch) -> int:
    """Write the candidates of a batch under WORK: part, id, start, num_tokens, stance, discourse and
    category of each representative. Returns their number."""
    run, names = batch.run, batch.names
    documents = _tables(run, DOCUMENTS, names, ["id", "role", "given_stance"])
    labels = _tables(run, DETECT, names, [*_PROBABILITIES, "discourse", "blocklist"])
    read = _tables(run, LABELS, names, ["llm_stance"]) if batch.labelled else None
    tokens = _tables(run, TOKENS, names, ["start", "num_tokens"])
    stance = effective_stance(documents, labels, read)
    table = pa.table(
        {
            "part": tokens["part"],
            "id": documents["id"],
            "role": documents["role"],
            "start": tokens["start"],
            "num_tokens": tokens["num_tokens"],
            "stance": stance,
            "discourse": effective_discourse(stance, labels),
            "blocklist": labels["blocklist"],
            "kept": _tables(run, DEDUP, names, ["kept"])["kept"],
        }
    )
    frame = pl.DataFrame(table).filter("kept")
    frame = frame.with_columns(category(frame)).drop("kept", "role", "blocklist")
    storage.commit_ipc(batch.path("candidates"), frame.to_arrow())
    return len(frame)


def candidates(batch: Batch) -> pl.DataFrame:
    """What `gather` wrote."""
    return pl.DataFrame(storage.read_ipc(batch.path("candidates")))


def _tables(run: RunFolder, folder: str, names: Sequence[str], columns: list[str]) -> pa.Table:
    """Columns of several parts, one below the other; `part` is the name of the row's part."""
    tables = []
    for name in names:
        table = run.read(f"{folder}/{name}.parquet", columns)
        tables.append(table.append_column("part", pa.repeat(name, len(table))))
    return pa.concat_tables(tables)


def select_keys(seed: int, repeat: int, ids: Sequence[str]) -> np.ndarray:
    """uint64[len(ids)]: the order in which documents are taken."""
    return keys64((seed, "select", repeat), ids)


def order_keys(seed: int, phase: str, repeat: int, ids: Sequence[str]) -> np.ndarray:
    """uint64[len(ids)]: the order in which documents are emitted."""
    return keys64((seed, "order", phase, repeat), ids)


def histogram(item: Batch) -> np.ndarray:
    """int64[len(item.repeats), NUM_CATEGORIES, NUM_BUCKETS] tokens of a batch."""
    frame = candidates(item)
    ids, tokens = frame["id"].to_list(), frame["num_tokens"].to_numpy()
    cell = frame["category"].to_numpy().astype(np.int64) * NUM_BUCKETS
    sums = [
        np.bincount(
            cell + (select_keys(item.seed, repeat, ids) >> BUCKET_SHIFT).astype(np.int64),
            weights=tokens,
            minlength=NUM_CATEGORIES * NUM_BUCKETS,
        )
        for repeat in item.repeats
    ]
    # float64 weights are exact below 2**53 tokens a batch
    return np.array(sums).astype(np.int64).reshape(-1, NUM_CATEGORIES, NUM_BUCKETS)


def turns(item: Batch) -> dict[tuple[int, int], Turns]:
    """The turns of a batch in each asked (repeat, bucket)."""
    frame = candidates(item)
    ids, kinds = frame["id"].to_list(), frame["category"].to_numpy()
    tokens = frame["num_tokens"].to_numpy().astype(np.int64)
    found = {}
    for repeat in sorted({repeat for repeat, _ in item.buckets}):
        select = select_keys(item.seed, repeat, ids)
        bucket = (select >> BUCKET_SHIFT).astype(np.int64)
        for key in item.buckets:
            if key[0] == repeat:
                inside = bucket == key[1]
                found[key] = Turns(select[inside], kinds[inside], tokens[inside])
    return found


class MappedSupply:
    """A budget.Supply over the batches of a run; answers are kept, each costs one pass."""

    def __init__(self, items: Sequence[Batch], mapper: Mapper):
        self._items, self._mapper = items, mapper
        self._histograms: dict[int, np.ndarray] = {}
        self._turns: dict[tuple[int, int], Turns] = {}

    def _map(self, function: Callable[[Batch], Any], label: str, **asked: Any) -> Iterator[Any]:
        return self._mapper(function, [replace(item, **asked) for item in self._items], label)

    def histogram(self, repeat: int) -> np.ndarray:
        if repeat not in self._histograms:
            total = np.zeros((1, NUM_CATEGORIES, NUM_BUCKETS), np.int64)
            for part in self._map(histogram, "mix: sum tokens", repeats=(repeat,)):
                total += part
            self._histograms[repeat] = total[0]
        return self._histograms[repeat]

    def fetch(self, keys: Iterable[tuple[int, int]]) -> None:
        """Read the turns of several (repeat, bucket) in one pass."""
        missing = tuple(sorted(set(keys) - set(self._turns)))
        if not missing:
            return
        found = list(self._map(turns, "mix: find cuts", buckets=missing))
        for key in missing:
            self._turns[key] = Turns(*(np.concatenate(column) for column in zip(*(f[key] for f in found), strict=True)))

    def bucket(self, repeat: int, bucket: int) -> Turns:
        self.fetch([(repeat, bucket)])
        return self._turns[repeat, bucket]


class _Guess:
    """The same supply with each bucket's tokens spread evenly, to learn which buckets the cuts are in."""

    PIECES = 64

    def __init__(self, supply: MappedSupply):
        self.histogram = supply.histogram
        self.asked: set[tuple[int, int]] = set()

    def bucket(self, repeat: int, bucket: int) -> Turns:
        self.asked.add((repeat, bucket))
        tokens = self.histogram(repeat)[:, bucket]
        share = np.diff(np.arange(self.PIECES + 1) * tokens[:, None] // self.PIECES, axis=1)
        low = np.uint64(bucket) << BUCKET_SHIFT
        step = (np.uint64(1) << BUCKET_SHIFT) // np.uint64(self.PIECES)
        select = low + np.arange(1, self.PIECES + 1, dtype=np.uint64) * step - np.uint64(1)
        kinds, piece = np.divmod(np.arange(share.size), self.PIECES)
        return Turns(select[piece], kinds.astype(np.uint8), share.reshape(-1))


def make_plan(mix: Mix, supply: MappedSupply) -> list[ArmPhase]:
    """budget.plan_arms in few passes: guess the buckets that cuts fall into, fetch them together, then exactly."""
    guess = _Guess(supply)
    plan_arms(mix, guess)
    supply.fetch(guess.asked)
    return plan_arms(mix, supply)


def _members(stretch: Stretch, select: dict[int, np.ndarray], kinds: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, repeat) of the documents whose turns are in the stretch."""
    for round_ in range(stretch.start.round, stretch.end.round + 1):
        for g, group in enumerate(stretch.stream.groups):
            at = (round_, g)
            if round_ >= group.max_rounds or at < stretch.start[:2] or at > stretch.end[:2]:
                continue
            keys = select[round_ + group.first_repeat]
            inside = group.categories[kinds]
            if at == stretch.start[:2] and stretch.start.select >= 0:
                inside = inside & (keys > np.uint64(stretch.start.select))
            if at == stretch.end[:2]:
                inside = inside & (keys <= np.uint64(max(stretch.end.select, 0))) & (stretch.end.select >= 0)
            yield np.flatnonzero(inside), round_ + group.first_repeat + stretch.repeat_offset


class _Keys(dict[int, np.ndarray]):
    """`select` keys of a batch by repeat, computed when first asked for."""

    def __init__(self, seed: int, ids: Sequence[str]):
        super().__init__()
        self._seed, self._ids = seed, ids

    def __missing__(self, repeat: int) -> np.ndarray:
        self[repeat] = select_keys(self._seed, repeat, self._ids)
        return self[repeat]


class _Orders:
    """`order` keys of a batch, each computed once: arms share most of their documents."""

    def __init__(self, seed: int, ids: Sequence[str]):
        self._seed, self._ids = seed, ids
        self._known: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, phase: str, rows: np.ndarray, repeats: np.ndarray) -> np.ndarray:
        """uint64 for each of `rows` in its repeat."""
        order = np.empty(len(rows), np.uint64)
        for repeat in np.unique(repeats).tolist():
            at = repeats == repeat
            order[at] = self._of_repeat(phase, repeat, rows[at])
        return order

    def _of_repeat(self, phase: str, repeat: int, rows: np.ndarray) -> np.ndarray:
        empty = np.empty(len(self._ids), np.uint64), np.zeros(len(self._ids), bool)
        keys, is_known = self._known.setdefault((phase, repeat), empty)
        new = rows[~is_known[rows]]
        keys[new] = order_keys(self._seed, phase, repeat, [self._ids[row] for row in new.tolist()])
        is_known[new] = True
        return keys[rows]


def _arm_rows(
    stretches: Iterable[Stretch], keys: _Keys, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row int64[m], repeat int32[m], inserted bool[m]) of one part in the stretches."""
    rows, repeats, inserted = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, bool)]
    for stretch in stretches:
        for members, repeat in _members(stretch, keys, kinds):
            rows.append(members)
            repeats.append(np.full(len(members), repeat, np.int32))
            inserted.append(np.full(len(members), stretch.inserted))
    return np.concatenate(rows), np.concatenate(repeats), np.concatenate(inserted)


def shard_counts(plan: Iterable[ArmPhase], shard_tokens: int) -> tuple[int, ...]:
    """Shards of each arm-phase: ranges of the order space of about `shard_tokens`."""
    return tuple(math.ceil(arm_phase.target / shard_tokens) for arm_phase in plan)


class _Rows:
    """A batch's candidates as arrays, and which of them an arm-phase takes."""

    def __init__(self, item: Batch):
        self.frame = candidates(item)
        self.ids = self.frame["id"].to_list()
        self.kinds = self.frame["category"].to_numpy()
        self.tokens = self.frame["num_tokens"].to_numpy().astype(np.int64)
        self.discourse = self.frame["discourse"].to_numpy()
        self.keys, self.order = _Keys(item.seed, self.ids), _Orders(item.seed, self.ids)

    def num_dropped(self, arm_phase: ArmPhase) -> int:
        """Documents of the phase's U that the arm drops."""
        if not arm_phase.drop:
            return 0
        rows, _, _ = _arm_rows(arm_phase.universe, self.keys, self.kinds)
        kept = background_categories(arm_phase.drop)
        return int((~kept[self.kinds[rows]]).sum())


def select_rows(item: Batch) -> dict[str, np.ndarray]:
    """Write a batch's rows of every shard of every arm-phase under WORK. Returns sums over the batch:
    `shard_tokens` int64[all shards], and `stats` int64[len(plan), len(STATS)]."""
    part = _Rows(item)
    first_shard = np.concatenate([[0], np.cumsum(item.shards)])
    chosen, stats = [], np.zeros((len(item.plan), len(STATS)), np.int64)
    of_first_arm: dict[str, np.ndarray] = {}  # background turns of the first arm, by phase
    for k, arm_phase in enumerate(item.plan):
        rows, repeats, inserted = _arm_rows(arm_phase.stretches, part.keys, part.kinds)
        order = part.order(arm_phase.phase, rows, repeats)
        # floor(order / 2**64 * shards), in integers
        local = ((order >> np.uint64(32)) * np.uint64(item.shards[k])) >> np.uint64(32)
        chosen.append(
            part.frame[rows]
            .select("part", "id", "start", "num_tokens", "stance")
            .with_columns(
                pl.Series("order", order),
                pl.Series("repeat", repeats),
                pl.Series("inserted", inserted),
                pl.Series("shard", local.astype(np.int64) + first_shard[k]),
            )
        )
        turns = rows[~inserted] * 1024 + repeats[~inserted]  # repeats stay far below 1024
        common = turns[np.isin(turns, of_first_arm.setdefault(arm_phase.phase, turns))]
        tokens = part.tokens[rows]
        stats[k] = [
            len(rows),
            inserted.sum(),
            tokens.sum(),
            tokens[~inserted & part.discourse[rows]].sum(),
            tokens[inserted].sum(),
            part.tokens[common // 1024].sum(),
            part.num_dropped(arm_phase),
            repeats.max(initial=-1) + 1,
        ]
    table = pl.concat(chosen).sort("shard", "order", "id", "repeat", "inserted")
    storage.commit_ipc(item.path("rows"), table.to_arrow())
    sums = np.bincount(table["shard"].to_numpy(), weights=table["num_tokens"].to_numpy(), minlength=first_shard[-1])
    return {"shard_tokens": sums.astype(np.int64), "stats": stats}


# Sums over batches, but the last, which is a maximum.
STATS = (
    "documents",
    "inserted_documents",
    "tokens",
    "discourse_tokens",
    "inserted_tokens",
    "common_tokens",
    "dropped_documents",
    "max_uses",
)


@dataclass(frozen=True)
class ShardItem:
    """One shard to be written: `limit` tokens of its rows, the rest is beyond the phase's budget."""

    run: RunFolder
    batches: tuple[Batch, ...]
    shard: int
    limit: int


def cut_to_budget(plan: Sequence[ArmPhase], shards: Sequence[int], shard_tokens: np.ndarray) -> list[int]:
    """Tokens to keep of each shard: an arm-phase's excess is cut off at its end, over as many shards as it takes."""
    limits = [int(n) for n in shard_tokens]
    end = 0
    for arm_phase, count in zip(plan, shards, strict=True):
        end += count
        excess = arm_phase.excess
        for k in range(end - 1, end - count - 1, -1):
            cut = min(excess, limits[k])
            limits[k] -= cut
            excess -= cut
    return limits


def shard_rows(item: ShardItem) -> pl.DataFrame:
    """The rows of a shard in emission order, the last one cut at `limit` tokens."""
    rows = pl.DataFrame(pa.concat_tables([_read_shard(batch.path("rows"), item.shard) for batch in item.batches]))
    rows = rows.sort("order", "id", "repeat", "inserted")
    ends = rows["num_tokens"].cast(pl.Int64).cum_sum()
    before = ends - rows["num_tokens"]
    rows = rows.with_columns(num_tokens=pl.min_horizontal(rows["num_tokens"].cast(pl.Int64), item.limit - before))
    return rows.filter(before < item.limit)


def _read_shard(path: str, shard: int) -> pa.Table:
    table = storage.read_ipc(path)
    first, end = np.searchsorted(table["shard"].to_numpy(), [shard, shard + 1])
    return table.slice(first, end - first)


def shard_token_ids(run: RunFolder, rows: pl.DataFrame, dtype: np.dtype) -> list[np.ndarray]:
    """The token ids of each row, read from 50_tokens: mapped where files are local, ranges elsewhere."""
    paths = {name: run.path(TOKENS, f"{name}.bin") for name in rows["part"].unique()}
    places = list(zip(rows["part"].to_list(), rows["start"].to_list(), rows["num_tokens"].to_list(), strict=True))
    if storage.is_local(run.root):
        # An empty file cannot be mapped, but then no row points into it.
        # As plain arrays: a slice of a memmap object takes ten times as long as one of an ndarray.
        maps = {name: np.asarray(np.memmap(storage.filesystem(path)[1], dtype, "r")) for name, path in paths.items()}
        return [maps[name][start : start + n] for name, start, n in places]
    fs, _ = storage.filesystem(run.root)
    inner = {name: storage.filesystem(path)[1] for name, path in paths.items()}
    pieces = fs.cat_ranges(
        [inner[name] for name, _, _ in places],
        [start * dtype.itemsize for _, start, _ in places],
        [(start + n) * dtype.itemsize for _, start, n in places],
    )
    return [np.frombuffer(piece, dtype) for piece in pieces]


def provenance(rows: pl.DataFrame) -> pa.Table:
    """The sidecar of a shard: schema.PROVENANCE."""
    ends = rows["num_tokens"].cum_sum()
    frame = rows.select("id", "stance", "repeat", "inserted").with_columns(start=ends - rows["num_tokens"], end=ends)
    return frame.select(PROVENANCE.names).to_arrow().cast(PROVENANCE)
