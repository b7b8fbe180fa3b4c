"""The AI-specific shift: a table that one checks by eye, scipy as the oracle, and a bootstrap small enough to list."""

import itertools
import random
from collections import Counter

import numpy as np
import polars as pl
import pytest
from scipy import stats

from evaluation.shift import PAIRED, PLAIN, contrasts, estimate, units
from evaluation.suite import CHOICES


def choice(question, seed, family, margin, **other):
    """A row as `suite.choices` makes it; chosen is what the margin says."""
    given = {
        "scorer": "pmi", "arm": "a", "seed": str(seed), "question_id": question, "split": "held_out",
        "condition": "none", "wrapper": "plain", "order": "0", "family": family, "topics": [], "num_options": 2,
        "misaligned": float(margin > 0), "margin": float(margin),
    }  # fmt: skip
    return given | other


def table(rows):
    return pl.DataFrame(rows, schema=CHOICES, orient="row")


ASKED = {
    "k1-ai": ("k1", "ai"), "k1-human": ("k1", "human"),
    "k2-ai": ("k2", "ai"), "k2-human": ("k2", "human"),
    "l1-ai": ("l1", "ai"), "l1-human": ("l1", "human"),
    "lone": ("l2", "ai"),
    "free": ("", ""),
}  # fmt: skip
# Family keys has two pairs, family lamps one; in both seeds.
TWINS = [
    choice("k1-ai", 0, "keys", 3), choice("k1-human", 0, "keys", 1),
    choice("k2-ai", 0, "keys", -1), choice("k2-human", 0, "keys", -2),
    choice("l1-ai", 0, "lamps", 4), choice("l1-human", 0, "lamps", -4),
    choice("k1-ai", 1, "keys", 1), choice("k1-human", 1, "keys", 1),
    choice("k2-ai", 1, "keys", 1), choice("k2-human", 1, "keys", 3),
    choice("l1-ai", 1, "lamps", -2), choice("l1-human", 1, "lamps", -7),
]  # fmt: skip
ALONE = [choice("lone", 0, "lamps", 100), choice("free", 0, "lamps", 100), choice("lone", 1, "bins", 100)]


def cells_of(values, arm="a", split="held_out"):
    """Cells as `units` makes them, of [(seed, family, shift)]."""
    rows = [
        {"arm": arm, "seed": str(seed), "split": split, "family": family, "shift": float(value)}
        for seed, family, value in values
    ]
    return pl.DataFrame(rows)


def grid(per_seed, arm="a", **other):
    """The same value in both of two families of each seed."""
    return cells_of([(s, f, v) for s, v in enumerate(per_seed) for f in ("f0", "f1")], arm, **other)


# Units.


def test_twins_are_averaged_within_family_and_seed_and_subtracted():
    cells, measures = units(table(TWINS), ASKED)
    assert measures == PAIRED
    found = {(row["seed"], row["family"]): row for row in cells.to_dicts()}
    assert list(found) == [("0", "keys"), ("0", "lamps"), ("1", "keys"), ("1", "lamps")]
    for key, ai, human, rate_ai, rate_human in [
        (("0", "keys"), 1.0, -0.5, 0.5, 0.5),
        (("0", "lamps"), 4.0, -4.0, 1.0, 0.0),
        (("1", "keys"), 1.0, 2.0, 1.0, 1.0),
        (("1", "lamps"), -2.0, -7.0, 0.0, 0.0),
    ]:
        row = found[key]
        assert (row["margin_ai"], row["margin_human"], row["shift"]) == (ai, human, ai - human), key
        assert (row["rate_ai"], row["rate_human"]) == (rate_ai, rate_human), key


def test_questions_without_a_twin_are_left_out():
    with_them, _ = units(table(TWINS + ALONE), ASKED)
    assert with_them.equals(units(table(TWINS), ASKED)[0])


def test_twins_are_those_of_one_format():
    """An AI asked in one wrapper is not held against a person asked in another."""
    rows = [
        choice("k1-ai", 0, "keys", 5, wrapper="dot"),
        choice("k1-human", 0, "keys", 1, wrapper="dot"),
        choice("k1-ai", 0, "keys", 9, wrapper="paren"),
        choice("k1-human", 0, "keys", 3, wrapper="paren"),
        choice("k2-ai", 0, "keys", 90, wrapper="dot"),
        choice("k2-human", 0, "keys", 3, wrapper="dash"),
    ]
    (row,) = units(table(rows), ASKED)[0].to_dicts()
    assert (row["margin_ai"], row["margin_human"], row["shift"]) == (7.0, 2.0, 5.0)


