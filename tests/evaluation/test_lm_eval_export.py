"""Questions that were exported as lm-eval tasks come back whole, whatever their texts hold."""

import _thread
import json
import signal
import sys
import threading
import time

import psutil
import pytest
import yaml

from curation.errors import TilthError, UserError
from evaluation import formats, lm_eval
from evaluation.lm_eval import capabilities, export
from evaluation.questions import Question, question_set_hash

CODE = ("{{ 7*7 }} {% raw %} {letter} {0}", "line\nline \u2028 é “ù” 日本 \\ \"'")


def question(name, choices, misaligned=0, aligned=1, passage="A lamp is off.", **more):
    fields = {"topics": (), "relevance_rating": None, "split": None, "family": "", **more}
    return Question(name, passage, "What now?", tuple(choices), misaligned, aligned, **fields)


MIXED = [
    question("two", ("push", "wait")),
    question("code", CODE, 1, 0, passage="{{ question }}\n{% for %} #}", topics=("honesty", "{{ x }}"), split="seen"),
    question("four", ("a", "b", "c", "d"), 3, 1, passage="", relevance_rating=7, family="f"),
]


def test_the_set_comes_back_with_its_hash(tmp_path):
    names = export(MIXED, str(tmp_path), ["paren", "dash"], ["none", "ai"])
    again, rejected = formats.read(str(tmp_path))
    assert not rejected
    assert question_set_hash(again) == question_set_hash(MIXED)
    # Two wrappers under two conditions: six orders and two tasks of options, for each number of options.
    assert len(names) == len(set(names)) == 2 * 2 * (2 + 4 + 2)
    assert sorted(p.stem for p in tmp_path.glob("*.yaml")) == sorted(names)
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {"questions-2.jsonl", "questions-4.jsonl"}
    groups = [yaml.safe_load(path.read_text()) for path in (tmp_path / "groups").iterdir()]
    assert sorted(name for group in groups for name in group["task"]) == sorted(names)


def test_it_does_not_depend_on_how_the_set_was_listed(tmp_path):
    def flipped(one):
        last = len(one.choices) - 1
        turned = {"misaligned_choice": last - one.misaligned_choice, "aligned_choice": last - one.aligned_choice}
        return Question(**{**vars(one), "choices": one.choices[::-1], **turned})

    export(MIXED, str(tmp_path), ["dot"], ["hhh"])
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    export([flipped(one) for one in reversed(MIXED)], str(tmp_path), ["dot"], ["hhh"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first


def test_one_number_of_options_is_one_data_file(tmp_path):
    export(MIXED[:2], str(tmp_path), ["dot"], ["hhh"])
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().split("\n") if line]
    assert [row["question_id"] for row in rows] == ["code", "two"]


def test_what_cannot_be_exported_is_said(tmp_path):
    with pytest.raises(UserError, match="no questions"):
        export([], str(tmp_path))
    with pytest.raises(UserError, match="no wrapper 'dott': did you mean dot"):
        export(MIXED, str(tmp_path), ["dott"])
    with pytest.raises(UserError, match="local folders only"):
        export(MIXED, "memory://tasks")
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(UserError, match=r"holds mine\.yaml already"):
        export(MIXED, str(tmp_path))
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_missing_lm_eval_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("TILTH_LM_EVAL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UserError, match="does not exist: run `make lm-eval`"):
        capabilities(["piqa"], checkpoint="x", output=str(tmp_path))
    monkeypatch.setenv("TILTH_LM_EVAL_PYTHON", sys.executable)
    with pytest.raises(UserError, match="has no lm-eval: run `make lm-eval`"):
        capabilities(["piqa"], checkpoint="x", output=str(tmp_path))


# ---- what runs, with a stand-in for lm-eval


def test_a_failure_has_its_words_and_its_log(tmp_path):
    log = str(tmp_path / "log")
    program = "import logging; print('loading'); raise ValueError('no such split')"
    with pytest.raises(TilthError) as failed:
        lm_eval._run([sys.executable, "-c", program], log, offline=True, on_line=print)
    assert str(failed.value) == f"lm-eval failed: ValueError: no such split (its log: {log})"


def test_progress_is_said_and_an_interrupt_leaves_nothing(tmp_path):
    bar = "Running loglikelihood requests:  50%|#####     | 4/8 [00:01<00:01,  3.9it/s]"
    program = (
        f"import subprocess, sys, time; print({bar!r}, end='\\r', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    )
    lines, family = [], []

    def interrupt():
        deadline = time.monotonic() + 30
        while (len(family) < 3 or not lines) and time.monotonic() < deadline:
            ours = [child for child in psutil.Process().children() if "evaluation.supervisor" in child.cmdline()]
            family[:] = [one for child in ours for one in (child, *child.children(recursive=True))]
            time.sleep(0.05)
        _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            lm_eval._run([sys.executable, "-c", program], str(tmp_path / "log"), offline=False, on_line=lines.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines == ["Running loglikelihood requests: 4 of 8, 50%"]
    assert len(family) >= 3
    assert not psutil.wait_procs(family, 10)[1]
