"""Make the default detector again, byte for byte:

    python -m examples.labels.train_default CORPUS_FOLDER [-o curation/detect/models/default.bin]

Training rows are our own documents (examples/corpus, examples/pool, documents.jsonl) and passages of others' texts
that may be used so. The latter are not kept here: passages.jsonl names them by document id and
character offsets, with the stance, and CORPUS_FOLDER holds the documents as JSON lines (.zst) with
`id` and `text`. `how` is `read` where a language model working for this project read and labelled
the passage, and `no AI word` where it was taken as unrelated
since its window (of ~200 words; for fiction, the whole book) has none of the words that could make it AI discourse.
Sources and licences: models/default.md.
"""

import argparse
import glob
import json
import sys
import tempfile
from pathlib import Path

from curation.detect.train import train
from curation.records import read_records

EXAMPLES = Path(__file__).resolve().parents[1]
PASSAGES = EXAMPLES / "labels" / "passages.jsonl"
DEFAULT = EXAMPLES.parent / "curation" / "detect" / "models" / "default.bin"


def own_rows() -> list[dict[str, str]]:
    """Text and stance of every document that we wrote."""
    folders = ("corpus/*", "pool/*", "labels/documents")
    paths = sorted(path for folder in folders for path in EXAMPLES.glob(f"{folder}.jsonl"))
    return [{"text": r["text"], "stance": r["stance"]} for path in paths for _, r in read_records(str(path))]


def passage_rows(corpus: str) -> list[dict[str, str]]:
    """Text and stance of every passage of passages.jsonl, from the documents in the folder `corpus`."""
    passages = [record for _, record in read_records(str(PASSAGES))]
    wanted = {p["id"] for p in passages}
    texts = {
        record["id"]: record["text"]
        for path in sorted(glob.glob(f"{corpus}/*.jsonl*"))
        for _, record in read_records(path)
        if record.get("id") in wanted
    }
    if missing := sorted(wanted - texts.keys()):
        sys.exit(f"{corpus} lacks {len(missing)} documents that passages.jsonl names, the first is {missing[0]}")
    return [{"text": texts[p["id"]][p["start"] : p["end"]], "stance": p["stance"]} for p in passages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder with the documents that passages.jsonl names")
    parser.add_argument("-o", "--output", default=str(DEFAULT))
    asked = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in own_rows() + passage_rows(asked.corpus))
        file.flush()
        card = train([file.name], asked.output)
    print(json.dumps({k: card[k] for k in ("sha256", "documents")} | {"discourse": card["held_out"]["discourse"]}))


if __name__ == "__main__":
    main()
