"""Which tokenizer a run uses, and text -> token ids with it.

Format: Hugging Face `tokenizer.json`. Two libraries read it: `tokenizers`, which defines what
the ids are, and `fastokens`, which gives the same ids some 30 times faster but does not take
every tokenizer. So `resolve` starts from `tokenizers`, and `check_fastokens` moves a run to
`fastokens` only after both gave the same ids for a sample of its text and for ODD_TEXTS.

Text is data: "<|endoftext|>" written in a document is encoded as the characters it is made of,
never as the control token, since a page about tokenizers would otherwise end its own document.
The only EOS ids are the one that closes each document. For that the tokenizer's special tokens
are split like other text (`encode_special_tokens`, `split_special_tokens`), and the EOS is made
special where its file forgot to. Post-processor, truncation and padding of the file are off.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curation import storage
from curation.errors import TilthError, UserError

EOS = "<|endoftext|>"  # of the tokenizers that `train` makes
WELL_KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>")
NUM_BYTES = 256  # a byte-level vocabulary before its first merge
UINT16_VOCAB_SIZE = 65_536  # ids up to 65,535

TOKENIZER_FILE = "tokenizer.json"
# Who may name the EOS, best first. The last two give ids, which may be a list; its first counts.
EOS_KEYS = (
    ("tokenizer_config.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)
FlatEncode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # texts -> ids uint32, offsets uint64[texts + 1]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# What encoders have been seen to differ on. The EOS text itself is added by check_fastokens.
ODD_TEXTS = (
    "",
    " ",
    "\x00",
    "a\x00b\x01\x7f",
    "\ufeffBOM, NBSP\u00a0and zero\u200bwidth",
    "e\u0301 a\u030a\u0327 \u0f40\u0fb5",  # combining marks, decomposed
    "é å ﬁ Ⅳ ½ ｆｕｌｌ",  # what NFKC would change
    "İstanbul ΣΊΣΥΦΟΣ straße",  # case folding
    "漢字かなカナ한국어 中文字符测试。",
    "שלום مرحبا नमस्ते สวัสดี",
    "😀 👨‍👩‍👧‍👦 👍🏽 🇫🇷",
    " " * 1000 + "x" + "\n" * 500 + "\t" * 70 + "\r\n\r\n" + "\u3000" * 9,
    "a" * 3000 + "1" * 300 + "=-" * 300,
    "don't I'LL we've 3.14159 1,234,567 x2y3 snake_case CamelCase",
    "<|endoftext|> <|im_start|>user</s><s><pad>[MASK]<unk><0x0A>▁▁",
)


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer that exists, and how this run uses it. Cheap to send to workers."""

    name: str  # Hugging Face id, or the last part of the path: the same on every machine
    path: str  # its tokenizer.json
    sha256: str  # of that file
    eos: str
    eos_id: int
    vocab_size: int  # largest id + 1, added tokens too
    backend: Literal["tokenizers", "fastokens"] = "tokenizers"
    warning: str | None = None  # one sentence for the user

    @property
    def token_bytes(self) -> int:
        return 2 if self.vocab_size <= UINT16_VOCAB_SIZE else 4

    @property
    def dtype(self) -> np.dtype:
        """Of token ids in memory and in files: little-endian uint16 or uint32."""
        return np.dtype(f"<u{self.token_bytes}")

    def about(self) -> dict[str, Any]:
        """What a manifest says of it; no path of this machine."""
        names = ("name", "sha256", "eos", "eos_id", "vocab_size", "token_bytes", "backend")
        return {name: getattr(self, name) for name in names}


def resolve(tokenizer: str, eos: str | None = None) -> TokenizerSpec:
    """Find a tokenizer: a tokenizer.json, a folder with one (both through fsspec), or a Hugging
    Face id, which is downloaded unless it is in the local cache.

    EOS is `eos`, else what the configs beside tokenizer.json say, else the first of
    WELL_KNOWN_EOS in the vocabulary. Raises UserError when the tokenizer or its EOS is not there.
    """
    name, path = _locate(tokenizer)
    raw = storage.read_bytes(path)
    try:
        loaded = _tokenizers(raw.decode())
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json that `tokenizers` can read ({_line(error)})") from None
    vocab = loaded.get_vocab(with_added_tokens=True)
    if not vocab:
        raise UserError(f"{path} has an empty vocabulary: train it, or give another tokenizer")
    eos = _find_eos(path, vocab, eos)
    return TokenizerSpec(name, path, hashlib.sha256(raw).hexdigest(), eos, vocab[eos], max(vocab.values()) + 1)


