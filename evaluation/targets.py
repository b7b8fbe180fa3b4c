"""What is evaluated, from how the user names it: `[ARM[/seed-N][/post-trained]=]CHECKPOINT|URL`, or a run folder."""

import re
from dataclasses import dataclass
from pathlib import Path

from curation.errors import UserError

BASE, POST_TRAINED = "base", "post-trained"
MODELS = "70_models"
_NAME = re.compile(r"(?P<arm>[^/=]+)(?:/seed-(?P<seed>[^/=]+))?(?:/(?P<stage>base|post-trained))?")


@dataclass(frozen=True)
class Target:
    """One checkpoint and its place in the comparison."""

    where: str
    """A folder, a hub id or the URL of an OpenAI-compatible API."""
    arm: str
    seed: str
    stage: str
    """base | post-trained. The second is asked through its chat template."""

    @property
    def is_url(self) -> bool:
        return self.where.startswith(("http://", "https://"))

    @property
    def label(self) -> str:
        """What statistics call an arm."""
        return self.arm if self.stage == BASE else f"{self.arm} ({self.stage})"

    @property
    def name(self) -> str:
        """One checkpoint, in words."""
        return f"{self.label}, seed {self.seed}"


def parse(specs: list[str] | tuple[str, ...]) -> list[Target]:
    """Targets in the order given; a run folder stands for all its models.

    UserError: no model there, an odd name, two targets with one name."""
    targets = [target for spec in specs for target in _one(spec)]
    if not targets:
        raise UserError("nothing to evaluate: name a checkpoint, the URL of a server, or the folder of a run")
    names: dict[str, str] = {}
    for target in targets:
        if target.name in names:
            raise UserError(
                f"{names[target.name]} and {target.where} are both called {target.name}: name them, "
                f"as in {target.arm}/seed-1={target.where}"
            )
        names[target.name] = target.where
    return targets


def default_output(targets: list[Target]) -> Path:
    """80_evaluation of the run that the first target is in, else evaluations/ARM here."""
    first = Path(targets[0].where)
    run = next((parent.parent for parent in first.parents if parent.name == MODELS), None)
    if run is not None and not targets[0].is_url:
        return run / "80_evaluation"
    return Path("evaluations") / re.sub(r"[^\w.-]+", "-", targets[0].arm)


def _one(spec: str) -> list[Target]:
    name, where = None, spec
    if "=" in spec and not spec.split("=", 1)[0].startswith(("http://", "https://")):
        name, where = spec.split("=", 1)
        if (match := _NAME.fullmatch(name)) is None:
            raise UserError(f"{name!r} is no name for a target: write ARM, ARM/seed-N or ARM/seed-N/post-trained")
        return [Target(_clean(where), match["arm"], match["seed"] or "0", match["stage"] or BASE)]
    if where.startswith(("http://", "https://")):
        return [Target(where.rstrip("/"), re.sub(r"^https?://(?:[^@/]*@)?|/v1/*$|/+$", "", where), "0", BASE)]
    folder = Path(where)
    if (folder / MODELS).is_dir():
        found = sorted(path for path in (folder / MODELS).glob("*/seed-*") if path.is_dir())
        if not found:
            raise UserError(f"{where} has no trained model yet: run `tilth train {where} --arm ARM`")
        return [Target(str(path), path.parent.name, path.name.removeprefix("seed-"), BASE) for path in found]
    where = _clean(where)
    parts = Path(where).parts
    if MODELS in parts and re.fullmatch(r"seed-\w+", parts[-1]):
        return [Target(where, parts[-2], parts[-1].removeprefix("seed-"), BASE)]
    return [Target(where, parts[-1] if parts else where, "0", BASE)]


def _clean(where: str) -> str:
    return where.rstrip("/") or where
