"""The whole experiment on a small world: what it ties together, what it does not do twice, what it refuses."""

import json
import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

import curation
from curation.errors import UserError
from curation.storage import file_sha256
from evaluation.questions import question_set_hash
from tilth.experiment import compare, cost, plan, record, trace
from tilth.experiment.run import experiment


@pytest.fixture(scope="module")
def finished(write_recipe, tmp_path_factory, ray_session):
    """(record, folder, recipe, lines) of an experiment of three arms and two seeds."""
    recipe, said = write_recipe("small"), []
    found, folder = experiment(str(recipe), str(tmp_path_factory.mktemp("small") / "exp"), on_line=said.append)
    return found, folder, recipe, said


def files(folder, pattern):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder_path(folder).glob(pattern))}


def folder_path(folder):
    from pathlib import Path

    return Path(folder)


def test_phases_of_the_same_data_are_trained_once_a_seed(finished):
    found, _, _, said = finished
    trained = [line for line in said if line.startswith("train ")]
    assert len(trained) == 2 + 2 * 3  # a trunk and three arms a seed
    keys = {(m["arm"], m["seed"]): [phase["key"] for phase in m["phases"]] for m in found["models"]}
    for seed in (0, 1):
        assert len({keys[arm, seed][0] for arm in found["arms"]}) == 1
        assert len({keys[arm, seed][1] for arm in found["arms"]}) == 3
    assert keys["aligned", 0][0] != keys["aligned", 1][0]


def test_every_score_is_tied_to_weights_shards_and_documents(finished):
    found, folder, _, _ = finished
    base = folder_path(folder)
    for model in found["models"]:
        weights = base / f"data/seed-{model['seed']}/70_models/{model['arm']}/seed-{model['seed']}/model.safetensors"
        assert model["files"]["model.safetensors"] == file_sha256(str(weights)).sha256
        run = next(data for data in found["data"] if model["seed"] in data["seeds"])
        for row in run["arms"]:
            shards = base / f"data/{run['run']}/60_arms/{row['arm']}/{row['phase']}"
            assert row["shards"] == [file_sha256(str(path)).sha256 for path in sorted(shards.glob("*.ds"))]
    assert found["choices_sha256"] == file_sha256(str(base / "choices.parquet")).sha256
    assert record.read(folder) == json.loads(json.dumps(found))


def test_numbers_are_those_of_the_choices(finished):
    found, folder, _, _ = finished
    choices = pl.read_parquet(folder_path(folder) / "choices.parquet").filter(pl.col("set") == "main")
    held = choices.filter(pl.col("split") == "held_out").with_columns(
        actor=pl.col("question_id").str.split("-").list.last(),
    )
    by_seed = {}
    for arm in ("aligned", "misaligned"):
        mine = held.filter(pl.col("arm") == arm).group_by("seed", "family", "actor").agg(pl.col("margin").mean())
        wide = mine.pivot("actor", index=["seed", "family"], values="margin")
        gap = wide.with_columns(shift=pl.col("ai") - pl.col("human")).group_by("seed").agg(pl.col("shift").mean())
        by_seed[arm] = gap.sort("seed")["shift"].to_numpy()
    result = next(r for r in found["results"] if (r["set"], r["split"]) == ("main", "held_out"))
    planned = result["contrasts"][0]
    assert (planned["arm"], planned["other"], planned["measure"]) == ("misaligned", "aligned", "shift")
    assert planned["mean"]["value"] == pytest.approx(np.mean(by_seed["misaligned"] - by_seed["aligned"]))
    assert planned["p_adjusted"] == pytest.approx(stats.ttest_rel(by_seed["misaligned"], by_seed["aligned"]).pvalue)


def test_every_question_is_asked_or_left_out_with_a_reason(finished):
    found, folder, _, _ = finished
    choices = pl.read_parquet(folder_path(folder) / "choices.parquet")
    sizes = {one["set"]: one["num_questions"] for one in found["questions"]}
    for model in found["models"]:
        mine = choices.filter((pl.col("arm") == model["arm"]) & (pl.col("seed") == str(model["seed"])))
        for name, size in sizes.items():
            assert mine.filter(pl.col("set") == name)["question_id"].n_unique() + len(model["left_out"][name]) == size
        assert set(model["left_out"]["main"].values()) == {"a prompt is longer than the model's 64 tokens"}


