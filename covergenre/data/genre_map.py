"""The user's genre map: raw genre names to the names to use, or to nothing.

As CSV or TSV it has two columns, raw name and new name, and an optional first line `from,to`. As
JSON or YAML it is one object. An empty or null new name drops the genre. Names that are not in
the map stay as they are. A map is applied once: in {a: b, b: c} an `a` becomes `b`.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from covergenre.data.genre_lists import JOINT, join_lists, make_lists
from covergenre.errors import ConfigError
from covergenre.genre_text import BRACKETS, clean_name
from covergenre.io import storage

# Where in the file (for messages), raw name, new name.
Entry = tuple[str, str, str | None]


def load_genre_map(uri: str) -> dict[str, str | None]:
    """Raw name -> new name, None to drop the genre. Raises ConfigError naming file and place."""
    readers = {
        ".csv": lambda text: _delimited(uri, text, ","),
        ".tsv": lambda text: _delimited(uri, text, "\t"),
        ".json": lambda text: _json(uri, text),
        ".yaml": lambda text: _yaml(uri, text),
        ".yml": lambda text: _yaml(uri, text),
    }
    reader = next((readers[end] for end in readers if uri.lower().endswith(end)), None)
    if reader is None:
        raise ConfigError(f"{uri}: a genre map is one of {', '.join(readers)}")
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri} is not UTF-8; save it as UTF-8") from error
    mapping: dict[str, str | None] = {}
    for place, raw, new in reader(text):
        raw, new = clean_name(raw), clean_name(new or "") or None
        if new is not None and not BRACKETS.isdisjoint(new):
            raise ConfigError(f"{uri}, {place}: {new!r}: a genre name has no brackets")
        if not raw:
            raise ConfigError(f"{uri}, {place}: no genre name before {new!r}")
        if mapping.setdefault(raw, new) != new:
            raise ConfigError(f"{uri}, {place}: {raw!r} is already mapped to {mapping[raw]!r}")
    return mapping


def _delimited(uri: str, text: str, delimiter: str) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for row in rows:
            place, start = f"line {start}", rows.line_num + 1
            if len(row) not in (0, 2):
                raise ConfigError(f"{uri}, {place}: 2 columns expected, {len(row)} found")
            if row and (place, *row) != ("line 1", "from", "to"):
                yield place, row[0], row[1]
    except csv.Error as error:
        raise ConfigError(f"{uri}, line {start}: not valid CSV: {error}") from error


def _json(uri: str, text: str) -> Iterator[Entry]:
    try:
        # Pairs, because a dict would keep only the last of two equal names.
        document = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{uri}: not valid JSON: {error}") from error
    if not isinstance(document, _Pairs):
        raise ConfigError(f"{uri}, line 1: one object of names expected")
    for raw, new in document:
        # The parser keeps no lines; a name that is spelled with escapes goes without.
        before, found, _ = text.partition(json.dumps(raw, ensure_ascii=False))
        place = f"line {before.count(chr(10)) + 1}" if found else "an entry"
        if new is not None and not isinstance(new, str):
            raise ConfigError(f"{uri}, {place}: {raw!r} must map to a name or null")
        yield place, raw, new


class _Pairs(list[tuple[str, object]]):
    """A JSON object, told apart from a JSON array."""


def _yaml(uri: str, text: str) -> Iterator[Entry]:
    try:
        # The nodes, not the values: they know their lines, and `No: 80s` is not False there.
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{uri}, line {line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(document, yaml.MappingNode):
        raise ConfigError(f"{uri}, line 1: one mapping of names expected")
    for key, value in document.value:
        place = f"line {key.start_mark.line + 1}"
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            raise ConfigError(f"{uri}, {place}: a name must map to a name or null")
        yield place, key.value, None if value.tag == "tag:yaml.org,2002:null" else value.value


def apply_genre_map(
    table: pa.Table, mapping: dict[str, str | None]
) -> tuple[pa.Table, dict[str, int]]:
    """The table with its `genres` renamed, and how many rows each entry of the map touched.

    Names that become equal are merged into the first of them. An entry with the count 0 names a
    genre that no row has.
    """
    genres = table.column("genres")
    counted = pc.value_counts(pc.list_flatten(genres)).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in counted}

    def renamed(text: str) -> Iterable[str]:
        names = (mapping.get(name, name) for name in text.split(JOINT))
        return dict.fromkeys(name for name in names if name)

    position = table.schema.get_field_index("genres")
    lists = make_lists(join_lists(genres), renamed)
    return (
        table.set_column(position, table.schema.field(position), lists),
        {raw: counts.get(raw, 0) for raw in mapping},
    )
