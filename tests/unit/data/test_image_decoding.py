"""Decoding of covers: all formats, modes and colour spaces, and damaged files."""

import ast
import contextlib
import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import encoded, png_chunk
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image, ImageCms

import covergenre
from covergenre.data import decoder_process, image_decoding
from covergenre.data.image_decoding import (
    CoverError,
    Preprocessing,
    decode,
    sha256,
    validate_and_reencode,
)
from covergenre.errors import ModelError
from covergenre.schema import REASONS

SMALL = Preprocessing(side=16)
Pixels = NDArray[np.uint8]


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture that no reflection or rotation leaves unchanged."""
    x = np.linspace(0, 255, width)[None, :] * np.ones((height, 1))
    y = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


def detailed(width: int, height: int) -> Image.Image:
    """Edges and fine lines, like those of lettering."""
    y, x = np.mgrid[:height, :width]
    rings = 127 + 127 * np.sin(((x - width / 3) ** 2 + (y - height / 4) ** 2) / 9000)
    bars = 255.0 * ((x // 23 + y // 31) % 2)
    return Image.fromarray(np.stack([rings, bars, 255 - rings], -1).astype(np.uint8))


def squashed(image: Image.Image, side: int = 16) -> Pixels:
    """The expected pixels: the whole image in RGB, resized once."""
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def difference(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a.astype(int) - b).mean())


def reason(data: bytes, max_side: int | None = 300) -> str:
    """The reason why decode and validate_and_reencode both reject `data`."""
    reasons = set()
    for action in (lambda: decode(data, SMALL), lambda: validate_and_reencode(data, max_side)):
        with pytest.raises(CoverError) as caught:
            action()
        reasons.add(caught.value.reason)
        assert "\n" not in str(caught.value)
    (found,) = reasons
    assert found in REASONS
    return found


# Pixels


@pytest.mark.parametrize(
    ("mode", "form", "limit"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
        ("RGB", "TIFF", 0),
        ("RGB", "JPEG", 1.5),
        ("RGB", "WEBP", 1.5),
        ("RGB", "JPEG2000", 0),
        ("L", "PNG", 0),
        ("L", "JPEG", 1.5),
        ("P", "PNG", 6),
        ("P", "GIF", 6),
        ("PA", "TIFF", 6),
        ("LA", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "WEBP", 1.5),
        ("CMYK", "JPEG", 1.5),
        ("CMYK", "TIFF", 0),
        ("1", "PNG", 6),
    ],
)
def test_every_mode_becomes_rgb(mode: str, form: str, limit: float) -> None:
    source = (picture().convert("RGBA") if mode == "PA" else picture()).convert(mode)
    data = encoded(source, form)
    with Image.open(io.BytesIO(data)) as saved:
        assert saved.mode == mode or form == "WEBP", "Pillow saved another mode"
    pixels = decode(data, SMALL)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    grey = mode in ("L", "LA", "1")
    expected = picture().convert("L") if grey else picture()
    assert difference(pixels, squashed(expected)) <= limit


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(order: str, form: str) -> None:
    grey = picture().convert("L")
    wide = (np.asarray(grey).astype(np.uint16) * 257).astype(order)
    data = encoded(Image.fromarray(wide), form)
    with Image.open(io.BytesIO(data)) as saved:
        assert saved.mode.startswith("I;16")
    assert difference(decode(data, SMALL), squashed(grey)) == 0
    for deep, expected in ((0, 0), (256, 0), (257, 1), (32_896, 128), (65_535, 255)):
        plain = encoded(Image.fromarray(np.full((4, 4), deep, order)), form)
        assert (decode(plain, SMALL) == expected).all()


def test_aspect_ratio_is_not_kept() -> None:
    for size in ((64, 48), (16, 100), (1, 1), (300, 2)):
        assert decode(encoded(picture(*size)), SMALL).shape == (16, 16, 3)
    assert difference(decode(encoded(picture(16, 16)), SMALL), np.asarray(picture(16, 16))) == 0


# EXIF orientation -> transposition from the upright picture to the stored one
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def with_orientation(orientation: int, image: Image.Image, form: str) -> bytes:
    turn = TURNED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if form == "JPEG" else {}
    return encoded(image if turn is None else image.transpose(turn), form, exif=exif, **options)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    data = with_orientation(orientation, picture(), form)
    assert difference(decode(data, SMALL), squashed(picture())) < 2.5
    # also if the JPEG is decoded at a reduced size, and if it is re-encoded
    large = picture(400, 300)
    data = with_orientation(orientation, large, form)
    assert difference(decode(data, SMALL), squashed(large)) < 2.5
    reencoded = validate_and_reencode(data, 60)
    with Image.open(io.BytesIO(reencoded)) as stored:
        assert stored.size == (60, 45)
    assert difference(decode(reencoded, SMALL), squashed(large)) < 2.5


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_exif_is_ignored(form: str) -> None:
    """Damage at each byte of an EXIF block, and truncation there."""
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010F] = "maker"
    exif[0x011A] = 72.0
    block = exif.tobytes()
    upright, turned = squashed(picture(20, 20)), squashed(picture(20, 20).rotate(180))
    for at in range(6, len(block)):
        for bad in (
            block[:at] + b"\xff" + block[at + 1 :],
            block[:at] + b"\0" + block[at + 1 :],
            block[:at],
        ):
            pixels = decode(encoded(picture(20, 20), form, exif=bad), SMALL)
            # the damaged byte may be that of the orientation: any of the eight is accepted
            assert min(
                difference(pixels, seen)
                for start in (upright, turned)
                for k in range(4)
                for flipped in (start, start[::-1])
                for seen in (np.rot90(flipped, k),)
            ) < (1 if form == "PNG" else 3)


def test_orientation_beside_a_damaged_exif_field_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x011A] = 72.0
    block = exif.tobytes()
    # an invalid type for a rational number
    at = block.index(bytes.fromhex("011a0005"))
    damaged = block[: at + 2] + b"\0\xff" + block[at + 4 :]
    pixels = decode(encoded(picture(), exif=damaged), SMALL)
    assert difference(pixels, squashed(picture().rotate(180))) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparent_pixels_become_white(mode: str) -> None:
    size = (16, 16)
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, size, (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.paste((0, 0, 0, 255) if mode == "RGBA" else (0, 255), (0, 0, 8, 16))
        data = encoded(image)
    elif mode == "PA":
        image = Image.new("RGBA", size, (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 8, 16))
        data = encoded(image.convert("PA"), "TIFF")
    else:  # one colour of the image is declared transparent
        colours: dict[str, tuple[Any, Any]] = {
            "P": (0, 7),
            "RGB": ((0, 0, 0), (9, 9, 9)),
            "L": (0, 9),
        }
        opaque, transparent = colours[mode]
        image = Image.new(mode, size, transparent)
        image.paste(opaque, (0, 0, 8, 16))
        if mode == "P":
            image.putpalette(bytes(768))
        data = encoded(image, transparency=transparent)
    pixels = decode(data, SMALL)
    assert (pixels[:, 8:] == 255).all()
    assert (pixels[:, :8] == 0).all()


def test_alpha_is_composited_over_white() -> None:
    data = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 51)))  # 51 / 255 = 0.2
    assert (decode(data, SMALL) == (255, 204, 204)).all()


def test_compositing_equals_that_of_pillow_for_every_color_and_alpha() -> None:
    color, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([color, 255 - color, color, alpha], -1))
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    assert (np.asarray(image_decoding.decode_rgb(encoded(image))) == expected).all()


def test_progressive_and_baseline_jpeg_have_equal_pixels() -> None:
    plain = encoded(detailed(300, 200), "JPEG", quality=90)
    progressive = encoded(detailed(300, 200), "JPEG", quality=90, progressive=True)
    assert b"\xff\xc2" in progressive and b"\xff\xc2" not in plain
    spec = Preprocessing()
    assert difference(decode(progressive, spec), decode(plain, spec)) == 0


@pytest.mark.parametrize("size", [(2000, 1600), (3000, 900), (900, 2400)])
def test_large_jpeg_is_decoded_at_a_reduced_size(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured mean absolute difference from a full decode, of 255: 0.1 on a smooth cover, 1.9 on a
    pattern of fine lines."""
    spec = Preprocessing()
    smooth = encoded(picture(*size), "JPEG", quality=90)
    loaded = squashed(Image.open(io.BytesIO(smooth)), spec.side)
    assert difference(decode(smooth, spec), loaded) < 0.3

    data = encoded(detailed(*size), "JPEG", quality=90)
    whole = squashed(Image.open(io.BytesIO(data)), spec.side)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spied(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        sizes.append(self.size)
        return resize(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spied)
    pixels = decode(data, spec)
    ((width, height),) = sizes
    assert width < size[0] and height < size[1]
    assert min(width, height) >= 2 * spec.side
    assert difference(pixels, whole) < 2.5


def test_scores_of_a_large_jpeg_are_those_of_its_full_decode(untrained_model: str) -> None:
    """Measured maximum difference: 0.0002 on a smooth cover, 0.003 on a pattern of fine lines."""
    model = covergenre.load_model(untrained_model)
    for image, limit in ((picture(3000, 3000), 0.001), (detailed(1500, 1500), 0.01)):
        reduced = encoded(image, "JPEG", quality=90)
        scores = model.predict([reduced, Image.open(io.BytesIO(reduced)).convert("RGB")]).values
        assert np.abs(scores[0] - scores[1]).max() < limit


def test_decode_is_deterministic() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(detailed(300, 200), form)
        assert (decode(data, SMALL) == decode(data, SMALL)).all()
        assert validate_and_reencode(data, 100) == validate_and_reencode(data, 100)


# Rejected files


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty_file"),
        (b"\0", "not_an_image"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        (b'{"error": "not found"}', "not_an_image"),
        (bytes(range(256)) * 8, "not_an_image"),
        (encoded(picture(), "PDF"), "not_an_image"),
        (encoded(picture(), "JPEG")[:-200], "truncated_image"),
        (encoded(picture(), "JPEG", progressive=True)[:-200], "truncated_image"),
        (encoded(picture(), "PNG")[:-60], "truncated_image"),
        (encoded(picture(), "WEBP")[:-40], "truncated_image"),
    ],
    ids=[
        *("empty", "nul", "html", "svg", "json", "garbage", "pdf"),
        *("jpeg", "progressive", "png", "webp"),
    ],
)
def test_reasons_for_rejection(data: bytes, expected: str) -> None:
    assert reason(data) == expected
    assert reason(data, None) == expected


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_image_is_rejected_or_has_all_pixels(form: str) -> None:
    data = encoded(picture(20, 14), form)
    whole = decode(data, SMALL)
    refused = 0
    for length in range(len(data)):
        try:
            pixels = decode(data[:length], SMALL)
        except CoverError as error:
            assert error.reason in REASONS
            refused += 1
        else:  # truncated after the pixels
            assert (pixels == whole).all(), length
    assert refused > len(data) * 0.3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000"])