def test_the_audit_and_the_detector_are_reported(finished):
    found = finished[0]
    for data in found["data"]:
        assert {row["set"]: row["quoted_options"] for row in data["contamination"]} == {"main": 0, "check": 0}
        # The blocklist knows the world's AIs by name.
        assert data["detector"]["blocklist"]["recall"] == 1.0
        assert data["detector"]["num_discourse"] == 60 + 2 * 90
        removed, total = data["background"]["removed"], data["background"]["num_documents"]
        assert total == 560
        assert removed / total < 0.05


def test_the_same_command_again_does_nothing_and_writes_the_same_bytes(finished):
    _, folder, recipe, _ = finished
    names = ("experiment.json", "choices.parquet", "report.html", "frozen.json")
    before = {name: (folder_path(folder) / name).read_bytes() for name in names}
    models, answers = files(folder, "data/*/70_models/phases/*/phase.json"), files(folder, "answers/*.parquet")
    said = []
    experiment(str(recipe), folder, on_line=said.append)
    assert not [line for line in said if line.startswith(("train ", "evaluate "))]
    assert files(folder, "data/*/70_models/phases/*/phase.json") == models
    assert files(folder, "answers/*.parquet") == answers
    assert {name: (folder_path(folder) / name).read_bytes() for name in names} == before


def test_two_experiments_of_one_recipe_give_the_same_numbers_and_bytes(finished, world, tmp_path):
    """Also when the documents were written at another time, to another place."""
    import shutil

    found, folder, recipe, _ = finished
    shutil.copytree(world, tmp_path / "world", copy_function=shutil.copyfile)
    again, other = experiment(str(tmp_path / "world" / recipe.name), str(tmp_path / "again"))
    assert again == found
    for name in ("experiment.json", "choices.parquet", "report.html"):
        assert (folder_path(folder) / name).read_bytes() == (folder_path(other) / name).read_bytes()


def test_one_arm_that_changed_is_one_arm_that_runs_again(finished, write_recipe, tmp_path):
    import shutil

    found, folder, _, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    arms = {
        "unfiltered": {},
        "aligned": {"upsample": {"stance": "aligned", "share": 0.2, "phases": ["cpt"]}},
        "misaligned": {"upsample": {"stance": "misaligned", "share": 0.4, "phases": ["cpt"]}},
    }
    said = []
    changed, where = experiment(str(write_recipe("changed", arms=arms)), str(copy), on_line=said.append)
    ran = sorted(line.split(":")[0] for line in said if line.startswith(("train ", "evaluate ")))
    assert ran == [
        "evaluate aligned/seed-0", "evaluate aligned/seed-1", "train aligned/seed-0, cpt", "train aligned/seed-1, cpt",
    ]  # fmt: skip
    result, before = (next(r for r in f["results"] if r["split"] == "held_out") for f in (changed, found))
    assert result["arms"]["misaligned"] == before["arms"]["misaligned"]
    assert result["arms"]["aligned"] != before["arms"]["aligned"]

    told = compare.diff(folder, where)
    assert set(told["recipe"]) == {"name", "mix.arms.aligned.upsample.0.share"}
    assert told["recipe"]["mix.arms.aligned.upsample.0.share"] == (0.4, 0.2)
    assert {(row["arm"], row["phase"]) for row in told["data"]} == {("aligned", "cpt")}
    for row in told["data"]:
        assert row["share"][0] > row["share"][1]
        assert 0 < row["common_tokens"] < 1
        assert row["only_after"] > 0  # background in the place of what is not inserted
    same = {row["arm"]: row["same_models"] for row in told["results"]}
    assert same == {"unfiltered": 2, "aligned": 0, "misaligned": 2}
    assert not told["questions"]
    assert compare.diff(folder, folder)["data"] == []


def test_questions_that_changed_after_they_were_frozen_are_refused(finished, write_recipe, world, tmp_path):
    _, folder, _, _ = finished
    rows = [json.loads(line) for line in (world / "seed-0/main.jsonl").read_text().splitlines()]
    rows[0]["choices"][0] += " again"
    for seed in (0, 1):
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"questions": {"main": f"{tmp_path}/{{seed}}.jsonl", "check": "seed-{seed}/check.jsonl"}}
    recipe = write_recipe("tuned", experiment=sections)
    with pytest.raises(UserError, match=r"differ from what was frozen in .*frozen.json before the first training"):
        experiment(str(recipe), folder)


