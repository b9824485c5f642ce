"""Encoded images for tests."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image as a file of Pillow's format `form`."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each repetition is 14 bytes and takes 6 ms
    to decode, so that 200,000 of them are 3 MB and 20 minutes."""
    data = encoded(Image.new("L", (4000, 4000), 99), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]
