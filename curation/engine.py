"""Ray: a session to work in, and a Mapper over Ray Data.

A run is a few short Ray Data executions over items (splits, parts, partitions, shards); the
data itself goes through files, so that every task can be repeated and nothing passes through
the object store but chunks of inputs that are so large that one task decompresses them for all.
Warm, an execution costs 0.1 s, and each of its tasks 7 ms of CPU in the driver and 25 ms in which its
worker idles, so items are sent in few tasks for each CPU; a local session takes 3-10 s to start.
"""

import contextlib
import importlib
import itertools
import logging
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curation import ray_inside
from curation.errors import TilthError, UserError
from curation.stage import Item, Result

# Ray's own reports and usage statistics are not the user's business; an address given by the
# user or by `ray job submit` keeps that cluster's settings.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_OBJECT_STORE_BYTES = 1 << 30  # a local session holds a few chunks at a time
# Tasks of one execution: more balance better, fewer cost less. A worker idles 25 ms between two of them.
TASKS_PER_CPU, PIECES_PER_CPU = (2, 8), 64
ITEMS_PER_TASK = 8  # as long as that leaves TASKS_PER_CPU
_IMPORTS = ("ray.data", "curation.steps")  # what a worker of a local session needs at once


@contextlib.contextmanager
def session(workers: int | None, address: str | None, root: str) -> Iterator["Engine"]:
    """An Engine whose Ray starts when it is first needed: the job's own inside `ray job submit`, the cluster at
    `address`, or else a local one that is ended on exit. A session that was there before is used and left alone."""
    engine = Engine(workers, address, root)
    try:
        yield engine
    finally:
        engine.close()


def _start(workers: int | None, address: str | None, local: bool) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if local:
        count = workers or os.cpu_count() or 1
        options |= {"num_cpus": count, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address} ({' '.join(str(error).split())[:200]})") from None


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


class _Failure:
    """A TilthError on its way from a worker to the driver, where it is raised without Ray's traceback."""

    def __init__(self, error: TilthError):
        self.module, self.kind, self.message = type(error).__module__, type(error).__name__, str(error)

    def raise_(self) -> None:
        raise getattr(importlib.import_module(self.module), self.kind)(self.message)


@dataclass(frozen=True)
class Task:
    """One node of `Engine.graph`: `function(argument)`, both importable on every node."""

    function: Callable[[Any], Any]
    argument: Any
    after: tuple[str, ...] = ()
    cpus: int = 1
    gpus: int = 0


def _pack(value: object) -> bytes:
    # Our own objects between our own processes; nothing from data is ever unpickled.
    return pickle.dumps(value, protocol=5)


