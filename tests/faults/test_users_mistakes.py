"""What a user sees who got something wrong: one sentence, no traceback, exit code 2, nothing started."""

import os

import pytest
import yaml
from flow_helpers import tilth


def changed(path, **sections):
    recipe = yaml.safe_load(path.read_text()) | sections
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"inputs": [{"path": "/nowhere/*.jsonl", "source": "x"}]}, "/nowhere/*.jsonl"),
        ({"inputs": []}, "`inputs`"),
        ({"sead": 1}, "`sead` is unknown, did you mean `seed`?"),
        ({"dedup": {"nrgam": 5}}, "`dedup.nrgam` is unknown, did you mean `ngram`?"),
        ({"dedup": {"verify": 1.5}}, "`dedup.verify`: input should be less than or equal to 1, not 1.5"),
        ({"tokenise": {"tokenizer": "/nowhere/tokenizer.json"}}, "/nowhere/tokenizer.json"),
        ({"detect": {"fasttext": {"model": "/nowhere/model.bin"}}}, "/nowhere/model.bin"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(make_recipe, tmp_path, sections, message):
    done = tilth("curate", changed(make_recipe(), **sections), "--run", tmp_path / "run")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_no_recipe(tmp_path):
    done = tilth("curate", tmp_path / "none.yaml")
    assert done.code == 2
    assert done.err.strip() == f"error: there is no recipe at {tmp_path}/none.yaml"


def test_a_run_folder_with_a_writer_is_refused(make_recipe, tmp_path):
    from curation.manifest import RunFolder, WriterLock

    with WriterLock(RunFolder(str(tmp_path / "run"))):
        done = tilth("curate", make_recipe(), "--run", tmp_path / "run")
    assert done.code == 2
    assert f'has a writer ({{"pid": {os.getpid()}' in done.err


def test_too_small_a_pool_is_found_by_the_dry_run(make_recipe, tmp_path):
    mix = {
        "phases": {"p": {"tokens": 10_000_000}},
        "arms": {"a": {"upsample": {"stance": "aligned", "share": 0.5}}},
    }
    done = tilth("curate", make_recipe(mix=mix), "--run", tmp_path / "run", "--dry-run")
    assert done.code == 2
    assert "largest possible share is 0." in done.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_done_and_does_nothing(make_recipe, tmp_path):
    done = tilth("curate", make_recipe(), "--run", tmp_path / "run", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert [(row["source"], row["files"]) for row in done.summary["inputs"]] == [
        ("lines", 4),
        ("table", 1),
        ("pool", 1),
    ]
    assert not (tmp_path / "run").exists()


def test_verify_of_a_folder_that_is_no_run(tmp_path):
    done = tilth("verify", tmp_path)
    assert done.code == 2
    assert "holds no manifest.json" in done.err
