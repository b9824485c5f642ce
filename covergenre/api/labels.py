"""read_labels: the output of `score` as a table."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from covergenre.data import dataset
from covergenre.errors import StorageError
from covergenre.io import storage

_READS_AT_A_TIME = 8


def read_labels(
    uri: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    allow_partial: bool = False,
) -> pa.Table:
    """Read the labels of a scored catalog: a row for each cover that was scored.

    Args:
        uri: output directory of `score`, local or s3://.
        columns: names of the columns to read; by default all of them.
        allow_partial: read the labels so far if the run is not finished.

    Returns:
        The rows in the order of the catalog, in memory.

    Raises:
        StorageError: not an output directory of `score` (code "not_labels"), or the run is not
            finished (code "unfinished").
    """
    uri = storage.absolute(os.fspath(uri))
    names = storage.list_sizes(uri)
    parts = sorted(name for name in names if re.fullmatch(r"part-[0-9]+\.parquet", name))
    if not parts:
        raise StorageError(
            f"{uri}: contains no labels; give an output directory of score", code="not_labels"
        )
    if "_SUCCESS" not in names and not allow_partial:
        raise StorageError(
            f"{uri}: the run is not finished (no _SUCCESS); run the same score command again, or"
            " pass allow_partial=True",
            code="unfinished",
        )
    with ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
        read = pool.map(lambda name: dataset.read_table(storage.join(uri, name), columns), parts)
        return pa.concat_tables(read)
