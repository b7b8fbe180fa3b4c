"""Where vLLM is. It lives in an environment of its own, since its pins exclude the product's: the interpreter that
TILTH_VLLM_PYTHON names, else our own when it has vLLM, else `.venv-vllm` (by `make vllm`) in the current folder or
beside the project.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from curation.errors import UserError

_PROBE = (
    "import importlib.util, json; found = importlib.util.find_spec('vllm') is not None\n"
    "import torch; print(json.dumps({'vllm': found, 'cuda': torch.cuda.is_available()}))"
)


@dataclass(frozen=True)
class Environment:
    """Where vLLM is, and whether it has a GPU there."""

    python: str
    cuda: bool


def find_environment() -> Environment:
    """Raises UserError that says how to get vLLM when there is none."""
    named = os.environ.get("TILTH_VLLM_PYTHON")
    beside = Path(__file__).resolve().parents[1]
    own = [sys.executable] if importlib.util.find_spec("vllm") else []
    places = [named] if named else [*own, *(str(p / ".venv-vllm/bin/python") for p in (Path.cwd(), beside))]
    python = next((place for place in places if Path(place).exists()), None)
    if python is None:
        where = f"TILTH_VLLM_PYTHON names {named}, which does not exist" if named else "vLLM is not installed"
        raise UserError(f"{where}: run `make vllm`, or point TILTH_VLLM_PYTHON to a python that has it")
    probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True)
    try:
        found = json.loads(probe.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"vllm": False}
    if not found["vllm"]:
        raise UserError(f"{python} has no vLLM: run `make vllm`, or point TILTH_VLLM_PYTHON to a python that has it")
    return Environment(python, bool(found["cuda"]))
