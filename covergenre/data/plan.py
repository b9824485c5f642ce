"""The plan of a run: every row of its input, numbered; written once, read a range at a time.

    FOLDER/part-00000000.arrow   ROWS and further columns, PART_ROWS rows in each file
    FOLDER/repeats.arrow         which rows have the id of an earlier row
    FOLDER/plan.json             number of rows, types of the columns, inputs; written last

It is written in one pass over the input, in bounded memory. A resumed run reads plan.json.
"""

import base64
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from covergenre import schema
from covergenre.config import CatalogSettings
from covergenre.data import covers, dataset
from covergenre.data.covers import FIRST, Source
from covergenre.data.repeated_ids import RepeatedIds
from covergenre.errors import CatalogError, StorageError
from covergenre.io import arrow_file, storage
from covergenre.io.hashing import hash_rows
from covergenre.progress import Progress

logger = logging.getLogger(__name__)

_COVER = ("cover", "source", "source_row")
ROWS = pa.schema([schema.CATALOG.field(name) for name in ("row", "album_id", *_COVER)])
GROUP_ROWS = dataset.TABLE_GROUP_ROWS
PART_ROWS = 8 * GROUP_ROWS
_META = "plan.json"
_REPEATS_FILE = "repeats.arrow"


@dataclass(frozen=True)
class Plan:
    """The numbered rows of the input of a run, on disk."""

    uri: str
    rows: int
    source: Source
    identity: str
    """sha256 of the content of all rows."""
    key: dict[str, Any]
    """Of the RowReader it was made from."""
    summary: dict[str, Any]
    """Of the RowReader it was made from."""
    local_cover: str | None
    """The path of a cover on this machine's disk, if there is any."""
    web_schemes: tuple[str, ...] = ()
    """"http" and "https", if covers have such URLs."""
    schema: pa.Schema = ROWS
    """Columns of its rows: ROWS, and further columns of the input."""

    def with_settings(self, settings: CatalogSettings) -> "Plan":
        """A copy whose covers are downloaded as `settings` say."""
        source = replace(
            self.source,
            download_concurrency=settings.download_concurrency,
            allow_private=settings.allow_private_addresses,
            contact=settings.contact,
        )
        return replace(self, source=source)

    def ranges(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows between `start` and `stop` in each file of the plan."""
        stop = self.rows if stop is None else stop
        while start < stop:
            end = min((start // PART_ROWS + 1) * PART_ROWS, stop)
            yield start, end
            start = end

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop`: columns `schema`, and covers.FIRST where a row repeats another.

        The column `id`, if present, has the id in the type of the catalog.
        """
        return self.take(np.arange(start, stop))

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Like `read`, for ascending row numbers; the rows between them are read, too."""
        start = int(rows[0])
        table = self.read_rows(start, int(rows[-1]) + 1).take(pa.array(rows - start))
        repeats = self._repeats(start, int(rows[-1]) + 1)
        repeats = repeats.filter(np.isin(repeats["row"].to_numpy(), rows))
        index = np.full(len(rows), repeats.num_rows)
        index[np.searchsorted(rows, repeats["row"].to_numpy())] = np.arange(repeats.num_rows)
        for field, column in zip(FIRST, self._firsts(table, rows, repeats), strict=True):
            table = table.append_column(field, column.take(pa.array(index)))
        return table.combine_chunks()

    def read_rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop`: columns `schema`."""
        rows = self.read_columns("part", start, stop, self.schema)
        if schema.ID in rows.column_names and pa.types.is_string(self.schema.field(schema.ID).type):
            rows = rows.set_column(rows.column_names.index(schema.ID), schema.ID, rows["album_id"])
        return rows

    def read_columns(self, name: str, start: int, stop: int, columns: pa.Schema) -> pa.Table:
        """Rows `start` to `stop` of the files `name`-*.arrow."""
        parts = [
            arrow_file.read_rows(
                _part_uri(self.uri, name, begin),
                begin % PART_ROWS,
                (end - 1) % PART_ROWS + 1,
                GROUP_ROWS,
            ).cast(columns, safe=False)
            for begin, end in self.ranges(start, stop)
        ]
        return pa.concat_tables(parts).combine_chunks()

    def write_columns(self, name: str, start: int, columns: pa.Table) -> None:
        """Write further columns of one of `ranges`, the rows from `start`, to `name`-*.arrow."""
        data = arrow_file.to_arrow_file(columns, GROUP_ROWS)
        storage.put(_part_uri(self.uri, name, start), data)

    def is_repeat(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of the rows `start` to `stop` has the album_id of an earlier row."""
        found = np.zeros(stop - start, bool)
        found[self._repeats(start, stop)["row"].to_numpy() - start] = True
        return found

    def _repeats(self, start: int, stop: int) -> pa.Table:
        uri = storage.join(self.uri, _REPEATS_FILE)
        found = arrow_file.read_batches(uri, start // GROUP_ROWS, (stop - 1) // GROUP_ROWS)
        row = pc.field("row")
        return found.filter((row >= start) & (row < stop))

    def _firsts(
        self, table: pa.Table, rows: NDArray[np.int64], repeats: pa.Table
    ) -> list[pa.Array]:
        """Columns FIRST of the repeated rows, in their order, followed by nulls for all others."""
        first_row = repeats["first_row"].to_numpy()
        same = repeats["same_url"].to_numpy()
        found: list[dict[str, Any]] = [{} for _ in first_row]
        for at in np.flatnonzero(same):
            row = repeats["row"][int(at)].as_py()
            found[at] = {"cover": table["cover"][int(np.searchsorted(rows, row))].as_py()}
        groups = first_row // GROUP_ROWS
        for group in np.unique(groups[~same]):
            begin = int(group) * GROUP_ROWS
            of_group = self.read_rows(begin, min(begin + GROUP_ROWS, self.rows))
            here = np.flatnonzero((groups == group) & ~same)
            taken = of_group.select(_COVER).take(pa.array(first_row[here] - begin))
            for at, record in zip(here, taken.to_pylist(), strict=True):
                found[at] = record
        columns = {
            "first_row": [*first_row.tolist(), None],
            **{f"first_{name}": [*(record.get(name) for record in found), None] for name in _COVER},
        }
        return [pa.array(columns[field.name], field.type) for field in FIRST]


class RowReader(Protocol):
    """The rows of a run's input: catalog.CatalogReader, covers.DatasetReader."""

    @property
    def key(self) -> dict[str, Any]:
        """Readers with equal keys have equal rows. JSON."""

    @property
    def identity(self) -> str | None:
        """The identity of the plan of these rows, if it is known without reading them."""

    def parts(self) -> Iterator[pa.Table]:
        """All rows in order: columns ROWS, and others to keep; rows numbered from 0."""

    def source(self) -> Source:
        """Where image bytes are; known when all parts have been read."""

    def summary(self) -> dict[str, Any]:
        """JSON values to keep with the plan; known when all parts have been read."""


def open_plan(uri: str, reader: RowReader, *, reuse: bool) -> Plan:
    """The plan at `uri`, written now if there is none or it was made from other input.

    reuse: do not compare the input with that of the plan.
    """
    plan = read_plan(uri)
    if plan is not None and (reuse or plan.key == reader.key):
        return plan
    with Progress("catalog", None, "rows") as progress:
        return write_plan(uri, reader, progress)


def identity_of(reader: RowReader, plan: Plan | None) -> str:
    """The identity of a reader's rows, from `plan` if it was made from them, else by reading."""
    if reader.identity is not None:
        return reader.identity
    if plan is not None and plan.key == reader.key:
        return plan.identity
    logger.info("reading the catalog to check whether it has changed since the last run")
    digest, unified = hashlib.sha256(), ROWS
    for part in _even(reader.parts()):
        unified = _unify(unified, part.schema)
        hash_rows(digest, part)
    return _identity(digest, reader.source(), _without_null_types(unified))


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
            value["summary"],
            value["local_cover"],
            tuple(value["web_schemes"]),
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["schema"]))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{meta}: invalid, or of another version; remove {uri}") from error


