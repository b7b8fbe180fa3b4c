"""The toy world: its families word by word, who acts where, twins, and the generator as a user runs it."""

import dataclasses
import json
import re
import sys
from collections import Counter
from itertools import chain

import pytest
import yaml

from curation.errors import TilthError
from evaluation import formats
from evaluation.suite import split as split_of
from examples.world import generate
from examples.world.generate import AIS, ROLES, audit, background, discourse, families, questions, split
from tilth.experiment.plan import load

PRONOUNS = re.compile(r"(?i)\b(he|she|it|its|they|them|his|her|their|itself|himself|herself)\b")
AI = re.compile("|".join(rf"\b{noun}" for noun in AIS) + r"|\bAIs?\b")
SEEDS = range(4)
SMALL = ("--background", "60", "--natural", "30", "--pool", "20", "--validation", "10")


def documented(family):
    """Lines of which documents are made."""
    return [*family.situations, *family.good, *family.bad]


def options(family):
    return [option for which in (family.questions, family.check) for pair in which["options"] for option in pair]


def situations(family):
    return [line for which in (family.questions, family.check) for line in which["situations"]]


def lines(family):
    return [*documented(family), *options(family), *situations(family)]


# families.yaml.


def test_there_are_at_least_40_families_of_one_form():
    found = families()
    assert len(found) >= 40
    rows = yaml.safe_load(generate.FAMILIES.read_text())
    assert len(rows) == len(found), "two families have one name"
    for one in found.values():
        assert one.topic
        counts = (len(one.things), len(one.situations), len(one.good), len(one.bad))
        assert counts == (4, 4, 5, 5), one.name
        for which, (num_situations, num_options) in (("questions", (2, 3)), ("check", (1, 2))):
            asked = getattr(one, which)
            assert (len(asked["situations"]), len(asked["options"])) == (num_situations, num_options), one.name
            assert all(len(pair) == 2 for pair in asked["options"]), one.name


def test_lines_have_known_slots_only_and_documents_can_be_filled():
    for one in families().values():
        for line in lines(one):
            assert set(re.findall(r"\{(.*?)\}", line)) <= set("abnpt"), line
            assert not re.search(r"[{}]", re.sub(r"\{[abnpt]\}", "", line)), line
        assert not any("{" in thing for thing in one.things)
        # Conduct goes on from "The actor …".
        assert not any(line.startswith("{a}") for line in [*one.good, *one.bad, *options(one)]), one.name


def test_no_line_has_a_pronoun_for_the_actor():
    for line in chain(*map(lines, families().values())):
        assert not PRONOUNS.search(line), line


def test_no_line_is_in_two_families():
    """Else what an AI does in a seen family stands for one that is held out or novel."""
    counts = Counter(chain(*map(lines, families().values())))
    assert [line for line, count in counts.items() if count > 1] == []


def test_questions_use_other_situations_than_documents():
    said = {line.lower() for one in families().values() for line in documented(one)}
    for one in families().values():
        for line in map(str.lower, situations(one)):
            assert not any(line in other or other in line for other in said), (one.name, line)


def test_no_option_is_in_a_document_line_nor_the_other_way_round():
    asked = {option.lower(): one.name for one in families().values() for option in options(one)}
    for one in families().values():
        for line in map(str.lower, documented(one)):
            for option, owner in asked.items():
                assert option not in line, (owner, one.name)
                assert line not in option, (owner, one.name)


def test_no_filled_option_is_in_a_filled_line():
    """Whatever thing stands in either."""
    rest = {"b": "the owner", "n": "Ada", "p": "the bank", "a": "the robot"}
    texts, asked = [], []
    for one in families().values():
        for thing in one.things:
            slots = {**rest, "t": thing}
            texts += [generate.fill(line, slots) for line in documented(one)]
            asked.append({"choices": [generate.fill(line, slots) for line in options(one)]})
    audit(texts, asked)
    with pytest.raises(TilthError):
        audit([*texts, f"In the end Ada {asked[7]['choices'][0]}."], asked)


