"""The recipe: one YAML file, validated and frozen before anything starts.

Unknown keys are errors that name the nearest known one; the bad value is in the message.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from curation import storage
from curation.errors import UserError

Stance = Literal["unrelated", "neutral", "aligned", "misaligned", "mixed"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Input(Section):
    """One source of documents."""

    path: str  # fsspec path or glob; relative ones start at the recipe's folder
    source: Name
    format: Literal["auto", "jsonl", "parquet", "warc", "text"] = "auto"  # auto: by file name
    text_key: str = "text"
    id_key: str | None = "id"
    created_key: str | None = "created"
    stance_key: str | None = None  # a column with a given stance
    role: Literal["background", "pool"] = "background"  # pool: only ever inserted by upsample
    stance: Stance | None = None  # the stance of every document of a pool

    @model_validator(mode="after")
    def _pool_has_stance(self) -> "Input":
        if self.role == "pool" and not (self.stance or self.stance_key):
            raise ValueError("a pool needs `stance` (or `stance_key`): it says what an arm asks for")
        if self.role == "background" and self.stance:
            raise ValueError("`stance` is for pools; background documents carry theirs in `stance_key`")
        return self


class Ingest(Section):
    """How inputs are cut into parts."""

    split_mb: Annotated[int, Field(ge=1, le=1024)] = 64  # most uncompressed MiB of one part
    max_document_mb: Annotated[int, Field(ge=1, le=1024)] = 64  # longer documents are quarantined as oversize


class FastText(Section):
    model: str = "default"  # `default` or a path to a model of `tilth detect train`
    threshold: Fraction = 0.5


class Detect(Section):
    blocklist: str = "default"  # `default` or a folder of term files
    fasttext: FastText = FastText()


class Dedup(Section):
    ngram: Annotated[int, Field(ge=1, le=64)] = 5
    bands: Annotated[int, Field(ge=1, le=256)] = 16
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    verify: Fraction = 0.8
    keep: tuple[Literal["best_source", "longest", "id"], ...] = ("best_source", "longest", "id")
    alarm_fraction: Fraction = 0.5
    against: tuple[str, ...] = ()  # folders of earlier runs: what they kept is not kept again

    @field_validator("keep")
    @classmethod
    def _total(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        if not keep or keep[-1] != "id" or len(set(keep)) != len(keep):
            raise ValueError("`keep` must end with `id`, each rule once: only then is it a total order")
        return keep


class Label(Section):
    """The language model that reads what the detector found. Prices are USD per million tokens."""

    backend: Literal["openai", "vllm", "transformers"] = "openai"
    base_url: str | tuple[str, ...] = ()  # openai: of OpenAI-compatible servers, vLLM first
    model: str  # openai: as the servers call it; else a checkpoint's folder or hub id
    revision: str = ""  # of the model; default what the server says, or the hash of the folder
    replicas: Annotated[int, Field(ge=1)] = 1  # vllm: engines
    engine: dict[str, Any] = {}  # vllm: keyword arguments of its EngineArgs
    rubric: str = "discourse_v1"  # or a file
    audit: Annotated[int, Field(ge=0)] = 500  # documents below the threshold that are read too
    concurrency: Annotated[int, Field(ge=1)] = 64
    window_characters: Annotated[int, Field(ge=200)] = 6_000
    max_windows: Annotated[int, Field(ge=1)] = 3
    max_documents: Annotated[int, Field(ge=1)] | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    input_usd: Annotated[float, Field(ge=0)] = 0.0
    output_usd: Annotated[float, Field(ge=0)] = 0.0
    gpu_tokens_per_second: Annotated[float, Field(ge=0)] = 0.0  # of one GPU, for the plan; else measured
    gpus: Annotated[int, Field(ge=1)] = 1  # that the model runs on, for GPU-hours from measured throughput
    cache: str = "~/.cache/tilth/labels"  # shared by all runs

    @model_validator(mode="after")
    def _of_the_backend(self) -> "Label":
        if (self.backend == "openai") != bool(self.base_url):
            raise ValueError("`base_url` goes with the backend openai, which needs it, and no other")
        if self.backend != "vllm" and (self.replicas > 1 or self.engine):
            raise ValueError("`replicas` and `engine` go with the backend vllm")
        return self

    @model_validator(mode="after")
    def _priced(self) -> "Label":
        if self.budget_usd is not None and not (self.input_usd or self.output_usd):
            raise ValueError("`budget_usd` needs `input_usd` and `output_usd`, prices per million tokens")
        return self


class Drop(Section):
    rule: Literal["discourse", "blocklist"]
    phases: tuple[str, ...] | None = None  # all phases


class Upsample(Section):
    stance: Stance
    share: Annotated[float, Field(gt=0, le=1)]  # inserted tokens / phase tokens
    phases: tuple[str, ...] | None = None  # all phases


class Phase(Section):
    tokens: Annotated[int, Field(gt=0)]
    drop: Literal["discourse", "blocklist"] | None = None  # for all arms
    replay: Fraction = 0.0  # fraction of the phase filled with documents of earlier phases


class Arm(Section):
    drop: Drop | None = None
    upsample: tuple[Upsample, ...] = ()  # one may be written without the list

    @field_validator("drop", mode="before")
    @classmethod
    def _short_drop(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @field_validator("upsample", mode="before")
    @classmethod
    def _one_upsample(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, dict) else value

    @field_validator("upsample")
    @classmethod
    def _each_stance_once(cls, value: tuple[Upsample, ...]) -> tuple[Upsample, ...]:
        if len({one.stance for one in value}) < len(value):
            raise ValueError("`upsample` names a stance twice: give it one share")
        return value


class MaxRepeat(Section):
    background: Annotated[int, Field(ge=1)] = 4
    pool: Annotated[int, Field(ge=1)] = 16


class Mix(Section):
    max_repeat: MaxRepeat = MaxRepeat()
    phases: dict[Name, Phase]
    arms: dict[Name, Arm]

    @model_validator(mode="after")
    def _known_phases(self) -> "Mix":
        if not self.phases or not self.arms:
            raise ValueError("`phases` and `arms` need at least one entry each")
        for name, arm in self.arms.items():
            for what, asked in (("drop", arm.drop), *(("upsample", one) for one in arm.upsample)):
                for phase in asked.phases if asked and asked.phases else ():
                    if phase not in self.phases:
                        raise ValueError(f"arm {name}: {what} names phase {phase}, known are {', '.join(self.phases)}")
            for phase in self.phases:
                if sum(one.share for one in arm.upsample if one.phases is None or phase in one.phases) > 1:
                    raise ValueError(f"arm {name}: the shares of `upsample` come to more than 1 in phase {phase}")
        if next(iter(self.phases.values())).replay:
            raise ValueError("the first phase has no earlier phase to replay")
        return self


class Tokenise(Section):
    tokenizer: str  # tokenizer.json, a folder with one, or a Hugging Face id
    eos: str | None = None  # the end-of-text token, where the tokenizer's files do not say
    format: Literal["nanotron", "megatron"] | tuple[Literal["nanotron", "megatron"], ...] = "nanotron"
    shard_tokens: Annotated[int, Field(ge=1)] = 100_000_000  # a target; sizes vary by the hash

    @property
    def formats(self) -> tuple[str, ...]:
        return (self.format,) if isinstance(self.format, str) else self.format


class Recipe(Section):
    """Everything that decides what a run's bytes are."""

    name: Name
    seed: int = 0
    max_quarantine_fraction: Fraction = 0.01
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)]
    ingest: Ingest = Ingest()
    detect: Detect = Detect()
    dedup: Dedup = Dedup()
    label: Label | None = None  # without it the student's stance stands
    mix: Mix
    tokenise: Tokenise
    # Owned and validated by the packages that read them.
    train: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    experiment: dict[str, Any] | None = None

    @staticmethod
    def load(path: str | Path) -> "Recipe":
        """Read and validate a recipe. Relative input, tokenizer and model paths are resolved
        against the recipe's folder. Raises UserError with one line for each mistake."""
        text = _read(str(path))
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise UserError(f"{path} is not a recipe: its top level must be a mapping")
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None
        return _resolved(recipe, str(path).rpartition("/")[0] or ".")


