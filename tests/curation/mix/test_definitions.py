"""Each definition of docs/mixing.md on documents that a reader counts by eye.

Twelve background documents b00..b11 and three pool documents, 10 tokens each. `select` keys come
from the hash, so a test first asks for the order (`by_select`) and then says what must be taken.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UserError
from curation.mix import arms, policy
from curation.mix.budget import BUCKET_SHIFT, NUM_BUCKETS, Turns, plan_arms
from curation.recipe import Mix

SEED = 7


class World:
    """Documents in memory: a budget.Supply, and the members of an arm-phase by brute force over all rows."""

    def __init__(self, documents):  # (id, role, stance, discourse, blocklist, tokens)
        import polars as pl

        self.ids = [d[0] for d in documents]
        self.tokens = np.array([d[5] for d in documents], np.int64)
        frame = pl.DataFrame(
            [d[1:5] for d in documents], schema=["role", "stance", "discourse", "blocklist"], orient="row",
            schema_overrides={"stance": pl.String, "discourse": pl.Boolean, "blocklist": pl.Boolean},
        )  # fmt: skip
        self.kinds = policy.category(frame).to_numpy()

    def histogram(self, repeat):
        table = np.zeros((policy.NUM_CATEGORIES, NUM_BUCKETS), np.int64)
        bucket = (arms.select_keys(SEED, repeat, self.ids) >> BUCKET_SHIFT).astype(np.int64)
        np.add.at(table, (self.kinds, bucket), self.tokens)
        return table

    def bucket(self, repeat, bucket):
        select = arms.select_keys(SEED, repeat, self.ids)
        inside = (select >> BUCKET_SHIFT) == bucket
        return Turns(select[inside], self.kinds[inside], self.tokens[inside])

    def by_select(self, repeat, wanted=lambda i: True):
        keys = arms.select_keys(SEED, repeat, self.ids)
        return [i for _, i in sorted(zip(keys, self.ids, strict=True)) if wanted(i)]

    def members(self, arm_phase):
        """[(id, repeat, inserted)] in the order of the stretches, rows sorted."""
        keys = arms._Keys(SEED, self.ids)
        rows, repeats, inserted = arms._arm_rows(arm_phase.stretches, keys, self.kinds)
        return [(self.ids[r], int(k), bool(i)) for r, k, i in zip(rows, repeats, inserted, strict=True)]

    def plan(self, **mix):
        return {(p.arm, p.phase): p for p in plan_arms(Mix.model_validate(mix), self)}


def toy(discourse=(), blocklist=(), aligned=()):
    background = [
        (
            f"b{k:02d}",
            "background",
            "aligned" if k in aligned else None,
            k in discourse or k in aligned,
            k in blocklist,
            10,
        )
        for k in range(12)
    ]
    return World([*background, *[(f"p{k}", "pool", "aligned", True, True, 10) for k in range(3)]])


def background_ids(world):
    return world.by_select(0, lambda i: i.startswith("b"))


def test_universe_is_the_first_documents_by_select_until_the_budget():
    world = toy()
    plan = world.plan(phases={"p": {"tokens": 45}}, arms={"u": {}})
    # 45 tokens are four and a half documents: five are taken, the excess of five tokens is cut at emission
    assert sorted(world.members(plan["u", "p"])) == sorted((i, 0, False) for i in background_ids(world)[:5])
    assert plan["u", "p"].excess == 5


def test_phases_take_consecutive_ranges_and_share_no_document():
    world = toy()
    plan = world.plan(phases={"one": {"tokens": 40}, "two": {"tokens": 30}}, arms={"u": {}})
    order = background_ids(world)
    assert [i for i, _, _ in sorted(world.members(plan["u", "one"]))] == sorted(order[:4])
    assert [i for i, _, _ in sorted(world.members(plan["u", "two"]))] == sorted(order[4:7])


def test_background_repeats_only_when_the_corpus_is_exhausted():
    world = toy()
    plan = world.plan(phases={"p": {"tokens": 150}}, arms={"u": {}})
    again = world.by_select(1, lambda i: i.startswith("b"))[:3]
    assert sorted(world.members(plan["u", "p"])) == sorted(
        [(i, 0, False) for i in background_ids(world)] + [(i, 1, False) for i in again]
    )


def test_more_than_all_repeats_is_the_users_mistake():
    with pytest.raises(UserError, match=r"need 490 background tokens, the corpus gives 480 \(4 uses"):
        toy().plan(phases={"p": {"tokens": 490}}, arms={"u": {}})


def test_drop_takes_documents_away_and_refills_from_behind_every_phase():
    order = background_ids(toy())
    gone = {order[1], order[5]}  # one in each phase
    world = toy(discourse={int(i[1:]) for i in gone})
    plan = world.plan(phases={"one": {"tokens": 40}, "two": {"tokens": 30}}, arms={"f": {"drop": "discourse"}})
    # phase one = order[0..3], two = order[4..6]; the reserve starts at order[7]
    assert {i for i, _, _ in world.members(plan["f", "one"])} == {order[0], order[2], order[3], order[7]}
    assert {i for i, _, _ in world.members(plan["f", "two"])} == {order[4], order[6], order[8]}


def test_refill_is_dropped_from_too():
    order = background_ids(toy())
    world = toy(discourse={int(order[0][1:]), int(order[4][1:])})  # order[4] would be the refill
    plan = world.plan(phases={"p": {"tokens": 40}}, arms={"f": {"drop": "discourse"}})
    assert {i for i, _, _ in world.members(plan["f", "p"])} == {order[1], order[2], order[3], order[5]}


def test_blocklist_drop_and_discourse_drop_are_different_rules():
    order = background_ids(toy())
    world = toy(discourse={int(order[0][1:])}, blocklist={int(order[1][1:])})
    arms_asked = {"d": {"drop": "discourse"}, "b": {"drop": "blocklist"}}
    plan = world.plan(phases={"p": {"tokens": 30}}, arms=arms_asked)
    assert {i for i, _, _ in world.members(plan["d", "p"])} == {order[1], order[2], order[3]}
    assert {i for i, _, _ in world.members(plan["b", "p"])} == {order[0], order[2], order[3]}


def test_a_phase_can_drop_for_all_arms_and_an_arm_in_one_phase():
    order = background_ids(toy())
    world = toy(discourse={int(order[0][1:]), int(order[3][1:])})
    phases = {"one": {"tokens": 30}, "two": {"tokens": 30, "drop": "discourse"}}
    plan = world.plan(phases=phases, arms={"u": {}, "f": {"drop": {"rule": "discourse", "phases": ["one"]}}})
    assert plan["u", "one"].drop == frozenset()
    assert plan["u", "two"].drop == plan["f", "two"].drop == {"discourse"}
    assert order[0] in {i for i, _, _ in world.members(plan["u", "one"])}
    assert order[0] not in {i for i, _, _ in world.members(plan["f", "one"])}


def test_share_is_inserted_tokens_over_phase_tokens_and_pushes_out_the_highest_select():
    world = toy()
    asked = {"upsample": {"stance": "aligned", "share": 0.4}}
    plan = world.plan(phases={"p": {"tokens": 50}}, arms={"a": asked})
    pool = world.by_select(0, lambda i: i.startswith("p"))
    order = background_ids(world)
    assert sorted(world.members(plan["a", "p"])) == sorted(
        [(i, 0, True) for i in pool[:2]] + [(i, 0, False) for i in order[:3]]
    )
    assert plan["a", "p"].excess == 0


def test_a_share_that_is_no_whole_document_is_rounded_up_to_one():
    plan = toy().plan(phases={"p": {"tokens": 50}}, arms={"a": {"upsample": {"stance": "aligned", "share": 0.01}}})
    assert sum(s.num_tokens for s in plan["a", "p"].stretches if s.inserted) == 10


def test_insertions_repeat_the_pool_then_natural_documents_and_go_on_through_phases():
    order = background_ids(toy())
    natural = order[0]
    world = toy(aligned={int(natural[1:])})
    asked = {"upsample": {"stance": "aligned", "share": 0.5}}
    plan = world.plan(
        phases={"one": {"tokens": 60}, "two": {"tokens": 60}},
        arms={"a": asked},
        max_repeat={"pool": 2, "background": 2},
    )
    turns = [(i, k, ins) for phase in ("one", "two") for i, k, ins in world.members(plan["a", phase]) if ins]
    # round 0: three of the pool, then the natural one (its second use: repeat 1); round 1: the pool again
    pool0, pool1 = world.by_select(0, lambda i: i[0] == "p"), world.by_select(1, lambda i: i[0] == "p")
    assert sorted(turns[:3]) == sorted((i, 0, True) for i in pool0)
    assert sorted(turns[3:]) == sorted([(natural, 1, True), *[(i, 1, True) for i in pool1[:2]]])


def test_an_arm_may_up_sample_several_stances_each_with_its_share():
    rows = [(f"b{k:02d}", "background", None, False, False, 10) for k in range(12)]
    pools = [(f"{s[0]}{k}", "pool", s, True, False, 10) for s in ("aligned", "misaligned") for k in range(4)]
    world = World([*rows, *pools])
    halves = [{"stance": s, "share": 0.25} for s in ("aligned", "misaligned")]
    plan = world.plan(phases={"p": {"tokens": 80}}, arms={"control": {"upsample": halves}})
    aligned, misaligned = (world.by_select(0, lambda i, s=s: i.startswith(s)) for s in ("a", "m"))
    inserted = [i for i, _, is_inserted in world.members(plan["control", "p"]) if is_inserted]
    assert sorted(inserted) == sorted([*aligned[:2], *misaligned[:2]])
    kept = sorted(i for i, _, is_inserted in world.members(plan["control", "p"]) if not is_inserted)
    assert kept == sorted(background_ids(world)[:4])
    assert (plan["control", "p"].share, plan["control", "p"].excess) == (0.5, 0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([("aligned", 0.1), ("aligned", 0.2)], "names a stance twice"),
        ([("aligned", 0.6), ("mixed", 0.5)], "more than 1"),
    ],
)
def test_shares_of_one_stance_twice_or_beyond_the_whole_are_refused(shares, message):
    arm = {"upsample": [{"stance": stance, "share": share} for stance, share in shares]}
    with pytest.raises(ValueError, match=message):
        Mix.model_validate({"phases": {"p": {"tokens": 50}}, "arms": {"a": arm}})


def test_too_small_a_pool_names_the_largest_share():
    asked = {"upsample": {"stance": "aligned", "share": 0.7}}
    with pytest.raises(UserError, match=r"arm a, phase p: .*largest possible share is 0.6:"):
        toy().plan(phases={"p": {"tokens": 100}}, arms={"a": asked}, max_repeat={"pool": 2})


def test_an_empty_pool_is_the_users_mistake():
    with pytest.raises(UserError, match="there are no misaligned documents to insert"):
        toy().plan(phases={"p": {"tokens": 50}}, arms={"a": {"upsample": {"stance": "misaligned", "share": 0.1}}})


def test_pool_documents_are_never_background():
    world = toy()
    plan = world.plan(phases={"p": {"tokens": 240}}, arms={"u": {}})
    assert not any(i.startswith("p") for i, _, _ in world.members(plan["u", "p"]))


def test_replay_fills_its_fraction_from_the_beginning():
    world = toy()
    plan = world.plan(phases={"pre": {"tokens": 60}, "cpt": {"tokens": 40, "replay": 0.5}}, arms={"u": {}})
    order = background_ids(world)
    assert sorted(world.members(plan["u", "cpt"])) == sorted(
        [(i, 1, False) for i in order[:2]] + [(i, 0, False) for i in order[6:8]]
    )


def test_background_common_to_two_arms_keeps_its_relative_order():
    world = toy(discourse={1, 4, 7})
    plan = world.plan(
        phases={"p": {"tokens": 80}},
        arms={"u": {}, "f": {"drop": "discourse"}, "a": {"upsample": {"stance": "aligned", "share": 0.2}}},
    )

    def emitted(arm):
        rows = [(i, k) for i, k, inserted in world.members(plan[arm, "p"]) if not inserted]
        return sorted(rows, key=lambda row: int(arms.order_keys(SEED, "p", row[1], [row[0]])[0]))

    unfiltered = emitted("u")
    for arm in ("f", "a"):
        common = [row for row in emitted(arm) if row in unfiltered]
        assert common
        assert common == [row for row in unfiltered if row in common]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 400), min_size=3, max_size=60),
    budget=st.integers(1, 3000),
    dropped=st.sets(st.integers(0, 59)),
    share=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_every_phase_reaches_its_budget_with_the_fewest_documents(tokens, budget, dropped, share):
    world = World(
        [(f"d{k}", "background", None, k in dropped, False, n) for k, n in enumerate(tokens)]
        + [("pool", "pool", "aligned", True, False, 50)]
    )
    arm = {"drop": "discourse"} | ({"upsample": {"stance": "aligned", "share": share}} if share else {})
    try:
        plan = world.plan(phases={"p": {"tokens": budget}}, arms={"x": arm})
    except UserError:
        kept = sum(n for k, n in enumerate(tokens) if k not in dropped)
        assert 4 * sum(tokens) < budget or 4 * kept < budget + sum(tokens) or share * budget + 1 > 16 * 50
        return
    members = world.members(plan["x", "p"])
    size = dict(zip(world.ids, world.tokens.tolist(), strict=True))
    total = sum(size[i] for i, _, _ in members)
    assert len(set(members)) == len(members)
    assert total == sum(s.num_tokens for s in plan["x", "p"].stretches) >= budget
    assert not any(i in {f"d{k}" for k in dropped} for i, _, _ in members)
    background = [(k, int(arms.select_keys(SEED, k, [i])[0]), i) for i, k, inserted in members if not inserted]
    if background:  # without its last background document the phase would be short
        assert total - size[max(background)[2]] < budget