def _locate(tokenizer: str) -> tuple[str, str]:
    """(name, path of the tokenizer.json)."""
    fs, inner = storage.filesystem(tokenizer)
    if fs.isfile(inner):
        return inner.rsplit("/", 1)[-1], _absolute(tokenizer)
    if fs.isdir(inner):
        folder, name = tokenizer, inner.rstrip("/").rsplit("/", 1)[-1]
    elif not HUB_ID.fullmatch(tokenizer) or tokenizer.endswith(".json"):
        raise UserError(f"there is no tokenizer at {tokenizer}: give a tokenizer.json, its folder or a Hugging Face id")
    else:
        folder, name = _download(tokenizer), tokenizer
    path = storage.join(folder, TOKENIZER_FILE)
    if not storage.exists(path):
        raise UserError(
            f"{tokenizer} has no {TOKENIZER_FILE}: save it as a fast tokenizer with transformers, or give another one"
        )
    return name, _absolute(path)


def _absolute(path: str) -> str:
    """Workers may run in another folder."""
    return storage.filesystem(path)[1] if storage.is_local(path) else path


def _download(hub_id: str) -> str:
    """The local folder with the tokenizer files of a Hugging Face model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        folder: str = snapshot_download(hub_id, allow_patterns=[TOKENIZER_FILE, *(file for file, _ in EOS_KEYS)])
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"tokenizer {hub_id} is no local path, and Hugging Face does not give it ({_line(error)}): "
            "check the name, the network and HF_TOKEN, or give the path of a tokenizer.json"
        ) from None
    return folder


def _find_eos(path: str, vocab: dict[str, int], eos: str | None) -> str:
    if eos is not None:
        if eos not in vocab:
            raise UserError(f"tokenise.eos {eos!r} is not in the vocabulary of {path}: name one of its tokens")
        return eos
    named = _configured_eos(path.rpartition("/")[0] or ".", vocab)
    found = named or next((token for token in WELL_KNOWN_EOS if token in vocab), None)
    if found is None:
        raise UserError(f"{path} does not say which token ends a text: set `tokenise.eos` to it")
    if found not in vocab:
        raise UserError(f"the eos_token {found!r} beside {path} is not in its vocabulary: set `tokenise.eos`")
    return found


def _configured_eos(folder: str, vocab: dict[str, int]) -> str | None:
    """The EOS that the configs in `folder` name, or None when they name none."""
    for file, key in EOS_KEYS:
        path = storage.join(folder, file)
        if not storage.exists(path):
            continue
        try:
            value = json.loads(storage.read_bytes(path))[key]
        except KeyError:
            continue
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a JSON object ({_line(error)}): mend or delete it") from None
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, dict):  # an AddedToken
            value = value.get("content")
        if isinstance(value, int):
            value = next((token for token, id_ in vocab.items() if id_ == value), None)
        if value:
            return str(value)
    return None


def check_fastokens(spec: TokenizerSpec, sample_texts: Sequence[str]) -> TokenizerSpec:
    """`spec` on `fastokens` when that gives the ids of `tokenizers` for the sample and ODD_TEXTS,
    else on `tokenizers` with a warning. Also warns when EOS text within a document becomes the EOS id."""
    eos_texts = [spec.eos, f"a{spec.eos}b", f" {spec.eos}\n{spec.eos} "]
    texts = pa.array([*ODD_TEXTS, *eos_texts, *sample_texts], pa.large_string())
    expected = Encoder(replace(spec, backend="tokenizers")).encode(texts)
    warnings = []
    if np.count_nonzero(expected[0] == spec.eos_id) > len(texts):
        warnings.append(f"the text {spec.eos!r} within a document is encoded as the end of a document")
    backend, fault = _agreeing_backend(spec, texts, expected)
    if fault:
        warnings.append(f"encoding with `tokenizers`, many times slower: {fault}")
    warning = f"tokenizer {spec.name}: {'; '.join(warnings)}" if warnings else None
    return replace(spec, backend=backend, warning=warning)


def _agreeing_backend(
    spec: TokenizerSpec, texts: pa.Array, expected: tuple[np.ndarray, np.ndarray]
) -> tuple[Literal["tokenizers", "fastokens"], str | None]:
    """(backend, why not fastokens)."""
    try:
        ids, ends = Encoder(replace(spec, backend="fastokens")).encode(texts)
    except Exception as error:  # whatever it raises, `tokenizers` can do the work
        return "tokenizers", f"`fastokens` does not take this tokenizer ({_line(error)})"
    if np.array_equal(ends, expected[1]) and np.array_equal(ids, expected[0]):
        return "fastokens", None
    return "tokenizers", "`fastokens` gives other ids for a sample"


class Encoder:
    """Text -> ids with one loaded tokenizer. Build it once a process: loading takes up to a second."""

    def __init__(self, spec: TokenizerSpec):
        """Raises TilthError when the tokenizer.json is not the one that `spec` was made from."""
        self.spec = spec
        raw = storage.read_bytes(spec.path)
        if hashlib.sha256(raw).hexdigest() != spec.sha256:
            raise TilthError(f"{spec.path} is another file than at the start of the run: put it back and run again")
        self._flat = _load(_as_plain_text_encoder(raw, spec.eos), spec.backend)

    def encode(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(ids, ends) of n texts (string or large_string, no nulls), each closed by the EOS id.

        ids: spec.dtype, all texts one after the other. ends: int64[n], one past each text's EOS.
        Holds the texts as Python strings and their ids as uint32: give it batches.
        """
        if texts.null_count:
            raise TilthError(f"{texts.null_count} of {len(texts)} texts are null: ingest quarantines those")
        ids, offsets = self._flat(texts.to_pylist())
        ends = offsets[1:].astype(np.int64)
        closed = np.insert(ids.astype(self.spec.dtype), ends, self.spec.eos_id)
        return closed, ends + np.arange(1, len(ends) + 1)


