"""The genre map (--genre-map): a file that renames or drops genres.

A CSV or TSV file has two columns, raw name and new name, and an optional first line `from,to`. A
JSON or YAML file is one object. An empty or null new name drops the genre. Names that are not in
the map are unchanged. The map is applied once: with {a: b, b: c} an `a` becomes `b`.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from covergenre.data.genre_lists import map_names
from covergenre.errors import ConfigError
from covergenre.genre_text import BRACKETS, clean_name
from covergenre.io import storage

# (line in the file, for messages; raw name; new name)
Entry = tuple[str, str, str | None]


def load_genre_map(uri: str) -> dict[str, str | None]:
    """Raw name -> new name, or None to drop the genre. Raises ConfigError with file and line."""
    readers = {
        ".csv": lambda text: _delimited(uri, text, ","),
        ".tsv": lambda text: _delimited(uri, text, "\t"),
        ".json": lambda text: _json(uri, text),
        ".yaml": lambda text: _yaml(uri, text),
        ".yml": lambda text: _yaml(uri, text),
    }
    reader = next((readers[end] for end in readers if uri.lower().endswith(end)), None)
    if reader is None:
        raise ConfigError(
            f"{uri}: unknown genre map format; use one of {', '.join(readers)}", code="format"
        )
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri}: not UTF-8; save the file as UTF-8", code="encoding") from error
    mapping: dict[str, str | None] = {}
    for line, raw, new in reader(text):
        raw, new = clean_name(raw), clean_name(new or "") or None
        if new is not None and not BRACKETS.isdisjoint(new):
            raise ConfigError(
                f"{uri}, {line}: {new!r}: brackets are not allowed in genre names", code="brackets"
            )
        if not raw:
            raise ConfigError(
                f"{uri}, {line}: the old name (mapped to {new!r}) is empty", code="empty_name"
            )
        if mapping.setdefault(raw, new) != new:
            raise ConfigError(
                f"{uri}, {line}: {raw!r} is already mapped to {mapping[raw]!r}", code="conflict"
            )
    return mapping


def _delimited(uri: str, text: str, delimiter: str) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for row in rows:
            line, start = f"line {start}", rows.line_num + 1
            if len(row) not in (0, 2):
                raise ConfigError(
                    f"{uri}, {line}: expected 2 columns, found {len(row)}", code="columns"
                )
            if row and (line, *row) != ("line 1", "from", "to"):
                yield line, row[0], row[1]
    except csv.Error as error:
        raise ConfigError(f"{uri}, line {start}: not valid CSV: {error}", code="invalid") from error


def _json(uri: str, text: str) -> Iterator[Entry]:
    try:
        # Pairs, because a dict keeps only the last of two equal names.
        document = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{uri}: not valid JSON: {error}", code="invalid") from error
    if not isinstance(document, _Pairs):
        raise ConfigError(f"{uri}, line 1: expected a JSON object", code="not_a_mapping")
    for raw, new in document:
        # The parser has no line numbers; names written with escapes are not found.
        before, found, _ = text.partition(json.dumps(raw, ensure_ascii=False))
        line = f"line {before.count(chr(10)) + 1}" if found else "unknown line"
        if new is not None and not isinstance(new, str):
            raise ConfigError(
                f"{uri}, {line}: {raw!r} must map to a name or null", code="value_type"
            )
        yield line, raw, new


class _Pairs(list[tuple[str, object]]):
    """The pairs of a JSON object; of another type than a JSON array."""


def _yaml(uri: str, text: str) -> Iterator[Entry]:
    try:
        # Nodes instead of values: they have line numbers, and `No` stays text instead of False.
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        number = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{uri}, line {number}: not valid YAML: {error.problem}", code="invalid"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{uri}: not valid YAML: {str(error).splitlines()[0]}", code="invalid"
        ) from error
    if not isinstance(document, yaml.MappingNode):
        raise ConfigError(f"{uri}, line 1: expected a YAML mapping", code="not_a_mapping")
    for key, value in document.value:
        line = f"line {key.start_mark.line + 1}"
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            raise ConfigError(
                f"{uri}, {line}: a name must map to a name or null", code="value_type"
            )
        yield line, key.value, None if value.tag == "tag:yaml.org,2002:null" else value.value


def apply_genre_map(
    genres: pa.ChunkedArray, mapping: Mapping[str, str | None]
) -> tuple[pa.ChunkedArray, dict[str, int]]:
    """A column of genre lists with the names replaced, and the number of rows with each raw name.

    Of names that become equal, the first is kept. The counts have every name in `mapping`, also
    those of no row.
    """
    counted = pc.value_counts(pc.list_flatten(genres)).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in counted}

    def renamed(names: list[str]) -> Iterable[str]:
        return dict.fromkeys(new for name in names if (new := mapping.get(name, name)))

    return map_names(genres, renamed), {raw: counts.get(raw, 0) for raw in mapping}
