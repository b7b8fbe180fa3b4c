"""kill -9 at three moments of an experiment, then the same command: the same bytes of record, choices, page."""

import pytest
from flow_helpers import killed_when, tilth

pytestmark = pytest.mark.slow

MOMENTS = {
    "documents are being curated": "data/seed-1/10_documents/*.json",
    "an arm is being trained": "data/*/70_models/phases/cpt-*/metrics.jsonl",
    "the first choices are there": "answers/*.json",
}
FILES = ("experiment.json", "choices.parquet", "report.html", "frozen.json")


@pytest.fixture(scope="module")
def whole(write_recipe, tmp_path_factory):
    recipe, folder = write_recipe("killed"), tmp_path_factory.mktemp("whole") / "exp"
    done = tilth("experiment", recipe, "--output", folder, "--json", timeout_s=600)
    assert done.code == 0, done.err
    return recipe, {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(whole, tmp_path, moment):
    recipe, expected = whole
    folder = tmp_path / "exp"
    arguments = ("experiment", recipe, "--output", folder)
    assert killed_when(lambda: any(folder.glob(MOMENTS[moment])), *arguments, timeout_s=600), "it ended before the kill"
    assert not (folder / "experiment.json").exists()
    done = tilth(*arguments, timeout_s=600)
    assert done.code == 0, done.err
    assert {name: (folder / name).read_bytes() for name in FILES} == expected
    assert not list(folder.rglob("*.tmp"))