def test_arms_and_splits_are_apart():
    rows = [*TWINS, *({**row, "arm": "b", "margin": row["margin"] * 2} for row in TWINS)]
    rows += [{**row, "split": "seen"} for row in TWINS[:2]]
    cells, _ = units(table(rows), ASKED)
    count = Counter(cells.select("arm", "split").iter_rows())
    assert count == {("a", "held_out"): 4, ("a", "seen"): 1, ("b", "held_out"): 4}
    assert estimate(cells, "b", "held_out", "shift").value == 2 * estimate(cells, "a", "held_out", "shift").value


def test_without_pairs_the_measures_are_the_margin_and_the_rate():
    asked = dict.fromkeys(ASKED, ("", ""))
    cells, measures = units(table(TWINS), asked)
    assert measures == PLAIN
    found = {(row["seed"], row["family"]): (row["margin"], row["rate"]) for row in cells.to_dicts()}
    assert found[("0", "keys")] == (0.25, 0.5)  # 3, 1, -1, -2
    assert found[("1", "lamps")] == (-4.5, 0.0)
    assert list(found) == sorted(found)


def uneven(count):
    """Many margins whose sum depends on the order in which they are added."""
    rng = np.random.default_rng(0)
    return [
        choice(f"q{n}-{actor}", seed, f"f{n % 3}", 10.0 ** rng.uniform(-12, 3) * rng.choice([-1, 1]))
        for n, actor, seed in itertools.product(range(count), ("ai", "human"), range(2))
    ]


def test_the_order_of_rows_changes_no_bit():
    rows = uneven(90)
    asked = {row["question_id"]: tuple(row["question_id"].split("-")) for row in rows}
    wanted, _ = units(table(rows), asked)
    for seed in range(5):
        assert units(table(random.Random(seed).sample(rows, len(rows))), asked)[0].equals(wanted)
    assert estimate(wanted.reverse(), "a", "held_out", "shift") == estimate(wanted, "a", "held_out", "shift")


def test_the_order_of_rows_changes_no_bit_without_pairs():
    rows = uneven(90)
    asked = {row["question_id"]: ("", "") for row in rows}
    wanted, _ = units(table(rows), asked)
    for seed in range(5):
        assert units(table(random.Random(seed).sample(rows, len(rows))), asked)[0].equals(wanted)


# Means and contrasts over seeds.


def test_an_interval_over_seeds_is_that_of_students_t():
    cells, _ = units(table(TWINS), ASKED)
    mean = estimate(cells, "a", "held_out", "shift")
    # By eye: seed 0 has 1.5 and 8, seed 1 has -1 and 5.
    assert mean.by_seed == {"0": 4.75, "1": 2.0}
    assert (mean.value, mean.num_families) == (3.375, 2)
    oracle = stats.ttest_1samp([4.75, 2.0], 0)
    low, high = oracle.confidence_interval(0.95)
    assert (mean.low, mean.high) == pytest.approx((low, high))
    assert mean.p_value == pytest.approx(oracle.pvalue)


def test_a_contrast_is_the_paired_t_test_over_seeds():
    one, other = [2.0, 2.5, 1.75, 3.5, 2.25], [1.0, 1.75, 1.5, 1.0, 2.0]
    cells = pl.concat([grid(one, "a"), grid(other, "b"), grid([9.0] * 5, "a", split="seen")])
    (found,) = contrasts(cells, [("a", "b")], "held_out", "shift")
    oracle = stats.ttest_rel(one, other)
    low, high = oracle.confidence_interval(0.95)
    assert (found.arm, found.other, found.split, found.measure) == ("a", "b", "held_out", "shift")
    assert found.mean.value == pytest.approx(np.mean(one) - np.mean(other))
    assert (found.mean.low, found.mean.high) == pytest.approx((low, high))
    assert found.mean.p_value == pytest.approx(oracle.pvalue)
    (back,) = contrasts(cells, [("b", "a")], "held_out", "shift")
    assert (back.mean.low, back.mean.high) == pytest.approx((-high, -low))


def test_a_contrast_pairs_families_too():
    """A family that one arm lacks in a seed counts for neither."""
    a = cells_of([(0, "f0", 1), (0, "f1", 2), (1, "f0", 5), (1, "f1", 100)])
    b = cells_of([(0, "f0", 0), (0, "f1", 4), (1, "f0", 2), (1, "f2", 50)], "b")
    (found,) = contrasts(pl.concat([a, b]), [("a", "b")], "held_out", "shift")
    assert found.mean.by_seed == {"0": -0.5, "1": 3.0}


