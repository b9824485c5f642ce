"""Catalogs and plans as tables in memory, for small tests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from covergenre import schema
from covergenre.config import CatalogSettings
from covergenre.data import covers
from covergenre.data.catalog import CatalogReader
from covergenre.data.covers import Source


@dataclass
class TableReader:
    """A plan.RowReader that reads from tables."""

    tables: Iterable[pa.Table]
    image_source: Source = field(default_factory=Source)
    key: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None

    def parts(self) -> Iterator[pa.Table]:
        yield from self.tables

    def source(self) -> Source:
        return self.image_source

    def summary(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Catalog:
    """A whole catalog."""

    table: pa.Table
    files: tuple[str, ...]
    source_rows: int
    notes: tuple[str, ...]
    image_column: str


def read_catalog(uri: Path | str, settings: CatalogSettings) -> Catalog:
    """All rows of a catalog as one table."""
    reader = CatalogReader(str(uri), settings)
    table = pa.concat_tables(reader.parts())
    assert table.schema.equals(schema.CATALOG)
    return Catalog(
        table, tuple(reader.files), reader.source_rows, tuple(reader.notes), reader.image_column
    )


def plan_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Numbered rows of covers.PLAN; the columns first_* are filled in from `first_row`."""
    rows = list(rows)
    numbered = []
    for number, row in enumerate(rows):
        first = {} if row.get("first_row") is None else rows[row["first_row"]]
        of_first = {f"first_{name}": first.get(name) for name in ("cover", "source", "source_row")}
        numbered.append({"row": number, **row, **of_first})
    return pa.Table.from_pylist(numbered, schema=covers.PLAN)
