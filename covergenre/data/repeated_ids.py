"""Rows with the id of an earlier row, found in bounded memory by hashes in temporary files."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre.io import arrow_file

_REPEATS = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("first_row", pa.int64()),
        pa.field("same_url", pa.bool_()),  # the same cover, without reading it
    ]
)
_BUCKETS = 64
"""Temporary files of ids; each is sorted in memory."""
_RANGE_GROUPS = 512
"""Groups of rows per temporary file of repeated rows."""

# 128 bits of hash with a random key: a collision among 100 million ids, accidental or deliberate,
# has a probability of about 1e-23.
_SEEN = np.dtype([("id", np.uint64, 2), ("row", np.int64), ("cover", np.uint64)])
_REPEATED = np.dtype([("row", np.int64), ("first_row", np.int64), ("same_url", np.bool_)])


class RepeatedIds:
    """Finds the rows whose album_id an earlier row has.

    Ids and covers are kept as hashes in temporary files, 32 bytes per row.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys = [secrets.token_hex(8) for _ in range(3)]

    def add(self, part: pa.Table) -> None:
        """Add the next rows of the plan, columns plan.ROWS."""
        part = part.filter(pc.is_valid(part["album_id"]))
        records = np.empty(part.num_rows, _SEEN)
        for n in range(2):
            records["id"][:, n] = self._hashes(part["album_id"], n)
        records["row"] = part["row"].to_numpy()
        # Covers with equal URLs or paths are equal, without reading them. 0: no URL.
        has_url = pc.and_(pc.is_valid(part["cover"]), pc.is_null(part["source"])).to_numpy()
        records["cover"] = np.where(
            has_url, self._hashes(pc.fill_null(part["cover"], ""), 2) | np.uint64(1), 0
        )
        self._spill("ids", records, records["id"][:, 0] % np.uint64(_BUCKETS))

    def _hashes(self, texts: pa.ChunkedArray, key: int) -> NDArray[np.uint64]:
        from pandas.util import hash_array

        values = texts.to_numpy().astype(object)
        hashes: NDArray[np.uint64] = hash_array(values, hash_key=self._keys[key], categorize=False)
        return hashes

    def _spill(self, name: str, records: NDArray[Any], buckets: NDArray[Any]) -> None:
        for bucket in np.unique(buckets):
            with self._file(name, int(bucket)).open("ab") as file:
                file.write(records[buckets == bucket].tobytes())

    def _file(self, name: str, bucket: int) -> Path:
        return self._folder / f"{name}-{bucket:06d}"

    def write_repeats(self, to: Path, rows: int, group_rows: int) -> None:
        """Write _REPEATS in order of row, as an Arrow IPC file.

        rows: number of rows of the plan. Batch n has the repeated ones among its rows from
        n * group_rows.
        """
        range_rows = _RANGE_GROUPS * group_rows
        for file in sorted(self._folder.glob("ids-*")):
            found = _repeated(np.fromfile(file, _SEEN))
            file.unlink()
            self._spill("repeats", found, found["row"] // range_rows)
        with pa.ipc.new_file(to, _REPEATS, options=arrow_file.options()) as writer:
            for start in range(0, rows, range_rows):
                file = self._file("repeats", start // range_rows)
                found = np.fromfile(file, _REPEATED) if file.exists() else np.empty(0, _REPEATED)
                found.sort(order="row")
                begins = range(start, min(start + range_rows, rows), group_rows)
                for group in np.split(found, np.searchsorted(found["row"], begins[1:])):
                    columns = [pa.array(np.ascontiguousarray(group[f.name])) for f in _REPEATS]
                    writer.write_batch(pa.record_batch(columns, _REPEATS))


def _repeated(seen: NDArray[Any]) -> NDArray[Any]:
    """_REPEATED of records _SEEN, which have all rows of their ids."""
    seen = seen[np.lexsort((seen["row"], seen["id"][:, 1], seen["id"][:, 0]))]
    is_first = np.ones(len(seen), bool)
    is_first[1:] = (seen["id"][1:] != seen["id"][:-1]).any(1)
    first = seen[np.maximum.accumulate(np.where(is_first, np.arange(len(seen)), 0))]
    found = np.empty(len(seen), _REPEATED)
    found["row"], found["first_row"] = seen["row"], first["row"]
    found["same_url"] = (seen["cover"] == first["cover"]) & (seen["cover"] != 0)
    return found[~is_first]
