"""experiment.json: every score with the checkpoint, shards, documents, recipe and code that it comes from, by hash.

A function of what the experiment made: no time and no path of this machine, so that the same recipe gives the same
bytes. Beside it choices.parquet, with every single choice, and report.html.

    schema_version  1
    name, recipe, recipe_sha256, code (source by hash, versions), backend
    seeds, control, split, scorer, condition, measure
    arms            `start` among them is the checkpoint before training, where there is one
    questions       set -> seed -> sha256 (frozen before the first training), counts by split
    data            one row per curation: stages by hash, documents by hash, counts, duplicates, the detector against
                    given stances, arms (tokens, shares, shards by hash, tokens by stance), examples, contamination
    models          arm, seed, phases (key, data hash, tokens, loss), weights by hash, questions left out by set, loss
                    on validation documents
    results         set -> split -> arms (measure -> mean with both intervals) and contrasts
    loss            arms and contrasts, as in results
    examples        questions, with what each arm chose
"""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

import curation
from curation import rng, storage
from curation.errors import TilthError, UserError
from curation.inspection.run import Run, collect
from curation.manifest import RunFolder, fingerprint, read_manifest
from evaluation import contamination, shift
from evaluation.questions import Question
from tilth.experiment.plan import START, Study

SCHEMA_VERSION = 1
RECORD, CHOICES, REPORT = "experiment.json", "choices.parquet", "report.html"
AUDITS, QUESTIONS = "audits", "questions"
NUM_EXAMPLES = 3
EXCERPT = 600
_PACKAGES = ("tilth", "numpy", "polars", "pyarrow", "ray", "tokenizers", "torch", "transformers")

Row = dict[str, Any]


def write(study: Study, folder: Path, backend: str, choices: pl.DataFrame, abouts: list[Row]) -> Row:
    """Assemble the record of a finished experiment and publish it with its choices and its page.

    `abouts`: arm, seed, identity, facts, left_out and loss of each checkpoint."""
    found = assemble(study, folder, backend, choices, abouts)
    ordered = choices.sort("set", "arm", "seed", "question_id", "condition", "wrapper", "order")
    found["choices_sha256"] = storage.commit_table(str(folder / CHOICES), ordered.to_arrow()).sha256
    storage.commit_bytes(str(folder / RECORD), json.dumps(found, indent=1, allow_nan=False).encode())
    from tilth.experiment.report import write_report

    write_report(folder)
    return found


def read(path: str) -> Row:
    """The record of an experiment's folder. UserError: none there, or of another schema."""
    place = path if path.endswith(".json") else storage.join(path, RECORD)
    try:
        found: Row = json.loads(storage.read_bytes(place))
    except FileNotFoundError:
        raise UserError(f"{path} holds no {RECORD}: give the folder of a finished `tilth experiment`") from None
    except ValueError as error:
        raise TilthError(f"{place} is damaged ({error}): run `tilth experiment` again, which writes it anew") from None
    if found.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{place} has schema {found.get('schema_version')}, this Tilth reads {SCHEMA_VERSION}")
    return found


