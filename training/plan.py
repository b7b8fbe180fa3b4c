"""From a configuration to the phases that will be trained: their shards, steps and keys.

A phase's key is a hash of all that decides its weights: where it starts (shape and seed, or a
checkpoint's hash), its values, its data, and the key of the phase before. Phases of equal key are
one: arms whose leading phases have byte-identical shards share them, trained once a seed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.manifest import ARMS, RunFolder, fingerprint, read_manifest
from training.config import PRESETS, Phase, Train
from training.model import checkpoint_hash, padded_vocab
from training.shards import TokenStream

MODELS = "70_models"
SCAN_TOKENS = 1 << 28  # shards up to here are read once for ids beyond the vocabulary before step 1
STAGE_VERSION = 1  # raised by hand when the same plan gives other weights


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json and what training needs of it."""

    path: Path
    vocab_size: int
    eos_id: int
    eos: str
    sha256: str
    bos_id: int | None = None
    bos: str | None = None
    """What it puts before each text, if anything: windows then begin with it, as in the model's own pretraining. Gemma
    3 270M without it has a loss of 6.4 on text on which it has 4.2 with it."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase of one training. `windows` is the optimizer step's global batch; `steps` optimizer steps."""

    name: str
    key: str
    parent: str | None
    folder: Path
    shards: str
    data_hash: str
    shard_tokens: int
    values: Phase
    windows: int
    steps: int

    @property
    def sequence_length(self) -> int:
        assert self.values.sequence_length is not None
        return self.values.sequence_length

    @property
    def tokens(self) -> int:
        return self.steps * self.windows * self.sequence_length

    @property
    def epochs(self) -> float:
        return self.tokens / self.shard_tokens


@dataclass(frozen=True)
class Plan:
    """All phases of a training, in order, and what they share."""

    config: Train
    output: Path
    tokenizer: Tokenizer
    vocab_size: int  # rows of the embedding
    max_positions: int
    phases: tuple[PhasePlan, ...]

    @property
    def final(self) -> PhasePlan:
        return self.phases[-1]

    @property
    def link(self) -> Path:
        """Where the last phase's model is found by arm and seed."""
        return self.output / (self.config.arm or self.config.name) / f"seed-{self.config.seed}"


def configuration(target: str, **given: Any) -> Train:
    """The configuration of `target`, a YAML file or the folder of a curate run (then the `train` section of
    its recipe, if any); what is `given` and not None goes over it."""
    if Path(target).is_dir():
        section = read_manifest(RunFolder(target))["recipe"].get("train") or {}
        raw, where = {**section, "run": target}, f"the train section of {target}"
    else:
        raw, where = Train.load(target).model_dump(exclude_unset=True), target
    over = {key: value for key, value in given.items() if value is not None}
    if "model" in over:  # another model is not of the shape that stands beside the first
        raw.pop("shape", None)
    return Train.parse({**raw, **over}, where)


def plan(config: Train) -> Plan:
    """Open the shards and lay out the phases.

    Raises UserError for missing keys, arms and shards, an empty phase, a tokenizer that does not fit
    the model or the shards, and TilthError for damaged shards: all before anything is trained."""
    folders = _shard_folders(config)
    if not folders:
        raise UserError("no phases to train: name a run and an arm, or give `phases` with their `shards`")
    if config.output is None and config.run is None:
        raise UserError("no `output` in the configuration: give the folder where models go, or a run")
    output = Path(config.output or Path(str(config.run), MODELS))
    tokenizer = read_tokenizer(_tokenizer_path(config), _eos(config))
    values = {name: config.phase(name) for name in folders}
    longest = max(v.sequence_length or 0 for v in values.values())
    vocab_size, max_positions, start = _start(config, tokenizer, longest)
    phases: list[PhasePlan] = []
    for name, folder in folders.items():
        stream = TokenStream.open(folder)
        _check_ids(stream, folder, tokenizer)
        parent = phases[-1].key if phases else None
        phases.append(_phase(config, output, name, folder, stream, values[name], parent, start, tokenizer.bos_id))
    return Plan(config, output, tokenizer, vocab_size, max_positions, tuple(phases))


