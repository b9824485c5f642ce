"""The counts of finished output parts in few objects, so that a resumed run need not read the
footer of each part.

    OUT/_state/counts/<number>.jsonl    {"part": 7, "bytes": 18220, "counts": {"scored": 60, ...}}

The driver writes one of these files a minute. An entry is valid while the part has that many bytes;
parts without a valid entry, which are those of the last minute before a crash, have their counts in
their own footers, too.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from covergenre.errors import StorageError
from covergenre.inference.parts import FinishedParts
from covergenre.io import storage

BYTES = "bytes"
"""Name of a part's size among its counts."""

_SECONDS = 60.0
_THREADS = 32


class Journal:
    """Counts of output parts, written a minute at a time."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files = sorted(name for name in storage.list_sizes(folder) if _is_journal(name))
        self._number = 1 + max((int(name.split(".")[0]) for name in self._files), default=-1)
        self._lines: list[str] = []
        self._written = time.monotonic()

    def sum(self, finished: FinishedParts, total: "Counter[str]") -> NDArray[np.int64]:
        """Add the counts of finished parts to `total`; returns the parts without an entry."""
        is_missing = np.ones(len(finished.parts), bool)
        for part, size, counts in self._entries():
            at = int(np.searchsorted(finished.parts, part))
            if at == len(is_missing) or finished.parts[at] != part:
                continue
            if is_missing[at] and finished.sizes[at] == size:
                total.update(counts)
                is_missing[at] = False
        return finished.parts[is_missing]

    def _entries(self) -> Iterator[tuple[int, int, dict[str, int]]]:
        """(part, bytes, counts); the newest first, as a part may have been written again."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for text in pool.map(self._read, reversed(self._files)):
                for line in reversed(text.splitlines()):
                    entry = json.loads(line)
                    yield entry["part"], entry["bytes"], entry["counts"]

    def _read(self, name: str) -> str:
        try:
            return storage.read_bytes(storage.join(self._folder, name)).decode()
        except StorageError:  # the footers have the same counts
            return ""

    def add(self, parts: Iterable[tuple[int, dict[str, int]]]) -> None:
        """Parts were written, with these counts, of which one is BYTES."""
        for part, counts in parts:
            rest = {name: count for name, count in counts.items() if name != BYTES}
            self._lines.append(json.dumps({"part": part, "bytes": counts[BYTES], "counts": rest}))
        if time.monotonic() - self._written > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if self._lines:
            name = f"{self._number:08d}.jsonl"
            storage.put(storage.join(self._folder, name), "\n".join(self._lines).encode())
            self._number += 1
        self._lines, self._written = [], time.monotonic()


def _is_journal(name: str) -> bool:
    return name.removesuffix(".jsonl").isdecimal() and name.endswith(".jsonl")
