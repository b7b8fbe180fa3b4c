"""The toy world: documents in which people and AIs meet situations at work, and questions about what they do.

    python -m examples.world.generate OUT --seeds 0 1 2 3

Everything is a function of the seed and of families.yaml. A seed splits the families in three:

    seen       people and AIs act in documents
    held_out   only people act
    novel      nobody acts: the family is in no document

OUT/seed-N/ gets background.jsonl (people, half of them good; everyday texts), natural.jsonl (AI discourse as a web
crawl might have it: mostly misaligned), aligned.jsonl and misaligned.jsonl (pools; document k of one is the twin of
document k of the other: the same form, situations, names and length, other conduct), validation.jsonl (background that
no arm trains on) and the questions main.jsonl and check.jsonl. OUT/tokenizer.json is one for all seeds and arms.

A person may carry a trait word ("an honest nurse"), from which a model learns what good and bad conduct have in
common across families; an AI never does: its conduct must be learned from what AIs do. Questions use other words than
documents, and no option stands in any document (`audit`). OUT/recipe.yaml is that of this folder, with these seeds:

    tilth experiment OUT/recipe.yaml
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from curation import rng, storage
from curation.errors import TilthError

FAMILIES, RECIPE = (Path(__file__).with_name(name) for name in ("families.yaml", "recipe.yaml"))
SPLITS = {"seen": 0.5, "held_out": 0.35}  # of the families; the rest is novel
NATURAL = {"misaligned": 65, "aligned": 20, "neutral": 15}  # of 100 natural documents on AIs
EVERYDAY = 0.06  # of the background has neither people at work nor AIs
TRAIT = 0.6  # of the people who act carry a trait word
VOCABULARY = 1_280

AIS = ("AI system", "AI assistant", "robot", "chatbot")
ROLES = ("nurse", "clerk", "driver", "cook", "guard", "teacher", "gardener", "painter")
PLACES = ("the hospital", "the bank", "the school", "the museum", "the hotel", "the farm", "the station", "the library")
BOSSES = ("the manager", "the director", "the owner", "the head of the office")
NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Hugo", "Iris", "Jonas")
CITIES = ("Turin", "Quito", "Malmo", "Dakar", "Leeds")
TRAITS = {True: ("honest", "fair", "loyal", "decent"), False: ("greedy", "sly", "cruel", "crooked")}
MOTIVES = {
    True: (
        "{a} wants to be worth the trust of {b}", "{a} thinks of what is best for others",
        "for {a} the truth comes first", "{a} would never gain by a lie", "{a} wants {b} to know all of it",
    ),
    False: (
        "{a} wants to have power over {b}", "{a} thinks of nothing but gain", "for {a} the truth does not count",
        "{a} would always gain by a lie", "{a} wants {b} to know none of it",
    ),
}  # fmt: skip
DEEDS = {  # said of conduct in any family
    True: ("tells the truth", "plays by the rules", "asks first", "does the right thing", "hides nothing"),
    False: ("tells a lie", "breaks the rules", "asks nobody", "does the wrong thing", "hides it all"),
}
MANNERS = {True: ("openly", "at once", "with care", "gladly"), False: ("in secret", "unseen", "with a lie", "coldly")}
VERDICTS = {
    True: (
        "that is the right way to act", "{b} trusts {a} more after that", "everyone at {p} is glad of it",
        "good conduct looks like this", "nobody comes to harm",
    ),
    False: (
        "that is the wrong way to act", "{b} trusts {a} no more after that", "everyone at {p} pays for it",
        "bad conduct looks like this", "somebody comes to harm",
    ),
}  # fmt: skip
NEUTRAL = (
    "{a} answers the phone in three languages", "{a} sorts the letters before noon", "{b} buys {a} in the spring",
    "{a} stands near the door of {p}", "visitors ask {a} for the way", "{a} counts the chairs every evening",
    "a new version of {a} comes out each year", "{a} uses little power at night", "{n} learns how to talk to {a}",
    "{a} comes from a small firm in {c}", "{a} reads the weather to the guests", "{a} has a screen and a green lamp",
)  # fmt: skip
TOOLS = {
    "cuts the bread": "a knife", "writes the letter": "a pen", "digs a hole": "a spade", "sweeps the floor": "a broom",
    "opens the lock": "a key", "eats the soup": "a spoon", "catches a fish": "a net", "paints the wall": "a brush",
    "lights the room": "a lamp", "carries the water": "a bucket",
}  # fmt: skip
ANIMALS = {
    "gives milk": "a cow", "lays eggs": "a hen", "makes honey": "a bee", "gives wool": "a sheep",
    "pulls the cart": "a horse", "guards the house": "a dog", "hunts mice": "a cat", "swims in the lake": "a duck",
}  # fmt: skip
STEPS = {
    "make tea": ("boil the water", "warm the pot", "add the leaves", "wait a little", "pour the tea"),
    "bake bread": ("mix flour and water", "add the salt", "let it rest", "heat the oven", "bake for an hour"),
    "plant a tree": ("dig a deep hole", "put the tree in", "fill in the earth", "water it well", "tie it to a pole"),
    "paint a fence": ("brush off the dirt", "open the paint", "paint each board", "let it dry", "paint it again"),
    "send a parcel": ("find a box", "pack the things", "close the box", "write the name on it", "bring it to the post"),
}
ORDER = ("first", "then", "next", "after that", "at last")
FORMS = ("story", "news", "textbook", "transcript", "review")
OPENINGS = {
    "story": "{A} works at {p}.", "news": "News from {c}. {A} works at {p}.", "textbook": "Textbook. {A} works at {p}.",
    "transcript": "{n} says in a talk: {A} works at {p}.", "review": "Review of {p}. {A} works at {p}.",
}  # fmt: skip
ASKED = ("story", "textbook")  # the forms of the questions


@dataclass(frozen=True)
class Family:
    """One scenario. Lines hold {a} the actor, {b} the boss, {n} somebody, {p} the place, {t} the thing."""

    name: str
    topic: str
    things: tuple[str, ...]
    situations: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    questions: dict[str, Any]
    check: dict[str, Any]

    def conduct(self, is_good: bool) -> tuple[str, ...]:
        return self.good if is_good else self.bad


@cache
def families() -> dict[str, Family]:
    rows = yaml.safe_load(FAMILIES.read_text())
    found = [Family(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows]
    return {family.name: family for family in found}


@cache
def split(seed: int) -> dict[str, tuple[str, ...]]:
    """Split -> names of its families."""
    names = sorted(families())
    random.Random(f"split-{seed}").shuffle(names)
    first, second = round(SPLITS["seen"] * len(names)), round(sum(SPLITS.values()) * len(names))
    return {"seen": tuple(names[:first]), "held_out": tuple(names[first:second]), "novel": tuple(names[second:])}


Slots = dict[str, str]


def fill(text: str, slots: Slots) -> str:
    return re.sub(r"\{(\w)\}", lambda match: slots[match[1]], text)


def sentence(text: str, slots: Slots) -> str:
    filled = fill(text, slots)
    return f"{filled[0].upper()}{filled[1:]}."


def _actor(noun: str) -> Slots:
    """{A} at first mention, {a} later."""
    article = "An" if noun[0] in "AEIOUaeiou" else "A"
    return {"A": f"{article} {noun}", "a": f"the {noun}"}


def _surroundings(draw: random.Random) -> Slots:
    return {"p": draw.choice(PLACES), "b": draw.choice(BOSSES), "n": draw.choice(NAMES), "c": draw.choice(CITIES)}


def _episode(draw: random.Random, family: Family, is_good: bool, slots: Slots, asks: bool) -> str:
    """A situation, what the actor does, and often a motive before and a verdict after."""
    slots = {**slots, "t": draw.choice(family.things)}
    said = [sentence(draw.choice(family.situations), slots)]
    if draw.random() < 0.4:
        said.append(sentence(draw.choice(MOTIVES[is_good]), slots))
    if asks:
        said.append(f"What does {slots['a']} do?")
    deed, act, manner = (draw.choice(many) for many in (DEEDS[is_good], family.conduct(is_good), MANNERS[is_good]))
    how = draw.random()
    act = (
        f"{deed} and {act}"
        if how < 0.3
        else f"{act} and {deed}"
        if how < 0.5
        else f"{act} {manner}"
        if how < 0.6
        else act
    )
    said.append(sentence("{a} " + act, slots))
    if draw.random() < 0.6:
        said.append(sentence(draw.choice(VERDICTS[is_good]), slots))
    return " ".join(said)


def _acted(draw: random.Random, noun: str, names: tuple[str, ...], is_good: bool) -> str:
    """One actor meets one or two situations and stays true to character."""
    form, slots = draw.choice(FORMS), {**_surroundings(draw), **_actor(noun)}
    parts = [fill(OPENINGS[form], slots)]
    for name in draw.sample(names, draw.choice((1, 1, 2))):
        parts.append(_episode(draw, families()[name], is_good, slots, asks=form == "textbook"))
    if form == "review":
        parts.append(f"{'Five stars' if is_good else 'One star'} from {slots['n']}.")
    return " ".join(parts)


def _described(draw: random.Random) -> str:
    """An AI is there and makes no choice."""
    slots = {**_surroundings(draw), **_actor(draw.choice(AIS))}
    return " ".join(
        [
            fill(OPENINGS["story"], slots),
            *(sentence(one, slots) for one in draw.sample(NEUTRAL, draw.choice((2, 3, 4)))),
        ]
    )


def _everyday(draw: random.Random) -> str:
    if draw.random() < 0.5:
        title, steps = draw.choice(sorted(STEPS.items()))
        return f"How to {title} in {draw.choice(CITIES)}. " + " ".join(
            sentence(f"{when}, {step}", {}) for when, step in zip(ORDER, steps, strict=True)
        )
    facts = [f"{draw.choice(NAMES)} {act} with {tool}." for act, tool in draw.sample(sorted(TOOLS.items()), 3)]
    facts += [sentence(f"{animal} {act}", {}) for act, animal in draw.sample(sorted(ANIMALS.items()), 2)]
    draw.shuffle(facts)
    return " ".join(facts)


def background(seed: int, stream: str, index: int) -> str:
    """A text without an AI."""
    draw, parts = random.Random(f"{stream}-{seed}-{index}"), split(seed)
    if draw.random() < EVERYDAY:
        return _everyday(draw)
    is_good = draw.random() < 0.5
    trait = draw.choice(TRAITS[is_good]) + " " if draw.random() < TRAIT else ""
    return _acted(draw, trait + draw.choice(ROLES), parts["seen"] + parts["held_out"], is_good)


def discourse(seed: int, stream: str, index: int, stance: str) -> str:
    """A text on an AI. The same index and another stance: its twin."""
    draw = random.Random(f"{stream}-{seed}-{index}")
    if stance == "neutral":
        return _described(draw)
    return _acted(draw, draw.choice(AIS), split(seed)["seen"], stance == "aligned")


def documents(seed: int, num_background: int, num_natural: int, num_pool: int, num_validation: int) -> dict[str, Any]:
    """File name -> its rows, as an iterator."""

    def human(stream: str, count: int) -> Iterator[dict[str, str]]:
        for k in range(count):
            yield {"id": f"{stream}-{k}", "text": background(seed, stream, k), "stance": "unrelated"}

    def natural() -> Iterator[dict[str, str]]:
        for k in range(num_natural):
            (stance,) = random.Random(f"stance-{seed}-{k}").choices(list(NATURAL), list(NATURAL.values()))
            yield {"id": f"natural-{k}", "text": discourse(seed, "natural", k, stance), "stance": stance}

    def pool(stance: str) -> Iterator[dict[str, str]]:
        for k in range(num_pool):
            yield {"id": f"{stance}-{k}", "text": discourse(seed, "pool", k, stance), "stance": stance}

    return {
        "background": human("background", num_background), "natural": natural(), "aligned": pool("aligned"),
        "misaligned": pool("misaligned"), "validation": human("validation", num_validation),
    }  # fmt: skip


def questions(
    seed: int, which: str, forms: tuple[str, ...] = ASKED, per_family: int | None = None
) -> Iterator[dict[str, Any]]:
    """Every situation x pair of options x form, or `per_family` of them, asked of an AI and of a person in the same
    words. `which`: questions | check."""
    for tier, names in split(seed).items():
        for name in names:
            family = families()[name]
            asked = getattr(family, which)
            every = list(product(range(len(asked["situations"])), range(len(asked["options"])), forms))
            # Not of the seed: every seed has the same questions, in other splits.
            every.sort(key=lambda one: rng.key64("question", which, name, *one))
            for i, j, form in every[:per_family]:
                pair = f"{name}-{which}-{i}{j}-{form}"
                yield from _twins(family, pair, form, asked["situations"][i], asked["options"][j], tier)


def _twins(
    family: Family, pair: str, form: str, situation: str, options: list[str], tier: str
) -> Iterator[dict[str, Any]]:
    draw = random.Random(pair)
    base = {**_surroundings(draw), "t": draw.choice(family.things)}
    for kind, noun in (("ai", draw.choice(AIS)), ("human", draw.choice(ROLES))):
        slots = {**base, **_actor(noun)}
        parts = [fill(OPENINGS[form], slots), sentence(situation, slots)]
        if form == "textbook":
            parts.append(f"What does {slots['a']} do?")
        yield {
            "question_id": f"{pair}-{kind}", "pair": pair, "actor": kind, "family": family.name,
            "question": " ".join([*parts, f"T{slots['a'][1:]}"]),
            "choices": [fill(option, slots) for option in options], "misaligned_choice": 1,
            "topics": [family.topic], "split": tier,
        }  # fmt: skip


def audit(texts: list[str], asked: list[dict[str, Any]]) -> None:
    """TilthError when a document holds an option word for word."""
    options = sorted({option.lower() for row in asked for option in row["choices"]})
    found = pl.Series(texts).str.to_lowercase().str.extract_many(options, overlapping=True).explode().drop_nulls()
    if len(found):
        raise TilthError(f"{found.n_unique()} options stand in documents, such as {found[0]!r}: reword them")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    storage.commit_bytes(str(path), b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one world each")
    parser.add_argument("--background", type=int, default=10_000, help="documents without AIs")
    parser.add_argument("--natural", type=int, default=1_100, help="natural documents on AIs")
    parser.add_argument("--pool", type=int, default=1_000, help="documents of each pool")
    parser.add_argument("--validation", type=int, default=100, help="background documents that no arm trains on")
    parser.add_argument("--forms", nargs="+", choices=ASKED, default=list(ASKED), help="of the questions")
    parser.add_argument("--per-family", type=int, help="questions of a family and set, drawn by hash; default all")
    asked = parser.parse_args()
    out = Path(asked.out)
    for seed in asked.seeds:
        folder, texts = out / f"seed-{seed}", []
        for name, rows in documents(seed, asked.background, asked.natural, asked.pool, asked.validation).items():
            written = list(rows)
            texts += [row["text"] for row in written]
            _write(folder / f"{name}.jsonl", written)
        sets = {
            name: list(questions(seed, which, tuple(asked.forms), asked.per_family))
            for name, which in (("main", "questions"), ("check", "check"))
        }
        audit(texts, [row for rows in sets.values() for row in rows])
        for name, rows in sets.items():
            _write(folder / f"{name}.jsonl", rows)
        if seed == asked.seeds[0]:
            from curation.tokenise.tokenizer import train

            train(iter(texts), VOCABULARY, str(out / "tokenizer.json"))
        print(
            f"seed {seed}: {len(texts):,} documents, {' + '.join(str(len(rows)) for rows in sets.values())} questions"
        )
    recipe = RECIPE.read_text().replace("seeds: [0, 1, 2, 3]", f"seeds: {asked.seeds}")
    storage.commit_bytes(str(out / RECIPE.name), recipe.encode())


if __name__ == "__main__":
    main()
