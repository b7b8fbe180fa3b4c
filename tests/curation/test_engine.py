"""Items that become pieces, on a real Ray: every piece once, large items shared, failures by their own name."""

import subprocess
import sys

import engine_tasks
import pytest

from curation.engine import Engine
from curation.errors import UserError

SIZES = [("even", [1, 1, 1, 1, 1, 1]), ("one large", [100, 1, 1, 1, 1, 1]), ("all of one", [7, 0, 0, 0, 0, 0])]


@pytest.fixture
def engine(ray_session, tmp_path):
    return Engine(2, None, str(tmp_path))


@pytest.mark.parametrize("sizes", [sizes for _, sizes in SIZES], ids=[name for name, _ in SIZES])
def test_every_piece_is_worked_on_once(engine, sizes):
    told = []
    engine.on_progress = lambda *told_of: told.append(told_of)
    found = list(engine.fan_out(engine_tasks.pieces, engine_tasks.seen, "abcdef", sizes, "pieces"))
    assert sorted(piece for piece, _ in found) == [(item, k) for item in "abcdef" for k in range(3)]
    assert [done for _, done, _ in told] == list(range(19))
    of_first = {process for (item, _), process in found if item == "b"}
    assert len(of_first) == 1  # a small item is one task's


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 9, 1]])
def test_a_failure_of_a_piece_is_the_user_s_error(engine, sizes):
    with pytest.raises(UserError, match="piece b 1 is no good"):
        list(engine.fan_out(engine_tasks.pieces, engine_tasks.refuse, "abc", sizes, "pieces"))


def test_nothing_starts_nothing(engine):
    assert list(engine.fan_out(engine_tasks.pieces, engine_tasks.seen, [], [], "pieces")) == []


def test_a_local_session_has_no_process_but_its_workers(tmp_path):
    """Ray Data's two actors are of use to clusters alone; a process that joins one later has Ray's own parts again."""
    code = f"""
import ray
from curation.engine import session
with session(2, None, {str(tmp_path)!r}) as engine:
    found = list(engine.map(abs, [-1, 2, -3], "x"))
    print(sorted(found), ray.util.list_named_actors(all_namespaces=True))
from ray.data._internal.execution import streaming_executor
from ray.data._internal.stats import _StatsManager
print(streaming_executor.create_cluster_autoscaler.__module__, _StatsManager.update_execution_metrics.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "[1, 2, 3] []",
        "ray.data._internal.cluster_autoscaler ray.data._internal.stats",
    ], done.stderr
