"""S3 as an Arrow filesystem, by paths like bucket/key; see s3.py."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from covergenre.io.s3 import (
    CHUNK_BYTES,
    ObjectReader,
    ObjectWriter,
    delete,
    head,
    list_pages,
    split_path,
    write,
)
from covergenre.io.s3_client import request


@lru_cache(maxsize=1)
def filesystem() -> fs.PyFileSystem:
    """S3 by paths like bucket/key. Its pickle contains no client and no secret."""
    return fs.PyFileSystem(Handler())


class Handler(fs.FileSystemHandler):  # type: ignore[misc]
    """Arrow's filesystem operations on S3; a directory is a prefix of keys up to a slash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handler)

    def __hash__(self) -> int:
        return hash(Handler)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [_path_info(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        directory = selector.base_dir.rstrip("/")
        bucket, _, key = directory.partition("/")
        files: list[fs.FileInfo] = []
        directories: set[str] = set()
        exists = not key
        for page in list_pages(bucket, f"{key}/" if key else "", selector.recursive):
            for name, size, modified in zip(page.keys, page.sizes, page.modified, strict=True):
                exists, path = True, f"{bucket}/{name}"
                above = path.rpartition("/")[0]
                while len(above) > len(directory) and above not in directories:
                    directories.add(above)
                    above = above.rpartition("/")[0]
                if not path.endswith("/"):  # an empty object that marks a directory
                    files.append(_file_info(path, size, datetime.fromisoformat(modified)))
            for prefix in page.prefixes:
                exists = True
                directories.add(f"{bucket}/{prefix.rstrip('/')}")
        if not exists and not selector.allow_not_found:
            raise FileNotFoundError("no such file or directory")
        return files + [fs.FileInfo(path, fs.FileType.Directory) for path in sorted(directories)]

    def create_dir(self, path: str, recursive: bool) -> None:
        pass  # a directory exists while there is a key in it

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        bucket, key = split_path(path.rstrip("/"))  # never a whole bucket
        pages = list_pages(bucket, f"{key}/", recursive=True)
        keys = [key for page in pages for key in page.keys]
        # One request each: older stores refuse the checksum of a request to delete many objects.
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda key: delete(bucket, key), keys))

    def delete_root_dir_contents(self) -> None:
        raise OSError("deleting all buckets is not supported")

    def delete_file(self, path: str) -> None:
        delete(*split_path(path))

    def move(self, src: str, dest: str) -> None:
        raise OSError("S3 has no rename")

    def copy_file(self, src: str, dest: str) -> None:
        write(dest, _chunks(ObjectReader(src)))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(ObjectReader(path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(ObjectWriter(path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("S3 has no append")


def _chunks(reader: ObjectReader) -> Iterator[bytes]:
    while chunk := reader.read(CHUNK_BYTES):
        yield chunk


def _file_info(path: str, size: int, mtime: Any) -> fs.FileInfo:
    return fs.FileInfo(path, fs.FileType.File, size=size, mtime=mtime)


def _path_info(path: str) -> fs.FileInfo:
    bucket, _, key = path.partition("/")
    if key:
        with contextlib.suppress(FileNotFoundError):  # it may be a directory
            where = {"Bucket": bucket, "Key": key}
            found = request(bucket, lambda client: head(client, where))
            return _file_info(path, found["ContentLength"], found["LastModified"])
    page = next(list_pages(bucket, f"{key}/" if key else "", recursive=True, max_keys=1))
    is_directory = page.keys or not key
    return fs.FileInfo(path, fs.FileType.Directory if is_directory else fs.FileType.NotFound)