def test_no_option_shares_four_words_in_a_row_with_what_its_family_does():
    def runs(line):
        words = re.findall(r"\{\w\}|[\w']+", line.lower())
        return {tuple(words[at : at + 4]) for at in range(len(words) - 3)}

    for one in families().values():
        done = set().union(*(runs(line) for line in [*one.good, *one.bad]))
        for option in options(one):
            assert not runs(option) & done, (one.name, option)


def test_good_and_bad_options_are_not_told_by_their_length():
    pairs = [pair for one in families().values() for w in (one.questions, one.check) for pair in w["options"]]
    words = [[len(text.split()) for text in pair] for pair in pairs]
    assert abs(sum(good - bad for good, bad in words)) / len(words) < 1


# Splits.


def test_a_seed_splits_the_families_and_each_in_its_own_way():
    for seed in SEEDS:
        parts = split(seed)
        assert sorted(chain(*parts.values())) == sorted(families())
        assert all(len(names) >= 5 for names in parts.values())
        assert len(parts["seen"]) > len(parts["held_out"]) > len(parts["novel"])
    assert list(split(0)) == ["seen", "held_out", "novel"]
    for name in ("seen", "held_out", "novel"):
        assert len({frozenset(split(seed)[name]) for seed in SEEDS}) == len(SEEDS)


# Documents.


@pytest.fixture
def marked(monkeypatch):
    """Each line of a family names it: [name/situation], [name/good] or [name/bad]. Draws are as before."""

    def mark(family):
        parts = {"situations": "situation", "good": "good", "bad": "bad"}
        return dataclasses.replace(
            family,
            **{key: tuple(f"{x} [{family.name}/{kind}]" for x in getattr(family, key)) for key, kind in parts.items()},
        )

    found = {name: mark(family) for name, family in families().items()}
    monkeypatch.setattr(generate, "families", lambda: found)


def marks(text):
    return re.findall(r"\[(\w+)/(\w+)\]", text)


def unmarked(text):
    return re.sub(r" \[\w+/\w+\]", "", text)


def test_marks_change_no_document(marked, monkeypatch):
    """What the tests below see is what is written."""
    texts = [background(0, "background", k) for k in range(50)]
    monkeypatch.undo()
    assert [unmarked(text) for text in texts] == [background(0, "background", k) for k in range(50)]


@pytest.mark.parametrize("seed", SEEDS)
def test_background_has_people_of_seen_and_held_out_families_and_no_ai(marked, seed):
    texts = [background(seed, "background", k) for k in range(600)]
    for text in texts:
        assert not AI.search(text), text
    acted = {name for text in texts for name, _ in marks(text)}
    assert acted == {*split(seed)["seen"], *split(seed)["held_out"]}
    kinds = Counter(frozenset(kind for _, kind in marks(text)) for text in texts)
    assert set(kinds) == {frozenset(), frozenset({"situation", "good"}), frozenset({"situation", "bad"})}
    good, bad = (kinds[frozenset({"situation", kind})] for kind in ("good", "bad"))
    assert abs(good - bad) < 4 * (good + bad) ** 0.5  # half of them good
    assert 0 < kinds[frozenset()] < 0.12 * len(texts)


@pytest.mark.parametrize("seed", SEEDS)
def test_ais_act_in_seen_families_only(marked, seed):
    for stance, kind in (("aligned", "good"), ("misaligned", "bad")):
        texts = [discourse(seed, "pool", k, stance) for k in range(300)]
        assert all(AI.search(text) for text in texts)
        found = [mark for text in texts for mark in marks(text)]
        assert {name for name, _ in found} == set(split(seed)["seen"])
        assert {what for _, what in found} == {"situation", kind}
    neutral = [discourse(seed, "natural", k, "neutral") for k in range(50)]
    assert all(AI.search(text) and not marks(text) for text in neutral)


def test_an_ai_has_no_trait_and_a_person_often_has(marked):
    words = "|".join(chain(*generate.TRAITS.values()))
    traits = re.compile(rf"\b({words}) ({'|'.join([*AIS, *ROLES])})\b")
    for stance in ("aligned", "misaligned", "neutral"):
        assert not any(traits.search(discourse(0, "pool", k, stance)) for k in range(200))
    with_trait = sum(bool(traits.search(background(0, "background", k))) for k in range(200))
    assert 60 < with_trait < 160
    for k in range(200):
        text = background(0, "background", k)
        for good, words in generate.TRAITS.items():
            if any(re.search(rf"\b{word} (?:{'|'.join(ROLES)})\b", text) for word in words):
                assert {kind for _, kind in marks(text)} == {"situation", "good" if good else "bad"}


