"""The backend without a server: a model in this process, whose answer is the most likely of those that the schema
allows.

The answer is made field by field, in the schema's order, after the same prompt as elsewhere. A field with listed values
gets the one whose characters have the highest log-likelihood after what stands before it; the quote is the sentence of
the document with the highest mean log-likelihood per token. So every answer is valid, also from base models too small
to write JSON, and its cost in tokens is known. One row at a time: for models that fit into this machine, not for
clusters."""

import asyncio
import copy
import inspect
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.label.backend import Failed, Messages, Reply, Request, Text, Usage
from curation.label.model import identity_of, revision_of
from curation.label.rubric import document_of

_AT_ONCE = 8  # continuations in a batch; each has a copy of the prompt's keys and values
_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]*\s*")
_SHORTEST = 20  # characters; shorter pieces show nothing


class Likelihood:
    """model: folder of a Hugging Face checkpoint, or a hub id with its revision; with a chat template or without (a
    base model gets the messages as plain text). On a GPU where PyTorch sees one. Raises UserError where PyTorch and
    transformers are missing, or the checkpoint is no causal language model."""

    def __init__(self, model: str, *, revision: str = "", schema: Mapping[str, Any]):
        self.model, self.revision = model, revision_of(model, revision)
        self._properties: Mapping[str, Any] = schema["properties"]
        self._loaded: Any = None

    @property
    def identity(self) -> Mapping[str, str]:
        return identity_of("transformers", self.model, self.revision)

    @property
    def sampling(self) -> Mapping[str, Any]:
        return {"choice": "log-likelihood"}

    async def label(self, rows: AsyncIterator[Request]) -> AsyncGenerator[Reply, None]:
        async for row in rows:
            yield await asyncio.to_thread(self._answer, row)

    def _answer(self, row: Request) -> Reply:
        self._load()
        prompt, answer = self._prompt(row.messages), ""
        with self._torch.inference_mode():
            state = self._extend(_State(), prompt)
            for number, (name, about) in enumerate(self._properties.items()):
                begin = f'{", " if number else "{"}"{name}": "'
                state = self._extend(state, self._ids(begin))
                options = about.get("enum") or sentences(document_of(row.messages), about["maxLength"])
                written = [json.dumps(option, ensure_ascii=False)[1:] for option in options]
                ids = [self._ids(one) for one in written]
                if state.length + max(map(len, ids)) > self._max_length:
                    detail = f"prompt and answer have more tokens than the model's {self._max_length}"
                    return Reply(row.key, Failed("bad_request", detail), Usage())
                scores = self._scores(state, ids)
                if "enum" not in about:
                    scores = [score / len(one) for score, one in zip(scores, ids, strict=True)]
                best = max(range(len(ids)), key=scores.__getitem__)
                state = self._extend(state, ids[best])
                answer += begin + written[best]
        return Reply(row.key, Text(answer + "}"), Usage(len(prompt), state.length - len(prompt)))

    def _load(self) -> None:
        if self._loaded is not None:
            return
        try:
            import torch
            import transformers
        except ImportError:
            raise UserError("the label backend `transformers` needs PyTorch: pip install 'tilth[train]'") from None
        self._torch = torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hub = {} if Path(self.model).is_dir() else {"revision": self.revision}
        transformers.logging.disable_progress_bar()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.model, **hub)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.model, dtype="auto" if device == "cuda" else "float32", **hub
            )
        # Whatever is wrong with a checkpoint, transformers has an exception for it, of many classes.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{self.model} could not be loaded as a causal language model: {reason}") from None
        finally:
            transformers.logging.enable_progress_bar()
        self._loaded = model.to(device).eval()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        self._max_length = int(getattr(config, "max_position_embeddings", None) or 1_000_000)

    def _prompt(self, messages: Messages) -> list[int]:
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self._ids(text)
        text = "\n\n".join(message["content"] for message in messages)
        return list(self._tokenizer(f"{text}\n\nAnswer: ")["input_ids"])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _extend(self, state: "_State", ids: Sequence[int]) -> "_State":
        """`state` with more tokens, unless they are too many: then only the length grows. Its keys and values go on
        into the new one."""
        length = state.length + len(ids)
        if length > self._max_length:
            return _State(length)
        found = self._forward([ids], state.cache, last=True)
        return _State(length, found.cache, found.logits[0, -1].float().log_softmax(-1))

    def _scores(self, state: "_State", continuations: Sequence[Sequence[int]]) -> list[float]:
        """Log-likelihood of each after `state`, in nats."""
        torch, found = self._torch, []
        for start in range(0, len(continuations), _AT_ONCE):
            batch = continuations[start : start + _AT_ONCE]
            cache = copy.deepcopy(state.cache)
            cache.batch_repeat_interleave(len(batch))
            # Padding stands behind, where nothing attends to it.
            width = max(map(len, batch))
            log_p = self._forward([[*ids, *[0] * (width - len(ids))] for ids in batch], cache).logits.float()
            log_p = log_p.log_softmax(-1)
            for at, ids in enumerate(batch):
                later = log_p[at, torch.arange(len(ids) - 1), torch.tensor(ids[1:], dtype=torch.long)].sum()
                found.append(float(state.next_log_p[ids[0]]) + float(later))
        return found

    def _forward(self, rows: Sequence[Sequence[int]], cache: Any, last: bool = False) -> Any:
        """last: logits of the last position will do, where a prompt's are gigabytes."""
        ids = self._torch.tensor(rows, device=self._loaded.device)
        keep = {"logits_to_keep": 1} if last and self._keeps else {}
        return self._loaded(input_ids=ids, cache=cache, use_cache=True, **keep)


@dataclass
class _State:
    """A beginning that went through the model."""

    length: int = 0
    cache: Any = None
    next_log_p: Any = None
    """float32[vocabulary]"""


def sentences(text: str, at_most: int) -> list[str]:
    """Passages of `text`, letter by letter, of at most `at_most` characters: its sentences, long ones cut at white
    space; where none is long enough to show anything the beginning of the text, with single spaces."""
    found = []
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip()
        if len(sentence) > at_most:
            sentence = sentence[: at_most + 1].rsplit(maxsplit=1)[0][:at_most]
        if len(" ".join(sentence.split())) >= _SHORTEST:
            found.append(sentence)
    return found or [" ".join(text.split())[:at_most].strip()]
