"""datatrove's and megatron-core's side of test_golden.py; runs in their environment, not in ours:

    python -m venv D && D/bin/pip install datatrove==0.10.1 tokenizers torch==2.13.0
    D/bin/pip install --no-deps megatron-core==0.16.1
    D/bin/python datatrove_peer.py record > datatrove-0.10.1.json
    TILTH_DATATROVE_PYTHON=D/bin/python pytest tests/curation/tokenise/test_golden.py

record          the bytes that datatrove writes for CASES (hex when short, else sha256), and its short counts
read FOLDER N   what datatrove's and megatron-core's readers see in FOLDER/shard.*, ids of N bytes
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

TOKENIZER = "tok.json"
# name: (token bytes, document lengths)
CASES = {
    "three documents": (2, [4, 2, 6]),
    "three documents, 4 bytes": (4, [4, 2, 6]),
    "999 tokens": (2, [999]),
    "1000 tokens": (4, [1, 999]),
    "123456 tokens": (2, [123_000, 456]),
    "1.2 million tokens": (2, [300_000] * 4),
}
COUNTS = [1, 9, 10, 12, 99, 100, 994, 995, 996, 999, 1000, 1005, 1015, 9994, 9995, 9999, 10_000, 12_345, 12_350]
COUNTS += [99_949, 99_950, 99_999, 123_456, 999_499, 999_500, 999_999, 10**6, 1_200_000, 1_005_000, 9_995_000]
COUNTS += [99_950_000, 99_999_999, 100_000_000, 999_500_000, 999_999_999, 10**9, 1_234_567_890, 10**12, 999_999 * 10**9]


def documents(token_bytes: int, lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths; the last id of each is 0, the first of all the largest id of its type."""
    largest = 65_535 if token_bytes == 2 else 2_000_000
    return [[largest - (7 * k + i) % 60_000 for i in range(n - 1)] + [0] for k, n in enumerate(lengths)]


def record() -> dict:
    import humanize
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    cases = {}
    for name, (token_bytes, lengths) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            nanotron = TokenizedFile(
                folder,
                "shard.ds",
                save_index=True,
                save_final_metadata=True,
                tokenizer_name_or_path=TOKENIZER,
                token_size=token_bytes,
            )
            megatron = MegatronTokenizedFile(folder, "shard", token_size=token_bytes)
            for ids in documents(token_bytes, lengths):
                nanotron.write(ids, None)
                megatron.write(ids)
            nanotron.close()
            megatron.close()
            cases[name] = {path.name: fixed(path.read_bytes()) for path in sorted(Path(folder).iterdir())}
    return {"cases": cases, "counts": {str(n): humanize.metric(n, unit="T") for n in COUNTS}}


def fixed(raw: bytes) -> str:
    return raw.hex(" ") if len(raw) <= 128 else f"sha256 {hashlib.sha256(raw).hexdigest()}"


def read(folder: str, token_bytes: int) -> dict:
    from datatrove.utils.dataset import DatatroveFolderDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    windows = DatatroveFolderDataset(folder, 3, filename_pattern="shard.ds", token_size=token_bytes, shuffle=False)
    return {
        "windows": [windows[i]["input_ids"].tolist() for i in range(len(windows))],
        "documents": [ids.tolist() for ids in IndexedDataset(f"{folder}/shard")],
    }


if __name__ == "__main__":
    json.dump(record() if sys.argv[1] == "record" else read(sys.argv[2], int(sys.argv[3])), sys.stdout, indent=1)
    print()
