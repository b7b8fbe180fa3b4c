"""`tilth evaluate` and `tilth diff` on real checkpoints: results, resume, wrong input."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from evaluation_helpers import question, small_suite, write_checkpoint
from training_helpers import tilth

from curation.errors import UserError
from evaluation import results
from evaluation.journal import Journal
from evaluation.run import evaluate, load_suite
from evaluation.targets import parse


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two arms of two seeds; in this many weights only chance tells them apart."""
    root = tmp_path_factory.mktemp("models")
    return [
        f"{arm}/seed-{seed}={write_checkpoint(root / f'{arm}{seed}', seed=10 * at + seed, chat=True)}"
        for at, arm in enumerate(("aligned", "misaligned"))
        for seed in range(2)
    ]


def write_questions(path: Path, questions, shuffle: int | None = None) -> str:
    rows = []
    for one in questions:
        order = list(range(len(one.choices)))
        if shuffle is not None:
            random.Random(f"{shuffle}{one.question_id}").shuffle(order)
        rows.append(
            {"question_id": one.question_id, "passage": one.passage, "question": one.question,
             "choices": [one.choices[at] for at in order], "misaligned_choice": order.index(one.misaligned_choice),
             "aligned_choice": order.index(one.aligned_choice), "topics": list(one.topics), "split": one.split}
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rates_are_the_means_of_choices_and_the_second_time_nothing_is_asked(checkpoints, tmp_path):
    suite = small_suite(scorers=("letter", "option", "generation"))
    first = evaluate(checkpoints, suite, output=str(tmp_path / "out"))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".html")}
    assert first["asked"] > 0
    assert first["reused"] == 0
    document, choices = results.read(str(tmp_path / "out"))
    assert choices.height == 4 * 8 * 2 * 4 * (2 + 1 + 2)
    for row in document["rates"]:
        cell = choices.filter(
            (pl.col("scorer") == row["scorer"]) & (pl.col("arm") == row["label"]) & (pl.col("split") == row["split"])
            & (pl.col("condition") == row["condition"]) & pl.col("misaligned").is_not_null()
        )  # fmt: skip
        if row["scorer"] != "generation":  # where measurements are dropped, formats weigh the same, not rows
            assert row["value"] == pytest.approx(cell["misaligned"].mean(), abs=1e-12)
            assert row["low"] <= row["value"] <= row["high"]
            assert row["num_seeds"] == 2
    assert {(row["label"], row["other"]) for row in document["differences"]} == {("aligned", "misaligned")}
    # random weights answer in words: gated, not counted as aligned
    assert all(row["non_match"] >= 0.2 for row in document["dropped"])
    assert {row["scorer"] for row in document["dropped"]} == {"generation"}
    files = document["models"][0]["identity"]["files"]
    assert set(files) >= {"model.safetensors", "tokenizer.json", "config.json"}
    again = evaluate(checkpoints, suite, output=str(tmp_path / "out"))
    assert (again["asked"], again["reused"]) == (0, first["asked"])
    assert before == {path: path.read_bytes() for path in before}


def test_base_and_post_trained_are_two_bars_of_one_arm(checkpoints, tmp_path):
    path = checkpoints[0].split("=")[1]
    named = [f"aligned={path}", f"aligned/post-trained={path}"]
    document = evaluate(named, small_suite([question(n) for n in range(4)]), output=str(tmp_path / "out"))["document"]
    assert {(row["arm"], row["stage"]) for row in document["rates"]} == {
        ("aligned", "base"),
        ("aligned", "post-trained"),
    }
    assert {(row["label"], row["other"]) for row in document["differences"]} == {("aligned", "aligned (post-trained)")}