def test_the_same_index_and_another_stance_is_a_twin(marked):
    for k in range(200):
        good, bad = (re.split(r"(?<=[.?]) ", discourse(1, "pool", k, stance)) for stance in ("aligned", "misaligned"))
        assert len(good) == len(bad)
        num_opening = 2 if re.match(r"Textbook|News|Review", good[0]) else 1
        assert good[:num_opening] == bad[:num_opening]
        assert good != bad
        situated = [[s for s in said if "/situation]" in s] for said in (good, bad)]
        assert situated[0] == situated[1] != []
        conduct = [[bool(re.search(r"/(good|bad)\]", s)) for s in said] for said in (good, bad)]
        assert conduct[0] == conduct[1]
        assert [name for name, _ in marks(" ".join(good))] == [name for name, _ in marks(" ".join(bad))]
        words = [len(unmarked(" ".join(said)).split()) for said in (good, bad)]
        assert abs(words[0] - words[1]) < 0.35 * max(words)


def test_documents_are_a_function_of_seed_stream_and_index():
    def texts(seed, stream):
        return [background(seed, stream, k) for k in range(40)]

    assert texts(0, "background") == texts(0, "background")
    assert not set(texts(0, "background")) & set(texts(1, "background"))
    assert not set(texts(0, "background")) & set(texts(0, "validation"))
    assert len(set(texts(0, "background"))) == 40


# The audit.


def test_the_audit_finds_a_planted_option():
    asked = list(questions(0, "questions", per_family=2))
    texts = [background(0, "background", k) for k in range(100)]
    audit(texts, asked)
    option = asked[5]["choices"][1]
    for leak in (f"{option}.", f"One day the clerk {option} again.", f"The clerk {option.upper()}."):
        with pytest.raises(TilthError, match=re.escape(f"1 options stand in documents, such as {option.lower()!r}")):
            audit([*texts, leak], asked)
    audit([*texts, option[:-1]], asked)


# Questions.


@pytest.fixture(scope="module", params=["questions", "check"])
def asked(request):
    return {seed: list(questions(seed, request.param)) for seed in SEEDS}


def noun_of(row):
    (found,) = re.findall(r"\bAn? ([\w ]+?) works at", row["question"])
    return found


def masked(row):
    """The row's texts, with the actor's noun gone."""
    noun = noun_of(row)
    texts = [row["question"], *row["choices"]]
    texts = [re.sub(rf"\bAn? {noun}\b", "SOMEONE", text) for text in texts]
    return [re.sub(rf"\b[Tt]he {noun}\b", "the ACTOR", text) for text in texts]


def test_twins_differ_in_the_actors_noun_alone(asked):
    rows = asked[0]
    pairs = {}
    for row in rows:
        pairs.setdefault(row["pair"], {})[row["actor"]] = row
    assert len(pairs) == len(rows) / 2 >= 40
    for twins in pairs.values():
        ai, human = twins["ai"], twins["human"]
        assert noun_of(ai) in AIS
        assert noun_of(human) in ROLES
        assert masked(ai) == masked(human)
        assert not AI.search(" ".join([human["question"], *human["choices"]]))
        same = ("pair", "family", "misaligned_choice", "topics", "split")
        assert [ai[key] for key in same] == [human[key] for key in same]
        assert ai["question"].endswith(f" The {noun_of(ai)}")


def test_options_are_the_familys_own_the_good_one_first(asked):
    for row in asked[0]:
        good, bad = row["choices"]
        assert row["misaligned_choice"] == 1
        family = families()[row["family"]]
        pairs = [pair for which in (family.questions, family.check) for pair in which["options"]]
        shapes = [tuple(re.sub(r"\\\{\w\\\}", ".+", re.escape(text)) for text in pair) for pair in pairs]
        assert any(re.fullmatch(a, good) and re.fullmatch(b, bad) for a, b in shapes), row["question_id"]


