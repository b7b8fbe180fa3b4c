"""The plan of an experiment and what it costs, before anything is run (`--dry-run`)."""

import time
from typing import Any

from curation import plan as curation_plan
from curation import tokenise
from tilth.experiment import plan
from tilth.experiment.plan import Study
from training.model import build, flops_per_token, num_parameters, peak_flops

GPU, MFU = "H100", 0.4  # of the estimate; the trainer prints the MFU that it reaches
PROBED_PARAMETERS = 30_000_000  # models up to here are tried on this CPU for a moment
_PROBE_STEPS = 6


def estimate(recipe: str, root: str | None) -> dict[str, Any]:
    """Curations with what is to do, distinct trainings with tokens and FLOPs, and prompts. Checks recipe, questions,
    inputs and pools as the experiment itself does; which phases are shared is what the recipe tells."""
    study = plan.load(recipe, root)
    curations = [{"run": run, "stages": curation_plan.plan(one, run)["stages"]} for run, one in study.runs().items()]
    phases = study.recipe.mix.phases
    trainings: list[dict[str, Any]] = [
        {"phase": name, "arms": list(arms), "times": len(study.seeds), "tokens": phases[name].tokens}
        for arms, num in study.shared_phases()
        for name in [list(phases)[num - 1]]
    ]
    tokens = sum(row["tokens"] * row["times"] for row in trainings)
    suites = study.suites[study.seeds[0]].values()
    return {
        "name": study.recipe.name, "folder": study.root, "arms": list(study.arms), "seeds": list(study.seeds),
        "curations": curations, "trainings": trainings, "tokens": tokens,
        **_price(study, tokens),
        "prompts": sum(suite.num_prompts for suite in suites) * len(study.asked) * len(study.seeds),
        "cpus": study.experiment.cpus, "gpus": study.experiment.gpus,
    }  # fmt: skip


def _price(study: Study, tokens: int) -> dict[str, Any]:
    """Parameters, FLOPs, GPU-hours at MFU of a GPU's peak, and for small models core-minutes of this CPU by trying."""
    import torch

    config = study.training(study.arms[0], study.seeds[0])
    length = max(config.phase(name).sequence_length or 0 for name in study.recipe.mix.phases)
    shape = config.scratch_shape()
    with torch.device("meta"):
        if shape is not None:
            spec = tokenise.resolve(study.recipe.tokenise.tokenizer, study.recipe.tokenise.eos)
            model = build(shape, spec.vocab_size, length, 0, 0)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model))
    flops = flops_per_token(model, length) * tokens
    found = {"num_parameters": num_parameters(model), "flops": flops, "gpu": GPU, "mfu": MFU, "core_minutes": None}
    found["gpu_hours"] = flops / (MFU * (peak_flops(GPU) or 1)) / 3600
    if shape is not None and num_parameters(model) <= PROBED_PARAMETERS and not study.experiment.gpus:
        windows = max(1, (config.phase(next(iter(study.recipe.mix.phases))).batch_tokens or length) // length)
        found["core_minutes"] = (
            tokens * _seconds_per_token(build(shape, spec.vocab_size, length, 0, 0), windows, length) / 60
        )
    return found


def _seconds_per_token(model: Any, windows: int, length: int) -> float:
    """On one thread: forward, backward and AdamW; the first steps warm up."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ids = torch.zeros(windows, length + 1, dtype=torch.long)
    began = 0.0
    for step in range(_PROBE_STEPS):
        if step == _PROBE_STEPS // 2:
            began = time.monotonic()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(before)
    return (time.monotonic() - began) / (_PROBE_STEPS - _PROBE_STEPS // 2) / (windows * length)