def _phase(
    config: Train, output: Path, name: str, folder: str, stream: TokenStream, values: Phase, parent: str | None,
    start: dict[str, Any], bos_id: int | None,
) -> PhasePlan:  # fmt: skip
    length, batch_tokens = values.sequence_length, values.batch_tokens
    assert length is not None
    assert batch_tokens is not None
    available = stream.num_windows(length)
    if available == 0:
        raise UserError(
            f"phase {name} has {len(stream):,} tokens in {folder}, less than a window of {length:,}: give it more "
            "tokens in the recipe, or a smaller sequence_length"
        )
    if batch_tokens % length:
        raise UserError(f"phase {name}: batch_tokens {batch_tokens:,} is no multiple of sequence_length {length:,}")
    wanted = (values.tokens // length) if values.tokens else available
    windows = batch_tokens // length
    if wanted < windows:
        raise UserError(
            f"phase {name} has {wanted * length:,} tokens to train on, less than one batch of {batch_tokens:,}: give "
            "it a smaller batch_tokens, or more tokens"
        )
    steps = wanted // windows
    data_hash = stream.data_hash()
    about = {} if bos_id is None else {"bos": bos_id}
    key = fingerprint(
        {
            **about, "version": STAGE_VERSION, "parent": parent, "start": None if parent else start, "data": data_hash,
            "values": values.model_dump(exclude={"shards", "tokens"}), "steps": steps, "dtype": config.dtype,
            "optimizer": [config.betas, config.eps, config.weight_decay, config.clip_norm], "name": name,
        }
    )[:12]  # fmt: skip
    return PhasePlan(
        name, key, parent, output / "phases" / f"{name}-{key}", folder, data_hash, len(stream), values, windows, steps
    )


def _shard_folders(config: Train) -> dict[str, str]:
    """Phase -> folder of shards, in training order: the run's phases of the arm, else the configuration's."""
    if config.run is None:
        without = [name for name, phase in config.phases.items() if phase.shards is None]
        if without:
            raise UserError(f"phase {without[0]} has no `shards`: give a folder of shards, or a run and an arm")
        return {name: str(phase.shards) for name, phase in config.phases.items()}
    mix = read_manifest(RunFolder(config.run))["recipe"].get("mix") or {}
    arms = list(mix.get("arms", {}))
    if config.arm is None or config.arm not in arms:
        said = f"has no arm {config.arm}" if config.arm else "needs an arm"
        raise UserError(f"{config.run} {said}: choose one of {', '.join(arms)} with --arm")
    known = list(mix["phases"])
    for name in config.phases:
        if name not in known:
            raise UserError(f"{config.run} has no phase {name}: its phases are {', '.join(known)}")
    found = {name: Path(config.run, ARMS, config.arm, name) for name in known}
    return {name: config.phase(name).shards or str(folder) for name, folder in found.items()}


def _start(config: Train, tokenizer: Tokenizer, longest: int) -> tuple[int, int, dict[str, Any]]:
    """Rows of the embedding, longest sequence, and what the first phase's key says about its start."""
    shape = config.scratch_shape()
    if shape is not None:
        heads, kv = shape.num_heads, shape.num_kv_heads or shape.num_heads
        if shape.hidden_size % heads or heads % kv:
            raise UserError(f"shape: hidden_size must divide by num_heads {heads}, and num_heads by num_kv_heads {kv}")
        about = {"shape": shape.model_dump(), "seed": config.seed, "tokenizer": tokenizer.sha256, "length": longest}
        return padded_vocab(tokenizer.vocab_size), longest, about
    from transformers import AutoConfig

    if config.model not in PRESETS and not Path(config.model).exists() and "/" not in config.model:
        raise UserError(f"model {config.model} is no preset, folder or hub id: the presets are {', '.join(PRESETS)}")
    try:
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {config.model} cannot be read: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.vocab_size > found.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} ids and model {config.model} "
            f"{found.vocab_size:,}: curate with the model's own tokenizer"
        )
    own = Path(config.model, "tokenizer.json")
    if own.exists() and _vocabulary(own) != _vocabulary(tokenizer.path):
        raise UserError(
            f"tokenizer {tokenizer.path} of the shards is not that of model {config.model}: curate with the model's own"
        )
    positions = int(getattr(found, "max_position_embeddings", longest))
    if longest > positions:
        raise UserError(f"sequence_length {longest:,} is beyond the {positions:,} positions of model {config.model}")
    return found.vocab_size, positions, {"checkpoint": checkpoint_hash(config.model), "seed": config.seed}


