"""Arrow IPC files of internal state."""

from pathlib import Path

import pyarrow as pa
import pytest

from covergenre.errors import StorageError
from covergenre.io.arrow_file import read_rows, to_arrow_file


def write(path: Path, table: pa.Table) -> str:
    path.write_bytes(to_arrow_file(table, 4))
    return str(path)


def test_any_range_of_rows_can_be_read(tmp_path: Path) -> None:
    uri = write(tmp_path / "x.arrow", pa.table({"n": range(10)}))
    for start in range(10):
        for stop in range(start + 1, 11):
            assert read_rows(uri, start, stop, 4)["n"].to_pylist() == list(range(start, stop))


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    for values in ([1, 2], [3, 4, 5]):
        uri = write(tmp_path / "x.arrow", pa.table({"n": values}))
        assert read_rows(uri, 0, 2, 4)["n"].to_pylist() == values[:2]


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -20])
def test_truncated_file_is_an_error(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    data = Path(write(path, pa.table({"n": range(10)}))).read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(StorageError):
        read_rows(str(path), 0, 1, 4)


def test_extension_types_are_refused_before_their_code_runs(tmp_path: Path) -> None:
    field = pa.field("n", pa.int64(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"})
    uri = write(tmp_path / "x.arrow", pa.table([pa.array([1])], pa.schema([field])))
    with pytest.raises(StorageError) as caught:
        read_rows(uri, 0, 1, 4)
    assert caught.value.code == "extension_type"
