"""Data-Juicer: read -> clusters, with its MinHash operator for Ray (in its own environment).

    peer_datajuicer.py INPUT OUT WORKERS python|cpp

The operator drops duplicates and does not say of what: the parents of its union-find are fetched before it
forgets them.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import ray
from data_juicer.ops.deduplicator.ray_bts_minhash_cpp_deduplicator import RayBTSMinhashCppDeduplicator
from data_juicer.ops.deduplicator.ray_bts_minhash_deduplicator import RayBTSMinhashDeduplicator
from data_juicer.utils.constant import HashKeys

SETTINGS = {"tokenization": "space", "window_size": 5, "num_permutations": 128, "num_bands": 16, "num_rows_per_band": 8}


class Watched(RayBTSMinhashDeduplicator):
    """The operator; `parents` are the links of its union-find."""

    def merge_op_batch(self, object_refs: list) -> list:
        results = super().merge_op_batch(object_refs)
        found = ray.get([part.__ray_call__.remote(lambda self: self.parent) for part in self.union_find_list])
        if all(isinstance(parent, dict) for parent in found):
            self.parents = {one: of for parent in found for one, of in parent.items()}
        return results


def main(source: str, out: str, workers: str, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = time.time()
        ray.init(address="local", num_cpus=int(workers), include_dashboard=False, log_to_driver=False)
        start_ray = time.time() - began
        operator = (Watched if kind == "python" else RayBTSMinhashCppDeduplicator)(**SETTINGS, work_dir=folder)
        files = [str(path) for path in sorted(Path(source).iterdir())]
        dataset = ray.data.read_json(files, file_extensions=None).select_columns(["id", "text"])
        kept = operator.run(dataset).select_columns(["id"]).to_pandas()["id"].tolist()
        seconds = time.time() - float(os.environ["BENCH_STARTED"])
        removed = {}
        if kind == "python":
            uids = next(path.parent for path in Path(folder).rglob("*.parquet"))
            rows = ray.data.read_parquet(str(uids), columns=["id", HashKeys.uid])
            ids = {row[HashKeys.uid]: row["id"] for row in rows.iter_rows()}
            for uid in operator.parents:
                head = uid
                while head in operator.parents:
                    head = operator.parents[head]
                removed[ids[uid]] = ids[head]
    Path(out).write_text(json.dumps(removed))
    print(json.dumps({"kept": len(kept), "seconds": seconds, "start_ray": start_ray}))


if __name__ == "__main__":
    main(*sys.argv[1:])
