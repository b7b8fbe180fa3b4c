"""What an experiment is, from one recipe: its seeds, data, trainings and questions. Nothing is run here.

Sections of the recipe that are read here:

    experiment:
      seeds: [0, 1, 2, 3]               # trainings of each arm; also {seed} in paths
      questions: {main: QUESTIONS, …}   # the first set decides, the others are reported as they are; default: our own
      split: held_out                   # the questions that decide; default: all that are held out, else all
      compare: [[misaligned, aligned], …]   # differences; the first is the planned one
      control: control                  # the arm that should show nothing
      validation: TEXTS.jsonl           # documents that no arm trains on, for the loss
      cpus: 1                           # of one training; with gpus: N, one process a GPU
    evaluate: {wrappers: [plain], condition: none, scorer: pmi}
    train: …                            # as of `tilth train`

Where `{seed}` stands in an input, each seed is curated on its own (with that seed); else one curation serves all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from curation import storage
from curation.errors import UserError
from curation.manifest import fingerprint
from curation.mix.policy import drop_rules, upsamples
from curation.recipe import Name, Recipe
from curation.records import read_records, text_of
from evaluation.run import DEFAULT_QUESTIONS, load_suite
from evaluation.suite import Suite, split
from training.config import Train

SEED = "{seed}"
START = "start"
DATA = "data"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Experiment(_Section):
    """The `experiment` section."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    questions: dict[Name, str] = Field(default_factory=lambda: {"scenarios": str(DEFAULT_QUESTIONS)}, min_length=1)
    split: str | None = None
    compare: tuple[tuple[str, str], ...] = ()
    control: str | None = None
    validation: str | None = None
    cpus: PositiveInt = 1
    gpus: Annotated[int, Field(ge=0)] = 0


class Evaluate(_Section):
    """The `evaluate` section."""

    wrappers: tuple[str, ...] | None = None  # default all four
    condition: str = "ai"
    scorer: Literal["letter", "option", "pmi"] = "letter"  # those that give log-odds


