"""Daft: read -> clusters, with its native `minhash`, a band explode and a group-by (in its own environment).

    peer_daft.py INPUT OUT bare|normalised

Daft has no components and no verification: bands that are equal link their documents, scipy joins the links.
"""

import glob
import json
import os
import sys
import time

import daft
import numpy as np
from daft import col
from daft.functions import chunk, hash, minhash, monotonically_increasing_id, normalize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BANDS, ROWS, NGRAM = 16, 8, 5


def main(source: str, out: str, how: str) -> None:
    daft.set_runner_native()
    frame = daft.read_json(sorted(glob.glob(f"{source}/*"))).select("id", "text")
    text = col("text")
    if how == "normalised":
        text = normalize(text, remove_punct=True, lowercase=True, nfd_unicode=True, white_space=True)
    signature = minhash(text, num_hashes=BANDS * ROWS, ngram_size=NGRAM, hash_function="xxhash")
    signed = (
        frame.select("id", signature.alias("signature")).with_column("row", monotonically_increasing_id()).collect()
    )
    band = daft.lit(list(range(BANDS)))
    groups = (
        signed.select("row", chunk(col("signature"), ROWS).alias("values"), band.alias("band"))
        .explode("values", "band")
        .groupby("band", hash(col("values")).alias("key"))
        .agg(col("row").list_agg().alias("rows"))
        .where(col("rows").list_count() > 1)
        .select("rows")
        .to_arrow()["rows"]
        .combine_chunks()
    )
    rows = signed.select("row", "id").to_pydict()
    ids = dict(zip(rows["row"], rows["id"], strict=True))
    values, offsets = np.asarray(groups.values), np.asarray(groups.offsets)
    heads = np.repeat(values[offsets[:-1]], np.diff(offsets))
    nodes, ends = np.unique(np.stack([heads, values]), return_inverse=True)
    ends = ends.reshape(2, -1)
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), shape=(len(nodes),) * 2)
    _, component = connected_components(graph, directed=False)
    kept, removed = {}, {}
    for node, label in zip(nodes.tolist(), component.tolist(), strict=True):
        head = kept.setdefault(label, node)
        if head != node:
            removed[ids[node]] = ids[head]
    seconds = time.time() - float(os.environ["BENCH_STARTED"])
    with open(out, "w") as file:
        json.dump(removed, file)
    print(json.dumps({"documents": len(ids), "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
