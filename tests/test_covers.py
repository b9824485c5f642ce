"""Covers: every kind of image that Pillow can make, and every kind of broken one."""

import io
import json
import pickle
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covergenre import covers
from covergenre.covers import CoverError, Preprocessing, decode, pack, sha256
from covergenre.errors import ModelError
from covergenre.schema import REASONS

SMALL = Preprocessing(side=16)
Pixels = NDArray[np.uint8]


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture that no mirror or turn leaves as it is."""
    x = np.linspace(0, 255, width)[None, :] * np.ones((height, 1))
    y = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


def detailed(width: int, height: int) -> Image.Image:
    """Edges and fine lines, as lettering has."""
    y, x = np.mgrid[:height, :width]
    rings = 127 + 127 * np.sin(((x - width / 3) ** 2 + (y - height / 4) ** 2) / 9000)
    bars = 255.0 * ((x // 23 + y // 31) % 2)
    return Image.fromarray(np.stack([rings, bars, 255 - rings], -1).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def squashed(image: Image.Image, side: int = 16) -> Pixels:
    """What the pixels should be: all of the image in RGB, then one resize."""
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def difference(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a.astype(int) - b).mean())


def reason(data: bytes, max_side: int | None = 300) -> str:
    """Why decode and pack, both, refuse `data`."""
    reasons = set()
    for action in (lambda: decode(data, SMALL), lambda: pack(data, max_side)):
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
        assert saved.mode == mode or form == "WEBP", "the file is not what the test is about"
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


def test_the_aspect_ratio_is_squashed() -> None:
    for size in ((64, 48), (16, 100), (1, 1), (300, 2)):
        assert decode(encoded(picture(*size)), SMALL).shape == (16, 16, 3)
    assert difference(decode(encoded(picture(16, 16)), SMALL), np.asarray(picture(16, 16))) == 0


# stored picture = upright picture, turned by this
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
    # also where the JPEG comes reduced, and where it is packed
    large = picture(400, 300)
    data = with_orientation(orientation, large, form)
    assert difference(decode(data, SMALL), squashed(large)) < 2.5
    packed = pack(data, 60)
    with Image.open(io.BytesIO(packed)) as stored:
        assert stored.size == (60, 45)
    assert difference(decode(packed, SMALL), squashed(large)) < 2.5


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_exif_does_not_cost_a_good_cover(form: str) -> None:
    """Of every byte of an EXIF block in turn, and of its end."""
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
            # the byte may have been the orientation's own: any of the eight, but no other picture
            assert min(
                difference(pixels, seen)
                for start in (upright, turned)
                for k in range(4)
                for flipped in (start, start[::-1])
                for seen in (np.rot90(flipped, k),)
            ) < (1 if form == "PNG" else 3)


def test_an_orientation_beside_a_damaged_field_is_still_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x011A] = 72.0
    block = exif.tobytes()
    # the rational's type becomes one that it cannot be
    at = block.index(bytes.fromhex("011a0005"))
    damaged = block[: at + 2] + b"\0\xff" + block[at + 4 :]
    pixels = decode(encoded(picture(), exif=damaged), SMALL)
    assert difference(pixels, squashed(picture().rotate(180))) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
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


def test_half_transparent_is_half_white() -> None:
    data = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 51)))  # 51 / 255 = 0.2
    assert (decode(data, SMALL) == (255, 204, 204)).all()


def test_a_progressive_jpeg_is_as_good_as_a_baseline_one() -> None:
    plain = encoded(detailed(300, 200), "JPEG", quality=90)
    progressive = encoded(detailed(300, 200), "JPEG", quality=90, progressive=True)
    assert b"\xff\xc2" in progressive and b"\xff\xc2" not in plain
    spec = Preprocessing()
    assert difference(decode(progressive, spec), decode(plain, spec)) == 0


@pytest.mark.parametrize("size", [(2000, 1600), (3000, 900), (900, 2400)])
def test_a_huge_jpeg_comes_reduced_and_looks_the_same(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean absolute difference from a full decode, of 255: 0.1 measured on a smooth cover, 1.9 on
    a harsh pattern of lines."""
    spec = Preprocessing()
    smooth = encoded(picture(*size), "JPEG", quality=90)
    loaded = squashed(Image.open(io.BytesIO(smooth)), spec.side)
    assert difference(decode(smooth, spec), loaded) < 0.3

    data = encoded(detailed(*size), "JPEG", quality=90)
    whole = squashed(Image.open(io.BytesIO(data)), spec.side)
    came: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spied(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        came.append(self.size)
        return resize(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spied)
    pixels = decode(data, spec)
    ((width, height),) = came
    assert width < size[0] and height < size[1]  # it did come reduced
    assert min(width, height) >= 2 * spec.side  # but to no less than twice the side
    assert difference(pixels, whole) < 2.5


def test_the_first_picture_of_several_counts() -> None:
    second = picture().transpose(Image.Transpose.ROTATE_180)
    data = encoded(picture(), "GIF", save_all=True, append_images=[second])
    assert difference(decode(data, SMALL), squashed(picture())) < 6


def test_decode_is_deterministic() -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded(detailed(300, 200), form)
        assert (decode(data, SMALL) == decode(data, SMALL)).all()
        assert pack(data, 100) == pack(data, 100)


# What cannot be used


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
def test_reasons(data: bytes, expected: str) -> None:
    assert reason(data) == expected
    assert reason(data, None) == expected


def test_postscript_is_not_run() -> None:
    """Pillow hands an EPS to Ghostscript; a cover from outside must start no program."""
    assert reason(encoded(picture(), "EPS")) == "not_an_image"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_no_prefix_of_an_image_makes_another_picture(form: str) -> None:
    data = encoded(picture(20, 14), form)
    whole = decode(data, SMALL)
    refused = 0
    for length in range(len(data)):
        try:
            pixels = decode(data[:length], SMALL)
        except CoverError as error:
            assert error.reason in REASONS
            refused += 1
        else:  # only what follows the pixels was cut
            assert (pixels == whole).all(), length
    assert refused > len(data) * 0.3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000"])
def test_damaged_bytes_give_pixels_or_a_reason(form: str) -> None:
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
    """A PNG that promises more than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    "size", [(10_001, 10_000), (12_000, 12_000), (14_000, 14_000), (100_000, 100_000)]
)
def test_a_decompression_bomb_is_set_aside(size: tuple[int, int]) -> None:
    assert reason(png_header(*size)) == "too_many_pixels"


def test_limits_are_the_last_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(20, 10))
    monkeypatch.setattr(covers, "MAX_PIXELS", 200)
    monkeypatch.setattr(covers, "MAX_BYTES", len(data))
    assert decode(data, SMALL).shape == (16, 16, 3)
    assert pack(data, 300) == data
    monkeypatch.setattr(covers, "MAX_PIXELS", 199)
    assert reason(data) == "too_many_pixels"
    monkeypatch.setattr(covers, "MAX_BYTES", len(data) - 1)
    assert reason(data) == "file_too_large"


def test_a_large_cover_below_the_limit_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here, as it does
    data = encoded(picture(40, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pack(data, 300) == data
        assert len(pack(data, 20))
        assert decode(data, SMALL).shape == (16, 16, 3)


def test_cover_error_survives_a_pickle() -> None:
    for error in (CoverError("empty_file"), CoverError("truncated_image", "OSError: cut")):
        again = pickle.loads(pickle.dumps(error))
        assert (again.reason, again.detail) == (error.reason, error.detail)
        assert str(again) == str(error)
    assert str(CoverError("empty_file")) == "empty_file"
    assert str(CoverError("truncated_image", "cut")) == "truncated_image: cut"


# What is stored


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("size", [(300, 300), (300, 20), (64, 48), (1, 1)])
def test_a_small_cover_keeps_its_bytes(form: str, size: tuple[int, int]) -> None:
    data = encoded(picture(*size), form)
    assert pack(data, 300) == data


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
def test_a_larger_cover_is_stored_smaller(
    form: str, size: tuple[int, int], stored: tuple[int, int]
) -> None:
    packed = pack(encoded(picture(*size), form), 300)
    with Image.open(io.BytesIO(packed)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", stored)
    assert pack(packed, 300) == packed


def test_original_bytes_are_kept_only_of_covers_that_decode() -> None:
    for form in ("JPEG", "PNG"):
        data = encoded(detailed(700, 500), form)
        assert pack(data, None) == data
        assert reason(data[: len(data) // 2], None) == "truncated_image"


def test_packing_hardly_changes_what_a_model_sees() -> None:
    """Mean absolute difference of the 224 x 224 pixels, of 255: 0.5 (PNG) and 0.6 (JPEG) measured
    on a smooth cover, 3.9 and 3.6 on a harsh pattern of lines; 0 where the bytes are kept."""
    spec = Preprocessing()
    for source, limit in ((picture(1000, 800), 0.8), (detailed(1000, 800), 4.5)):
        for form in ("PNG", "JPEG"):
            data = encoded(source, form)
            packed = pack(data, 300)
            assert len(packed) < len(data)
            assert difference(decode(packed, spec), decode(data, spec)) < limit


def test_sha256_is_of_the_bytes() -> None:
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# Preprocessing


def test_preprocessing_survives_json() -> None:
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
def test_a_step_that_this_version_cannot_do_is_refused(name: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        Preprocessing.from_json(Preprocessing().to_json() | {name: value})
    assert f"{name} {value!r} needs another version of covergenre" in str(caught.value)


def test_a_missing_or_unknown_step_is_refused() -> None:
    values = Preprocessing().to_json()
    for name in values:
        less = {key: value for key, value in values.items() if key != name}
        with pytest.raises(ModelError, match="preprocessing: expected"):
            Preprocessing.from_json(less)
    with pytest.raises(ModelError, match="preprocessing: expected"):
        Preprocessing.from_json(values | {"gamma": 2.2})
