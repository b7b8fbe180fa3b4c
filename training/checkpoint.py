"""Checkpoints that are whole or not there: to resume from, and to serve.

    PHASE/step-00000500/  model.safetensors  optimizer.safetensors  state.json     everything to go on exactly
    PHASE/model/          Hugging Face layout: weights, tokenizer, generation config, card

A folder is written under a temporary name, synced, and renamed. Weights and moments are float32 and
whole (not by rank), so that a training goes on with any number of processes.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import TilthError, UserError
from training.plan import PhasePlan, Plan

STEP = "step-"
EXPORT = "model"


@dataclass(frozen=True)
class State:
    """What a step checkpoint says of itself. `step`: of this phase; it is the data position too (shards.spread).
    `optimizer_steps`: since the training began, over all phases (Adam's bias correction counts them)."""

    key: str
    step: int
    optimizer_steps: int


def publish(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary folder)` and rename it to `folder`, whole or not at all.

    Raises TilthError when the disk is full or a write fails; what was there before stays."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed writer
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise TilthError(
                f"{folder} could not be written ({error}): make room, and the same command goes on from the checkpoint "
                "before"
            ) from None
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(folder: Path) -> list[Path]:
    """The phase's step checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{STEP}*") if path.is_dir())


def prune(folder: Path, keep: int) -> None:
    """Leave the newest `keep` step checkpoints."""
    for path in steps(folder)[:-keep]:
        # Renamed first: a kill in the middle leaves no half checkpoint under a name that is read.
        doomed = path.with_name(f".{path.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def gather(model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole float32 weights and moments by parameter name, on the CPU. Every process calls it."""
    weights, moments = {}, {}
    for name, parameter in model.named_parameters():
        weights[name] = _whole(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                moments[f"{name}.{moment}"] = _whole(optimizer.state[parameter][moment])
    return weights, moments


def save(phase: PhasePlan, state: State, weights: dict[str, Any], moments: dict[str, Any]) -> None:
    """Publish the step checkpoint of `state`."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        save_file(weights, folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(state.__dict__, indent=1))

    publish(phase.folder / f"{STEP}{state.step:08d}", write)


def read_state(checkpoint: Path) -> State:
    try:
        return State(**json.loads((checkpoint / "state.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, error) from None


def _damaged(checkpoint: Path, error: Exception) -> TilthError:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return TilthError(f"{checkpoint} is damaged ({first}): delete it, and the same command goes on before it")


def restore(checkpoint: Path, key: str, model: Any, optimizer: Any) -> State:
    """Fill the model and the optimizer from a step checkpoint; every process calls it.

    Raises UserError when the checkpoint is of another configuration, TilthError when it is damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    state = read_state(checkpoint)
    if state.key != key:
        raise UserError(
            f"{checkpoint} was written by a training with another configuration (key {state.key}, not {key}): move it "
            "away"
        )
    try:
        with (
            safe_open(checkpoint / "model.safetensors", "pt") as weights,
            safe_open(checkpoint / "optimizer.safetensors", "pt") as moments,
            torch.no_grad(),
        ):
            for name, parameter in model.named_parameters():
                _fill(parameter, weights.get_tensor(name))
                device = parameter.device
                optimizer.state[parameter] = {
                    "step": torch.tensor(
                        float(state.optimizer_steps), device=device if device.type == "cuda" else "cpu"
                    ),
                    **{m: _like(parameter, moments.get_tensor(f"{name}.{m}")) for m in ("exp_avg", "exp_avg_sq")},
                }
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise _damaged(checkpoint, error) from None
    return state


def export(plan: Plan, phase: PhasePlan, model: Any, weights: dict[str, Any], dtype: Any) -> None:
    """Publish PHASE/model in Hugging Face layout, weights in `dtype`."""
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    def write(folder: Path) -> None:
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures, config.dtype = [type(model).__name__], dtype
        end = plan.tokenizer
        bos_id, bos = (end.eos_id, end.eos) if end.bos_id is None else (end.bos_id, end.bos)
        config.bos_token_id = bos_id
        config.save_pretrained(folder)
        save_torch_state_dict({name: w.to(dtype) for name, w in weights.items()}, folder, max_shard_size="5GB")
        ends = {"bos_token_id": bos_id, "eos_token_id": end.eos_id, "pad_token_id": end.eos_id}
        GenerationConfig(**ends).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(end.path), eos_token=end.eos, bos_token=bos, pad_token=end.eos,
            model_max_length=plan.max_positions,
        )  # fmt: skip
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card(plan, phase, "its lightweight trainer"))
        for terms in _terms(plan.config.model) if plan.config.scratch_shape() is None else ():
            shutil.copyfile(terms, folder / terms.name)

    publish(phase.folder / EXPORT, write)


def _terms(model: str) -> list[Path]:
    """Licence and notice of the checkpoint that training started from: they go with whatever is made of it."""
    names = ("LICENSE*", "NOTICE*", "*TERMS*", "*POLICY*")
    return sorted({path for name in names for path in Path(model).glob(name) if path.is_file()})


def card(plan: Plan, phase: PhasePlan, trainer: str) -> str:
    """The model card: where the weights come from, so that they can be traced to documents."""
    config = plan.config
    rows = []
    for one in plan.phases[: plan.phases.index(phase) + 1]:
        numbers = f"{one.tokens:,} | {one.sequence_length:,} | {one.values.learning_rate:g}"
        rows.append(f"| {one.name} | {numbers} | `{one.data_hash[:16]}` | `{one.key}` |")
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [tilth]", "---",
            f"# {config.name} after {phase.name}", "",
            f"Trained by Tilth with {trainer}. Arms whose phases so far have the same data share this model.", "",
            f"- run: {config.run or 'none'}", f"- arm: {config.arm or 'none'}", f"- seed: {config.seed}",
            f"- start: {config.model if config.shape is None else 'a shape of its own'}",
            f"- tokenizer: `{plan.tokenizer.sha256[:16]}` (sha256)", f"- data manifest hash: `{phase.data_hash}`", "",
            "| phase | tokens | sequence length | learning rate | data | key |", "|---|---|---|---|---|---|", *rows, "",
        ]
    )  # fmt: skip


def _whole(tensor: Any) -> Any:
    """A DTensor gathered, or the tensor, as a contiguous CPU copy's view."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous()


def _like(parameter: Any, whole: Any) -> Any:
    """`whole` on the parameter's device, cut as the parameter is."""
    whole = whole.to(parameter.device)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole


def _fill(parameter: Any, whole: Any) -> None:
    if parameter.shape != whole.shape:
        raise RuntimeError(f"a weight of shape {tuple(whole.shape)}, not {tuple(parameter.shape)}")
    parameter.copy_(_like(parameter, whole))
