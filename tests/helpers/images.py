"""Encoded images for tests."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image, encoded in Pillow's format `form`."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated.

    A scan has 14 bytes and takes 6 ms to decode, so 200,000 scans are 3 MB and take 20 minutes.
    """
    data = encoded(Image.new("L", (4000, 4000), 99), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]
