"""The process of vllm_engine.py, in vLLM's environment: `python vllm_worker.py ASKED_AS_JSON FD`.

Reads requests from a file, writes a JSON line for each reply to the file descriptor, and ends when its standard input
does, as it does when whoever started it is killed. Imports nothing of Tilth: Tilth need not be installed there.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

_GRACE_S = 20.0
_STRUCTURED = {"backend": "guidance", "disable_any_whitespace": True}
_ENVIRONMENT = ("VLLM_", "HF_HOME", "HF_HUB_", "TRANSFORMERS_")


def main() -> None:
    asked, replies = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", encoding="utf-8")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import ray

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


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's handler ends its session
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
