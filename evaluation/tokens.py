"""Text to token ids, the same for every backend: special tokens where the tokenizer puts them, at the front only."""

from collections.abc import Sequence
from typing import Any

from curation.errors import UserError
from evaluation.backends import Tokens

# The suite itself looks for what is too long, so no warnings.
_PLAIN: dict[str, Any] = {"return_attention_mask": False, "verbose": False}


class Encoder:
    """A checkpoint's tokenizer. UserError: there is none at `source` (a folder or hub id)."""

    def __init__(self, source: str):
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        # Whatever is missing or broken, transformers has an exception for it, of many classes.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"no tokenizer could be loaded from {source}: {reason}; name one by --tokenizer") from None
        whole, bare = (self.tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
        # An end-of-text token after the context would be a lie about what follows.
        self._tail = 0 if whole[-len(bare) :] == bare else len(whole) - len(bare) - _at(whole, bare)

        # A tokenizer without special tokens of its own at the front: documents begin after the one that ends them.
        ends = (getattr(self.tokenizer, f"{name}_token", None) for name in ("bos", "eos"))
        self.beginning = "" if self.encode([""])[0] else next((str(end) for end in ends if end), "\n")

    @property
    def can_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of whole texts, with the special tokens at their front."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), **_PLAIN)["input_ids"]
        return [tuple(row[: len(row) - self._tail]) for row in ids]

    def encode_templated(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of what `chat_texts` gave, and of more after it: the template writes its special tokens itself."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False, **_PLAIN)["input_ids"]
        return [tuple(row) for row in ids]

    def chat_texts(self, chats: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        """Up to where the assistant's turn begins."""
        return [self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def _at(whole: list[int], part: list[int]) -> int:
    return next((at for at in range(len(whole)) if whole[at : at + len(part)] == part), 0)