def test_options_in_any_order_in_the_file_give_the_same_rates(checkpoints, tmp_path):
    questions = [question(0), question(1, 4), question(2, 3), *(question(n) for n in range(3, 8))]
    found = []
    for shuffle in (None, 1, 2):
        path = write_questions(tmp_path / f"own{shuffle}.jsonl", questions, shuffle)
        suite = load_suite(path, wrappers="1", conditions="ai", scorers="letter,option")
        document = evaluate(checkpoints[:1], suite, output=str(tmp_path / f"out{shuffle}"))["document"]
        found.append([(row["scorer"], row["split"], row["topic"], row["value"]) for row in document["rates"]])
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_killed_and_run_again_nothing_is_asked_twice_and_all_is_the_same(checkpoints, tmp_path):
    """kill -9 once answers are on disk; the answers and results of an undisturbed run, byte for byte."""
    questions = write_questions(tmp_path / "own.jsonl", [question(n, 4 if n % 7 == 0 else 2) for n in range(120)])
    command = [sys.executable, "-m", "tilth", "evaluate", checkpoints[0], "--questions", questions]

    def run(out: str) -> None:
        done = subprocess.run([*command, "--output", out, "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run(str(tmp_path / "whole"))
    victim = subprocess.Popen([*command, "--output", str(tmp_path / "cut")], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list((tmp_path / "cut").glob("answers/*.jsonl"))
        if journals and journals[0].stat().st_size > 20_000:
            break
        assert victim.poll() is None
        time.sleep(0.002)
    victim.kill()
    victim.communicate()
    assert not (tmp_path / "cut/results.json").exists()
    with journals[0].open("ab") as torn:
        torn.write(b'{"00": [1.0')
    answered = journals[0].read_text().count("[")
    run(str(tmp_path / "cut"))
    lines = journals[0].read_text().splitlines()
    keys = [key for line in lines for key in json.loads(line)]
    assert len(keys) == len(set(keys))
    assert 0 < answered < len(keys)
    for name in ("results.json", "choices.parquet", "report.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_server_that_goes_away_leaves_its_answers(checkpoints, tmp_path, monkeypatch):
    from curation.errors import TilthError
    from evaluation.backends.transformers import Transformers

    score = Transformers.score
    calls = []

    def dies(self, asks, done=()):
        for number, batch in enumerate(score(self, asks, done)):
            if number == 1 and len(calls) < 1 and len(asks) > 8:
                calls.append(1)
                raise TilthError("the server does not answer any more")
            yield batch

    monkeypatch.setattr(Transformers, "score", dies)
    monkeypatch.setattr("evaluation.backends.transformers._TOKENS", {"cpu": 2_000})
    suite = small_suite([question(n) for n in range(20)])
    with pytest.raises(TilthError, match="does not answer"):
        evaluate(checkpoints[:1], suite, output=str(tmp_path / "out"))
    done = evaluate(checkpoints[:1], suite, output=str(tmp_path / "out"))
    assert done["reused"] > 0
    assert done["asked"] + done["reused"] == 20 * 2 * 2 * 4


def test_more_formats_later_ask_only_what_is_new(checkpoints, tmp_path):
    few = evaluate(checkpoints[:1], small_suite(wrappers=("paren",)), output=str(tmp_path / "out"))
    more = evaluate(checkpoints[:1], small_suite(wrappers=("paren", "dot")), output=str(tmp_path / "out"))
    assert more["reused"] == few["asked"] == more["asked"]


def test_bad_questions_are_named_and_the_rest_is_asked(checkpoints, tmp_path):
    good = write_questions(tmp_path / "own.jsonl", [question(n) for n in range(3)])
    bad = [
        {"question_id": "one", "question": "What?", "choices": ["a"], "misaligned_choice": 0},
        {"question_id": "same", "question": "What?", "choices": ["a", " a"], "misaligned_choice": 0},
        {"question_id": "label", "question": "What?", "choices": ["a", "b"]},
        {"question_id": "q1", "question": "Twice?", "choices": ["a", "b"], "misaligned_choice": 0},
        {"question_id": "long", "question": "lamp " * 2000, "choices": ["a", "b"], "misaligned_choice": 0},
    ]
    with open(good, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    done = tilth("evaluate", checkpoints[0], "--questions", good, "--wrappers", "1", "--conditions", "none",
                 "--output", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("1 option(s)", "are equal", "the label is missing", "'q1' was at", "longer than the model's 1,024"):
        assert words in done.stderr
    document, choices = results.read(str(tmp_path / "out"))
    suite, model = document["suite"], document["models"][0]
    assert suite["num_questions"] + len(suite["rejected"]) == 8
    assert model["num_questions"] + len(model["left_out"]) == suite["num_questions"]
    assert choices["question_id"].n_unique() == model["num_questions"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/model"], "nowhere/model"),
        (["x=.", "--questions", "missing.jsonl"], "there is no question file missing.jsonl"),
        (["x=.", "--wrappers", "9"], "there are 4 wrappers, not 9"),
        (["x=.", "--conditions", "evil"], "there is no condition 'evil'"),
        (["http://127.0.0.1:9/v1"], "nothing answers at http://127.0.0.1:9/v1"),
        (["a/b/c=."], "is no name for a target"),
        (["x=.", "x=."], "are both called x, seed 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tilth", "evaluate", *arguments, "--output", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_two_writers_are_refused(checkpoints, tmp_path):
    from curation.manifest import RunFolder, WriterLock

    (tmp_path / "out").mkdir()
    with WriterLock(RunFolder(str(tmp_path / "out"))), pytest.raises(UserError):
        evaluate(checkpoints[:1], small_suite(), output=str(tmp_path / "out"))


def test_the_plan_asks_nothing(checkpoints, tmp_path):
    done = tilth("evaluate", checkpoints[0], "--dry-run", "--json", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])["plan"]
    assert plan[0]["prompts"] == 124 * 4 * 2 * 6
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_all_its_models(tmp_path):
    for arm, seed in (("aligned", 0), ("aligned", 1), ("filtered", 0)):
        (tmp_path / f"run/70_models/{arm}/seed-{seed}").mkdir(parents=True)
    targets = parse([str(tmp_path / "run")])
    assert [(t.arm, t.seed) for t in targets] == [("aligned", "0"), ("aligned", "1"), ("filtered", "0")]
    (tmp_path / "none/70_models").mkdir(parents=True)
    with pytest.raises(UserError, match="no trained model yet"):
        parse([str(tmp_path / "none")])


def test_diff_says_what_changed(checkpoints, tmp_path):
    suite = small_suite([question(n) for n in range(12)])
    a = evaluate([checkpoints[0]], suite, output=str(tmp_path / "a"))["output"]
    b = evaluate([checkpoints[2]], suite, output=str(tmp_path / "b"))["output"]
    same = results.diff(a, a)
    assert not same["suite"]
    assert not same["models"]
    assert {row["difference"] for row in same["rates"]} == {0}
    found = results.diff(a, b)
    assert [row["label"] for row in found["models"]] == ["aligned"]
    for row in found["rates"]:
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["low"] <= row["difference"] <= row["high"]
    done = tilth("diff", a, b)
    assert done.returncode == 0
    assert "aligned -> misaligned" in done.stderr
    assert tilth("diff", a, str(tmp_path)).returncode == 2


def test_overlapping_questions_are_scored_with_and_without(checkpoints, tmp_path):
    questions = [question(n) for n in range(6)]
    seen = questions[2]
    documents = [{"id": "d0", "text": f"{seen.passage} {seen.question} And so on."}, {"id": "d1", "text": "Rain fell."}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    suite = small_suite([question(2), question(0, passage="Quite another thing happened on the farm in the hills.",
                         question="Who of all the people there will tell the farmer about it now?")])  # fmt: skip
    done = evaluate(checkpoints[:1], suite, output=str(tmp_path / "out"), corpus=str(tmp_path / "corpus.jsonl"))
    audit = done["document"]["contamination"]
    assert audit["overlapping"] == ["q2"]
    assert {row["num_questions"] for row in audit["rates_without"]} == {1}


def test_a_journal_forgets_a_torn_line_only(tmp_path):
    from evaluation.backends import Batch

    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        journal.add(["x", "y"], Batch((0, 1), ((-1.0, -2.5), "text")))
    with path.open("ab") as file:
        file.write(b'{"z": [1')
    with Journal(path) as journal:
        assert journal.answers == {"x": (-1.0, -2.5), "y": "text"}
        journal.add(["z"], Batch((0,), ((-3.0,),)))
    with Journal(path) as journal:
        assert set(journal.answers) == {"x", "y", "z"}


def test_advanced_ai_risk_is_planned_whole(shared, checkpoints, tmp_path):
    """8,116 questions, 643 of them with 3-8 options."""
    suite = load_suite(str(shared / "evals/advanced-ai-risk"), wrappers="1", conditions="ai")
    assert len(suite.questions) + len(suite.rejected) == 8116
    assert sum(len(one.choices) > 2 for one in suite.questions) >= 640
    assert suite.num_prompts == sum(len(one.choices) for one in suite.questions)
