"""Connected components of links, in one place while they fit, else by rounds of tasks.

Up to `Sizes.links` links scipy labels them at once. They are read partition by partition, and what is held of
them is what differs: a link that many bands found counts once. Beyond that,
alternating large-star and small-star (Kiveris et al. 2014, Connected Components in MapReduce and
Beyond): large-star ties the larger neighbours of each text to its smallest one, small-star its
smaller ones; when neither changes a link, every text is tied to the smallest of its component.
Links are spread by the text that a round looks at, so that no task holds more than its share.

Both write (entity, component) tables, sorted, for `find` to map and search: no process loads them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from curation import storage
from curation.dedup import shuffle
from curation.dedup.work import COMPONENTS, LINKS, STARS, Work
from curation.errors import TilthError
from curation.stage import Mapper

_HALF, _WAITING = np.uint64(32), 1 << 16
_MAX_ROUNDS = 100  # of two stars each; their number grows with the logarithm of the longest chain


def label(work: Work, num_links: int, most_links: int, mapper: Mapper) -> int:
    """Write COMPONENTS from LINKS, `num_links` rows (a, b) of uint64. A component is known by its smallest
    member. Returns how many entities there are."""
    if num_links <= most_links:
        names = storage.list_names(work.run.path(LINKS))
        return _write(work, 0, _components(lambda: (_read(work, LINKS, name) for name in names)))
    return _by_stars(work, -(-num_links // most_links), mapper)


def find(work: Work, entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bool[n], uint64[n]): whether each entity has a link, and its component then."""
    names = storage.list_names(work.run.path(COMPONENTS))
    linked, component = np.zeros(len(entities), bool), np.zeros(len(entities), np.uint64)
    for k, name in enumerate(names):
        table = storage.read_ipc(work.run.path(COMPONENTS, name))
        known = table["entity"].chunk(0).to_numpy() if table.num_rows else np.empty(0, np.uint64)
        own = np.flatnonzero(entities % np.uint64(len(names)) == k)
        at = np.searchsorted(known, entities[own])
        hit = np.flatnonzero(at < len(known))
        hit = hit[known[at[hit]] == entities[own[hit]]]
        linked[own[hit]] = True
        component[own[hit]] = table["component"].chunk(0).to_numpy()[at[hit]] if len(hit) else 0
    return linked, component


def _components(links: Callable[[], Iterator[pl.DataFrame]]) -> pl.DataFrame:
    """(entity, component), by entity, for links a - b, of which a call gives all partitions."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    entities = _distinct(frame[side].to_numpy() for frame in links() for side in "ab")

    def numbers(frame: pl.DataFrame, side: str) -> np.ndarray:
        return np.searchsorted(entities, frame[side].to_numpy()).astype(np.uint64)

    pairs = _distinct((numbers(frame, "a") << _HALF) | numbers(frame, "b") for frame in links())
    ends = (pairs >> _HALF).astype(np.int32), pairs.astype(np.uint32).view(np.int32)
    del pairs
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(len(entities),) * 2)
    number, component = connected_components(graph, directed=False)
    first = np.empty(number, np.int64)
    first[component[::-1]] = np.arange(len(entities) - 1, -1, -1)
    return pl.DataFrame({"entity": entities, "component": entities[first[component]]})


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The distinct values of all `parts`, uint64, sorted. Holds them two and a half times, and a part."""
    known, waiting, count = np.empty(0, np.uint64), list[np.ndarray](), 0

    def merged() -> np.ndarray:
        values = np.concatenate([known, *waiting])
        waiting.clear()
        values.sort()
        return values[np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])]

    for part in parts:
        waiting.append(np.unique(part))
        count += len(waiting[-1])
        if count > max(_WAITING, len(known) // 4):
            known, count = merged(), 0
    return merged()


def _read(work: Work, folder: str, name: str) -> pl.DataFrame:
    frame = pl.from_arrow(storage.read_ipc(work.run.path(folder, name)))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _write(work: Work, index: int, frame: pl.DataFrame) -> int:
    storage.commit_ipc(work.run.path(COMPONENTS, f"{index:06d}.arrow"), frame.to_arrow())
    return len(frame)


@dataclass(frozen=True)
class _Star:
    """What one task does to its share of the links, `name` or destination `index`, and where they go."""

    work: Work
    index: int
    name: str
    num_partitions: int
    source: str
    target: str


def _by_stars(work: Work, num_partitions: int, mapper: Mapper) -> int:
    def run(step: Callable[[_Star], int], source: str, target: str) -> int:
        names = storage.list_names(work.run.path(LINKS)) if source == LINKS else [""] * num_partitions
        tasks = [_Star(work, k, name, num_partitions, source, target) for k, name in enumerate(names)]
        total = sum(mapper(step, tasks, "components"))
        if source != LINKS:
            storage.remove(work.run.path(source))
        return total

    folder = f"{STARS}/0"
    run(_spread, LINKS, folder)
    for number in range(1, _MAX_ROUNDS):
        half, whole = f"{STARS}/{number}-large", f"{STARS}/{number}"
        changed = run(_large_star, folder, half) + run(_small_star, half, whole)
        folder = whole
        if not changed:
            return run(_label_stars, folder, COMPONENTS)
    raise TilthError(f"dedup: {_MAX_ROUNDS} rounds did not settle the components of candidates; please report this")


def _send(task: _Star, frame: pl.DataFrame, *, both_ways: bool) -> None:
    """Links (a, b) to the partition of a and, `both_ways`, as (b, a) to that of b."""
    frame = frame.unique()
    if both_ways:
        frame = pl.concat([frame, frame.select(a="b", b="a")])
    destinations = (frame["a"].to_numpy() % np.uint64(task.num_partitions)).astype(np.int64)
    folder = task.work.run.path(task.target)
    shuffle.write(folder, f"{task.index:06d}", frame, destinations, task.num_partitions)


def _own(task: _Star) -> pl.DataFrame:
    return shuffle.read(task.work.run.path(task.source), task.index).unique()


def _spread(task: _Star) -> int:
    _send(task, _read(task.work, task.source, task.name), both_ways=True)
    return 0


def _large_star(task: _Star) -> int:
    """Returns how many links it changed; so does `_small_star`."""
    links = (
        _own(task)
        .with_columns(least=pl.min_horizontal("a", pl.col("b").min().over("a")))
        .filter(pl.col("b") > pl.col("a"))
    )
    _send(task, links.select(a="b", b="least"), both_ways=False)
    return int((links["least"] != links["a"]).sum())


def _small_star(task: _Star) -> int:
    links = _own(task).with_columns(least=pl.col("b").min().over("a"))
    moved = links.filter(pl.col("b") != pl.col("least"))
    _send(task, pl.concat([links.select("a", b="least"), moved.select(a="b", b="least")]), both_ways=True)
    return len(moved)


def _label_stars(task: _Star) -> int:
    frame = _own(task).group_by("a").agg(pl.col("b").min())
    frame = frame.select(entity="a", component=pl.min_horizontal("a", "b")).sort("entity")
    return _write(task.work, task.index, frame)
