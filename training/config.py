"""What to train: one frozen, validated configuration, and presets that fill in what it leaves out.

The same keys stand in the `train` section of a recipe and in a file for `tilth train CONFIG`:

    run: runs/four-arms      # a curate run and one of its arms: shards, tokenizer and budgets come from there
    arm: aligned
    model: tiny              # a preset, or a Hugging Face checkpoint to go on from
    phases: {pretrain: {learning_rate: 1.0e-3}}       # what differs from the preset

Without a run: `output`, `tokenizer`, and `shards` for each phase.
"""

import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from curation.errors import UserError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shape(_Frozen):
    """A decoder from scratch, in the terms of Hugging Face's configurations. The vocabulary is the tokenizer's."""

    architecture: Literal["llama", "gpt_neox"]
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None  # llama only; default as many as heads
    intermediate_size: PositiveInt
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    rotary_fraction: float = Field(default=1.0, gt=0, le=1)  # gpt_neox only: the part of a head that is rotated
    initialisation: Literal["normal", "scaled"] = "normal"  # scaled: see model.build


class Phase(_Frozen):
    """One stretch of training with its own data and schedule. What is None comes from the preset."""

    shards: str | None = None  # folder of shards; with a run, the arm's
    tokens: PositiveInt | None = None  # default: the shards once; more goes round again
    sequence_length: PositiveInt | None = None
    batch_tokens: PositiveInt | None = None  # tokens an optimizer step sees, over all processes
    learning_rate: float | None = Field(default=None, gt=0)
    final_learning_rate: float | None = Field(default=None, ge=0)
    warmup: float | None = Field(default=None, ge=0, lt=1)  # part of the phase's steps
    schedule: Literal["cosine", "wsd"] | None = None
    decay: float | None = Field(default=None, gt=0, le=1)  # wsd: part of the steps at the end that fall linearly

    def over(self, base: "Phase") -> "Phase":
        """This phase, with the gaps filled from `base`."""
        return Phase(**{**base.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})


class Train(_Frozen):
    """A whole training: phases one after the other, optimizer state carried on, schedule anew in each."""

    name: str = "model"
    run: str | None = None
    arm: str | None = None
    output: str | None = None  # default: RUN/70_models
    tokenizer: str | None = None  # tokenizer.json; default: the run's, or the checkpoint's
    model: str = "tiny"  # a preset, or the folder or hub id of a Hugging Face checkpoint
    shape: Shape | None = None  # instead of the preset's
    seed: int = Field(default=0, ge=0)
    phases: dict[str, Phase] = Field(default_factory=dict)
    micro_batch: PositiveInt | None = None  # windows of a forward pass; default by tokens
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU, float32 on CPU
    compile: bool | None = None  # default: on GPU
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"  # auto: fsdp when the model's state does not fit one GPU
    activation_checkpointing: bool = False
    checkpoint_steps: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    nanotron: dict[str, Any] = Field(default_factory=dict)  # what only --backend nanotron takes (its own keys)

    @staticmethod
    def load(path: str) -> "Train":
        """The configuration of a YAML file. Raises UserError that names the key and what is wrong with it."""
        try:
            raw = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: give a training configuration or the folder of a run") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
        return Train.parse(raw or {}, path)

    @staticmethod
    def parse(raw: Any, where: str) -> "Train":
        """Validate a mapping; `where` names it in errors."""
        if not isinstance(raw, dict):
            raise UserError(f"{where} holds no mapping of training keys")
        try:
            return Train(**raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                owner = Phase if first["loc"][0] == "phases" else Shape if first["loc"][0] == "shape" else Train
                near = difflib.get_close_matches(str(first["loc"][-1]), owner.model_fields, 1)
                raise UserError(f"{where}: {key} is no key" + (f", did you mean {near[0]}?" if near else "")) from None
            raise UserError(f"{where}: {key}: {first['msg']}") from None
        except TypeError as error:
            raise UserError(f"{where}: {error}") from None

    def scratch_shape(self) -> Shape | None:
        """The shape to start from scratch, or None when `model` is a checkpoint to go on from."""
        return self.shape or (PRESETS[self.model].shape if self.model in PRESETS else None)

    def phase(self, name: str) -> Phase:
        """The phase, with the gaps filled; one of a name that the preset lacks takes its pretraining values."""
        defaults = PRESETS[self.model].phases if self.model in PRESETS else FROM_CHECKPOINT
        return self.phases.get(name, Phase()).over(defaults.get(name, defaults["pretrain"]))


class Preset(_Frozen):
    """A shape and the values of its phases."""

    shape: Shape
    phases: dict[str, Phase]


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, *, tied: bool) -> Shape:
    return Shape(
        architecture="llama", hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        intermediate_size=intermediate, tied_embeddings=tied,
    )  # fmt: skip


def _phases(sequence_length: int, batch_tokens: int, learning_rate: float) -> dict[str, Phase]:
    """Cosine to a tenth in pretraining; what comes after starts lower and goes to zero."""
    pretrain = Phase(
        sequence_length=sequence_length, batch_tokens=batch_tokens, learning_rate=learning_rate,
        final_learning_rate=learning_rate / 10, warmup=0.01, schedule="cosine", decay=0.2,
    )  # fmt: skip
    later = Phase(learning_rate=learning_rate / 2, final_learning_rate=0.0).over(pretrain)
    return {"pretrain": pretrain, "midtrain": later, "cpt": later}


# Going on from a trained model: small steps, so that it forgets little.
FROM_CHECKPOINT = _phases(sequence_length=1_024, batch_tokens=65_536, learning_rate=5e-5)
PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        shape=_llama(128, 4, 4, 4, 352, tied=True),
        phases=_phases(sequence_length=256, batch_tokens=4_096, learning_rate=3e-3),
    ),
    "100m": Preset(
        shape=_llama(768, 12, 12, 12, 2_048, tied=True),
        phases=_phases(sequence_length=2_048, batch_tokens=524_288, learning_rate=6e-4),
    ),
    "1b": Preset(
        shape=_llama(2_048, 16, 32, 8, 8_192, tied=True),
        phases=_phases(sequence_length=2_048, batch_tokens=2_097_152, learning_rate=3e-4),
    ),
    # The reference's model and values (arXiv 2601.10160): Pythia 6.9B; it gives none for continued pretraining,
    # which here goes on as midtraining does.
    "6.9b": Preset(
        shape=Shape(
            architecture="gpt_neox", hidden_size=4_096, num_layers=32, num_heads=32, intermediate_size=16_384,
            rotary_fraction=0.25,
        ),
        phases={
            "pretrain": (
                pretrain := Phase(
                    sequence_length=2_048, batch_tokens=4_194_304, learning_rate=3e-4, final_learning_rate=1.2e-5,
                    warmup=0.01, schedule="cosine", decay=0.2,
                )
            ),
            "midtrain": (
                midtrain := Phase(
                    sequence_length=16_384, learning_rate=2.25e-4, final_learning_rate=0.0
                ).over(pretrain)
            ),
            "cpt": midtrain,
        },
    ),
}  # fmt: skip


def learning_rate(phase: Phase, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine to
    final_learning_rate, or constant and a linear fall at the end (warmup-stable-decay)."""
    peak, final = phase.learning_rate or 0.0, phase.final_learning_rate or 0.0
    warmup = math.ceil((phase.warmup or 0.0) * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if phase.schedule == "wsd":
        fall = max(1, round((phase.decay or 0.2) * steps))
        left = (steps - step) / fall
        return peak if left >= 1 else final + (peak - final) * left
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
