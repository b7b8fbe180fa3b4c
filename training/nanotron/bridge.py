"""A training's plan (training.plan) as Nanotron's configuration, and Nanotron's model as an arm's.

The plan is the same for both trainers: phases, steps, batches, values and shards. What only Nanotron has
stands in the configuration's `nanotron` section (keys of NanotronConfig: version, parallelism, zero_stage, slurm …).
"""

from collections.abc import Callable
from typing import Any

from curation import storage
from curation.errors import UserError
from training import checkpoint
from training.nanotron.config import ModelShape, NanotronConfig, NanotronPhase
from training.nanotron.launch import Launcher
from training.nanotron.launch import train as launch
from training.plan import PhasePlan, Plan

_OURS = ("name", "model", "phases", "accumulation", "betas", "eps", "weight_decay", "clip_norm", "seed", "tokenizer")


def configuration(plan: Plan) -> NanotronConfig:
    """Raises UserError for what Nanotron cannot train (GPT-NeoX, a Hugging Face checkpoint to go on from), for a
    batch that its processes cannot share, and for unknown keys of the `nanotron` section."""
    config, shape = plan.config, plan.config.scratch_shape()
    if shape is None or shape.architecture != "llama":
        what = "a checkpoint to go on from" if shape is None else shape.architecture
        raise UserError(f"nanotron trains Llama from scratch, and model {config.model} is {what}: use --backend tilth")
    if shape.initialisation != "normal":
        raise UserError(
            "nanotron draws first weights by its own rule: leave out shape.initialisation, or use --backend tilth"
        )
    section = {"dtype": "bfloat16" if config.dtype == "auto" else config.dtype, **config.nanotron}
    for key in _OURS:
        if key in config.nanotron:
            raise UserError(f"nanotron.{key} is not for the nanotron section: the training's own keys say it")
    dp = int((section.get("parallelism") or {}).get("dp", 1))
    micro = int(section.setdefault("micro_batch", config.micro_batch or _micro_batch(plan.phases, dp)))
    return NanotronConfig.parse(
        {
            **section,
            "name": config.name,
            "model": ModelShape(
                hidden_size=shape.hidden_size, num_layers=shape.num_layers, num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads or shape.num_heads, intermediate_size=shape.intermediate_size,
                vocab_size=plan.vocab_size, rope_theta=shape.rope_theta, tied_embeddings=shape.tied_embeddings,
                bos_id=plan.tokenizer.eos_id, eos_id=plan.tokenizer.eos_id, norm_eps=1e-6,
            ),
            "phases": tuple(_phase(phase, dp, micro) for phase in plan.phases),
            "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay,
            "clip_norm": config.clip_norm, "seed": config.seed, "tokenizer": str(plan.tokenizer.path),
            "checkpoint_steps": config.checkpoint_steps,
        },
        "the nanotron section",
    )  # fmt: skip


def train(plan: Plan, *, launcher: Launcher, dry_run: bool, on_line: Callable[[str], None]) -> dict[str, Any]:
    """Train the plan's phases with Nanotron into OUTPUT/nanotron/ARM-seed-N-KEY; returns its summary. Phases are
    not shared between arms here: Nanotron keeps one line of checkpoints a training."""
    config = plan.config
    folder = plan.output / "nanotron" / f"{config.arm or config.name}-seed-{config.seed}-{plan.final.key}"
    summary = launch(configuration(plan), str(folder), launcher=launcher, dry_run=dry_run, on_line=on_line)
    if "model" in summary:
        card = checkpoint.card(plan, plan.final, "Nanotron")
        storage.commit_bytes(f"{summary['model']}/README.md", card.encode())
    return summary


def _micro_batch(phases: tuple[PhasePlan, ...], dp: int) -> int:
    """The most windows of a forward pass, up to 8, that divide every phase's share of a process."""
    return next((n for n in range(8, 0, -1) if all(phase.windows % (dp * n) == 0 for phase in phases)), 1)


def _phase(phase: PhasePlan, dp: int, micro: int) -> NanotronPhase:
    values = phase.values
    if phase.windows % (dp * micro):
        raise UserError(
            f"phase {phase.name} has {phase.windows} windows a step, which dp {dp} with micro_batch {micro} cannot "
            "share evenly: change batch_tokens, dp or micro_batch"
        )
    assert values.learning_rate is not None
    return NanotronPhase(
        name=phase.name, shards=phase.shards, steps=phase.steps, sequence_length=phase.sequence_length,
        learning_rate=values.learning_rate, final_learning_rate=values.final_learning_rate or 0.0,
        warmup_steps=round((values.warmup or 0.0) * phase.steps), schedule=values.schedule or "cosine",
        decay_steps=max(1, round((values.decay or 0.2) * phase.steps)) if values.schedule == "wsd" else None,
        micro_batch=micro, accumulation=phase.windows // (dp * micro),
    )  # fmt: skip
