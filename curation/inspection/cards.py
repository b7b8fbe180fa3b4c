"""README.md of every arm-phase: what its shards are, for whoever finds the folder without the run."""

from typing import Any

from curation.manifest import RunFolder, fingerprint

_CARD = """# {arm} / {phase}

Token shards written by Tilth {version} from recipe `{recipe}` (recipe hash `{recipe_hash}`).

| | asked | achieved |
|---|---:|---:|
| tokens | {tokens_asked:,} | {tokens:,} |
| inserted share | {share_asked:.4%} | {share:.4%} |

- {documents:,} documents: {background_documents:,} background, {inserted_documents:,} inserted;
  no document is used more than {max_repeat} times
- dropped: {drop}{dropped}
- AI discourse in the background: {natural:.4%} of tokens
- background in common with the first arm: {common_with_first:.2%} of tokens
- tokenizer `{tokenizer}`, {token_bytes} bytes a token, little-endian; every document ends with token {eos_id};
  windows may cross documents
- `NNNNN.ds`, `.ds.index`, `.ds.metadata`: Nanotron / datatrove; `NNNNN.bin`, `.idx`: Megatron;
  `NNNNN.provenance.parquet`: token range -> document, stance, repeat
"""


def write_cards(run: RunFolder, manifest: dict[str, Any]) -> None:
    """One card for each row of the asked-versus-achieved table."""
    tokenizer = manifest["tokenizer"]
    for row in manifest["summary"]["arms"]:
        card = _CARD.format(
            **{k: v for k, v in row.items() if k != "drop"},
            drop=" and ".join(row["drop"]) or "nothing",
            dropped=f" ({row['dropped_documents']:,} documents)" if row["drop"] else "",
            natural=row["discourse_tokens"] / row["tokens"],
            version=manifest["tilth_version"],
            recipe=manifest["recipe"]["name"],
            recipe_hash=fingerprint(manifest["recipe"])[:16],
            tokenizer=tokenizer["name"],
            token_bytes=tokenizer["token_bytes"],
            eos_id=tokenizer["eos_id"],
        )
        run.commit_bytes(f"60_arms/{row['arm']}/{row['phase']}/README.md", card.encode())
