"""A limit on what a Ray worker may hold, for tests: set as `worker_process_setup_hook`.

Counted is anonymous resident memory (what a process allocated; mapped files and the shared object store are not
its own) beyond what the worker holds with all libraries, models and compiled kernels loaded: `watch` loads them
first. A worker above the limit ends at once, as a container's would, and leaves a note.
"""

import os
import threading
import time
from pathlib import Path

INTERVAL_S = 0.02


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def load_everything() -> None:
    import pandas  # noqa: F401 - Ray Data's
    import pyarrow as pa
    import ray.data  # noqa: F401

    from curation import dedup, detect
    from curation.mix import arms  # noqa: F401
    from curation.recipe import Dedup, Detect
    from curation.schema import DOCUMENT
    from curation.tokenise import Encoder, check_fastokens, resolve

    row = {"id": "0" * 32, "text": "a robot and a person " * 50, "source": "s", "file": "f", "position": 0,
           "role": "background", "source_rank": 0}  # fmt: skip
    documents = pa.Table.from_pylist([row], DOCUMENT)
    dedup.signature_table(documents, detect.label_table(documents, Detect()), Dedup())
    Encoder(check_fastokens(resolve(os.environ["LIMIT_TOKENIZER"]), ["a robot"])).encode(documents["text"].chunk(0))


def watch() -> None:
    load_everything()
    limit = anonymous_bytes() + int(os.environ["LIMIT_BYTES"])
    folder = Path(os.environ["LIMIT_NOTES"])

    def loop() -> None:
        most = 0
        while True:
            now = anonymous_bytes()
            if now > limit:
                (folder / f"killed-{os.getpid()}").write_text(str(now - limit))
                os._exit(137)
            if now > most + (1 << 20):
                most = now
                (folder / f"peak-{os.getpid()}").write_text(str(now - limit + int(os.environ["LIMIT_BYTES"])))
            time.sleep(INTERVAL_S)

    threading.Thread(target=loop, daemon=True).start()
