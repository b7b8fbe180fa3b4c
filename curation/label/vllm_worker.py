"""The process of vllm_engine.py, in vLLM's environment: `python vllm_worker.py ASKED_AS_JSON FD`.

Reads requests from a file, writes a JSON line for each reply to the file descriptor, and ends when its standard input
does, as it does when whoever started it is killed. Imports nothing of Tilth: Tilth need not be installed there.

It is two processes: one works, this one ends what the other leaves. Ray's processes and vLLM's are not of one group,
and when their starter dies early some stay for a minute, so those that lose their parent are made ours.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

_GRACE_S, _REST_S = 15.0, 5.0  # for the working process, and for what it leaves
_SET_CHILD_SUBREAPER = 36
_STRUCTURED = {"backend": "guidance", "disable_any_whitespace": True}
_ENVIRONMENT = ("VLLM_", "HF_HOME", "HF_HUB_", "TRANSFORMERS_")


def main() -> None:
    asked, file = json.loads(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if worker:
        os.close(file)
        os._exit(_watch(worker))
    os.set_inheritable(file, False)
    _work(asked, file)


def _watch(worker: int) -> int:
    """Waits for the worker or the end of our input; then nothing of it is left. Its exit status."""
    status, deadline = None, float("inf")
    while status is None and time.monotonic() < deadline:
        if deadline == float("inf") and select.select([0], [], [], 0.2)[0] and not os.read(0, 4096):
            os.kill(worker, signal.SIGTERM)  # Ray's handler ends its session
            deadline = time.monotonic() + _GRACE_S
        elif deadline < float("inf"):
            time.sleep(0.1)
        status = _reap(worker)
    deadline = time.monotonic() + (_REST_S if status is not None else 0)
    while _descendants(os.getpid()) and time.monotonic() < deadline:
        _reap(worker)
        time.sleep(0.1)
    while left := _descendants(os.getpid()):  # again: they may have started more
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        _reap(worker)
    return 1 if status is None else status


def _reap(worker: int) -> int | None:
    """Takes the dead off the kernel's list; the worker's exit status if it was among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                found = 0 if ended[1] == 0 else 1
    return found


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
            state, parent = file.read().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, open_ = [], [pid]
    while open_:
        more = children.get(open_.pop(), [])
        found += more
        open_ += more
    return found


def _work(asked: dict[str, Any], file: int) -> None:
    import ray

    replies = os.fdopen(file, "w", encoding="utf-8")
    if asked["address"]:
        ray.init(address=asked["address"])
    else:
        # Each stage of the processor takes a CPU of its own and mostly waits: these are names, not cores.
        ray.init(address="local", num_cpus=max(16, 4 * (os.cpu_count() or 1)), include_dashboard=False)
    try:
        for row in _processor(asked)(ray.data.from_items(_requests(asked))).iter_rows():
            replies.write(json.dumps({name: row[name] for name in _REPLY}) + "\n")
            replies.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        ray.shutdown()
        os._exit(1)
    replies.close()
    ray.shutdown()
    os._exit(0)  # libraries that vLLM brings have crashed in the interpreter's own end


_REPLY = ("key", "text", "input_tokens", "output_tokens", "error")


def _requests(asked: dict[str, Any]) -> list[dict[str, str]]:
    with open(asked["requests"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{"key": row["key"], "messages": json.dumps(row["messages"])} for row in rows]


def _processor(asked: dict[str, Any]) -> Any:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # Without it, small models fill their answers with white space.
    engine: dict[str, Any] = {"structured_outputs_config": _STRUCTURED, **asked["engine"]}
    options: dict[str, Any] = {}
    if not ray.cluster_resources().get("GPU"):
        # By default Ray asks for a GPU, and waits for one for ever.
        options = {"placement_group_config": {"bundles": [{"CPU": 1}]}, "batch_size": 16}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        engine = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", **engine}
    # No token of the hub: a runtime environment is shown in Ray's dashboard.
    kept = {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT) and "TOKEN" not in k}
    config = vLLMEngineProcessorConfig(
        model_source=asked["model"], engine_kwargs=engine, concurrency=asked["replicas"],
        runtime_env={"env_vars": kept}, log_engine_metrics=False, should_continue_on_error=True, **options,
    )  # fmt: skip
    # As text: between stages rows are Arrow tables, which would turn the schema into columns of its own.
    sampling = {**asked["sampling"], "structured_outputs": {"json": json.dumps(asked["schema"])}}

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return {"key": row["key"], "messages": json.loads(row["messages"]), "sampling_params": sampling}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "key": row["key"], "text": row["generated_text"], "input_tokens": int(row["num_input_tokens"]),
            "output_tokens": int(row["num_generated_tokens"]), "error": row["__inference_error__"],
        }  # fmt: skip

    return build_processor(config, preprocess=before, postprocess=after)


if __name__ == "__main__":
    main()
