"""How far along each stream an arm-phase reads, so that its tokens come to exactly T.

Nothing here holds a row per document. A `Supply` answers two questions: tokens per category
and `select` bucket for a round (a histogram, summed over parts), and the turns of single
buckets. A cut, the first turn at which the running sum reaches a target, is found from the
histogram down to one bucket and then exactly within it. Once every arm-phase is a list of
stretches (start, end] of streams, any part can tell by itself which of its documents are in.

Order of work for a phase of T tokens (design.md, Mix):
  universe U = the next T tokens of all background (with `replay`: that fraction from the start)
  inserted   = the next share * T tokens of the insertion stream
  background = U less what the arm drops, then the background behind every phase's U (refill);
               the shortest prefix of it that brings the phase to T
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from curation.errors import UserError
from curation.mix.policy import Stream, background, drop_rules, insertions, share_asked, upsamples
from curation.recipe import Mix, Upsample

NUM_BUCKETS = 1024
BUCKET_SHIFT = np.uint64(54)  # top 10 bits of `select`


class Position(NamedTuple):
    """A turn in a stream; stretches are (start, end], so a start is the turn before."""

    round: int
    group: int
    select: int


START = Position(0, 0, -1)


class Turns(NamedTuple):
    """Rows of some buckets: select uint64[n], category uint8[n], num_tokens int64[n]."""

    select: np.ndarray
    category: np.ndarray
    num_tokens: np.ndarray


class Supply(Protocol):
    def histogram(self, repeat: int) -> np.ndarray:
        """int64[NUM_CATEGORIES, NUM_BUCKETS]: tokens by category and bucket of this repeat's `select`."""
        ...

    def bucket(self, repeat: int, bucket: int) -> Turns:
        """The turns of one bucket of one repeat, any order."""
        ...


@dataclass(frozen=True, eq=False)
class Stretch:
    """The turns of `stream` in (start, end]; `repeat_offset` is added to the repeat that is recorded."""

    stream: Stream
    start: Position
    end: Position
    num_tokens: int
    inserted: bool = False
    repeat_offset: int = 0


@dataclass(frozen=True)
class ArmPhase:
    """One arm in one phase: the stretches that it takes; `excess` tokens are cut off at its end."""

    arm: str
    phase: str
    target: int
    share: float
    drop: frozenset[str]
    stretches: tuple[Stretch, ...]
    universe: tuple[Stretch, ...]  # the phase's U, before drops

    @cached_property
    def excess(self) -> int:
        return sum(s.num_tokens for s in self.stretches) - self.target


class Reader:
    """Running sums and cuts over the streams of one supply."""

    def __init__(self, supply: Supply):
        self._supply = supply

    def total(self, stream: Stream, group: int) -> int:
        """Tokens of one round of a group."""
        return int(self._supply.histogram(0)[stream.groups[group].categories].sum())

    def capacity(self, stream: Stream) -> int:
        """Tokens of all rounds of all groups."""
        return sum(self.total(stream, g) * group.max_rounds for g, group in enumerate(stream.groups))

    def _before(self, stream: Stream, round_: int, group: int) -> int:
        """Tokens of all turns before this round of this group."""
        return sum(
            self.total(stream, g) * min(round_ + (g < group), stream.groups[g].max_rounds)
            for g in range(len(stream.groups))
        )

    def upto(self, stream: Stream, at: Position) -> int:
        """Tokens of all turns up to and including `at`."""
        if at.select < 0:
            return self._before(stream, at.round, at.group)
        group = stream.groups[at.group]
        allowed, repeat = group.categories, at.round + group.first_repeat
        bucket = at.select >> int(BUCKET_SHIFT)
        below = int(self._supply.histogram(repeat)[allowed, :bucket].sum())
        turns = self._supply.bucket(repeat, bucket)
        inside = allowed[turns.category] & (turns.select <= np.uint64(at.select))
        return self._before(stream, at.round, at.group) + below + int(turns.num_tokens[inside].sum())

    def cut(self, stream: Stream, target: int) -> tuple[Position, int]:
        """The first turn at which the running sum is at least `target`, and that sum.
        `target` must be within the stream's capacity; 0 or less is before the first turn."""
        if target <= 0:
            return START, 0
        for round_ in range(max(group.max_rounds for group in stream.groups)):
            for g, group in enumerate(stream.groups):
                if round_ >= group.max_rounds:
                    continue
                before = self._before(stream, round_, g)
                if before + self.total(stream, g) >= target:
                    return self._cut_within(stream, round_, g, target, before)
        raise AssertionError("cut beyond the stream's capacity: callers check it first")

    def _cut_within(self, stream: Stream, round_: int, g: int, target: int, before: int) -> tuple[Position, int]:
        allowed, repeat = stream.groups[g].categories, round_ + stream.groups[g].first_repeat
        running = before + np.cumsum(self._supply.histogram(repeat)[allowed].sum(axis=0))
        bucket = int(np.searchsorted(running, target))
        turns = self._supply.bucket(repeat, bucket)
        inside = allowed[turns.category]
        select, tokens = turns.select[inside], turns.num_tokens[inside]
        order = np.argsort(select, kind="stable")
        base = int(running[bucket - 1]) if bucket else before
        sums = base + np.cumsum(tokens[order])
        i = int(np.searchsorted(sums, target))
        return Position(round_, g, int(select[order[i]])), int(sums[i])


