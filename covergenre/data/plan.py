"""The plan of a run: every row of its input, numbered; written once, read a range at a time.

    FOLDER/part-00000000.arrow   ROWS and further columns, PART_ROWS rows in each file
    FOLDER/repeats.arrow         which rows have the id of an earlier row
    FOLDER/plan.json             number of rows, types of the columns, inputs; written last

It is made in one pass over the input in memory that does not grow with it: repeated ids are found
by their hashes in temporary files. A resumed run reads plan.json.
"""

import base64
import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre import schema
from covergenre.data import dataset
from covergenre.data.covers import FIRST, Source, local_cover, web_schemes
from covergenre.errors import CatalogError, StorageError
from covergenre.io import arrow_file, storage
from covergenre.io.hashing import hash_rows

_COVER = ("cover", "source", "source_row")
ROWS = pa.schema([schema.CATALOG.field(name) for name in ("row", "album_id", *_COVER)])
_REPEATS = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("first_row", pa.int64()),
        pa.field("same_address", pa.bool_()),  # of the cover: then it need not be looked at
    ]
)
GROUP_ROWS = dataset.TABLE_GROUP_ROWS
PART_ROWS = 8 * GROUP_ROWS
_BUCKETS = 64
_RANGE_ROWS = 512 * GROUP_ROWS
_META = "plan.json"
_REPEATS_FILE = "repeats.arrow"


