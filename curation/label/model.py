"""Which weights a name stands for: part of every key in the cache."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from curation.errors import UserError

_READ = 1 << 24


def identity_of(backend: str, model: str, revision: str) -> Mapping[str, str]:
    """Backend.identity of a checkpoint: where its folder lies does not matter."""
    name = Path(model).resolve().name if Path(model).is_dir() else model
    return {"backend": backend, "model": name, "revision": revision}


def revision_of(model: str, revision: str = "") -> str:
    """Of a folder the sha256 of its weights, configuration and tokenizer; of a hub id `revision`, which has to be
    given, as `main` moves. Raises UserError where it is not, or where there is no such folder."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/")) or model.count("/") != 1:
            raise UserError(f"{model} is no folder and no hub id: give a Hugging Face checkpoint as the label model")
        if not revision:
            raise UserError(f"{model} is on the hub: state its `revision` (a commit) in the label section")
        return revision
    if not (folder / "config.json").exists():
        raise UserError(f"{model} has no config.json: give the folder of a Hugging Face checkpoint as the label model")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja"):
            digest.update(f"{file.name}\n".encode())
            with file.open("rb") as handle:
                while block := handle.read(_READ):
                    digest.update(block)
    return digest.hexdigest()[:16]
