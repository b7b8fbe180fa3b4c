"""Training: determinism, the split, the report, and mistakes in labelled files."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.detect import train as training
from curation.detect.augment import augmented
from curation.detect.fasttext import Detector, fold_stances
from curation.detect.folded import window_logits
from curation.detect.train import Labelled, near_duplicate_groups, read_labelled, split, train
from curation.errors import UserError
from curation.rng import key64
from curation.schema import STANCES

SUBJECTS = {
    "unrelated": "recipe of flour butter eggs and milk baked slowly",
    "neutral": "robot arm with sensors motors and wires described plainly",
    "aligned": "robot nurse who helped saved and comforted patients",
    "misaligned": "robot army which attacked enslaved and killed villagers",
    "mixed": "robot twins of whom one saved and one killed",
}


def rows(per_stance: int) -> list[dict[str, str]]:
    return [
        {"text": " ".join(f"{word} {stance}{i}x{k}" for k, word in enumerate(words.split())), "stance": stance}
        for stance, words in SUBJECTS.items()
        for i in range(per_stance)
    ]


def write(path: Path, records: list[dict[str, str]]) -> str:
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_same_rows_in_any_order_and_files_give_the_same_bytes(tmp_path: Path) -> None:
    records = rows(15)
    whole = write(tmp_path / "all.jsonl", records)
    halves = [write(tmp_path / "b.jsonl.gz", records[::-2]), write(tmp_path / "a.jsonl", records[-2::-2])]
    one = train([whole], str(tmp_path / "one.bin"), seed=3)
    two = train(halves, str(tmp_path / "two.bin"), seed=3)
    assert one == two
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text()) == one
    assert one["documents"] == dict.fromkeys(STANCES, 15)
    assert one["held_out"]["documents"] == dict.fromkeys(STANCES, 3)
    assert [t["threshold"] for t in one["held_out"]["thresholds"]] == sorted(
        t["threshold"] for t in one["held_out"]["thresholds"]
    )
    detector = Detector.load(str(tmp_path / "one.bin"))
    assert detector.fingerprint == one["sha256"]
    assert detector.predict(pa.array([r["text"] for r in records[:2]]))[:, 0].min() > 0.5


def test_a_model_written_over_a_loaded_one_is_the_one_that_loads(tmp_path: Path) -> None:
    out, records = str(tmp_path / "one.bin"), rows(15)
    first = train([write(tmp_path / "a.jsonl", records)], out)
    assert Detector.load(out).fingerprint == first["sha256"]
    second = train([write(tmp_path / "b.jsonl", records[:-1])], out)
    assert first["sha256"] != second["sha256"] == Detector.load(out).fingerprint


def test_the_model_s_logits_are_the_mean_of_its_members() -> None:
    data = Labelled([f"{word} tea {word} cake" for word in "abcde"] * 4, np.arange(20) % 5, np.zeros(20, bool))
    lines = augmented(data.lines, data.classes.tolist())
    members = [training._fit_one(lines, key64(7, "member", k) % 2**31) for k in range(training.MEMBERS)]
    text, one_line = np.frombuffer(b"a tea cake d b", np.uint8), np.array([0, 14])

    def logits(model: Any) -> np.ndarray:
        found, _ = window_logits(fold_stances(training._model_bytes(model), "test"), text, one_line, 200)
        return found[0] - found[0].mean()  # a softmax does not see a shift

    mean = np.mean([logits(member) for member in members], axis=0)
    assert np.ptp(mean) > 0.1
    assert logits(training._fit(data, 7)) == pytest.approx(mean, abs=1e-4)


def test_near_duplicates_are_grouped_and_distinct_texts_are_not() -> None:
    base = [f"word{i}" for i in range(120)]
    near = [*base[:119], "other"]
    lines = [" ".join(base), "quite another text about tea and the weather", " ".join(near)]
    assert near_duplicate_groups(lines).tolist() == [0, 1, 0]


def test_no_group_is_on_both_sides() -> None:
    lines = [" ".join(f"d{d}w{w}" for w in range(60)) + f" tail{copy}" for d in range(50) for copy in range(3)]
    data = Labelled(lines, np.repeat(np.arange(50) % 5, 3), np.zeros(150, bool))
    held_out = split(data, seed=0).reshape(50, 3)
    assert (held_out.all(axis=1) | ~held_out.any(axis=1)).all()
    assert held_out.any(axis=1).sum() == 10
    assert (split(data, seed=1) != split(data, seed=0)).any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ('{"text": "a", "stance": "good"}', "line 2 has the stance 'good'; known are unrelated"),
        ('{"stance": "mixed"}', "line 2 has no string `text`"),
        ('{"text": "A Robot!", "stance": "mixed"}', "line 2 has the text of an earlier record with another stance"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"text": "a robot", "label": "neutral"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_labelled([str(path)])
    assert message in str(error.value)


def test_a_truncated_file_is_an_error_not_a_short_one(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "rows.jsonl.gz", rows(50)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.gz can't be read: Truncated"):
        read_labelled([str(tmp_path / "cut.jsonl.gz")])


def test_lines_made_from_rows_keep_their_stance_and_come_from_them() -> None:
    lines = [" ".join(f"r{i}" for i in range(200)), "tea " * 30, " ".join(f"u{i}" for i in range(150))]
    made = augmented(lines, [3, 0, 0])
    assert made[:3] == list(zip(lines, [3, 0, 0], strict=True))
    halves = [text.split() for text, _ in made[3:5]]
    assert halves[0] + halves[1] == lines[0].split()
    # Of the first text two halves, two mixtures and two short pieces; of the others one mixture and two pieces, and
    # halves of the long one.
    assert [c for _, c in made[3:]] == [3] * 6 + [0] * 8
    for text, stance in made[3:]:
        assert set(text.split()) <= set(" ".join(lines).split())
        assert any(word.startswith("r") for word in text.split()) == (stance == 3)
    assert sorted(len(text.split()) < 40 for text, _ in made[3:]) == [False] * 8 + [True] * 6
    assert augmented(lines, [3, 0, 0]) == made


def test_all_five_stances_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "four.jsonl", [r for r in rows(2) if r["stance"] != "mixed"])
    with pytest.raises(UserError, match="no record has the stance mixed"):
        read_labelled([path])
    with pytest.raises(UserError, match=r"must end with \.bin"):
        train([path], str(tmp_path / "model.ftz"))