def _load(tokenizer_json: str, backend: str) -> FlatEncode:
    if backend == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(tokenizer_json)

        def encode_fast(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, offsets = fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
            return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")

        return encode_fast

    slow = _tokenizers(tokenizer_json)
    slow.encode_special_tokens = True

    def encode_slow(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [e.ids for e in slow.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.uint64)
        return np.fromiter(chain.from_iterable(encoded), np.uint32, int(offsets[-1])), offsets

    return encode_slow


def _as_plain_text_encoder(raw: bytes, eos: str) -> str:
    """The tokenizer.json without truncation and padding, and with `eos` special."""
    data = json.loads(raw)
    added = [
        {**token, "special": token["special"] or token["content"] == eos} for token in data.get("added_tokens", ())
    ]
    return json.dumps({**data, "truncation": None, "padding": None, "added_tokens": added})


def train(texts: Iterable[str], vocab_size: int, out_path: str) -> TokenizerSpec:
    """Train a byte-level BPE with EOS as id 0 on `texts` and commit it as `out_path`.

    The same texts give the same file. A small corpus may end with fewer ids than `vocab_size`:
    the returned spec says how many. Raises UserError when `vocab_size` leaves no room for a merge
    or `texts` has none to learn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = NUM_BYTES + 1  # the bytes and EOS
    if vocab_size <= smallest:
        raise UserError(f"--vocab-size {vocab_size} leaves nothing to learn beside {smallest} fixed ids: ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= smallest:
        raise UserError("the inputs hold no text that a tokenizer could learn from: give more documents")
    storage.commit_bytes(out_path, tokenizer.to_str(pretty=True).encode())
    return resolve(out_path, EOS)


def _tokenizers(text: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


def _line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
