"""The stage: LABEL rows, row-aligned, and a fingerprint that follows what they depend on."""

import pyarrow as pa
import pytest

from curation.detect import label_table, section_fingerprint
from curation.errors import UserError
from curation.recipe import Detect, FastText
from curation.schema import LABEL

DOCUMENTS = pa.table(
    {
        "id": ["a", "b", "c"],
        "text": pa.array(
            ["A robot lied to its makers and the AI attacked them.", "Bread and butter.", ""], pa.large_string()
        ),
    }
)


def test_rows_follow_the_schema_and_the_documents() -> None:
    labels = label_table(DOCUMENTS, Detect())
    assert labels.schema.equals(LABEL, check_metadata=True)
    assert labels["id"].to_pylist() == ["a", "b", "c"]
    assert labels["blocklist"].to_pylist() == [True, False, False]
    assert labels["hits"].to_pylist()[0][0] == {"term": "robot", "category": "general_ai", "offset": 2}
    for row in labels.to_pylist():
        assert row["p_discourse"] == pytest.approx(1 - row["p_unrelated"], abs=1e-6)
    assert label_table(DOCUMENTS.slice(1, 1), Detect()).to_pylist() == labels.slice(1, 1).to_pylist()
    assert label_table(DOCUMENTS.slice(0, 0), Detect()).num_rows == 0


def test_the_threshold_decides_and_is_part_of_the_fingerprint() -> None:
    sections = [Detect(fasttext=FastText(threshold=t)) for t in (0, 0.5, 1)]
    for section in sections:
        labels = label_table(DOCUMENTS, section)
        decided = [p >= section.fasttext.threshold for p in labels["p_discourse"].to_pylist()]
        assert labels["discourse"].to_pylist() == decided
    assert label_table(DOCUMENTS, sections[0])["discourse"].to_pylist() == [True, True, True]
    assert len({section_fingerprint(section) for section in sections}) == 3


def test_a_wrong_path_ends_before_any_document() -> None:
    with pytest.raises(UserError, match=r"there is no model file nowhere\.bin"):
        section_fingerprint(Detect(fasttext=FastText(model="nowhere.bin")))