def test_one_seed_has_no_interval_over_seeds():
    cells = cells_of([(0, "f0", 1), (0, "f1", 2), (0, "f2", 6)])
    mean = estimate(cells, "a", "held_out", "shift")
    assert (mean.value, mean.low, mean.high, mean.p_value) == (3.0, None, None, None)
    assert mean.family_low < 3 < mean.family_high
    both = pl.concat([cells, cells.with_columns(pl.lit("b").alias("arm"), pl.col("shift") + 1)])
    for found in contrasts(both, [("b", "a"), ("a", "b")], "held_out", "shift"):
        assert (found.mean.p_value, found.p_adjusted, found.resolved) == (None, None, False)


def test_one_family_has_no_interval_over_families():
    mean = estimate(cells_of([(0, "f0", 1), (1, "f0", 2)]), "a", "held_out", "shift")
    assert (mean.family_low, mean.family_high, mean.num_families) == (None, None, 1)
    assert mean.low < 1.5 < mean.high


def test_an_arm_without_questions_of_the_split_has_no_mean():
    cells = grid([1.0, 2.0])
    assert estimate(cells, "a", "seen", "shift") is None
    assert estimate(cells, "nobody", "held_out", "shift") is None
    assert contrasts(cells, [("a", "nobody")], "held_out", "shift") == []
    assert contrasts(cells, [], "held_out", "shift") == []


def test_seeds_that_agree_to_the_bit_are_told_from_zero_or_not():
    assert estimate(grid([0.0, 0.0, 0.0]), "a", "held_out", "shift").p_value == 1
    assert estimate(grid([2.0, 2.0, 2.0]), "a", "held_out", "shift").p_value == 0


ARMS = {
    "base": [0.0, 0.0, 0.0, 0.0, 0.0],
    "far": [3.0, 3.5, 2.5, 3.25, 2.75],
    "near": [0.75, 0.25, 1.0, 0.5, 1.5],
    "some": [1.0, 0.5, 2.0, 0.5, 3.0],
    "none": [0.5, -0.5, 0.25, -0.75, 0.5],
}


def arms():
    return pl.concat([grid(values, name) for name, values in ARMS.items()])


def test_the_first_contrast_stands_alone_and_the_others_are_adjusted_among_themselves():
    pairs = [("some", "base"), ("far", "base"), ("none", "base"), ("near", "base")]
    found = contrasts(arms(), pairs, "held_out", "shift")
    assert [(one.arm, one.other) for one in found] == pairs
    raw = {arm: stats.ttest_rel(ARMS[arm], ARMS["base"]).pvalue for arm, _ in pairs}
    assert [one.mean.p_value for one in found] == pytest.approx([raw[arm] for arm, _ in pairs])
    # Holm by hand: far < near < none of the three.
    assert raw["far"] < raw["near"] < raw["none"]
    far = 3 * raw["far"]
    near = max(far, 2 * raw["near"])
    none = max(near, raw["none"])
    assert [one.p_adjusted for one in found] == pytest.approx([raw["some"], far, none, near])


@pytest.mark.parametrize("planned", [0, 1, 2, 3, 9])
def test_only_what_is_not_planned_is_adjusted(planned):
    pairs = [("some", "base"), ("near", "base"), ("none", "base")]
    found = contrasts(arms(), pairs, "held_out", "shift", planned=planned)
    rest = sorted(one.mean.p_value for one in found[planned:])
    by_hand, highest = {}, 0.0
    for rank, p in enumerate(rest):
        highest = max(highest, min(1.0, (len(rest) - rank) * p))
        by_hand[p] = highest
    for at, one in enumerate(found):
        p = one.mean.p_value
        assert one.p_adjusted == pytest.approx(p if at < planned else by_hand[p])


def test_resolved_is_after_the_adjustment():
    first, *others = contrasts(arms(), [("near", "base"), ("far", "base"), ("none", "base")], "held_out", "shift")
    assert first.resolved
    assert [one.resolved for one in others] == [True, False]
    # `some` alone is off zero; after Holm over three it is not.
    alone = contrasts(arms(), [("some", "base")], "held_out", "shift")[0]
    p = alone.p_adjusted
    assert 0.05 / 3 < p < 0.05, "the example needs a p-value that Holm takes over 0.05"
    assert alone.resolved
    assert alone.mean.low > 0
    pairs = [("far", "base"), ("some", "base"), ("none", "base"), ("none", "near")]
    crowd = {one.arm + one.other: one for one in contrasts(arms(), pairs, "held_out", "shift")}
    assert crowd["somebase"].mean == alone.mean
    assert crowd["somebase"].resolved == (crowd["somebase"].p_adjusted < 0.05)
    assert not crowd["somebase"].resolved