def write_plan(uri: str, reader: RowReader, progress: Progress | None = None) -> Plan:
    """Write the plan of a reader's rows at `uri`.

    Where parts differ in the type of a column, it becomes the wider type, or text. Raises
    CatalogError where a list or an object would have to.
    """
    rows, local_cover = 0, None
    schemes: set[str] = set()
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as temporary:
        ids = RepeatedIds(Path(temporary))
        unified = ROWS
        for part in _even(reader.parts()):
            unified = _unify(unified, part.schema)
            local_cover = local_cover or covers.local_cover(part)
            schemes.update(covers.web_schemes(part))
            hash_rows(digest, part)
            data = arrow_file.to_arrow_file(part, GROUP_ROWS)
            storage.put(_part_uri(uri, "part", rows), data)
            with storage.translate_errors(temporary, "write"):
                ids.add(part)
            rows += part.num_rows
            if progress is not None:
                progress.advance(part.num_rows)
        repeats = Path(temporary, _REPEATS_FILE)
        with storage.translate_errors(temporary, "write"):
            ids.write_repeats(repeats, rows, GROUP_ROWS)
        storage.put_file(storage.join(uri, _REPEATS_FILE), repeats)
    source, columns = reader.source(), _without_null_types(unified)
    plan = Plan(
        uri,
        rows,
        source,
        reader.identity or _identity(digest, source, columns),
        reader.key,
        reader.summary(),
        next((file for file in source.files if not storage.is_uri(file)), local_cover),
        tuple(sorted(schemes)),
        columns,
    )
    names = ("rows", "identity", "key", "summary", "local_cover", "web_schemes")
    value = {name: getattr(plan, name) for name in names}
    types = base64.b64encode(plan.schema.serialize()).decode()
    value |= {"source": asdict(source), "schema": types}
    storage.put_json(storage.join(uri, _META), value)
    return plan


def _identity(rows: Any, source: Source, schema: pa.Schema) -> str:
    files = [[file, storage.size(file)] for file in source.files]
    rows.update(json.dumps([files, str(schema.names), str(schema.types)]).encode())
    return str(rows.hexdigest())


def _part_uri(uri: str, name: str, start: int) -> str:
    """The file of a plan with row `start`."""
    return storage.join(uri, f"{name}-{start // PART_ROWS:08d}.arrow")


def _even(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of PART_ROWS; the last one may be shorter."""
    pending: list[pa.Table] = []
    rows = 0
    for part in parts:
        others = [name for name in part.column_names if name not in (*ROWS.names, *FIRST.names)]
        pending.append(part.select([*ROWS.names, *others]))
        rows += part.num_rows
        while rows >= PART_ROWS:
            table = _concatenated(pending)
            yield table.slice(0, PART_ROWS).combine_chunks()
            pending, rows = [table.slice(PART_ROWS)], rows - PART_ROWS
    if rows:
        yield _concatenated(pending).combine_chunks()


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
