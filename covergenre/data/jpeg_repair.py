"""Repairs JPEG files with intact pixels but damaged metadata, so that Pillow can read them.

A missing EOI marker is added, and metadata that is too short for Pillow is removed.

libjpeg silently invents missing pixels if an EOI marker is appended. So the Huffman codes are
counted first: a file is complete if it has the codes of every block of its last scan, and its scans
together contain every coefficient of every component.
"""

import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed FF byte, not a restart marker
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_FILL = re.compile(rb"\xff{2,}")
_PARAMETERLESS = (0x01, 0xD8)  # TEM, SOI
_SOF, _DHT, _EOI, _SOS, _DRI = (0xC0, 0xC1, 0xC2), 0xC4, 0xD9, 0xDA, 0xDD
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {_DHT, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
_READ_AHEAD = 512  # bytes; more than the codes of one block, after which the end is checked


def repaired_jpeg(data: bytes) -> bytes | None:
    """A JPEG file with an EOI marker if only that was missing, and without metadata that is unused
    or too short. None if there is nothing to repair. The result may still fail to decode.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    parts, kept = [], 0
    for segment in _segments(data):
        if segment.end > len(data):
            break
        is_metadata = segment.marker == 0xFE or 0xE0 <= segment.marker <= 0xEF  # COM, APPn
        body = data[segment.body : segment.end]
        if is_metadata and not _metadata_is_readable(segment.marker, body):
            parts.append(data[kept : segment.start])
            kept = segment.end
    result = b"".join([*parts, data[kept:]])
    end = _end_of_complete_scans(result)
    if end is not None:
        return result[:end] + b"\xff\xd9"
    return result if parts else None


def _metadata_is_readable(marker: int, body: bytes) -> bool:
    """Whether a segment is used by libjpeg (for colors) or Pillow, and long enough for both."""
    return (
        (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14)
        or (marker == 0xE1 and body.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")))
        or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) >= 14)
        or (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12)
    )


@dataclass(frozen=True)
class _Segment:
    """A marker with its parameters: data[start:end]; the parameters alone: data[body:end]."""

    marker: int
    start: int
    body: int
    end: int


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments up to EOI or the end of the data; a truncated segment ends after the data."""
    at = 2
    while found := _MARKER.search(data, at):
        start, at = found.span()
        marker = data[at - 1]
        if marker in _PARAMETERLESS:
            continue
        if marker == _EOI:
            yield _Segment(marker, start, at, at)
            return
        length = int.from_bytes(data[at : at + 2]) if at + 2 <= len(data) else len(data)
        yield _Segment(marker, start, min(at + 2, len(data)), at + length)
        at += max(length, 2)


def _end_of_complete_scans(data: bytes) -> int | None:
    """Position of the missing EOI marker, if nothing else is missing; else None."""
    try:
        image = _Image(data)
        return image.end if image.is_complete() else None
    except (ArithmeticError, LookupError, ValueError, struct.error):
        # a missing field, component or table, or a size of 0
        return None


@dataclass
class _Component:
    h_factor: int  # horizontal and vertical sampling factors
    v_factor: int
    pending: list[bool] = field(default_factory=lambda: [True] * 64)
    """Per coefficient, in zigzag order: whether bits of it are still missing."""


@dataclass
class _Scan:
    components: list[tuple[int, int]]
    """Per component: its id, and the numbers of its DC and AC tables."""
    first: int
    last: int
    """First and last coefficient, in zigzag order."""
    refines: bool
    tables: dict[int, bytes]
    restart_interval: int
    start: int
    end: int

    def ac_table(self) -> list[int]:
        """The table of a scan of AC coefficients, which has one component."""
        return _lookup(self.tables[0x10 | self.components[0][1] & 15])


class _Image:
    """The frame and scans of a JPEG file, possibly without an EOI marker."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.end: int | None = None
        """Where the EOI marker is missing; None if it is not, or the file cannot be repaired."""
        self._components: dict[int, _Component] = {}
        self._scans: list[_Scan] = []
        self._progressive = False
        tables: dict[int, bytes] = {}
        restart_interval = 0
        for segment in _segments(data):
            if self._scans and not self._scans[-1].end:
                self._scans[-1].end = segment.start
            if segment.marker == _EOI or segment.marker in _OTHER_FRAMES:
                return
            if segment.end > len(data):
                self.end = segment.start
                break
            body = data[segment.body : segment.end]
            if segment.marker in _SOF:
                if self._components:
                    return
                self._progressive = segment.marker == 0xC2
                self._read_frame(body)
            elif segment.marker == _DHT:
                tables = tables | _read_tables(body)
            elif segment.marker == _DRI:
                (restart_interval,) = struct.unpack_from(">H", body)
            elif segment.marker == _SOS:
                self._read_scan(body, tables, restart_interval, segment.end)
        else:
            self.end = len(data)
        if self._scans and not self._scans[-1].end:
            self._scans[-1].end = self.end

    def _read_frame(self, body: bytes) -> None:
        _, self._height, self._width, count = struct.unpack_from(">BHHB", body)
        for at in range(6, 6 + 3 * count, 3):
            self._components[body[at]] = _Component(body[at + 1] >> 4, body[at + 1] & 15)
        self._max_h_factor = max(component.h_factor for component in self._components.values())
        self._max_v_factor = max(component.v_factor for component in self._components.values())

    def _read_scan(
        self, body: bytes, tables: dict[int, bytes], restart_interval: int, start: int
    ) -> None:
        count = body[0]
        components = [(body[at], body[at + 1]) for at in range(1, 1 + 2 * count, 2)]
        first, last, bits = body[1 + 2 * count : 4 + 2 * count]
        if not self._progressive:
            first, last, bits = 0, 63, 0
        for name, _ in components:
            for k in range(first, last + 1):
                self._components[name].pending[k] = bits & 15 > 0
        self._scans.append(
            _Scan(components, first, last, bits >> 4 > 0, tables, restart_interval, start, 0)
        )

    def is_complete(self) -> bool:
        """Whether only the EOI marker is missing."""
        if self.end is None or not self._scans:
            return False
        if any(any(component.pending) for component in self._components.values()):
            return False
        *earlier, last = self._scans
        if not (last.first and last.refines):
            return self._has_all_blocks(last, None)
        # The number of refinement bits depends on which coefficients are nonzero so far.
        across, down = self._blocks(last.components[0][0])
        nonzero = array("Q", bytes(8 * across * down))
        ((name, _),) = last.components
        return all(
            self._has_all_blocks(scan, nonzero)
            for scan in [*earlier, last]
            if scan.first and [name] == [other for other, _ in scan.components]
        )

    def _blocks(self, name: int) -> tuple[int, int]:
        """Blocks horizontally and vertically in a scan of this component alone."""
        component = self._components[name]
        return (
            _ceil(self._width * component.h_factor, 8 * self._max_h_factor),
            _ceil(self._height * component.v_factor, 8 * self._max_v_factor),
        )

    def _has_all_blocks(self, scan: _Scan, nonzero: "array[int] | None") -> bool:
        """Whether the data of the scan has codes for all of its blocks."""
        if len(scan.components) == 1:
            across, down = self._blocks(scan.components[0][0])
            blocks = [scan.components[0][1]]
        else:
            across = _ceil(self._width, 8 * self._max_h_factor)
            down = _ceil(self._height, 8 * self._max_v_factor)
            blocks = [
                tables
                for name, tables in scan.components
                for _ in range(self._components[name].h_factor * self._components[name].v_factor)
            ]
        num_mcus = across * down
        data = _FILL.sub(b"\xff", self._data[scan.start : scan.end]).removesuffix(b"\xff")
        intervals = _RESTART.split(data)
        interval = scan.restart_interval or num_mcus
        if len(intervals) != _ceil(num_mcus, interval):
            return False
        for number, coded in enumerate(intervals):
            if nonzero is None and number < len(intervals) - 1:
                continue  # complete: a restart marker follows
            start = number * interval
            stop = min(start + interval, num_mcus)
            bits = _Bits(coded.replace(b"\xff\x00", b"\xff"))
            if not self._progressive:
                complete = _skip_sequential(bits, _block_tables(scan, blocks), stop - start)
            elif scan.first:
                skip = _skip_refinement if scan.refines else _skip_ac
                complete = skip(bits, scan, range(start, stop), nonzero)
            elif scan.refines:
                complete = (stop - start) * len(blocks) <= bits.count
            else:
                complete = _skip_dc(bits, _block_tables(scan, blocks), stop - start)
            if not complete:
                return False
        return True


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _read_tables(body: bytes) -> dict[int, bytes]:
    """The tables of a DHT segment: class and number -> 16 counts and the symbols."""
    tables = {}
    while body:
        size = 17 + sum(body[1:17])
        tables[body[0]] = body[1:size]
        body = body[size:]
    return tables


@lru_cache(maxsize=8)
def _lookup(table: bytes) -> list[int]:
    """Next 16 bits -> 256 * length of the code they start with + its symbol; 0 if there is none."""
    entries: list[int] = []
    at = 16
    for length in range(1, 17):
        for _ in range(table[length - 1]):
            entries += [length << 8 | table[at]] * (1 << 16 - length)
            at += 1
    if len(entries) > 1 << 16:
        raise IndexError("more codes than 16 bits allow")
    return entries + [0] * ((1 << 16) - len(entries))


@lru_cache(maxsize=8)
def _steps(table: bytes) -> list[int]:
    """Like _lookup, for AC coefficients of sequential JPEGs: 256 * number of coefficients (64 or
    more: to the end of the block) + number of bits of the code and the value after it."""

    def step(entry: int) -> int:
        run, size = entry >> 4 & 15, entry & 15
        count = run + 1 if size or run == 15 else 64
        return (count << 8 | (entry >> 8) + size) if entry else 0

    of_entry = {entry: step(entry) for entry in set(_lookup(table))}
    return [of_entry[entry] for entry in _lookup(table)]


def _block_tables(scan: _Scan, blocks: list[int]) -> list[tuple[bytes, bytes]]:
    """The DC and AC tables of each block; AC is empty if the scan has none."""
    return [
        (scan.tables[numbers >> 4], scan.tables[0x10 | numbers & 15] if scan.last else b"")
        for numbers in blocks
    ]


class _Bits:
    """Entropy-coded data that can be read at any bit offset."""

    def __init__(self, coded: bytes) -> None:
        self.count = 8 * len(coded)
        padded = np.frombuffer(coded + bytes(_READ_AHEAD), np.uint8).astype(np.uint32)
        windows = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
        self.windows: memoryview = windows.data
        """24 bits from each byte on; 16 at bit `at`: windows[at >> 3] >> 8 - (at & 7) & 0xFFFF."""


# Each of these functions skips the codes of the blocks and returns whether the data has all of
# them. Function calls in the loops would dominate the run time.


def _skip_sequential(bits: _Bits, tables: list[tuple[bytes, bytes]], num_mcus: int) -> bool:
    windows, count, at = bits.windows, bits.count, 0
    blocks = [(_lookup(dc), _steps(ac)) for dc, ac in tables]
    for _ in range(num_mcus):
        for dc, ac in blocks:
            entry = dc[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
            if not entry:
                return False
            at += (entry >> 8) + (entry & 15)
            k = 1
            while k < 64:
                entry = ac[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
                if not entry:
                    return False
                at += entry & 255
                k += entry >> 8
            if at > count:
                return False
    return True


def _skip_dc(bits: _Bits, tables: list[tuple[bytes, bytes]], num_mcus: int) -> bool:
    windows, count, at = bits.windows, bits.count, 0
    blocks = [_lookup(dc) for dc, _ in tables]
    for _ in range(num_mcus):
        for dc in blocks:
            entry = dc[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
            at += (entry >> 8) + (entry & 15)
            if not entry or at > count:
                return False
    return True


def _skip_ac(bits: _Bits, scan: _Scan, blocks: range, nonzero: "array[int] | None") -> bool:
    windows, count, at = bits.windows, bits.count, 0
    table, last = scan.ac_table(), scan.last
    block = blocks.start
    while block < blocks.stop:
        k = scan.first
        while k <= last:
            window = windows[at >> 3] >> 8 - (at & 7) & 0xFFFF
            entry = table[window]
            at += entry >> 8
            run, size = entry >> 4 & 15, entry & 15
            if not entry or at > count:
                return False
            if size:
                k += run
                if nonzero is not None:
                    nonzero[block] |= 1 << (k & 63)
                at += size
                k += 1
            elif run == 15:
                k += 16
            else:  # end of band: no more coefficients in this block and in those that are skipped
                more = windows[at >> 3] >> 8 - (at & 7) & 0xFFFF
                block += (1 << run | more >> 16 - run) - 1
                at += run
                break
        if at > count:
            return False
        block += 1
    return True


def _skip_refinement(bits: _Bits, scan: _Scan, blocks: range, nonzero: "array[int] | None") -> bool:
    assert nonzero is not None
    windows, count, at = bits.windows, bits.count, 0
    table, last = scan.ac_table(), scan.last
    band = (1 << last + 1) - 1
    ended = 0  # number of blocks, from this one on, without further new coefficients
    for block in blocks:
        before = now = nonzero[block]
        k = scan.first
        while k <= last and not ended:
            entry = table[windows[at >> 3] >> 8 - (at & 7) & 0xFFFF]
            at += entry >> 8
            run, size = entry >> 4 & 15, entry & 15
            if not entry or at > count:
                return False
            if size:
                at += 1  # sign
            elif run < 15:
                more = windows[at >> 3] >> 8 - (at & 7) & 0xFFFF
                ended = 1 << run | more >> 16 - run
                at += run
                break
            # skip `run` zero coefficients; each nonzero one has a refinement bit
            while k <= last:
                if before >> k & 1:
                    at += 1
                elif run:
                    run -= 1
                else:
                    break
                k += 1
            if size and k <= last:
                now |= 1 << k
            k += 1
        if ended:
            at += ((before & band) >> k).bit_count()
            ended -= 1
        if at > count:
            return False
        nonzero[block] = now
    return True
