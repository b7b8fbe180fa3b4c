"""A small tokenizer, trained here."""

from pathlib import Path

import pytest

from curation.tokenise import TokenizerSpec, train

# Enough kinds of text for a few hundred merges.
TEXTS = [
    "The assistant reads the letter, answers it, and says plainly what it does not know.",
    "Der Müller über dem Fluß mahlt; la niña corre por el jardín; l'été est déjà là.",
    "def area(width, height):\n    return width * height  # in metres\n\n",
    "漢字かな交じり文と 한국어 문장, и русский текст, ελληνικά.",
    "It's 3.14159, isn't it? We've 1,234,567 of them 😀 👍🏽 -- don't you?",
] * 3


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    """Not yet checked for fastokens."""
    return train(TEXTS, 500, str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@pytest.fixture(scope="session")
def folder(spec: TokenizerSpec) -> Path:
    """The folder with the tokenizer.json alone: copy from it."""
    return Path(spec.path).parent
