"""`tilth experiment`: curate, then train and evaluate as a graph of Ray tasks, then write the record and the page.

Every step finds by itself what is done already, by the hash of what it is made from: the same command after a kill goes
on, and one arm that changed is one arm that is trained and asked again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curation import storage
from curation.engine import Engine, Task, session
from curation.errors import RunLocked, UserError
from curation.manifest import RunFolder, WriterLock, fingerprint
from curation.pipeline import curate
from evaluation.suite import Suite
from tilth.experiment import plan, record
from tilth.experiment.plan import Study

ANSWERS, FROZEN = "answers", "frozen.json"
EVALUATION_VERSION = 2  # raised by hand when the same checkpoint gives other choices
_LOCK_WAIT_S = 60.0

Line = Callable[[str], None]
Progress = Callable[[str, int, int | None], None]


def experiment(
    recipe: str, root: str | None = None, *, backend: str = "transformers", workers: int | None = None,
    address: str | None = None, on_line: Line = lambda _: None, on_progress: Progress = lambda *_: None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Run the experiment of `recipe` into the folder `root` (default experiments/NAME); returns its record and folder.

    `backend`: transformers (in each task's process) or vllm. Raises UserError for what is wrong in the recipe, with
    questions that differ from those that were frozen when the folder's first training began, TilthError for what
    failed."""
    study = plan.load(recipe, root)
    if not storage.is_local(study.root):
        raise UserError(f"{study.root} is not a local folder: models are written there; mount one that all nodes see")
    folder = Path(storage.filesystem(study.root)[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with WriterLock(RunFolder(str(folder))), session(workers, address, str(folder)) as engine:
        engine.start()
        for run, one in study.runs().items():
            on_line(f"curate -> {run}")
            told = curate(one, run, workers=workers, address=address, on_progress=on_progress, on_line=on_line)
            if told["exit_code"]:
                share = f"{told['quarantined_total']:,} of {told['records_read']:,} records were quarantined in {run}"
                raise UserError(
                    f"{share}, above max_quarantine_fraction {one.max_quarantine_fraction}: mend the input or raise "
                    "the limit before anything is trained on it"
                )
        _freeze(study, folder, on_line)
        started = time.monotonic()
        _train_and_ask(study, folder, engine, backend, on_line, on_progress)
        on_line(f"trained and asked in {time.monotonic() - started:,.0f} s")
        found = record.write(study, folder, backend, *_read_answers(study, folder))
    return found, str(folder)


def _freeze(study: Study, folder: Path, on_line: Line) -> None:
    """Write down what will be asked before anything is trained, and hold to it."""
    path = folder / FROZEN
    now = {"questions": study.question_hashes, "evaluate": study.evaluate.model_dump(mode="json")}
    if path.exists():
        before = json.loads(path.read_bytes())
        kept = all(
            hashes.get(seed, value) == value
            for name, by_seed in now["questions"].items()
            for hashes in [before["questions"].get(name, {})]
            for seed, value in by_seed.items()
        )
        if not kept or before["evaluate"] != now["evaluate"]:
            raise UserError(
                f"the questions or how they are asked differ from what was frozen in {path} before the first training: "
                "put them back, or start another experiment with --output"
            )
        for name, hashes in before["questions"].items():
            now["questions"][name] = {**hashes, **now["questions"].get(name, {})}
    for name in study.experiment.questions:
        rows = {q.question_id: vars(q) for seed in study.seeds for q in study.suites[seed][name].questions}
        lines = (json.dumps(rows[key]).encode() + b"\n" for key in sorted(rows))
        storage.commit_bytes(str(folder / record.QUESTIONS / f"{name}.jsonl"), b"".join(lines))
    storage.commit_bytes(str(path), json.dumps(now, indent=1).encode())
    on_line(f"questions are frozen: {fingerprint(now['questions'])[:12]} ({path})")


# Tasks. Arguments are plain data: they cross processes.


@dataclass(frozen=True)
class _Training:
    """The first `num_phases` phases of one training; those before the last are trained."""

    config: dict[str, Any]
    num_phases: int
    folder: str
    """Of the last of them."""
    cpus: int
    gpus: int

    def is_done(self) -> bool:
        return Path(self.folder, "phase.json").exists()


@dataclass(frozen=True)
class _Asking:
    """One checkpoint and everything that it is asked."""

    arm: str
    seed: int
    suites: dict[str, Suite]
    validation: tuple[str, ...]
    folder: str
    model: str
    """By the key of its last phase: another training of the same arm is another folder."""
    backend: str
    cpus: int

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def path(self) -> Path:
        return Path(self.folder, ANSWERS, f"{self.arm}-seed-{self.seed}")

    def key(self) -> str:
        """Hash of all that the choices depend on."""
        from training.model import checkpoint_hash

        about = {name: suite.about() for name, suite in self.suites.items()}
        said = [EVALUATION_VERSION, checkpoint_hash(self.model), about, self.validation, self.backend]
        return fingerprint(said)

    def is_done(self) -> bool:
        about = self.path.with_suffix(".json")
        return about.exists() and Path(self.model).exists() and json.loads(about.read_bytes())["key"] == self.key()


def _train_and_ask(
    study: Study, folder: Path, engine: Engine, backend: str, on_line: Line, on_progress: Progress
) -> None:
    from training.plan import plan as lay_out
    from training.trainer import link

    trainings, askings = _graph(study, folder, backend)
    totals = {"train": len(trainings), "evaluate": len(askings)}
    done = dict.fromkeys(totals, 0)
    tasks = {**trainings, **askings}
    for name in [name for name, task in tasks.items() if task.argument.is_done()]:
        done[name.partition(" ")[0]] += 1
        del tasks[name]
    tasks = {n: Task(t.function, t.argument, tuple(a for a in t.after if a in tasks), t.cpus, t.gpus)
             for n, t in tasks.items()}  # fmt: skip
    for kind, total in totals.items():
        on_progress(kind, done[kind], total)
    for name, said in engine.graph(tasks):
        kind = name.partition(" ")[0]
        done[kind] += 1
        on_line(f"{name}: {said}")
        on_progress(kind, done[kind], totals[kind])
    for seed in study.seeds:
        for arm in study.arms:  # an arm that shares all of its phases has no training that would name it
            link(lay_out(study.training(arm, seed)))


def _graph(study: Study, folder: Path, backend: str) -> tuple[dict[str, Task], dict[str, Task]]:
    """Trainings by phase, each phase of equal key once, and the asking of each checkpoint after its last phase."""
    from training.checkpoint import EXPORT
    from training.plan import plan as lay_out

    trainings: dict[str, Task] = {}
    models: dict[tuple[str, int], tuple[str, tuple[str, ...]]] = {}  # (arm, seed) -> where it will be, after which task
    if study.start:
        models |= {(plan.START, seed): (study.start, ()) for seed in study.seeds}
    resources = {"cpus": study.experiment.cpus, "gpus": study.experiment.gpus}
    names: dict[str, str] = {}  # key of a phase -> its task
    for seed in study.seeds:
        for arm in study.arms:
            config = study.training(arm, seed)
            phases = lay_out(config).phases
            for at, phase in enumerate(phases, start=1):
                if phase.key not in names:
                    names[phase.key] = f"train {arm}/seed-{seed}, {phase.name}"
                    argument = _Training(config.model_dump(mode="json"), at, str(phase.folder), **resources)
                    before = (names[phase.parent],) if phase.parent else ()
                    trainings[names[phase.key]] = Task(_train, argument, before, **resources)
            models[arm, seed] = str(phases[-1].folder / EXPORT), (names[phases[-1].key],)
    askings: dict[str, Task] = {}
    for (arm, seed), (model, after) in models.items():
        asking = _Asking(
            arm, seed, dict(study.suites[seed]), study.validation[seed], str(folder), model, backend, resources["cpus"]
        )
        gpus = min(resources["gpus"], 1)
        if backend == "vllm" and not gpus and askings:
            after = (*after, next(reversed(askings)))  # a server on CPUs takes all of them: one at a time
        askings[f"evaluate {arm}/seed-{seed}"] = Task(_ask, asking, after, resources["cpus"], gpus)
    return trainings, askings


def _train(task: _Training) -> str:
    """In a worker: one phase more. What a killed experiment left running may hold the phase for a moment."""
    from training.config import Train
    from training.trainer import train

    if task.gpus > 1:
        return _train_apart(task)
    _set_threads(task.cpus)
    config = Train.parse(task.config, "the train section of the recipe")
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            done = train(config, num_phases=task.num_phases)
            break
        except RunLocked:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)
    return _told(done)


def _told(done: dict[str, Any]) -> str:
    last = done["phases"][-1]
    return f"loss {last['loss']:.3f} after {last['tokens']:,} tokens in {last['seconds']:.0f} s"


def _train_apart(task: _Training) -> str:
    """One process a GPU, by the command line."""
    import subprocess
    import sys
    import tempfile

    from curation.errors import TilthError

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(task.config, file)  # JSON is YAML
        file.flush()
        words = ["train", file.name, "--processes", str(task.gpus), "--phases", str(task.num_phases), "--json"]
        ended = subprocess.run([sys.executable, "-m", "tilth", *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise TilthError(f"a training failed: {(ended.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return _told(json.loads(ended.stdout.splitlines()[-1]))


def _ask(task: _Asking) -> str:
    """In a worker: one checkpoint, all sets. Its choices are published, then what they depend on."""
    from evaluation.run import answer

    _set_threads(task.cpus)
    said = answer(
        f"{task.name}={task.model}", task.suites, Path(task.folder), backend=task.backend, validation=task.validation
    )
    storage.commit_table(str(task.path.with_suffix(".parquet")), said.choices.to_arrow())
    about = {
        "key": task.key(), "identity": said.identity, "facts": said.facts, "left_out": said.left_out,
        "loss": asdict(said.loss) if said.loss else None,
    }  # fmt: skip
    storage.commit_bytes(str(task.path.with_suffix(".json")), json.dumps(about, indent=1).encode())
    left_out = sum(map(len, said.left_out.values()))
    return (
        f"{said.asked:,} asked"
        + (f", {said.reused:,} answered before" if said.reused else "")
        + (f", {left_out:,} questions left out (see models in {record.RECORD})" if left_out else "")
    )


def _set_threads(cpus: int) -> None:
    import torch

    torch.set_num_threads(cpus)


def _read_answers(study: Study, folder: Path) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """All choices, and what was written beside them, by seed and arm."""
    tables, abouts = [], []
    for seed in study.seeds:
        for arm in study.asked:
            path = folder / ANSWERS / f"{arm}-seed-{seed}"
            tables.append(pl.read_parquet(path.with_suffix(".parquet")))
            abouts.append({"arm": arm, "seed": seed, **json.loads(path.with_suffix(".json").read_bytes())})
    return pl.concat(tables), abouts
