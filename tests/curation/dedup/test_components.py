"""Components by rounds of stars against scipy, for any number of partitions."""

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import storage
from curation.dedup import components
from curation.dedup.work import LINKS, Work
from curation.manifest import RunFolder
from curation.recipe import Dedup
from curation.stage import serial

NODES = st.integers(0, 30).map(lambda k: (k * 0x9E3779B97F4A7C15) % 2**64)
EDGES = st.lists(st.tuples(NODES, NODES).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=40)


def labelled(folder, edges: list[tuple[int, int]], most_links: int, num_files: int = 2) -> dict[int, int]:
    work = Work(RunFolder(str(folder)), Dedup(), "", 1, 1, 1)
    for k in range(num_files):
        columns = {name: pl.Series([e[i] for e in edges[k::num_files]], dtype=pl.UInt64) for i, name in enumerate("ab")}
        storage.commit_ipc(work.run.path(LINKS, f"{k:06d}.arrow"), pl.DataFrame(columns).to_arrow())
    count = components.label(work, len(edges), most_links, serial)
    entities = np.array(sorted({end for edge in edges for end in edge}), np.uint64)
    assert count == len(entities)
    linked, component = components.find(work, entities)
    assert linked.all()
    assert not components.find(work, entities + np.uint64(1))[0][~np.isin(entities + np.uint64(1), entities)].any()
    return dict(zip(entities.tolist(), component.tolist(), strict=True))


def smallest_reachable(edges: list[tuple[int, int]]) -> dict[int, int]:
    label = {end: end for edge in edges for end in edge}
    for _ in label:
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    return label


@given(EDGES, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_both_ways_label_by_the_smallest_member(tmp_path_factory, edges, most_links):
    expected = smallest_reachable(edges)
    assert labelled(tmp_path_factory.mktemp("one"), edges, len(edges)) == expected
    assert labelled(tmp_path_factory.mktemp("stars"), edges, most_links) == expected


@pytest.mark.parametrize("most_links", [30, 100])
def test_a_long_chain_takes_few_rounds(tmp_path, most_links, monkeypatch):
    monkeypatch.setattr(components, "_MAX_ROUNDS", 20)
    nodes = [int(n) for n in np.random.RandomState(0).permutation(300)]
    found = labelled(tmp_path, list(itertools.pairwise(nodes)), most_links)
    assert set(found.values()) == {0}


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=30), max_size=8))
def test_distinct_values_of_all_parts(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "_WAITING", 5)  # so that few values are merged many times
        found = components._distinct(np.array(part, np.uint64) for part in parts)
    assert found.tolist() == sorted({value for part in parts for value in part})