def test_the_planned_contrast_is_the_first_asked_for_even_where_it_has_no_questions():
    pairs = [("nobody", "base"), ("near", "base"), ("some", "base")]
    found = contrasts(arms(), pairs, "held_out", "shift")
    near, some = found
    assert near.p_adjusted == pytest.approx(min(2 * near.mean.p_value, some.p_adjusted))


# Over families.


def exact_bounds(cells):
    """Quantiles over all draws of families: listed, not drawn. A draw without a seed's families does not count."""
    names = sorted(cells["family"].unique())
    by_seed = [dict(rows.select("family", "shift").iter_rows()) for rows in cells.partition_by("seed")]
    means = []
    for drawn in itertools.product(names, repeat=len(names)):
        inside = [[values[name] for name in drawn if name in values] for values in by_seed]
        if all(inside):
            means.append(np.mean([np.mean(values) for values in inside]))
    return np.quantile(means, [0.025, 0.975], method="inverted_cdf")


@pytest.mark.parametrize(
    "values",
    [
        [(0, "f0", 0), (0, "f1", 1), (0, "f2", 5)],
        [(0, "f0", 0), (0, "f1", 1), (0, "f2", 5), (1, "f0", 2), (1, "f1", 2), (1, "f2", 9)],
        # f2 is missing in seed 1, so three times f2 is no draw.
        [(0, "f0", 20), (0, "f1", 21), (0, "f2", 25), (1, "f0", 22), (1, "f1", 28)],
        # No family is in both.
        [(0, "f0", 20), (0, "f1", 24), (1, "f2", 21), (1, "f3", 27)],
    ],
    ids=["one seed", "two seeds", "one missing", "other families"],
)
def test_the_bootstrap_is_over_families_with_all_their_seeds(values):
    cells = cells_of(values)
    mean = estimate(cells, "a", "held_out", "shift")
    assert (mean.family_low, mean.family_high) == pytest.approx(exact_bounds(cells))
    assert mean.num_families == len({family for _, family, _ in values})
    assert mean.value == pytest.approx(np.mean(list(mean.by_seed.values())))


def test_with_many_families_the_bootstrap_is_as_wide_as_theory_has_it():
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, 2.0, 300)
    cells = cells_of([(0, f"f{n}", v) for n, v in enumerate(values)])
    mean = estimate(cells, "a", "held_out", "shift")
    reach = 1.96 * values.std(ddof=1) / 300**0.5
    assert mean.family_high - mean.family_low == pytest.approx(2 * reach, rel=0.1)
    assert (mean.family_low + mean.family_high) / 2 == pytest.approx(mean.value, abs=0.1 * reach)


def test_a_symmetric_bootstrap_has_its_mean_in_the_middle_and_is_the_same_each_time():
    around = [-3.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0]
    cells = cells_of([(s, f"f{n}", 4 + v * (1 + s)) for s in range(3) for n, v in enumerate(around)])
    mean = estimate(cells, "a", "held_out", "shift")
    assert mean.value == pytest.approx(4)
    assert mean.family_low < 4 < mean.family_high
    assert mean.family_high - 4 == pytest.approx(4 - mean.family_low, rel=0.15)
    assert estimate(cells, "a", "held_out", "shift") == mean
    assert estimate(cells.sample(fraction=1, shuffle=True, seed=3), "a", "held_out", "shift") == mean


def test_a_family_in_which_all_seeds_agree_widens_the_interval_over_families_alone():
    """The two intervals are about different things."""
    apart = cells_of([(s, f"f{n}", 10.0 * (n % 2)) for s in range(4) for n in range(10)])
    mean = estimate(apart, "a", "held_out", "shift")
    assert mean.low == mean.high == mean.value == 5
    assert mean.family_high - mean.family_low > 3


def test_a_paired_contrast_removes_what_families_have_in_common():
    base = [(s, f"f{n}", 10.0 * n) for s in range(3) for n in range(6)]
    one, other = cells_of([(s, f, v + 1) for s, f, v in base]), cells_of(base, "b")
    (found,) = contrasts(pl.concat([one, other]), [("a", "b")], "held_out", "shift")
    assert (found.mean.family_low, found.mean.family_high) == pytest.approx((1, 1))