def _universe(mix: Mix, read: Reader) -> dict[str, list[Stretch]]:
    """U of every phase: consecutive stretches of all background; a replay starts from the beginning."""
    stream = background(mix)
    needed = sum(math.ceil(p.tokens * (1 - p.replay)) for p in mix.phases.values())
    capacity = read.capacity(stream)
    if needed > capacity:
        raise UserError(
            f"the phases need {needed:,} background tokens, the corpus gives {capacity:,} "
            f"({mix.max_repeat.background} uses of each document): lower `mix.phases` tokens, "
            "raise `mix.max_repeat.background` or add documents"
        )
    at, reached = START, 0
    universe: dict[str, list[Stretch]] = {}
    for name, phase in mix.phases.items():
        stretches = []
        if phase.replay:
            wanted = math.floor(phase.tokens * phase.replay)
            if wanted > reached:
                raise UserError(
                    f"phase {name} replays {wanted:,} tokens, the phases before it have {reached:,}: lower its `replay`"
                )
            end, tokens = read.cut(stream, wanted)
            stretches.append(Stretch(stream, START, end, tokens, repeat_offset=1))
        fresh = phase.tokens - sum(s.num_tokens for s in stretches)
        end, tokens = read.cut(stream, min(reached + fresh, capacity)) if fresh > 0 else (at, reached)
        stretches.append(Stretch(stream, at, end, tokens - reached))
        universe[name], at, reached = stretches, end, tokens
    return universe


def _prefix(read: Reader, stretch: Stretch, stream: Stream, need: int) -> Stretch:
    """What is left of `stretch` in `stream` (its kept categories), cut short once `need` is reached."""
    first = read.upto(stream, stretch.start)
    available = read.upto(stream, stretch.end) - first
    if available <= need:
        end, tokens = stretch.end, available
    else:
        end, reached = read.cut(stream, first + need) if need > 0 else (stretch.start, first)
        tokens = reached - first
    return Stretch(stream, stretch.start, end, tokens, repeat_offset=stretch.repeat_offset)


def _arm_stretches(mix: Mix, arm: str, read: Reader, universe: dict[str, list[Stretch]]) -> Iterable[ArmPhase]:
    inserted = {asked.stance: (START, 0) for asked in mix.arms[arm].upsample}
    refill_at = list(universe.values())[-1][-1].end  # behind the U of every phase: U stays the same for all arms
    for name, phase in mix.phases.items():
        share, drop = share_asked(mix, arm, name), drop_rules(mix, arm, name)
        stretches, need = [], phase.tokens
        for asked in upsamples(mix, arm, name):
            supply, (start, before) = insertions(mix, asked.stance), inserted[asked.stance]
            target = before + math.ceil(asked.share * phase.tokens)
            end, total = _cut_insertions(mix, arm, name, read, supply, asked, target)
            stretches.append(Stretch(supply, start, end, total - before, inserted=True))
            inserted[asked.stance], need = (end, total), need - (total - before)
        kept = background(mix, drop)
        for stretch in universe[name]:
            taken = _prefix(read, stretch, kept, need)
            stretches.append(taken)
            need -= taken.num_tokens
        if need > 0:
            first = read.upto(kept, refill_at)
            if first + need > read.capacity(kept):
                short = first + need - read.capacity(kept)
                raise UserError(
                    f"arm {arm}, phase {name}: what `drop` leaves is {short:,} tokens short: "
                    "lower `mix.phases` tokens, raise `mix.max_repeat.background` or add documents"
                )
            end, total = read.cut(kept, first + need)
            stretches.append(Stretch(kept, refill_at, end, total - first))
            refill_at = end
        yield ArmPhase(arm, name, phase.tokens, share, drop, tuple(stretches), tuple(universe[name]))


def _cut_insertions(
    mix: Mix, arm: str, phase: str, read: Reader, stream: Stream, asked: Upsample, target: int
) -> tuple[Position, int]:
    capacity = read.capacity(stream)
    if target > capacity:
        tokens = sum(p.tokens for n, p in mix.phases.items() if asked in upsamples(mix, arm, n))
        raise UserError(too_small_pool(arm, phase, asked.stance, capacity, capacity / tokens))
    return read.cut(stream, target)


def too_small_pool(arm: str, phase: str, stance: str, capacity: int, largest_share: float) -> str:
    """The message of an empty or too small pool, naming the largest share that is possible."""
    largest = math.floor(largest_share * 1e6) / 1e6
    what = "there are no" if capacity == 0 else f"all repeats of the {capacity:,} tokens' worth of"
    verb = "" if capacity == 0 else " are not enough"
    return (
        f"arm {arm}, phase {phase}: {what} {stance} documents to insert{verb}; "
        f"the largest possible share is {largest:g}: lower `share`, raise `mix.max_repeat.pool` "
        "or add documents to the pool"
    )


def plan_arms(mix: Mix, supply: Supply) -> list[ArmPhase]:
    """Every arm in every phase, in the recipe's order. Raises UserError when the corpus, or the
    pool for an asked share, is too small."""
    read = Reader(supply)
    universe = _universe(mix, read)
    return [arm_phase for arm in mix.arms for arm_phase in _arm_stretches(mix, arm, read, universe)]