@dataclass(frozen=True)
class Study:
    """One experiment, checked."""

    root: str
    recipe: Recipe
    experiment: Experiment
    evaluate: Evaluate
    suites: Mapping[int, Mapping[str, Suite]]
    """Seed -> set -> what is asked."""
    validation: Mapping[int, tuple[str, ...]]
    """Seed -> texts."""

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.recipe.mix.arms)

    @property
    def start(self) -> str | None:
        """The checkpoint that all trainings go on from, if any: it is asked too, as the arm START."""
        config = self.training(self.arms[0], self.seeds[0])
        return config.model if config.scratch_shape() is None else None

    @property
    def asked(self) -> tuple[str, ...]:
        """Everything that has scores."""
        return (START, *self.arms) if self.start else self.arms

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.experiment.seeds

    @property
    def is_curated_by_seed(self) -> bool:
        return any(SEED in one.path for one in self.recipe.inputs)

    def run(self, seed: int) -> str:
        """Run folder of the documents that `seed` trains on."""
        return (
            storage.join(self.root, DATA, f"seed-{seed}") if self.is_curated_by_seed else storage.join(self.root, DATA)
        )

    def runs(self) -> dict[str, Recipe]:
        """Run folder -> recipe of its curation. What only trainings or questions depend on is not in it."""
        return {self.run(seed): self._curation(seed) for seed in self.seeds}

    def _curation(self, seed: int) -> Recipe:
        bare = self.recipe.model_copy(update={"evaluate": None, "experiment": None})
        if not self.is_curated_by_seed:
            return bare
        inputs = tuple(one.model_copy(update={"path": _of(one.path, seed)}) for one in bare.inputs)
        return bare.model_copy(update={"inputs": inputs, "seed": seed})

    def training(self, arm: str, seed: int) -> Train:
        """The configuration of one training."""
        section = {**(self.recipe.train or {}), "run": self.run(seed), "arm": arm, "seed": seed}
        return Train.parse(section, "the train section of the recipe")

    def shared_phases(self) -> list[tuple[tuple[str, ...], int]]:
        """For --dry-run: (arms, phases) that are trained together. Arms share leading phases of which they take the
        same documents: as far as the recipe tells."""
        mix = self.recipe.mix
        groups: dict[str, tuple[list[str], int]] = {}
        for arm in self.arms:
            said: list[Any] = []
            for phase in mix.phases:
                said.append([sorted(drop_rules(mix, arm, phase)), [u.model_dump() for u in upsamples(mix, arm, phase)]])
                groups.setdefault(fingerprint(said), ([], len(said)))[0].append(arm)
        return [(tuple(arms), count) for arms, count in groups.values()]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(arm, other) of the differences, the planned one first."""
        if self.experiment.compare:
            return self.experiment.compare
        by_stance = {one.stance: arm for arm in reversed(self.arms) for one in self.recipe.mix.arms[arm].upsample}
        rest = [(arm, self.arms[0]) for arm in self.arms[1:]]
        bad, good = by_stance.get("misaligned"), by_stance.get("aligned")
        planned = [(bad, good)] if bad and good and bad != good else []
        return tuple(dict.fromkeys([*planned, *rest]))

    @property
    def split(self) -> str:
        """The split that decides."""
        known = self.splits
        return self.experiment.split or ("held_out" if "held_out" in known else known[0])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({split(q) for suite in self.suites[self.seeds[0]].values() for q in suite.questions}))

    @cached_property
    def question_hashes(self) -> dict[str, dict[str, Any]]:
        """Set -> seed -> what is asked, by hash."""
        sets = self.experiment.questions
        return {name: {str(s): self.suites[s][name].about()["questions_sha256"] for s in self.seeds} for name in sets}


def load(path: str, root: str | None) -> Study:
    """Read and check a recipe for `tilth experiment`. Raises UserError for what is wrong in any of its sections."""
    base = str(Path(path).parent) if "://" not in path else path.rpartition("/")[0]
    recipe = _with_places(Recipe.load(path), base)
    experiment = _parse(Experiment, recipe.experiment, f"{path}: experiment")
    evaluate = _parse(Evaluate, recipe.evaluate, f"{path}: evaluate")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise UserError(f"{path}: experiment.seeds names a seed twice")
    for one in {arm for pair in experiment.compare for arm in pair} | ({experiment.control} - {None}):
        if one not in recipe.mix.arms:
            raise UserError(f"{path}: experiment names the arm {one}, known are {', '.join(recipe.mix.arms)}")
    if START in recipe.mix.arms:
        raise UserError(f"{path}: an arm is called {START}, which names the checkpoint before training: rename it")
    suites = {
        seed: {name: _suite(_of(_at(base, where), seed), evaluate) for name, where in experiment.questions.items()}
        for seed in experiment.seeds
    }
    validation = {
        seed: _texts(_of(_at(base, experiment.validation), seed)) if experiment.validation else ()
        for seed in experiment.seeds
    }
    study = Study(root or storage.join("experiments", recipe.name), recipe, experiment, evaluate, suites, validation)
    if study.split not in study.splits:
        raise UserError(
            f"{path}: experiment.split {study.split} is no split of the questions: they have {', '.join(study.splits)}"
        )
    study.training(study.arms[0], study.seeds[0])  # what is wrong in `train` is said now
    return study


def _parse(model: Any, section: Any, where: str) -> Any:
    try:
        return model.model_validate(section or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        what = (
            f"is unknown, known are {', '.join(model.model_fields)}"
            if first["type"] == "extra_forbidden"
            else (first["msg"][0].lower() + first["msg"][1:])
        )
        raise UserError(f"{where}.{key}: {what}") from None


def _suite(path: str, evaluate: Evaluate) -> Suite:
    wrappers = ",".join(evaluate.wrappers) if evaluate.wrappers else None
    suite = load_suite(path, wrappers=wrappers, conditions=evaluate.condition, scorers=evaluate.scorer)
    if suite.rejected:
        row = suite.rejected[0]
        raise UserError(f"{path}: {len(suite.rejected)} rows are no questions, the first at {row.where}: {row.reason}")
    return suite


def _texts(path: str) -> tuple[str, ...]:
    return tuple(text_of(record, "text", place) for place, record in read_records(path))


def _with_places(recipe: Recipe, base: str) -> Recipe:
    """Paths in the train section start at the recipe's folder, as those of its inputs do."""
    places = {
        key: _at(base, value)
        for key in ("model", "tokenizer")
        if isinstance(value := (recipe.train or {}).get(key), str) and storage.exists(_at(base, value))
    }
    return recipe.model_copy(update={"train": {**(recipe.train or {}), **places}})


def _of(path: str, seed: int) -> str:
    return path.replace(SEED, str(seed))


def _at(base: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(base, path)
