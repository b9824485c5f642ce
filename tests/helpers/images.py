"""Encoded images for tests."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image, encoded in Pillow's format `form`."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def rings_and_bars(width: int = 64, height: int = 48) -> Image.Image:
    """A picture that no reflection or rotation leaves unchanged."""
    y, x = np.mgrid[:height, :width]
    rings = 127 + 127 * np.sin(((x - width / 3) ** 2 + (y - height / 4) ** 2) / 200)
    bars = 255.0 * ((x // 5 + y // 7) % 2)
    return Image.fromarray(np.stack([rings, bars, 255 - rings], -1).astype(np.uint8))


def png_chunk(kind: bytes, body: bytes, *, length: int | None = None, crc: int = 0) -> bytes:
    """A chunk of a PNG file. length: to state a wrong one. crc: added to the correct checksum."""
    check = (zlib.crc32(kind + body) + crc) % 2**32
    stated = len(body) if length is None else length
    return struct.pack(">I", stated) + kind + body + struct.pack(">I", check)


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated.

    A scan has 14 bytes and takes 6 ms to decode, so 200,000 scans are 3 MB and take 20 minutes.
    """
    data = encoded(Image.new("L", (4000, 4000), 99), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]