def _check_ids(stream: TokenStream, folder: str, tokenizer: Tokenizer) -> None:
    """Raises UserError when shards were made with another tokenizer, as far as that can be seen without
    reading more than SCAN_TOKENS; the trainer looks at every batch."""
    if len(stream) <= SCAN_TOKENS and (largest := stream.max_id()) >= tokenizer.vocab_size:
        raise UserError(
            f"{folder} holds the token id {largest:,} and tokenizer {tokenizer.path} ends at "
            f"{tokenizer.vocab_size - 1:,}: train with the tokenizer that the shards were made with"
        )
    if not _ends_with(stream, tokenizer.eos_id):
        raise UserError(
            f"the documents in {folder} do not end with {tokenizer.eos} (id {tokenizer.eos_id}) of tokenizer "
            f"{tokenizer.path}: train with the tokenizer that the shards were made with"
        )


def _ends_with(stream: TokenStream, eos_id: int) -> bool:
    """Whether the first shard's first documents end with `eos_id` (the last of a phase may be cut)."""
    shard = stream.shards[0]
    ends = shard.ends[: min(100, len(shard.ends) - 1)]
    return bool((shard.ids[ends - 1] == eos_id).all())


def read_tokenizer(path: Path, eos: str | None) -> Tokenizer:
    """Raises UserError when `path` is no tokenizer.json or names no end of text."""
    from tokenizers import Tokenizer as Fast

    from curation.storage import file_sha256

    try:
        fast = Fast.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is no tokenizer.json: {error}") from None
    names = [eos] if eos else ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"]
    found = next(((name, at) for name in names if (at := fast.token_to_id(name)) is not None), None)
    if found is None:
        raise UserError(f"{path} has none of {', '.join(names)} as end of text: give the tokenizer of the shards")
    bare, whole = (fast.encode("x", add_special_tokens=special).ids for special in (False, True))
    bos_id = whole[0] if bare and whole[: len(bare)] != bare and whole[1 : 1 + len(bare)] == bare else None
    bos = fast.id_to_token(bos_id) if bos_id is not None else None
    return Tokenizer(path, fast.get_vocab_size(), found[1], found[0], file_sha256(str(path)).sha256, bos_id, bos)


def _tokenizer_path(config: Train) -> Path:
    choices = [config.tokenizer, Path(config.run, "tokenizer.json") if config.run else None]
    if config.scratch_shape() is None:
        choices.append(Path(config.model, "tokenizer.json"))
    path = next((Path(c) for c in choices if c is not None), None)
    if path is None:
        raise UserError("no tokenizer: give `tokenizer`, the tokenizer.json that the shards were made with")
    return path


def _eos(config: Train) -> str | None:
    if config.run is None or config.tokenizer is not None:
        return None
    return str(read_manifest(RunFolder(config.run))["tokenizer"]["eos"])


def _vocabulary(path: Path) -> dict[str, int]:
    found = json.loads(path.read_bytes())["model"]["vocab"]
    return found if isinstance(found, dict) else {str(piece): at for at, piece in enumerate(found)}
