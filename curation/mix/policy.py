"""What an arm may take: the category of each document, and the streams that arms read.

A document's category is all that mixing needs to know of it: pool or background, effective
stance, discourse, blocklist. A *stream* is an ordered supply of document turns. A turn is
(document, repeat), ordered by (round, group, select), where `select` = h(seed, "select", repeat,
id) is the same for every arm and phase, so that two arms that take the same stretch of a stream
take the same documents. Round and repeat are the same number but for a group's `first_repeat`.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from curation.recipe import Mix, Upsample
from curation.schema import POOL, STANCES

STANCE_CODES = ("none", *STANCES)
NUM_CATEGORIES = 8 * len(STANCE_CODES)
_CATEGORY = np.arange(NUM_CATEGORIES)
_IS_POOL, _IS_DISCOURSE, _IS_BLOCKLISTED = (_CATEGORY & 1) > 0, (_CATEGORY & 2) > 0, (_CATEGORY & 4) > 0
_STANCE = _CATEGORY // 8

DROP_RULES = {"discourse": _IS_DISCOURSE, "blocklist": _IS_BLOCKLISTED}


def category(frame: pl.DataFrame) -> pl.Series:
    """uint8 category of each row of columns role, stance (null = none), discourse, blocklist."""
    stance = (
        pl.col("stance")
        .fill_null("none")
        .replace_strict({s: i for i, s in enumerate(STANCE_CODES)}, return_dtype=pl.Int64)
    )
    code = (pl.col("role") == POOL).cast(pl.Int64) + 2 * pl.col("discourse") + 4 * pl.col("blocklist") + 8 * stance
    return frame.select(code.cast(pl.UInt8).alias("category"))["category"]


@dataclass(frozen=True, eq=False)
class Group:
    """Categories that take their turns together, each document at most `max_rounds` times."""

    categories: np.ndarray  # bool[NUM_CATEGORIES]
    max_rounds: int
    first_repeat: int = 0  # the repeat that round 0 is


@dataclass(frozen=True, eq=False)
class Stream:
    """Groups in their order within a round."""

    groups: tuple[Group, ...]


def background_categories(drop: frozenset[str]) -> np.ndarray:
    """bool[NUM_CATEGORIES]: all non-pool documents, less those that a drop rule takes away."""
    allowed = ~_IS_POOL
    for rule in drop:
        allowed = allowed & ~DROP_RULES[rule]
    return allowed


def background(mix: Mix, drop: frozenset[str] = frozenset()) -> Stream:
    """The stream of what `background_categories` leaves."""
    return Stream((Group(background_categories(drop), mix.max_repeat.background),))


def insertions(mix: Mix, stance: str) -> Stream:
    """Pool documents of a stance first, then natural ones. A natural document has had one turn
    as background, so it has one fewer here and its repeats count from 1."""
    right = STANCE_CODES.index(stance) == _STANCE
    return Stream(
        (
            Group(_IS_POOL & right, mix.max_repeat.pool),
            Group(~_IS_POOL & right, mix.max_repeat.background - 1, first_repeat=1),
        )
    )


def drop_rules(mix: Mix, arm: str, phase: str) -> frozenset[str]:
    """The drop rules in force for an arm in a phase: the arm's own and the phase's for all arms."""
    asked = mix.arms[arm].drop
    rules = {mix.phases[phase].drop} if mix.phases[phase].drop else set()
    if asked and (asked.phases is None or phase in asked.phases):
        rules.add(asked.rule)
    return frozenset(rules)  # type: ignore[arg-type]


def share_asked(mix: Mix, arm: str, phase: str) -> float:
    """Inserted tokens / phase tokens that the recipe asks for."""
    return sum(one.share for one in upsamples(mix, arm, phase))


def upsamples(mix: Mix, arm: str, phase: str) -> list[Upsample]:
    """What the arm inserts in the phase, in the recipe's order."""
    return [one for one in mix.arms[arm].upsample if one.phases is None or phase in one.phases]
