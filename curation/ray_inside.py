"""What a session replaces inside Ray Data 2.60: waits, and two processes that only clusters need.

Each first execution starts an actor that shares a cluster among data sets and an actor that collects statistics for
the dashboard. Both import Ray Data (1.2 s of CPU, 190 MB) beside a local session's workers, and until the first one
answers (and then for a second more: ray-project/ray#62725) an execution has one task at a time. A local session is
ours alone and has no dashboard: it needs neither. Where a version of Ray has these parts no more, its own stay.
"""

import contextlib
import functools
import uuid
from collections.abc import Iterator
from typing import Any

_POLL_SECONDS = 0.02  # of Ray Data's loop in the driver, whose steps take 1 ms


@contextlib.contextmanager
def replaced(alone: bool) -> Iterator[None]:
    """Ray Data's own parts are back when the block ends. `alone`: all resources are this session's."""
    with contextlib.ExitStack() as stack:
        for replace in (_alone, _without_statistics, _poll_often) if alone else (_ask_again,):
            with contextlib.suppress(ImportError, AttributeError, KeyError):
                replace(stack)
        yield


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _alone(stack: contextlib.ExitStack) -> None:
    """An execution may use all that there is, from the beginning."""
    import ray
    from ray.data._internal.cluster_autoscaler.base_cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources

    class Everything(ClusterAutoscaler):  # type: ignore[misc, unused-ignore]
        def try_trigger_scaling(self) -> None:
            pass

        def on_executor_shutdown(self) -> None:
            pass

        def get_total_resources(self) -> Any:
            return ExecutionResources.from_resource_dict(ray.cluster_resources())

    _set(stack, streaming_executor, "create_cluster_autoscaler", lambda *args, **kwargs: Everything())


def _without_statistics(stack: contextlib.ExitStack) -> None:
    from ray.data._internal.stats import _StatsManager

    def nothing(*args: object, **kwargs: object) -> None:
        pass

    _set(stack, _StatsManager, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex))
    for name in ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics"):
        _set(stack, _StatsManager, name, staticmethod(nothing))


def _poll_often(stack: contextlib.ExitStack) -> None:
    """The executor's loop sees what has ended after 0.1 s, twice for each task, while the worker idles."""
    from ray.data._internal.execution import streaming_executor_state

    _set(stack, streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", _POLL_SECONDS)


def _ask_again(stack: contextlib.ExitStack) -> None:
    """What an execution may use is asked for until it is known, and not once a second."""
    from ray.data._internal.execution.resource_manager import ResourceManager

    limits = ResourceManager.get_global_limits

    @functools.wraps(limits)
    def until_known(manager: Any) -> Any:
        known = getattr(manager, "_global_limits", None)
        if known is not None and not known.cpu:
            manager._global_limits_last_update_time = 0
        return limits(manager)

    _set(stack, ResourceManager, "get_global_limits", until_known)
