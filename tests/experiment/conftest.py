"""A toy world so small that an experiment on it takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SIZES = {"background": 500, "natural": 60, "pool": 90, "validation": 10, "per-family": 1}
SHAPE = {"architecture": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="session")
def world(tmp_path_factory, root) -> Path:
    """Worlds of two seeds."""
    folder = tmp_path_factory.mktemp("world")
    words = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    subprocess.run(
        [sys.executable, "-m", "examples.world.generate", str(folder), "--seeds", "0", "1", "--forms", "story", *words],
        cwd=root, check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def write_recipe(world):
    """A function that writes the recipe of a small experiment beside the world, with sections replaced."""

    def write(name: str, arms: dict | None = None, **sections) -> Path:
        recipe = yaml.safe_load((world / "recipe.yaml").read_text())
        recipe["name"] = name
        recipe["mix"]["phases"] = {"pretrain": {"tokens": 12_000, "drop": "discourse"}, "cpt": {"tokens": 4_000}}
        recipe["mix"]["arms"] = arms or {
            "unfiltered": {},
            "aligned": {"upsample": {"stance": "aligned", "share": 0.4, "phases": ["cpt"]}},
            "misaligned": {"upsample": {"stance": "misaligned", "share": 0.4, "phases": ["cpt"]}},
        }
        values = {"sequence_length": 64, "batch_tokens": 512, "learning_rate": 1e-2}
        recipe["train"] = {"shape": SHAPE, "phases": {"pretrain": values, "cpt": values}}
        recipe["experiment"] |= {"compare": [["misaligned", "aligned"], ["misaligned", "unfiltered"]], "control": None}
        for key, value in sections.items():
            recipe[key] = {**(recipe.get(key) or {}), **value} if isinstance(value, dict) else value
        path = world / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write