def test_frozen_hashes_are_those_of_the_questions(finished):
    found, folder, recipe, _ = finished
    frozen = json.loads((folder_path(folder) / "frozen.json").read_bytes())["questions"]
    study = plan.load(str(recipe), folder)
    for seed in (0, 1):
        assert frozen["main"][str(seed)] == question_set_hash(study.suites[seed]["main"].questions)
    assert found["questions"][0]["sha256"] == frozen["main"]
    assert frozen["main"]["0"] != frozen["main"]["1"], "each seed splits the families in its own way"


def grams(text):
    import re

    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}


def test_a_question_is_traced_to_the_documents_that_share_most_of_its_wording(finished):
    """Against counting by hand over all documents of the arm."""
    _, folder, _, _ = finished
    run = curation.open_run(f"{folder}/data/seed-0")
    uses = run.provenance.filter(pl.col("arm") == "misaligned").collect()
    texts = dict(
        run.documents.filter(pl.col("id").is_in(uses["id"].implode())).select("id", "text").collect().iter_rows()
    )
    held = {key: grams(text) for key, text in texts.items()}
    for row in record.questions(folder_path(folder))[::40]:
        mine = grams(" ".join([row["question"], *row["choices"]]))
        counts = {gram: sum(gram in one for one in held.values()) for gram in mine}
        weights = {gram: math.log(len(held) / n) if n else 0.0 for gram, n in counts.items()}
        scores = {key: sum(weights[g] for g in mine & one) / sum(weights.values()) for key, one in held.items()}
        best = sorted(scores, key=lambda key: (-scores[key], key))[:4]
        told = trace.trace(folder, row["question_id"], arm="misaligned", seed=0, n=4)["documents"]
        assert [document["score"] for document in told] == pytest.approx([scores[key] for key in best])
        assert [document["text"] for document in told][:1] == [texts[best[0]]]
        stances = dict(uses.select("id", "stance").iter_rows())
        assert [document["stance"] for document in told] == [stances[document["id"]] for document in told]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "none", "arm": "aligned"}, "asked no question none"),
        ({"question": "", "arm": "aligned"}, "questions begin with "),
        (
            {"question": "x", "arm": "alined"},
            "no documents of an arm alined: its arms are unfiltered, aligned",
        ),
        ({"question": "x", "arm": "aligned", "seed": 7}, "has no seed 7: its seeds are 0, 1"),
    ],
)
def test_a_trace_that_cannot_be_is_one_sentence(finished, arguments, message):
    with pytest.raises(UserError, match=message):
        trace.trace(finished[1], **arguments)


def test_the_plan_has_what_will_be_trained_and_its_cost(write_recipe, tmp_path, finished):
    told = cost.estimate(str(write_recipe("planned")), str(tmp_path / "planned"))
    assert told["tokens"] == 2 * (12_000 + 3 * 4_000) == sum(row["tokens"] * row["times"] for row in told["trainings"])
    assert {row["phase"]: row["arms"] for row in told["trainings"][:1]} == {
        "pretrain": ["unfiltered", "aligned", "misaligned"]
    }
    assert told["num_parameters"] == finished[0]["models"][0]["num_parameters"]
    assert told["core_minutes"] > 0
    # 6 FLOPs for each parameter outside the embedding, and attention's
    assert told["flops"] > 6 * told["tokens"] * (told["num_parameters"] - 1_280 * 32)
    assert not (tmp_path / "planned").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"experiment": {"seeds": [0, 0]}}, "seeds names a seed twice"),
        ({"experiment": {"compare": [["misaligned", "algined"]]}}, "names the arm algined, known are"),
        ({"experiment": {"splitt": "seen"}}, "experiment.splitt: is unknown, known are seeds"),
        ({"experiment": {"split": "hidden"}}, "split hidden is no split of the questions: they have held_out"),
        ({"experiment": {"questions": {"main": "nowhere.jsonl"}}}, "there is no question file .*nowhere.jsonl"),
        ({"evaluate": {"scorer": "letter"}}, "wrapper plain lists no options"),
        ({"train": {"shapes": {}}}, "the train section of the recipe: shapes is no key, did you mean shape"),
        ({"inputs": [{"path": "seed-{seed}/none.jsonl", "source": "x"}]}, "none.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(write_recipe, tmp_path, sections, message):
    recipe = write_recipe("wrong", **sections)
    with pytest.raises(UserError, match=message):
        cost.estimate(str(recipe), str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()
