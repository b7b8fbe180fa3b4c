"""Rows that go from the tasks of one round to the tasks of the next, through files.

A task writes one Arrow IPC file with a record batch for each destination; a task of the next
round reads its batch of every file. Work of one run of the barrier: nothing here outlives it.
"""

from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from curation import storage


def write(folder: str, name: str, frame: pl.DataFrame, destinations: np.ndarray, num_destinations: int) -> None:
    """Send row i of `frame` to task destinations[i] of `num_destinations`."""
    if num_destinations <= 1 << 16:
        destinations = destinations.astype(np.uint16)  # numpy sorts these by radix
    order = np.argsort(destinations, kind="stable")
    bounds = np.searchsorted(destinations[order], np.arange(num_destinations + 1))
    table = frame[order].to_arrow().combine_chunks()
    whole = table.to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], table.schema)

    def write_batches(file: pa.NativeFile) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(file, table.schema, options=options) as writer:
            for lo, hi in pairwise(bounds.tolist()):
                writer.write_batch(whole.slice(lo, hi - lo))

    storage.commit_work(storage.join(folder, f"{name}.arrow"), write_batches)


def read(folder: str, destination: int | None) -> pl.DataFrame:
    """What all tasks sent to `destination`, or to anyone (None), in the order of the senders' names."""
    batches: list[pa.RecordBatch] = []
    for name in storage.list_names(folder):
        file = storage.open_ipc(storage.join(folder, name))
        wanted = range(file.num_record_batches) if destination is None else [destination]
        batches += [file.get_batch(k) for k in wanted]
    frame = pl.from_arrow(pa.Table.from_batches(batches))
    assert isinstance(frame, pl.DataFrame)
    return frame
