"""Repairs PNG and WebP files with intact pixels but damaged metadata, so that Pillow can read them.

Removes data that other programs ignore: stray bytes before the image (also of JPEG and GIF), and
metadata that is damaged, too large or truncated. Pixels are never invented.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_STRAY = re.compile(
    rb"(?:\xef\xbb\xbf|[ \t\r\n\v\f]){1,16}"
    rb"(?=\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP)",
    re.DOTALL,
)
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT")
# Chunks that affect the image (transparency, colors, orientation); text chunks by keyword
_PNG_USED = (b"tRNS", b"iCCP", b"eXIf")
_PNG_USED_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def without_stray_bytes(data: bytes) -> bytes:
    """`data` without up to 16 white space characters or byte order marks before the signature."""
    stray = _STRAY.match(data)
    return data[stray.end() :] if stray else data


def repaired(data: bytes) -> bytes | None:
    """A PNG or WebP file without damaged metadata; None if there is nothing to remove.

    The result may still fail to decode.
    """
    result = None
    if data.startswith(_PNG):
        result = _png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        result = _webp(data)
    return None if result == data else result


def _png(data: bytes) -> bytes | None:
    """The PNG with its critical chunks and the ancillary chunks that are used and readable."""
    parts, header = [_PNG], b""
    seen: set[bytes] = set()
    for kind, start, end in _png_chunks(data):
        chunk = data[start:end]
        valid = end <= len(data) and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in _CRITICAL:
            if not valid:
                return None
            if kind == b"IHDR":
                header = chunk
            parts.append(chunk)
        elif (use := _png_use(kind, chunk[8:])) and use not in seen:
            seen.add(use)  # only the first of each, however many there are
            if valid and _png_chunk_is_readable(header, chunk):
                parts.append(chunk)
    return b"".join([*parts, _png_chunk(b"IEND", b"")])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk before IEND; a truncated chunk ends after the data."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        yield kind, at, at + 12 + length
        at += 12 + length


def _png_use(kind: bytes, body: bytes) -> bytes | None:
    """What an ancillary chunk is used for; None if it is not used."""
    if kind in _PNG_USED:
        return kind
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = body[:80].partition(b"\0")[0]
        return keyword if keyword in _PNG_USED_TEXTS else None
    return None


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def _png_chunk_is_readable(header: bytes, chunk: bytes) -> bool:
    """Whether Pillow can read the chunk in an image with this header."""
    if chunk[4:8] == b"tRNS":
        size, color_type = len(chunk) - 12, header[17:18]
        return size == {b"\0": 2, b"\2": 6}.get(color_type) or (color_type == b"\3" and size <= 256)
    small = b"".join([_PNG, header, chunk, _png_chunk(b"IDAT", b"")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that look like a decompression bomb
        try:
            Image.open(io.BytesIO(small), formats=("PNG",))
        except Exception:  # Pillow raises almost any exception on damaged metadata
            return False
    return True


def _webp(data: bytes) -> bytes | None:
    """The WebP file with its chunks up to a truncated one, without unused metadata, and a correct
    RIFF length. None if no chunk has an image.
    """
    chunks: list[tuple[bytes, bytes]] = []
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            break
        if kind in _WEBP_PIXELS or kind in _WEBP_FLAGS:
            chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    kinds = {kind for kind, _ in chunks}
    if not kinds & {b"VP8 ", b"VP8L", b"ANMF"}:
        return None
    parts = []
    for kind, body in chunks:
        if kind == b"VP8X" and body:
            flags = body[0]
            for metadata, flag in _WEBP_FLAGS.items():
                flags = flags | flag if metadata in kinds else flags & ~flag
            body = bytes([flags]) + body[1:]
        elif kind in _WEBP_FLAGS and b"VP8X" not in kinds:
            continue
        parts.append(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2))
    content = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(content)) + content