@dataclass(frozen=True)
class Plan:
    """The rows of a run's input, and where their covers are."""

    uri: str
    rows: int
    source: Source
    identity: str
    """sha256 of the content of all rows."""
    key: dict[str, Any]
    """What it was made of, as far as can be told without reading it."""
    local_cover: str | None
    """A cover that lies on this machine's disk, if any does."""
    web_schemes: tuple[str, ...] = ()
    """"http" and "https", as far as covers have such URLs."""
    schema: pa.Schema = ROWS
    """Columns of its rows: ROWS, and those that the input's parts had beside them."""

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop`: columns `schema`, and covers.FIRST where a row repeats another.

        The column `id`, where there is one, has the id in the type of the catalog.
        """
        rows = self._rows(start, stop)
        repeats = self._repeats(start, stop)
        place = np.full(rows.num_rows, repeats.num_rows)
        place[repeats["row"].to_numpy() - start] = np.arange(repeats.num_rows)
        for field, column in zip(FIRST, self._firsts(rows, start, repeats), strict=True):
            rows = rows.append_column(field, column.take(pa.array(place)))
        return rows

    def _rows(self, start: int, stop: int) -> pa.Table:
        parts = [
            arrow_file.read_rows(
                _part_uri(self.uri, part),
                max(start - part * PART_ROWS, 0),
                min(stop - part * PART_ROWS, PART_ROWS),
                GROUP_ROWS,
            ).cast(self.schema, safe=False)
            for part in range(start // PART_ROWS, -(-stop // PART_ROWS))
        ]
        rows = pa.concat_tables(parts).combine_chunks()
        if schema.ID in rows.column_names and pa.types.is_string(self.schema.field(schema.ID).type):
            rows = rows.set_column(rows.column_names.index(schema.ID), schema.ID, rows["album_id"])
        return rows

    def _repeats(self, start: int, stop: int) -> pa.Table:
        uri = storage.join(self.uri, _REPEATS_FILE)
        found = arrow_file.read_batches(uri, start // GROUP_ROWS, (stop - 1) // GROUP_ROWS)
        row = pc.field("row")
        return found.filter((row >= start) & (row < stop))

    def _firsts(self, rows: pa.Table, start: int, repeats: pa.Table) -> list[pa.Array]:
        """Columns FIRST of the repeated rows, in their order, and then of none: nulls."""
        first_row = repeats["first_row"].to_numpy()
        same = repeats["same_address"].to_numpy()
        found: list[dict[str, Any]] = [{} for _ in first_row]
        for at in np.flatnonzero(same):
            row = int(repeats["row"][int(at)].as_py()) - start
            found[at] = {"cover": rows["cover"][row].as_py()}
        groups = first_row // GROUP_ROWS
        for group in np.unique(groups[~same]):
            begin = int(group) * GROUP_ROWS
            table = self._rows(begin, min(begin + GROUP_ROWS, self.rows))
            here = np.flatnonzero((groups == group) & ~same)
            taken = table.take(pa.array(first_row[here] - begin))
            for at, record in zip(here, taken.to_pylist(), strict=True):
                found[at] = record
        columns = {
            "first_row": [*first_row.tolist(), None],
            **{f"first_{name}": [*(record.get(name) for record in found), None] for name in _COVER},
        }
        return [pa.array(columns[field.name], field.type) for field in FIRST]


def read_plan(uri: str) -> Plan | None:
    """The plan at `uri`; None where there is none, or not all of one."""
    meta = storage.join(uri, _META)
    if not storage.exists(meta):
        return None
    value = storage.read_json(meta)
    try:
        source = value["source"]
        source["files"] = tuple(source["files"])
        return Plan(
            uri,
            value["rows"],
            Source(**source),
            value["identity"],
            value["key"],
            value["local_cover"],
            tuple(value["web_schemes"]),
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["schema"]))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{meta}: was not written by this covergenre; remove {uri}") from error


def write_plan(
    uri: str,
    parts: Iterable[pa.Table],
    source: Callable[[], Source],
    key: dict[str, Any],
) -> Plan:
    """Write `parts` as the plan at `uri`.

    parts: columns ROWS, and others, which are kept; rows numbered from 0. Where parts differ in
    the type of a column, it becomes the wider type, or text. Raises CatalogError where a list or
    an object would have to.
    source: where image bytes are; called when all parts have been read.
    """
    rows, local = 0, None
    schemes: set[str] = set()
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as temporary:
        seen = _Seen(Path(temporary))
        unified = ROWS
        for number, part in enumerate(_even(parts)):
            unified = _unify(unified, part.schema)
            rows += part.num_rows
            local = local or local_cover(part)
            schemes.update(web_schemes(part))
            hash_rows(digest, part)
            storage.put(_part_uri(uri, number), arrow_file.to_arrow_file(part, GROUP_ROWS))
            with storage.translate_errors(temporary, "write"):
                seen.add(part)
        repeats = Path(temporary, _REPEATS_FILE)
        with storage.translate_errors(temporary, "write"):
            seen.write_repeats(repeats, rows)
        storage.put_file(storage.join(uri, _REPEATS_FILE), repeats)
    made_of, columns = source(), _without_null_types(unified)
    plan = Plan(
        uri,
        rows,
        made_of,
        _identity(digest, made_of, columns),
        key,
        next((file for file in made_of.files if not storage.is_uri(file)), local),
        tuple(sorted(schemes)),
        columns,
    )
    names = ("rows", "identity", "key", "local_cover", "web_schemes")
    value = {name: getattr(plan, name) for name in names}
    types = base64.b64encode(plan.schema.serialize()).decode()
    value |= {"source": asdict(made_of), "schema": types}
    storage.put_json(storage.join(uri, _META), value)
    return plan


def identify(parts: Iterable[pa.Table], source: Callable[[], Source]) -> str:
    """The identity that a plan of these rows would have."""
    digest, unified = hashlib.sha256(), ROWS
    for part in _even(parts):
        unified = _unify(unified, part.schema)
        hash_rows(digest, part)
    return _identity(digest, source(), _without_null_types(unified))


def _identity(rows: Any, source: Source, schema: pa.Schema) -> str:
    files = [[file, storage.size(file)] for file in source.files]
    rows.update(json.dumps([files, str(schema.names), str(schema.types)]).encode())
    return str(rows.hexdigest())


def _part_uri(uri: str, part: int) -> str:
    return storage.join(uri, f"part-{part:08d}.arrow")


def _even(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, PART_ROWS in each table but the last."""
    held: list[pa.Table] = []
    rows = 0
    for part in parts:
        others = [name for name in part.column_names if name not in (*ROWS.names, *FIRST.names)]
        held.append(part.select([*ROWS.names, *others]))
        rows += part.num_rows
        while rows >= PART_ROWS:
            table = _concatenated(held)
            yield table.slice(0, PART_ROWS).combine_chunks()
            held, rows = [table.slice(PART_ROWS)], rows - PART_ROWS
    if rows:
        yield _concatenated(held).combine_chunks()


def _concatenated(parts: list[pa.Table]) -> pa.Table:
    unified = ROWS
    for part in parts:
        unified = _unify(unified, part.schema)
    return pa.concat_tables([part.cast(unified, safe=False) for part in parts])


def _unify(known: pa.Schema, new: pa.Schema) -> pa.Schema:
    """`known` with the columns of `new`; of those in both, a type that has the values of both."""
    fields = {field.name: field.type for field in known}
    for field in new:
        if field.name in ROWS.names:
            continue
        old = fields.get(field.name, pa.null())
        fields[field.name] = _common_type(field.name, old, field.type)
    return pa.schema([*ROWS, *[(n, t) for n, t in fields.items() if n not in ROWS.names]])


def _common_type(name: str, old: pa.DataType, new: pa.DataType) -> pa.DataType:
    if old == new or pa.types.is_null(new):
        return old
    if pa.types.is_null(old):
        return new
    if all(pa.types.is_integer(t) and t != pa.uint64() for t in (old, new)):
        return pa.int64()
    if name != schema.ID and all(
        pa.types.is_integer(t) or pa.types.is_floating(t) for t in (old, new)
    ):
        return pa.float64()
    if any(pa.types.is_nested(t) or pa.types.is_binary(t) for t in (old, new)):
        raise CatalogError(
            f"column {name.removeprefix(schema.CARRIED)!r} has the type {old} in some rows and"
            f" {new} in others; give all files one type",
            code="mixed_types",
        )
    return pa.string()


def _without_null_types(schema: pa.Schema) -> pa.Schema:
    """A column that has no value anywhere is text: not every reader knows a type of nulls."""
    return pa.schema(
        [(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in schema]
    )


# 128 bits of hash under a key of chance: that two of 100 million ids share one by accident, or by
# somebody's design, is not to be expected in the life of the universe.
_SEEN = np.dtype([("id", np.uint64, 2), ("row", np.int64), ("cover", np.uint64)])
_REPEATED = np.dtype([("row", np.int64), ("first_row", np.int64), ("same_address", np.bool_)])


class _Seen:
    """Which ids were met, on which row first: 32 bytes a row, in temporary files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys = [secrets.token_hex(8) for _ in range(3)]

    def add(self, part: pa.Table) -> None:
        part = part.filter(pc.is_valid(part["album_id"]))
        records = np.empty(part.num_rows, _SEEN)
        for n in range(2):
            records["id"][:, n] = self._hashes(part["album_id"], n)
        records["row"] = part["row"].to_numpy()
        # Only an address says, unread, that two covers are the same; 0: there is none.
        has_address = pc.and_(pc.is_valid(part["cover"]), pc.is_null(part["source"])).to_numpy()
        records["cover"] = np.where(
            has_address, self._hashes(pc.fill_null(part["cover"], ""), 2) | np.uint64(1), 0
        )
        self._spill("ids", records, records["id"][:, 0] % np.uint64(_BUCKETS))

    def _hashes(self, texts: pa.ChunkedArray, key: int) -> NDArray[np.uint64]:
        from pandas.util import hash_array

        values = texts.to_numpy().astype(object)
        hashes: NDArray[np.uint64] = hash_array(values, hash_key=self._keys[key], categorize=False)
        return hashes

    def _spill(self, name: str, records: NDArray[Any], places: NDArray[Any]) -> None:
        for place in np.unique(places):
            with self._file(name, int(place)).open("ab") as file:
                file.write(records[places == place].tobytes())

    def _file(self, name: str, place: int) -> Path:
        return self._folder / f"{name}-{place:06d}"

    def write_repeats(self, to: Path, rows: int) -> None:
        """Write _REPEATS in order of row: batch n has those of the plan's rows from n * GROUP_ROWS.

        rows: of the plan.
        """
        for file in sorted(self._folder.glob("ids-*")):
            found = _repeated(np.fromfile(file, _SEEN))
            file.unlink()
            self._spill("repeats", found, found["row"] // _RANGE_ROWS)
        with pa.ipc.new_file(to, _REPEATS, options=arrow_file.options()) as writer:
            for start in range(0, rows, _RANGE_ROWS):
                file = self._file("repeats", start // _RANGE_ROWS)
                found = np.fromfile(file, _REPEATED) if file.exists() else np.empty(0, _REPEATED)
                found.sort(order="row")
                begins = range(start, min(start + _RANGE_ROWS, rows), GROUP_ROWS)
                for group in np.split(found, np.searchsorted(found["row"], begins[1:])):
                    columns = [pa.array(np.ascontiguousarray(group[f.name])) for f in _REPEATS]
                    writer.write_batch(pa.record_batch(columns, _REPEATS))


def _repeated(seen: NDArray[Any]) -> NDArray[Any]:
    """_SEEN, all rows of some ids -> _REPEATED."""
    seen = seen[np.lexsort((seen["row"], seen["id"][:, 1], seen["id"][:, 0]))]
    is_first = np.ones(len(seen), bool)
    is_first[1:] = (seen["id"][1:] != seen["id"][:-1]).any(1)
    first = seen[np.maximum.accumulate(np.where(is_first, np.arange(len(seen)), 0))]
    found = np.empty(len(seen), _REPEATED)
    found["row"], found["first_row"] = seen["row"], first["row"]
    found["same_address"] = (seen["cover"] == first["cover"]) & (seen["cover"] != 0)
    return found[~is_first]
