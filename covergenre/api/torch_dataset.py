"""A prepared dataset as a map-style torch dataset: load_dataset and CoverDataset."""

import bisect
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from covergenre.api.images import Transform
from covergenre.data import dataset, image_decoding
from covergenre.data.dataset import Manifest
from covergenre.data.image_decoding import CoverError
from covergenre.errors import ConfigError, DatasetError, ImageError, did_you_mean
from covergenre.io import s3_client, storage
from covergenre.schema import DATASET, SPLITS

if TYPE_CHECKING:
    import pandas as pd
    import ray.data

Split = Literal["train", "dev", "test"]
_CACHE_BYTES = 256 * 2**20


def load_dataset(
    uri: str | os.PathLike[str],
    split: Split,
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    cache_bytes: int = _CACHE_BYTES,
) -> "CoverDataset":
    """A split of a dataset that `prepare` wrote, as a map-style torch dataset.

    Args:
        uri: the dataset, local or s3://.
        split: "train", "dev" or "test".
        transform: called with each cover, a PIL image in RGB: `model.transform`, or one of
            torchvision's. By default the covers are PIL images.
        cache_bytes: bytes of encoded covers that each process keeps in memory. A row group, of up
            to 256 albums, is read as a whole, so random access is fast if the whole split fits.

    Raises:
        DatasetError: not a dataset, or its files are damaged.
        ConfigError: there is no such split (code "invalid").
    """
    if split not in SPLITS:
        raise ConfigError(f"split: no split {split!r}{did_you_mean(split, SPLITS)}", code="invalid")
    return CoverDataset(dataset.read_manifest(os.fspath(uri)), split, transform, cache_bytes)


class CoverDataset(torch.utils.data.Dataset[tuple[Any, torch.Tensor]]):
    """A split of a dataset. Created by `load_dataset`.

    `ds[i]` is (image, target): a PIL image in RGB, or the result of `transform`, and the genres as
    a multi-hot float32 tensor [genres]. Rows are in the order of the catalog. A DataLoader may fork
    or spawn its workers.

    Attributes:
        uri: the dataset.
        split: name of the split.
        transform: function of a PIL image, or None.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: Split,
        transform: Callable[[Image.Image], Any] | None,
        cache_bytes: int,
    ) -> None:
        self.uri = manifest.uri
        self.split = split
        self.transform = transform
        self._manifest = manifest
        self._ends = list(accumulate(shard.rows for shard in manifest.shards[split]))
        self._cache = _RowGroups(cache_bytes)

    @property
    def genres(self) -> tuple[str, ...]:
        """Names of the genres: element j of a target is genre j."""
        return self._manifest.genres.names

    @property
    def dataset_id(self) -> str:
        """Identity of the content of the whole dataset."""
        return self._manifest.dataset_id

    @property
    def targets(self) -> NDArray[np.float32]:
        """Genres of all albums, multi-hot [albums, genres]; reads no covers."""
        return self._manifest.genres.multi_hot(self._table(["genres"])["genres"].to_pylist())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        data, genres = self._row(index)
        try:
            if isinstance(self.transform, Transform):  # from the bytes, as in the pipeline
                image: Any = self.transform(data)
            else:
                image = image_decoding.decode_rgb(data)
                image = self.transform(image) if self.transform is not None else image
        except (CoverError, ImageError) as error:
            raise DatasetError(
                f"{self.uri}: album {index} of {self.split} cannot be decoded ({error}); prepare it"
                " again",
                code="bad_cover",
            ) from error
        return image, torch.from_numpy(self._manifest.genres.multi_hot([genres])[0])

    def encoded(self, index: int) -> bytes:
        """The stored bytes of a cover: JPEG or another image format."""
        return self._row(index)[0]

    def to_pandas(self) -> "pd.DataFrame":
        """All columns except the covers, one row per album, in the order of this dataset."""
        columns = [name for name in DATASET.names if name != "image"]
        frame: pd.DataFrame = self._table(columns).to_pandas()
        return frame

    def to_ray(self) -> "ray.data.Dataset":
        """The same rows for Ray Data, with the encoded covers in the column `image`.

        The columns are those of the dataset: album_id, row, image, cover_sha256, genres, group,
        split, title, artist. Ray Data yields rows in any order; `row` is the row of the catalog.
        """
        import ray.data

        files = self._manifest.shard_uris(self.split)
        filesystem, _ = storage.filesystem(self.uri)
        paths = [storage.filesystem(file)[1] for file in files]
        return ray.data.read_parquet(paths, filesystem=filesystem)

    def __repr__(self) -> str:
        return (
            f"CoverDataset({self.uri!r}, split={self.split!r}, {len(self)} albums,"
            f" {len(self.genres)} genres, transform={self.transform!r})"
        )

    def _table(self, columns: list[str]) -> pa.Table:
        uris = self._manifest.shard_uris(self.split)
        tables = [dataset.read_table(uri, columns) for uri in uris]
        if not tables:
            return pa.schema([DATASET.field(name) for name in columns]).empty_table()
        return pa.concat_tables(tables)

    def _row(self, index: int) -> tuple[bytes, list[str]]:
        """(encoded cover, genres)"""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range: {self.split} has {len(self)} albums")
        shard = bisect.bisect_right(self._ends, position)
        row = position - (self._ends[shard - 1] if shard else 0)
        uri = self._manifest.shard_uris(self.split)[shard]
        table, row = self._cache.find(uri, row)
        return table["image"][row].as_py(), table["genres"][row].as_py()


class _RowGroups:
    """A cache of the last row groups that were read, limited in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process starts with an empty cache
        return _RowGroups, (self._limit,)

    def find(self, uri: str, row: int) -> tuple[pa.Table, int]:
        """(the row group that has the row of a file, index in the row group)"""
        with self._lock:
            if self._process != os.getpid():  # forked: connections must not be shared
                s3_client.reset_clients()
                self._process = os.getpid()
            if uri not in self._starts:
                counts = dataset.row_group_rows(uri)
                self._starts[uri] = list(accumulate(counts, initial=0))
            group = bisect.bisect_right(self._starts[uri], row) - 1
            start, stop = self._starts[uri][group : group + 2]
            table = self._tables.pop((uri, group), None)
            if table is None:
                table = dataset.read_rows(uri, start, stop, ["image", "genres"])
            self._tables[uri, group] = table
            while (
                len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > self._limit
            ):
                self._tables.popitem(last=False)
            return table, row - start
