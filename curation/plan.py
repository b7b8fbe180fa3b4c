"""`tilth curate --dry-run`: what a run would read, which parts it would make, and whether pools are large enough.

Nothing is written and no Ray is started. Pools are small by their nature, so they are read and
tokenised here to the token: a share that their repeats cannot fill is an error now, not after
the corpus has been read.
"""

import math
from typing import Any

from curation import dedup, detect, ingest, storage, tokenise
from curation.errors import UserError
from curation.label import stage as label
from curation.manifest import ARMS, DEDUP, DETECT, DOCUMENTS, SIGNATURES, TOKENS, RunFolder
from curation.mix.budget import too_small_pool
from curation.mix.policy import drop_rules, share_asked, upsamples
from curation.recipe import Recipe
from curation.schema import POOL
from curation.steps import Chains, label_work, split_parts
from curation.tokenise.tokenizer import Encoder


def plan(recipe: Recipe, root: str) -> dict[str, Any]:
    """Inputs, stages and arms with counts. Raises UserError as the run would, for what can be known now."""
    splits = ingest.plan(recipe.inputs, recipe.ingest)
    spec = tokenise.resolve(recipe.tokenise.tokenizer, recipe.tokenise.eos)
    run = RunFolder(root)
    detect_fingerprint = detect.section_fingerprint(recipe.detect)
    for path in recipe.dedup.against:
        dedup.open_earlier(path, recipe.dedup)
    _check_pools(recipe, splits, spec)
    return {
        "recipe": recipe.name,
        "run": root,
        "inputs": _inputs(recipe, splits),
        "stages": _stages(run, recipe, splits, detect_fingerprint),
        "label": _label(run, recipe),
        "arms": [
            {
                "arm": arm,
                "phase": name,
                "tokens": phase.tokens,
                "share": share_asked(recipe.mix, arm, name),
                "drop": sorted(drop_rules(recipe.mix, arm, name)),
                "shards": math.ceil(phase.tokens / recipe.tokenise.shard_tokens),
            }
            for arm in recipe.mix.arms
            for name, phase in recipe.mix.phases.items()
        ],
    }


def _label(run: RunFolder, recipe: Recipe) -> str | None:
    """What labelling would cost, in words; None without a label section."""
    if recipe.label is None:
        return None
    names = [part.name for part in run.parts(DEDUP)]
    documents = {part.name for part in run.parts(DOCUMENTS)}
    names = [name for name in names if name in documents]
    if not names:
        return "label: how many documents is known when detect and dedup have run"
    return label.told_in_words(label.plan(label_work(recipe, run, names, [])), recipe.label)


def _inputs(recipe: Recipe, splits: list[ingest.Split]) -> list[dict[str, Any]]:
    rows = []
    for k, item in enumerate(recipe.inputs):
        mine = [s for s in splits if s.source_rank == k]
        files = {s.path for s in mine}
        size = sum(storage.size_bytes(path) for path in files)
        rows.append(
            {
                "source": item.source,
                "role": item.role,
                "path": item.path,
                "files": len(files),
                "bytes": size,
                "splits": len(mine),
            }
        )
    return rows


def _stages(
    run: RunFolder, recipe: Recipe, splits: list[ingest.Split], detect_fingerprint: str
) -> list[dict[str, Any]]:
    """Parts to do and done by stage; a split that was never read is counted as one part."""
    counts = {DOCUMENTS: [0, 0], DETECT: [0, 0], SIGNATURES: [0, 0]}
    for split in splits:
        chains = Chains.of(split, detect_fingerprint, recipe.dedup)
        for name in split_parts(run, split, chains) or [split.name]:
            for place, chain in chains.places():
                counts[place][run.current(place, name, chain) is not None] += 1
    rows = [
        {"stage": name, "to_do": counts[place][0], "done": counts[place][1]}
        for name, place in (("ingest", DOCUMENTS), ("detect", DETECT), ("signatures", SIGNATURES))
    ]
    # What comes behind dedup depends on its result: known only when all before it is done.
    for name, place in (("dedup", DEDUP), ("tokenise", TOKENS), ("mix", ARMS)):
        rows.append({"stage": name, "to_do": None, "done": len(run.parts(place))})
    return rows


def _check_pools(recipe: Recipe, splits: list[ingest.Split], spec: tokenise.TokenizerSpec) -> None:
    pools = [s for s in splits if s.input.role == POOL]
    wanted = {asked.stance for arm in recipe.mix.arms.values() for asked in arm.upsample}
    if not wanted or not pools:
        return
    tokens: dict[str, int] = dict.fromkeys(wanted, 0)
    encoder = Encoder(spec)
    for split in pools:
        for chunk in ingest.chunks(split):
            documents = ingest.parse(chunk).documents
            _, ends = encoder.encode(documents["text"])
            lengths = [int(n) for n in ends - [0, *ends[:-1]]]
            for stance, length in zip(documents["given_stance"].to_pylist(), lengths, strict=True):
                if stance in tokens:
                    tokens[stance] += length
    for name, arm in recipe.mix.arms.items():
        for asked in arm.upsample:
            phases = [p for p in recipe.mix.phases if asked in upsamples(recipe.mix, name, p)]
            total = sum(recipe.mix.phases[p].tokens for p in phases)
            capacity = tokens[asked.stance] * recipe.mix.max_repeat.pool
            if capacity < asked.share * total:
                raise UserError(too_small_pool(name, "+".join(phases), asked.stance, capacity, capacity / total))
