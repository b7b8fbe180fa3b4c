"""A graph of tasks on a real Ray: what waits for what, what comes back, and how a failure looks."""

import itertools
import os
import time
import traceback

import graph_tasks
import pytest

from curation.engine import Engine, Task
from curation.errors import RunLocked, TilthError, UserError
from evaluation.questions import BadQuestion


@pytest.fixture
def engine(ray_session, tmp_path):
    return Engine(None, None, str(tmp_path))


def stamps(folder, after, seconds=0.0):
    """A task a name that says which of those before it had not ended."""
    return {
        name: Task(graph_tasks.stamp, (str(folder), name, before, seconds), after=before)
        for name, before in after.items()
    }


def test_results_come_by_name_from_other_processes(engine):
    found = dict(engine.graph({f"n{n}": Task(graph_tasks.square, n) for n in range(6)}))
    assert {name: result for name, (result, _) in found.items()} == {f"n{n}": n * n for n in range(6)}
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_a_task_starts_when_all_before_it_have_ended(engine, tmp_path):
    """A diamond and a chain; what is before takes its time."""
    after = {
        "end": ("left", "right"), "left": ("top",), "right": ("top",), "top": (), "last": ("end",), "alone": (),
    }  # fmt: skip
    found = list(engine.graph(stamps(tmp_path, after, 0.1)))
    assert sorted(name for name, _ in found) == sorted(after)
    assert {name: missing for name, missing in found if missing} == {}
    order = [name for name, _ in found]
    for name, before in after.items():
        assert all(order.index(other) < order.index(name) for other in before)


def test_without_the_edges_they_do_not_wait(engine, tmp_path):
    """The test before can fail: the same tasks with nothing before them find nothing there."""
    free = {
        name: Task(graph_tasks.stamp, (str(tmp_path), name, before, 0.5)) for name, before in (("b", ("a",)), ("a", ()))
    }
    assert dict(engine.graph(free))["b"] == ["a"]


def test_independent_tasks_run_at_once(engine, tmp_path):
    tasks = {one: Task(graph_tasks.meet, (str(tmp_path), one, other)) for one, other in (("a", "b"), ("b", "a"))}
    assert dict(engine.graph(tasks)) == {"a": True, "b": True}


def test_results_are_there_as_soon_as_their_task_ends(engine, tmp_path):
    """What the driver does with a result, later tasks see; a slow one does not hold it up."""
    tasks = {
        "slow": Task(graph_tasks.meet, (str(tmp_path), "slow", "driver")),
        **stamps(tmp_path, {"quick": ()}),
    }
    names = []
    for name, result in engine.graph(tasks):
        names.append(name)
        if name == "quick":
            (tmp_path / "driver").touch()
        else:
            assert result is True
    assert names == ["quick", "slow"]


@pytest.mark.parametrize("kind", [TilthError, UserError, RunLocked])
def test_a_failure_is_raised_in_the_driver_as_it_was_in_the_task(engine, kind):
    said = "the list of lamps has no line 3: mend it"
    with pytest.raises(TilthError) as caught:
        list(engine.graph({"bad": Task(graph_tasks.fail, (kind, said, None))}))
    assert (type(caught.value), str(caught.value)) == (kind, said)
    assert caught.value.__cause__ is None
    shown = "".join(traceback.format_exception(caught.value))
    assert "ray::" not in shown
    assert "RayTaskError" not in shown
    assert "in _call" not in shown  # the worker's frame


def test_a_failure_of_another_packages_class_is_raised_as_it_was(engine):
    with pytest.raises(BadQuestion, match=r"^the question is empty$"):
        list(engine.graph({"bad": Task(graph_tasks.fail, (BadQuestion, "the question is empty", None))}))


def test_after_a_failure_nothing_starts_and_what_runs_is_cancelled(engine, tmp_path):
    heart = tmp_path / "heart"
    tasks = {
        "beats": Task(graph_tasks.beat, str(heart)),
        "bad": Task(graph_tasks.fail, (UserError, "no", str(heart))),
        "never": Task(graph_tasks.stamp, (str(tmp_path), "never", (), 0.0), after=("bad",)),
    }
    with pytest.raises(UserError, match=r"^no$"):
        list(engine.graph(tasks))
    until = time.monotonic() + 10
    sizes = [heart.stat().st_size]
    while time.monotonic() < until:
        time.sleep(0.4)
        sizes.append(heart.stat().st_size)
        if sizes[-1] == sizes[-2]:
            break
    assert any(one == other for one, other in itertools.pairwise(sizes)), "it still runs"
    assert not (tmp_path / "never").exists()


def test_what_ended_before_a_failure_has_come(engine, tmp_path):
    tasks = {
        **stamps(tmp_path, {"fine": ()}),
        "bad": Task(graph_tasks.fail, (UserError, "no", None), after=("fine",)),
    }
    found = []
    with pytest.raises(UserError):
        found.extend(engine.graph(tasks))
    assert found == [("fine", [])]


def test_no_tasks_start_no_ray(tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(Engine, "start", refuse)
    engine = Engine(1, None, str(tmp_path))
    assert list(engine.graph({})) == []
    with pytest.raises(AssertionError, match="Ray was started"):
        list(engine.graph({"one": Task(graph_tasks.square, 1)}))


def test_a_process_that_was_killed_is_named_without_a_traceback(engine):
    with pytest.raises(TilthError, match="the process of victim died") as caught:
        list(engine.graph({"victim": Task(graph_tasks.die, None)}))
    assert "\n" not in str(caught.value)