class Engine:
    """Runs functions over items on Ray Data; `map` is a stage.Mapper."""

    def __init__(self, workers: int | None, address: str | None, root: str):
        self._workers, self._address, self._root = workers, address, root
        self._started = self._mine = False
        self._inside = contextlib.ExitStack()
        self.start_seconds = 0.0
        self.on_progress: Callable[[str, int, int | None], None] = lambda label, done, total: None

    def start(self) -> None:
        """Start or join Ray now; else it happens when it is first needed."""
        if self._started:
            return
        began = time.perf_counter()
        local = self._local
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if local:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a session of ours alone needs no token file in HOME
        import ray

        self._mine = not ray.is_initialized()
        if self._mine:
            _start(self._workers, "local" if local else self._address, local)
        if local and self._mine:  # its workers import while the driver does, not in their first tasks
            for _ in range(self._num_cpus()):
                ray.remote(_import).remote(_IMPORTS)
        import ray.data

        self._started = True
        unseen = missing_on_nodes(self._root)
        if unseen:
            raise UserError(
                f"{self._root} is not shared: the driver does not see what node {unseen[0]} writes there; "
                "give --run a path that all nodes mount, or an object store"
            )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # Of one large item many pieces come, which Ray does not know before.
        warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        # One chunk a block: the next operator gets each as soon as it is there.
        context.target_max_block_size = 1 << 20
        context.memory_usage_poll_interval_s = None  # a thread in each task, for a statistic that nobody reads
        self._inside.enter_context(ray_inside.replaced(alone=local and self._mine))
        self.start_seconds = time.perf_counter() - began

    @property
    def _local(self) -> bool:
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        return self._address in (None, "local") and not inside_job

    @property
    def cluster(self) -> str | None:
        """The address at which another process joins this cluster; None for a local session, which is ours alone."""
        return None if self._local else self._address or os.environ.get("RAY_ADDRESS") or "auto"

    def close(self) -> None:
        """End the session if this engine started it."""
        self._inside.close()
        if self._started and self._mine:
            import ray

            ray.shutdown()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]:
        if not items:
            return
        self.start()
        blocks = _blocks(items, _num_tasks(len(items), self._num_cpus()))
        dataset = _dataset(blocks).map_batches(_each, fn_kwargs={"function": function}, **self._options(1, len(blocks)))
        yield from self._results([dataset], label, len(items))

    def fan_out(
        self,
        expand: Callable[[Item], Iterator[Any]],
        function: Callable[[Any], Result],
        items: Sequence[Item],
        sizes: Sequence[int],
        label: str,
    ) -> Iterator[Result]:
        """`function` on everything that `expand` yields for each item. `sizes` say how much work is in each: one that
        would leave other CPUs idle at the end is expanded by one task and worked on by all, through the object store
        (an expansion holds no CPU of the session's count: reading waits on decompression and the network, and a task
        that held one would starve a one-worker session); any other is all one task's, the largest first."""
        if not items:
            return
        self.start()
        cpus = self._num_cpus()
        shared = [size > sum(sizes) / (2 * cpus) and cpus > 1 for size in sizes]
        ordered = sorted(range(len(items)), key=lambda k: -sizes[k])
        large = [items[k] for k in ordered if shared[k]]
        small = [items[k] for k in ordered if not shared[k]]
        datasets = []
        if large:
            chunks = _dataset([[item] for item in large]).map_batches(
                _expand, fn_kwargs={"function": expand}, **self._options(0, len(large))
            )
            datasets.append(chunks.map_batches(_each, fn_kwargs={"function": function}, **self._options(1)))
        if small:
            blocks = _blocks(small, cpus * PIECES_PER_CPU)
            kwargs = {"expand": expand, "function": function}
            whole = _dataset(blocks).map_batches(_expand_each, fn_kwargs=kwargs, **self._options(1, len(blocks)))
            datasets.append(whole)
        yield from self._results(datasets, label, None)

    def graph(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
        """(name, result) of each task as it ends; a task starts when those before it have ended, and runs where its
        CPUs and GPUs are free. The first failure is raised, and what still runs is cancelled; a process that died
        (killed, or for want of memory) is a TilthError."""
        if not tasks:
            return
        self.start()
        import ray

        waiting = dict(tasks)
        running: dict[Any, str] = {}
        ended: set[str] = set()
        try:
            while waiting or running:
                for name in [name for name, task in waiting.items() if ended.issuperset(task.after)]:
                    task = waiting.pop(name)
                    # A worker keeps the memory of its GPU as long as it lives.
                    resources = {"num_cpus": task.cpus, "num_gpus": task.gpus, "max_calls": 1 if task.gpus else 0}
                    call = ray.remote(max_retries=0, **resources)(_call)
                    running[call.remote(_pack((task.function, task.argument)))] = name
                done, _ = ray.wait(list(running), num_returns=1)
                name = running.pop(done[0])
                try:
                    result = pickle.loads(ray.get(done[0]))
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                    why = str(error).strip().splitlines()[0]
                    raise TilthError(
                        f"the process of {name} died ({why}): the same command goes on from there"
                    ) from None
                if isinstance(result, _Failure):
                    result.raise_()
                ended.add(name)
                yield name, result
        finally:
            for left in running:
                ray.cancel(left, force=True)

    def _num_cpus(self) -> int:
        import ray

        return self._workers or int(ray.cluster_resources().get("CPU", 1))

    def _options(self, num_cpus: int, num_blocks: int | None = None) -> dict[str, Any]:
        from ray.data import TaskPoolStrategy

        most = self._num_cpus()
        return {
            "batch_format": "pyarrow",
            "batch_size": None,
            "zero_copy_batch": True,
            "num_cpus": num_cpus,
            # Ray warns when the limit is above the number of blocks.
            "compute": TaskPoolStrategy(min(most, num_blocks or most)),
        }

    def _results(self, datasets: Sequence[Any], label: str, total: int | None) -> Iterator[Any]:
        """Of one execution after the other."""
        done = 0
        self.on_progress(label, done, total)
        batches = (d.iter_batches(batch_size=None, batch_format="pyarrow") for d in datasets)
        for batch in itertools.chain.from_iterable(batches):
            for packed in batch["item"]:
                result = pickle.loads(packed.as_py())
                if isinstance(result, _Failure):
                    result.raise_()
                done += 1
                self.on_progress(label, done, total)
                yield result


def _num_tasks(num_items: int, cpus: int) -> int:
    least, most = (cpus * count for count in TASKS_PER_CPU)
    return min(max(num_items // ITEMS_PER_TASK, least), most)


def _blocks(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """`items` dealt out to at most `most` blocks: where they are ordered by size, those of all blocks are alike."""
    count = min(most, len(items))
    return [items[k::count] for k in range(count)]


def _dataset(blocks: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa
    import ray.data

    return ray.data.from_arrow(
        [pa.table({"item": pa.array([_pack(item) for item in block], pa.large_binary())}) for block in blocks]
    )


def _call(packed: bytes) -> bytes:
    function, argument = pickle.loads(packed)
    try:
        return _pack(function(argument))
    except TilthError as error:
        return _pack(_Failure(error))


def _each(batch: Any, function: Callable[[Any], Any]) -> Any:
    import pyarrow as pa

    results = []
    for packed in batch["item"]:
        item = pickle.loads(packed.as_buffer())
        if isinstance(item, _Failure):  # an expansion that failed
            results.append(item)
            continue
        try:
            results.append(function(item))
        except TilthError as error:
            results.append(_Failure(error))
    return pa.table({"item": pa.array([_pack(r) for r in results], pa.large_binary())})


def _expand_each(batch: Any, expand: Callable[[Any], Iterator[Any]], function: Callable[[Any], Any]) -> Any:
    import pyarrow as pa

    results: list[Any] = []
    for packed in batch["item"]:
        try:
            results += [function(value) for value in expand(pickle.loads(packed.as_buffer()))]
        except TilthError as error:
            results.append(_Failure(error))
    return pa.table({"item": pa.array([_pack(r) for r in results], pa.large_binary())})


def _expand(batch: Any, function: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    import pyarrow as pa

    for packed in batch["item"]:
        try:
            for value in function(pickle.loads(packed.as_buffer())):
                yield pa.table({"item": pa.array([_pack(value)], pa.large_binary())})
        except TilthError as error:
            yield pa.table({"item": pa.array([_pack(_Failure(error))], pa.large_binary())})


def missing_on_nodes(root: str) -> list[str]:
    """Write a probe file into `root` on every node; the nodes whose file the driver cannot see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from curation import storage

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return []
    probe = ray.remote(num_cpus=0)(_probe)
    paths = {node: storage.join(root, f".probe-{node}") for node in nodes}
    ray.get(
        [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path)
            for node, path in paths.items()
        ]
    )
    missing = [node for node, path in paths.items() if not storage.exists(path)]
    for path in paths.values():
        storage.remove(path)
    return missing


def _probe(path: str) -> None:
    from curation import storage

    storage.commit_bytes(path, b"probe")