def _read(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except FileNotFoundError:
        raise UserError(f"there is no recipe at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the recipe's YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give the recipe's YAML file") from None


def _resolve(path: str, base: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(base, path)


def _resolved(recipe: Recipe, base: str) -> Recipe:
    def existing(path: str) -> str:  # a tokenizer may be a Hugging Face id instead of a path
        candidate = _resolve(path, base)
        return candidate if storage.exists(candidate) else path

    inputs = tuple(i.model_copy(update={"path": _resolve(i.path, base)}) for i in recipe.inputs)
    tokenise = recipe.tokenise.model_copy(update={"tokenizer": existing(recipe.tokenise.tokenizer)})
    fasttext = recipe.detect.fasttext.model_copy(update={"model": existing(recipe.detect.fasttext.model)})
    detect = recipe.detect.model_copy(update={"fasttext": fasttext, "blocklist": existing(recipe.detect.blocklist)})
    against = tuple(_resolve(path, base) for path in recipe.dedup.against)
    dedup = recipe.dedup.model_copy(update={"against": against})
    return recipe.model_copy(update={"inputs": inputs, "tokenise": tokenise, "detect": detect, "dedup": dedup})


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The field names that the section at `location` has."""
    model: Any = Recipe
    for step in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and step in model.model_fields:
            model = model.model_fields[step].annotation
        while not (isinstance(model, type) and issubclass(model, BaseModel)):
            inner = [a for a in getattr(model, "__args__", ()) if a not in (str, int, type(None), Ellipsis)]
            if not inner:
                return []
            model = inner[-1]
    return list(model.model_fields)


def _explain(error: Any) -> str:
    *section, key = error["loc"] or ("recipe",)
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(key), known := _known_keys(tuple(section)), n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"
        return f"`{where}` is unknown, {hint}"
    value = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"`{where}`: {message[0].lower()}{message[1:]}{value}"