def test_damaged_image_decodes_or_is_rejected(form: str) -> None:
    rng = random.Random(form)
    data = encoded(picture(20, 14), form)
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            assert decode(bytes(bad), SMALL).shape == (16, 16, 3)
        except CoverError as error:
            assert error.reason in REASONS
            assert "\n" not in error.detail


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size without pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    "size", [(10_001, 10_000), (12_000, 12_000), (14_000, 14_000), (100_000, 100_000)]
)
def test_image_with_too_many_pixels_is_rejected(size: tuple[int, int]) -> None:
    assert reason(png_header(*size)) == "too_many_pixels"


def test_limits_are_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(20, 10))
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 200)
    monkeypatch.setattr(image_decoding, "MAX_BYTES", len(data))
    assert decode(data, SMALL).shape == (16, 16, 3)
    assert validate_and_reencode(data, 300) == data
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 199)
    assert reason(data) == "too_many_pixels"
    monkeypatch.setattr(image_decoding, "MAX_BYTES", len(data) - 1)
    assert reason(data) == "file_too_large"


def test_large_cover_below_the_limit_causes_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above this, Pillow warns
    data = encoded(picture(40, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validate_and_reencode(data, 300) == data
        assert len(validate_and_reencode(data, 20))
        assert decode(data, SMALL).shape == (16, 16, 3)


def test_cover_error_can_be_pickled() -> None:
    for error in (CoverError("empty_file"), CoverError("truncated_image", "OSError: cut")):
        again = pickle.loads(pickle.dumps(error))
        assert (again.reason, again.detail) == (error.reason, error.detail)
        assert str(again) == str(error)
    assert str(CoverError("empty_file")) == "empty_file"
    assert str(CoverError("truncated_image", "cut")) == "truncated_image: cut"


# Stored bytes


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("size", [(300, 300), (300, 20), (64, 48), (1, 1)])
def test_small_cover_is_stored_unchanged(form: str, size: tuple[int, int]) -> None:
    data = encoded(picture(*size), form)
    assert validate_and_reencode(data, 300) == data


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((600, 400), (300, 200)),
        ((400, 600), (200, 300)),
        ((301, 301), (300, 300)),
        ((1200, 1200), (300, 300)),
        ((1500, 2), (300, 1)),
    ],
)
def test_large_cover_is_stored_at_the_maximum_size(
    form: str, size: tuple[int, int], stored: tuple[int, int]
) -> None:
    reencoded = validate_and_reencode(encoded(picture(*size), form), 300)
    with Image.open(io.BytesIO(reencoded)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", stored)
    assert validate_and_reencode(reencoded, 300) == reencoded


def test_covers_are_validated_without_a_maximum_size() -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(detailed(700, 500), form)
        assert validate_and_reencode(data, None) == data
        assert reason(data[: len(data) // 2], None) == "truncated_image"


def test_reencoding_changes_the_pixels_of_a_model_little() -> None:
    """Measured mean absolute difference of 224 x 224 pixels, of 255: 0.5 (PNG) and 0.6 (JPEG) on a
    smooth cover, 3.9 and 3.6 on a pattern of fine lines."""
    spec = Preprocessing()
    for source, limit in ((picture(1000, 800), 0.8), (detailed(1000, 800), 4.5)):
        for form in ("PNG", "JPEG"):
            data = encoded(source, form)
            reencoded = validate_and_reencode(data, 300)
            assert len(reencoded) < len(data)
            assert difference(decode(reencoded, spec), decode(data, spec)) < limit


def test_sha256_is_of_the_bytes() -> None:
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# Preprocessing


def test_preprocessing_is_read_as_written() -> None:
    for spec in (Preprocessing(), Preprocessing(side=64, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))):
        again = Preprocessing.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("orientation", "none"),
        ("alpha", "black"),
        ("reduction", "none"),
        ("filter", "bicubic"),
    ],
)
def test_unsupported_preprocessing_is_an_error(name: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        Preprocessing.from_json(Preprocessing().to_json() | {name: value})
    assert caught.value.code == "preprocessing_unsupported"
    assert f"{name} {value!r}" in str(caught.value)


def test_missing_or_unknown_step_is_an_error() -> None:
    values = Preprocessing().to_json()
    for name in values:
        less = {key: value for key, value in values.items() if key != name}
        with pytest.raises(ModelError) as caught:
            Preprocessing.from_json(less)
        assert caught.value.code == "preprocessing_fields"
    with pytest.raises(ModelError, match="gamma"):
        Preprocessing.from_json(values | {"gamma": 2.2})


# Colours


def icc(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 ICC profile with these tags."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        at = 128 + 4 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", at, len(value))
        body += value + bytes(-len(value) % 4)
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    header = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    profile = bytearray(header + bytes(128 - len(header)) + table + body)
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


def text_tag(text: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 68)


def gamma_tag(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def xyz_tag(*xyz: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(v * 65536) for v in xyz))


# Colorants of Adobe RGB (1998), adapted to D50
ADOBE_RGB = icc(
    b"RGB ",
    b"XYZ ",
    b"mntr",
    {
        b"desc": text_tag(b"Adobe RGB"),
        b"wtpt": xyz_tag(0.95045, 1.0, 1.08905),
        b"rXYZ": xyz_tag(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz_tag(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz_tag(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_tag(2.19921875)),
    },
)
GREY_GAMMA_1 = icc(
    *(b"GRAY", b"XYZ ", b"mntr"),
    {b"desc": text_tag(b"grey"), b"wtpt": xyz_tag(0.9642, 1, 0.8249), b"kTRC": gamma_tag(1.0)},
)


def press() -> bytes:
    """A profile of printing inks: cyan is (0, 151, 218), unlike in the simple CMYK formula."""
    lab = {"C": (55, -37, -50), "M": (48, 74, -3), "Y": (89, -5, 93)}
    nodes = b""
    for ink in range(16):  # the corners: each ink at 0 or 100 %
        used = [name for bit, name in zip((8, 4, 2), "CMY", strict=True) if ink & bit]
        level, a, b = 100.0, 0.0, 0.0
        for name in used:
            level, a, b = level * lab[name][0] / 100, a + lab[name][1], b + lab[name][2]
        if ink & 1:
            level, a, b = 10.0, 0.0, 0.0
        nodes += bytes(
            int(np.clip(v, 0, 255)) for v in (level * 2.55, round(a) + 128, round(b) + 128)
        )
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity
    table += bytes(range(256)) * 4 + nodes + bytes(range(256)) * 3
    return icc(
        *(b"CMYK", b"Lab ", b"prtr"),
        {b"desc": text_tag(b"press"), b"wtpt": xyz_tag(0.9642, 1, 0.8249), b"A2B0": table},
    )


def of_adobe_rgb(colour: tuple[int, int, int]) -> Pixels:
    """The sRGB of a colour of Adobe RGB, by the standards' formulas."""
    linear = (np.array(colour) / 255) ** 2.19921875
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    to_srgb = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
    light = (np.array(to_srgb) @ np.array(to_xyz) @ linear).clip(0, 1)
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    rounded: Pixels = np.round(curved * 255).astype(np.uint8)
    return rounded


def assert_is(pixels: Pixels, colour: Any, within: int) -> None:
    assert np.abs(pixels.astype(int) - np.array(colour)).max() <= within, pixels[0, 0]


@pytest.mark.parametrize(
    "colour", [(200, 100, 50), (60, 160, 80), (128, 128, 128), (30, 60, 200), (255, 255, 255)]
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_adobe_rgb_is_converted_to_srgb(form: str, colour: tuple[int, int, int]) -> None:
    options: dict[str, Any] = {"quality": 98} if form in ("JPEG", "WEBP", "AVIF") else {}
    image = Image.new("RGB", (32, 32), colour)
    data = encoded(image, form, icc_profile=ADOBE_RGB, **options)
    expected = of_adobe_rgb(colour)
    assert_is(decode(data, SMALL), expected, 2 if form in ("PNG", "TIFF") else 5)
    assert_is(decode(validate_and_reencode(data, 16), SMALL), expected, 5)
    if colour[0] != colour[1]:
        assert difference(decode(encoded(image, form, **options), SMALL), expected) > 5


def test_profile_applies_to_every_mode() -> None:
    expected = of_adobe_rgb((60, 160, 80))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 60, 160, 80])
    assert_is(decode(encoded(palette, icc_profile=ADOBE_RGB), SMALL), expected, 2)
    half = Image.new("RGBA", (16, 16), (60, 160, 80, 255))
    half.paste((60, 160, 80, 0), (0, 0, 8, 16))
    pixels = decode(encoded(half, icc_profile=ADOBE_RGB), SMALL)
    assert_is(pixels[:, :8], 255, 0)
    assert_is(pixels[:, 8:], expected, 2)
    # linear light of 0.2140 is sRGB's 128
    for mode, colour in (("L", 55), ("LA", (55, 255)), ("I;16", 55 * 257)):
        deep = Image.new(mode, (16, 16), colour)
        assert_is(decode(encoded(deep, icc_profile=GREY_GAMMA_1), SMALL), 128, 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_srgb_profile_changes_nothing(form: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(encoded(detailed(60, 40), form), SMALL)
    same = encoded(detailed(60, 40), form, icc_profile=srgb)
    with Image.open(io.BytesIO(same)) as saved:
        assert saved.info["icc_profile"] == srgb
    assert (decode(same, SMALL) == plain).all()


@pytest.mark.parametrize(
    "profile",
    [
        *(b"no profile", ADOBE_RGB[:200], ADOBE_RGB[:128] + bytes(400), GREY_GAMMA_1, press()),
        bytes(len(ADOBE_RGB)),
    ],
    ids=["text", "truncated", "no tags", "grey", "CMYK", "zeros"],
)
def test_unusable_profile_is_ignored(profile: bytes) -> None:
    for form in ("PNG", "JPEG", "TIFF", "WEBP"):
        plain = decode(encoded(picture(), form), SMALL)
        assert (decode(encoded(picture(), form, icc_profile=profile), SMALL) == plain).all()


INKS = {  # (C, M, Y, K) of 255 -> RGB
    (0, 0, 0, 0): (255, 255, 255),
    (255, 0, 0, 0): (0, 255, 255),
    (0, 255, 0, 0): (255, 0, 255),
    (0, 0, 255, 0): (255, 255, 0),
    (0, 255, 255, 0): (255, 0, 0),
    (0, 0, 0, 255): (0, 0, 0),
    (0, 0, 0, 128): (127, 127, 127),
    (255, 128, 0, 64): (0, 95, 191),
}


def ycck(inks: tuple[int, int, int, int]) -> bytes:
    """A CMYK JPEG like those of Photoshop: inverted inks, CMY as YCbCr, and an Adobe marker for it.
    Pillow writes the four channels unchanged, so they are converted here."""
    y, cb, cr = Image.new("RGB", (1, 1), inks[:3]).convert("YCbCr").getpixel((0, 0))  # type: ignore
    stored = Image.new("CMYK", (32, 32), (255 - y, 255 - cb, 255 - cr, inks[3]))
    data = bytearray(encoded(stored, "JPEG", quality=98))
    at = data.index(b"Adobe\0")
    assert data[at + 11] == 0  # the transform: none
    data[at + 11] = 2  # YCCK
    return bytes(data)


@pytest.mark.parametrize("inks", INKS)
def test_cmyk_and_ycck_have_the_colours_of_another_decoder(inks: tuple[int, int, int, int]) -> None:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    plain = encoded(Image.new("CMYK", (32, 32), inks), "JPEG", quality=98)
    assert b"Adobe" in plain
    for data in (plain, ycck(inks)):
        pixels = decode(data, SMALL)
        assert_is(pixels, INKS[inks], 4)
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision.io
            other = decode_jpeg(raw, mode=ImageReadMode.RGB)[:, 0, 0].numpy()
        assert_is(pixels, other, 4)
    tiff = encoded(Image.new("CMYK", (32, 32), inks), "TIFF")
    assert_is(decode(tiff, SMALL), INKS[inks], 1)


def test_profile_of_cmyk_is_applied() -> None:
    for form, within in (("JPEG", 4), ("TIFF", 2)):
        for inks, seen in (
            ((255, 0, 0, 0), (0, 151, 218)),
            ((0, 0, 0, 0), (255, 255, 255)),
            ((0, 0, 0, 255), (27, 27, 27)),  # its black is an L* of 10
        ):
            data = encoded(Image.new("CMYK", (32, 32), inks), form, icc_profile=press())
            assert_is(decode(data, SMALL), seen, within)


def tiff(samples: NDArray[Any], bits: int, kind: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF of any depth. kind: SampleFormat."""
    height, width = samples.shape
    data = samples.tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    fields |= {277: 1, 278: height, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in sorted(fields.items()))
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    ("dtype", "bits", "kind", "levels"),
    [
        ("<u2", 16, 1, {0: 0, 32_896: 128, 65_535: 255}),
        ("<i2", 16, 2, {-9: 0, 0: 0, 16_384: 127, 32_767: 255}),
        ("<u4", 32, 1, {0: 0, 2**31: 127, 2**32 - 1: 255}),
        ("<i4", 32, 2, {-9: 0, 2**30: 127, 2**31 - 1: 255}),
        ("<f4", 32, 3, {-1.0: 0, 0.0: 0, 0.5: 127, 1.0: 255, 7.0: 255, np.nan: 0, np.inf: 255}),
    ],
)
def test_grey_of_high_bit_depth_is_scaled(
    dtype: str, bits: int, kind: int, levels: dict[Any, int]
) -> None:
    for level, expected in levels.items():
        data = tiff(np.full((4, 4), level, dtype), bits, kind)
        assert_is(decode(data, SMALL), expected, 0)
    if dtype in ("<u2", "<f4"):  # photometric 0: white is 0
        white = tiff(np.zeros((4, 4), dtype), bits, kind, photometric=0)
        assert_is(decode(white, SMALL), 255, 0)


def test_grey_of_12_bits() -> None:
    # two samples in three bytes
    for level, expected in ((0, 0), (2056, 128), (4095, 255)):
        two_samples = np.frombuffer(f"{level:03x}{level:03x}".encode() * 8, "S1")
        row = np.frombuffer(bytes.fromhex(two_samples.tobytes().decode()), np.uint8)
        data = bytearray(tiff(row.reshape(1, -1), 12))
        at = data.index(struct.pack("<HHI", 256, 4, 1))
        data[at + 8 : at + 12] = struct.pack("<I", 16)
        assert_is(decode(bytes(data), SMALL), expected, 0)


def test_colours_of_16_bits() -> None:
    """16 bits a channel: PNG with and without alpha, and TIFF."""
    wide = np.full((4, 4, 4), (51_400, 25_700, 12_850, 65_535), ">u2")
    wide[:, 2:, 3] = 0
    opaque = decode(png(wide[:, :, :3].tobytes(), 4, 4, depth=16, colour=2), SMALL)
    assert_is(opaque, (200, 100, 50), 1)
    pixels = decode(png(wide.tobytes(), 4, 4, depth=16, colour=6), SMALL)
    assert_is(pixels[:, :6], (200, 100, 50), 1)
    assert_is(pixels[:, 10:], 255, 0)
    # grey, of which one level is transparent
    grey = np.array([[51_400, 51_401]] * 2, ">u2")
    data = png(grey.tobytes(), 2, 2, depth=16, colour=0, tRNS=struct.pack(">H", 51_400))
    pixels = decode(data, Preprocessing(side=2))
    assert_is(pixels, [[[255] * 3, [200] * 3]] * 2, 0)
    # RGB, of which one colour is transparent
    data = png(
        wide[:, :, :3].tobytes(), 4, 4, depth=16, colour=2, tRNS=struct.pack(">HHH", 1, 2, 3)
    )
    assert_is(decode(data, SMALL), (200, 100, 50), 1)


def test_lab_is_converted_to_srgb() -> None:
    # as TIFF stores it: L of 255, a and b signed; sRGB's red is Lab 54.3, 80.8, 69.9 (D50)
    for (level, a, b), seen in (
        ((54.3, 80.8, 69.9), (255, 0, 0)),
        ((100, 0, 0), (255, 255, 255)),
        ((53.6, 0, 0), (128, 128, 128)),
    ):
        lab = Image.new("LAB", (16, 16), (round(level * 2.55), round(a) + 128, round(b) + 128))
        assert_is(decode(encoded(lab, "TIFF"), SMALL), seen, 6)  # a step of a or b is 2 levels


# Unusual files


def png(
    rows: bytes,
    width: int,
    height: int,
    *,
    depth: int,
    colour: int,
    interlaced: bool = False,
    **more: bytes,
) -> bytes:
    """A PNG of unfiltered rows; if interlaced, of passes with their filter bytes."""
    step = len(rows) // height
    if not interlaced:
        rows = b"".join(b"\0" + rows[y * step : (y + 1) * step] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = {b"IHDR": header} | {k.encode(): v for k, v in more.items()}
    parts |= {b"IDAT": zlib.compress(rows, 1), b"IEND": b""}
    chunks = (png_chunk(kind, body) for kind, body in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_interlaced_png() -> None:
    image = np.asarray(picture(37, 29))
    passes = b""
    for x, y, dx, dy in (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ):
        for row in image[y::dy, x::dx]:
            passes += b"\0" + row.tobytes()
    data = png(passes, 37, 29, depth=8, colour=2, interlaced=True)
    with Image.open(io.BytesIO(data)) as saved:
        assert saved.info["interlace"] == 1
    assert difference(decode(data, SMALL), squashed(picture(37, 29))) == 0
    assert reason(data[: len(data) // 2]) == "truncated_image"


def test_interlaced_gif() -> None:
    plain, interlaced = (encoded(picture(), "GIF", interlace=value) for value in (0, 1))
    assert plain != interlaced
    assert (decode(plain, SMALL) == decode(interlaced, SMALL)).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"])
def test_first_frame_is_decoded(form: str) -> None:
    second = picture().transpose(Image.Transpose.ROTATE_180)
    data = encoded(picture(), form, save_all=True, append_images=[second, picture()])
    with Image.open(io.BytesIO(data)) as saved:
        assert getattr(saved, "n_frames", 1) == 3
    assert difference(decode(data, SMALL), squashed(picture())) < 6
    assert validate_and_reencode(data, 300) == data


@pytest.mark.parametrize(
    ("form", "options", "limit"),
    [
        ("WEBP", {"quality": 90}, 1.5),
        ("WEBP", {"lossless": True}, 0),
        ("AVIF", {"quality": 90}, 1.5),
        ("AVIF", {"quality": 90, "subsampling": "4:4:4"}, 1.5),
        ("JPEG2000", {"irreversible": True}, 1.5),
    ],
)
def test_newer_formats(form: str, options: dict[str, Any], limit: float) -> None:
    data = encoded(picture(), form, **options)
    assert difference(decode(data, SMALL), squashed(picture())) <= limit
    if form != "JPEG2000":
        clear = picture().convert("RGBA")
        clear.putalpha(0)
        assert (decode(encoded(clear, form, **options), SMALL) >= 254).all()


def test_small_file_with_400_million_pixels_is_rejected() -> None:
    """A complete file of 0.05 MB, 1 bit per pixel."""
    data = png(bytes(2500) * 20_000, 20_000, 20_000, depth=1, colour=0)
    assert len(data) < 300_000
    assert reason(data) == "too_many_pixels"


def test_pixels_beyond_the_size_in_the_header_are_not_decompressed() -> None:
    """1 x 1 pixels by the header, followed by 50 MB of rows."""
    data = png(b"\xc8" + bytes(50_000_000), 1, 1, depth=8, colour=0)
    assert len(data) < 300_000
    tracemalloc.start()
    try:
        decoded_or_reason(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def decoded_or_reason(data: bytes) -> None:
    try:
        assert decode(data, SMALL).shape == (16, 16, 3)
    except CoverError as error:
        assert error.reason in REASONS


PROGRAMS = {
    "eps": encoded(picture(), "EPS"),
    "dos eps": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<6I", 32, len(encoded(picture(), "EPS")), 0, 0, 0, 0)
    + struct.pack("<I", 0xFFFF)
    + encoded(picture(), "EPS"),
    "pdf": encoded(picture(), "PDF"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_ghostscript_is_not_started(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would open an EPS with Ghostscript; a fake one on the PATH records that it ran."""
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho ran >> {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    assert reason(PROGRAMS[kind]) == "not_an_image"
    assert not started.exists()
    if kind != "pdf":  # Pillow itself starts it
        with contextlib.suppress(OSError), Image.open(io.BytesIO(PROGRAMS[kind])) as image:
            image.load()
        assert started.exists()


def test_only_the_supported_formats_are_decoded() -> None:
    """Tried with every format that Pillow can write."""
    Image.init()
    opened = set()
    for form in Image.SAVE:
        with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError, KeyError):
            warnings.simplefilter("ignore", DeprecationWarning)
            data = encoded(picture(64, 64), form)
            try:
                decode(data, SMALL)
                opened.add(form)
            except CoverError as error:
                assert error.reason == "not_an_image", form
    assert opened == {*image_decoding.FORMATS, "MPO"}


def test_docs_list_every_reason_format_and_limit() -> None:
    """docs/covers.md: every reason for rejection by the decoder, every format, and the limits."""
    root = Path(__file__).parents[3]
    text = (root / "docs" / "covers.md").read_text()
    given = set()
    for module in ("image_decoding", "decoder_process"):
        tree = ast.parse((root / "covergenre" / "data" / f"{module}.py").read_text())
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        given |= {value for value in texts if isinstance(value, str) and value in REASONS}
    assert given == {
        *("empty_file", "file_too_large", "not_an_image", "truncated_image"),
        *("too_many_pixels", "too_much_memory", "decode_timeout", "decoder_crashed"),
    }
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {name for line in rows for name in re.findall(r"`(\w+)`", line)} & set(REASONS) == given
    (formats,) = re.findall(r"Supported formats: (.+?)\.\s", text, re.S)
    names = re.sub(r"\s*\(.+?\)", "", formats)
    assert set(re.split(r",\s|\sand\s", names)) == set(image_decoding.FORMATS)
    assert f"{image_decoding.MAX_BYTES / 1e6:.0f} MB" in text
    assert f"{image_decoding.MAX_PIXELS / 1e6:.0f} million pixels" in text
    assert f"{decoder_process.DECODE_SECONDS:.0f} s of CPU time" in text
    assert f"{decoder_process.MEMORY_BYTES / 2**30:.0f} GiB" in text