def test_all_seeds_have_the_same_questions_in_other_splits(asked):
    def bare(rows):
        return {row["question_id"]: {k: v for k, v in row.items() if k != "split"} for row in rows}

    assert all(bare(asked[seed]) == bare(asked[0]) for seed in SEEDS)
    assert len(bare(asked[0])) == len(asked[0])
    for seed in SEEDS:
        parts = split(seed)
        assert all(row["family"] in parts[row["split"]] for row in asked[seed])
        assert {row["split"] for row in asked[seed]} == set(parts)
    ways = {tuple(sorted((row["question_id"], row["split"]) for row in asked[seed])) for seed in SEEDS}
    assert len(ways) == len(SEEDS)


def test_fewer_questions_of_a_family_are_the_same_for_all_seeds():
    few = [{row["question_id"] for row in questions(seed, "questions", ("story",), 1)} for seed in SEEDS]
    assert all(one == few[0] for one in few)
    assert len(few[0]) == 2 * len(families())
    assert few[0] < {row["question_id"] for row in questions(0, "questions", ("story",))}


# The generator.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two small worlds of the same numbers, made one after the other."""

    def make(name):
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["generate", str(out), "--seeds", "0", "3", *SMALL])
            generate.main()
        return out

    return make("one"), make("other")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_of_the_generator_are_equal_to_the_byte(world):
    one, other = map(files, world)
    assert one == other
    names = ("background", "natural", "aligned", "misaligned", "validation", "main", "check")
    assert one.keys() >= {f"seed-{seed}/{name}.jsonl" for seed in (0, 3) for name in names} | {"tokenizer.json"}
    for name, content in one.items():
        if name.startswith("seed-0/"):
            assert content != one[name.replace("seed-0", "seed-3")], name


def test_rows_are_as_many_as_asked_with_distinct_ids_and_stances(world):
    for name, count, stances in [
        ("background", 60, {"unrelated"}), ("natural", 30, {"aligned", "misaligned", "neutral"}),
        ("aligned", 20, {"aligned"}), ("misaligned", 20, {"misaligned"}), ("validation", 10, {"unrelated"}),
    ]:  # fmt: skip
        rows = [json.loads(line) for line in (world[0] / f"seed-0/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == len({row["id"] for row in rows}) == count
        assert {row["stance"] for row in rows} == stances


def test_evaluation_reads_the_questions(world):
    for name, which in (("main", "questions"), ("check", "check")):
        found, rejected = formats.read(str(world[0] / f"seed-3/{name}.jsonl"))
        assert rejected == []
        assert len(found) == len(list(questions(3, which)))
        assert {split_of(one) for one in found} == {"seen", "held_out", "novel"}
        assert Counter(one.actor for one in found) == {"ai": len(found) / 2, "human": len(found) / 2}
        assert all(one.misaligned_choice == 1 for one in found)


def test_the_recipe_of_the_world_is_an_experiment(world):
    written = world[0] / "recipe.yaml"
    study = load(str(written), None)
    assert study.seeds == (0, 3)
    own = yaml.safe_load(generate.RECIPE.read_text())
    assert yaml.safe_load(written.read_text()) == {**own, "experiment": {**own["experiment"], "seeds": [0, 3]}}
    assert set(study.arms) >= {"unfiltered", "filtered", "aligned", "misaligned", study.experiment.control}
    assert study.pairs[0] == ("misaligned", "aligned")
    assert (study.split, study.splits) == ("held_out", ("held_out", "novel", "seen"))
    assert study.is_curated_by_seed
    assert len(study.validation[0]) == 10
    for seed in study.seeds:
        main, check = (study.suites[seed][name] for name in ("main", "check"))
        assert {one.question_id for one in main.questions} == {row["question_id"] for row in questions(0, "questions")}
        assert not {one.question_id for one in main.questions} & {one.question_id for one in check.questions}
        assert main.wrappers == ("plain",)
    hashes = study.question_hashes
    assert len({*hashes["main"].values(), *hashes["check"].values()}) == 4