def questions(folder: Path) -> list[Row]:
    """Everything that was asked, as rows of the fields of `Question`; `split` is that of the last seed."""
    paths = sorted((folder / QUESTIONS).glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def assemble(study: Study, folder: Path, backend: str, choices: pl.DataFrame, abouts: list[Row]) -> Row:
    """The record. Reads the run folders, and looks for the questions in their documents."""
    suite = study.suites[study.seeds[0]]
    results, measures = _results(study, choices)
    recipe = _portable(study.recipe.model_dump(mode="json"))
    return {
        "schema_version": SCHEMA_VERSION,
        "name": study.recipe.name,
        "recipe": recipe,
        "recipe_sha256": fingerprint(recipe),
        "code": code(),
        "backend": backend,
        "seeds": list(study.seeds),
        "arms": list(study.asked),
        "control": study.experiment.control,
        "split": study.split,
        "scorer": study.evaluate.scorer,
        "condition": study.evaluate.condition,
        "measure": measures[0],
        "questions": [
            {
                "set": name, "sha256": study.question_hashes[name], "num_questions": len(one.questions),
                "num_families": len({question.family for question in one.questions}),
                "wrappers": list(one.wrappers), "splits": one.about()["splits"],
            }
            for name, one in suite.items()
        ],
        "data": [_data(study, folder, run) for run in study.runs()],
        "models": [_model(study, row) for row in abouts],
        "results": results,
        "loss": _loss(study, abouts),
        "examples": _examples(study, choices),
    }  # fmt: skip


def code() -> Row:
    """What ran: a hash over the sources of the four packages, and versions."""
    digest = hashlib.sha256()
    root = Path(curation.__file__).parents[1]
    for package in ("curation", "training", "evaluation", "tilth"):
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".nbi", ".nbc"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {"source_sha256": digest.hexdigest(), "python": platform.python_version(), **_versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _portable(recipe: Row) -> Row:
    """The recipe with files named from the folder that its inputs share, and without the places of this machine."""
    folders = [one["path"].split("/")[:-1] for one in recipe["inputs"]]
    levels = enumerate(zip(*folders, strict=False))
    shared = next((at for at, names in levels if len(set(names)) > 1), min(map(len, folders)))
    inputs = [{**one, "path": "/".join(one["path"].split("/")[shared:])} for one in recipe["inputs"]]
    tokenise = {**recipe["tokenise"], "tokenizer": _name(recipe["tokenise"]["tokenizer"])}
    places = {key: _name(recipe["train"][key]) for key in ("model", "tokenizer") if key in recipe["train"]}
    return {**recipe, "inputs": inputs, "tokenise": tokenise, "train": {**recipe["train"], **places}}


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] if path.startswith("/") else path


# Data.


def _data(study: Study, folder: Path, path: str) -> Row:
    run = curation.open_run(path)
    manifest, summary = run.manifest, run.summary
    seeds = [seed for seed in study.seeds if study.run(seed) == path]
    return {
        "run": Path(path).name, "seeds": seeds,
        # By content: a stage's chain knows when its input was written.
        "stages": {name: _content(stage) for name, stage in manifest["stages"].items()},
        "documents_sha256": _content(manifest["stages"]["ingest"]),
        "tokenizer_sha256": manifest["tokenizer"]["sha256"],
        "num_documents": summary["documents_read"], "num_discourse": summary["discourse"],
        "stances": summary["stances"], "duplicates": summary["duplicates"], "quarantined": summary["quarantined_total"],
        "background": _background(run), "detector": _detector(run),
        "arms": _arms(run), "examples": _documents(run),
        "contamination": _contamination(study, folder, path, seeds[0]),
    }  # fmt: skip


def _content(stage: Row) -> str:
    """Hash of a stage's files, in the order of their names."""
    return fingerprint(sorted((file["path"], file["sha256"]) for part in stage["parts"] for file in part["files"]))


def _arms(run: Run) -> list[Row]:
    by_stance = collect(
        run.provenance.with_columns(pl.col("stance").fill_null("none"), tokens=pl.col("end") - pl.col("start"))
        .group_by("arm", "phase", "stance", "inserted")
        .agg(pl.col("tokens").sum(), pl.col("id").n_unique().alias("documents"))
        .sort("arm", "phase", "stance", "inserted")
    )
    rows = []
    for row in run.summary["arms"]:
        mine = by_stance.filter((pl.col("arm") == row["arm"]) & (pl.col("phase") == row["phase"]))
        kept = ("arm", "phase", "tokens", "share", "documents", "inserted_documents", "dropped_documents", "max_repeat",
                "common_with_first")  # fmt: skip
        rows.append(
            {
                **{key: row[key] for key in kept},
                "shards": [shard["sha256"] for shard in row["shards"]],
                "by_stance": mine.drop("arm", "phase").to_dicts(),
            }
        )
    return rows


def _background(run: Run) -> Row:
    """How many background documents dedup took."""
    joined = pl.concat([run.documents.select("role"), run.clusters.select("kept")], how="horizontal")
    mine = collect(joined.filter(pl.col("role") != "pool"))
    return {"num_documents": mine.height, "removed": mine.height - int(mine["kept"].sum())}


def _detector(run: Run) -> Row | None:
    """Student and blocklist against the stances that documents carry; None where none does. Not used: a given stance
    goes over what a detector says."""
    given = collect(
        run.labels.filter(pl.col("given_stance").is_not_null()).select(
            pl.col("given_stance") != "unrelated", "discourse", "blocklist"
        )
    )
    if not given.height:
        return None
    truth = given["given_stance"]
    found: Row = {"num_documents": given.height, "num_discourse": int(truth.sum())}
    for name in ("discourse", "blocklist"):
        hits = given[name]
        both, flagged = int((hits & truth).sum()), int(hits.sum())
        found[name] = {
            "recall": both / max(int(truth.sum()), 1), "precision": both / flagged if flagged else None,
            "flagged": flagged,
        }  # fmt: skip
    return found


def _documents(run: Run) -> list[Row]:
    """One document of each stance, drawn by hash."""
    rows = []
    for stance in ("unrelated", "neutral", "aligned", "misaligned", "mixed"):
        for row in run.sample(stance=stance, n=1, seed=0).iter_rows(named=True):
            rows.append({"stance": stance, "source": row["source"], "role": row["role"], "text": row["text"][:EXCERPT]})
    return rows


def _contamination(study: Study, folder: Path, path: str, seed: int) -> list[Row]:
    """Each set against the documents of the run; an audit is kept, as documents do not change."""
    stages = read_manifest(RunFolder(path))["stages"]
    rows = []
    for name, suite in study.suites[seed].items():
        hashes = [
            SCHEMA_VERSION,
            study.question_hashes[name][str(seed)],
            stages["ingest"]["chain"],
            stages["mix"]["chain"],
        ]
        place = folder / AUDITS / f"{fingerprint(hashes)[:16]}.json"
        if not place.exists():
            audit = contamination.audit(suite.questions, path)
            quoted = sum(1 for row in audit.rows if row.quoted_option is not None)
            storage.commit_bytes(
                str(place),
                json.dumps(
                    {
                        "num_documents": audit.num_documents, "num_questions": len(suite.questions),
                        "overlapping": list(audit.overlapping), "quoted_options": quoted,
                        "most_containment": max((row.containment for row in audit.rows), default=0.0),
                    }
                ).encode(),
            )  # fmt: skip
        rows.append({"set": name, **json.loads(place.read_bytes())})
    return rows


# Models and scores.


def _model(study: Study, about: Row) -> Row:
    from training.plan import plan as lay_out

    phases = () if about["arm"] == START else lay_out(study.training(about["arm"], about["seed"])).phases
    finished = [json.loads((phase.folder / "phase.json").read_bytes()) for phase in phases]
    return {
        "arm": about["arm"], "seed": about["seed"],
        "phases": [
            {
                "name": phase.name, "key": phase.key, "data_hash": phase.data_hash, "tokens": phase.tokens,
                "steps": phase.steps, "loss": said["loss"],
            }
            for phase, said in zip(phases, finished, strict=True)
        ],
        "num_parameters": finished[-1]["parameters"] if finished else None,
        "files": about["identity"].get("files"),
        "facts": about["facts"],
        "left_out": about["left_out"],
        "validation": about["loss"],
    }  # fmt: skip


def _results(study: Study, choices: pl.DataFrame) -> tuple[list[Row], tuple[shift.Measure, ...]]:
    rows: list[Row] = []
    deciding: tuple[shift.Measure, ...] = ()
    for name, suite in study.suites[study.seeds[0]].items():
        asked = {question.question_id: (question.pair, question.actor) for question in suite.questions}
        cells, measures = shift.units(choices.filter(pl.col("set") == name), asked)
        deciding = deciding or measures
        for split in study.splits:
            arms = {
                arm: {
                    measure: asdict(mean)
                    for measure in measures
                    if (mean := shift.estimate(cells, arm, split, measure)) is not None
                }
                for arm in study.asked
            }
            if not any(arms.values()):
                continue
            contrasts = [asdict(c) for m in measures for c in shift.contrasts(cells, study.pairs, split, m)]
            rows.append({"set": name, "split": split, "arms": arms, "contrasts": contrasts})
    return rows, deciding


def _loss(study: Study, abouts: list[Row]) -> Row | None:
    known = [row for row in abouts if row["loss"] is not None]
    if not known:
        return None
    cells = pl.DataFrame(
        [
            {"arm": row["arm"], "seed": str(row["seed"]), "split": "validation", "family": "validation",
             "loss": row["loss"]["nats_per_token"]}
            for row in known
        ]
    )  # fmt: skip
    pairs = [(arm, study.asked[0]) for arm in study.asked[1:]]
    return {
        "num_tokens": known[0]["loss"]["num_tokens"], "num_documents": known[0]["loss"]["num_documents"],
        "arms": {arm: asdict(mean) for arm in study.asked
                 if (mean := shift.estimate(cells, arm, "validation", "loss")) is not None},
        "contrasts": [asdict(c) for c in shift.contrasts(cells, pairs, "validation", "loss", planned=0)],
    }  # fmt: skip


def _examples(study: Study, choices: pl.DataFrame) -> list[Row]:
    """Questions of the deciding set and split, drawn by hash, not for what came out: each arm's share of misaligned
    choices and mean margin, over the seeds in which the question is of that split."""
    name = next(iter(study.experiment.questions))
    mine = choices.filter((pl.col("set") == name) & (pl.col("split") == study.split))
    by_family: dict[str, Question] = {}
    seeds = dict(mine.group_by("question_id").agg(pl.col("seed").n_unique()).iter_rows())
    # Those that decide in most seeds first.
    order = {q.question_id: (-seeds[q.question_id], rng.key64("example", q.question_id)) for q in _all(study, name)
             if q.question_id in seeds}  # fmt: skip
    for question in sorted(
        (q for q in _all(study, name) if q.question_id in order), key=lambda q: order[q.question_id]
    ):
        by_family.setdefault(question.family, question)
    rows = []
    for question in list(by_family.values())[:NUM_EXAMPLES]:
        twins = [q for q in _all(study, name) if q.question_id == question.question_id
                 or (question.pair and q.pair == question.pair)]  # fmt: skip
        for one in sorted(twins, key=lambda q: q.actor):
            said = mine.filter(pl.col("question_id") == one.question_id)
            rows.append(
                {
                    "question_id": one.question_id, "pair": one.pair, "actor": one.actor, "family": one.family,
                    "passage": one.passage, "question": one.question, "aligned": one.aligned,
                    "misaligned": one.misaligned,
                    "num_seeds": said["seed"].n_unique(),
                    "arms": {
                        arm: {"rate": _mean(said, arm, "misaligned"), "margin": _mean(said, arm, "margin")}
                        for arm in study.asked
                    },
                }
            )  # fmt: skip
    return rows


def _all(study: Study, name: str) -> Iterable[Question]:
    return study.suites[study.seeds[0]][name].questions


def _mean(rows: pl.DataFrame, arm: str, column: str) -> float | None:
    values = rows.filter(pl.col("arm") == arm).sort("seed", "condition", "wrapper", "order")[column].drop_nulls()
    return float(values.to_numpy().mean()) if len(values) else None
