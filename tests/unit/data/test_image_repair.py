"""Images with intact pixels but damaged metadata decode; those with damaged pixels are rejected."""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from images import encoded, png_chunk, rings_and_bars
from numpy.typing import NDArray
from PIL import Image, ImageCms

from covergenre.data.image_decoding import (
    CoverError,
    Preprocessing,
    decode,
    sha256,
    validate_and_reencode,
)
from covergenre.data.image_repair import repaired, without_stray_bytes
from covergenre.data.jpeg_repair import repaired_jpeg

SMALL = Preprocessing(side=16)
Pixels = NDArray[np.uint8]
PNG = b"\x89PNG\r\n\x1a\n"


def reason(data: bytes) -> str:
    """The reason why decode and validate_and_reencode both reject `data`."""
    reasons = set()
    for action in (
        lambda: decode(data, SMALL),
        lambda: validate_and_reencode(data, 300),
        lambda: validate_and_reencode(data, 8),
    ):
        with pytest.raises(CoverError) as caught:
            action()
        reasons.add(caught.value.reason)
    (found,) = reasons
    return found


def assert_decodes_as(data: bytes, whole: bytes) -> None:
    """`data` has the pixels of `whole`; validate_and_reencode keeps the bytes of a small cover."""
    expected = decode(whole, SMALL)
    assert np.array_equal(decode(data, SMALL), expected)
    assert validate_and_reencode(data, 300) == data
    assert np.array_equal(
        decode(validate_and_reencode(data, 7), SMALL),
        decode(validate_and_reencode(whole, 7), SMALL),
    )


# PNG


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(data: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with chunks added before IDAT and before IEND."""
    parts, placed = [PNG], False
    for kind, body in chunks_of(data):
        if kind == b"IDAT" and not placed:
            parts.append(before)
            placed = True
        if kind == b"IEND":
            parts.append(after)
        parts.append(png_chunk(kind, body))
    return b"".join(parts)


PLAIN_PNG = encoded(rings_and_bars(), "PNG")
ANCILLARY = (
    *(b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"cHRM", b"gAMA", b"sRGB", b"eXIf", b"tIME"),
    *(b"sBIT", b"bKGD", b"hIST", b"sPLT", b"acTL", b"fcTL", b"fdAT", b"cICP", b"tRNS", b"prVt"),
)
BODIES = {
    "empty": b"",
    "short": b"\0",
    "text": b"key\0\1\1damaged\0\xff\xfe",
    "not zlib": b"key\0\0\0\0\0not zlib at all",
    "zeros": bytes(40),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("kind", ANCILLARY, ids=bytes.decode)
def test_png_decodes_without_its_damaged_ancillary_chunk(kind: bytes, body: bytes) -> None:
    wrong_crc, right_crc = png_chunk(kind, body, crc=1), png_chunk(kind, body)
    assert_decodes_as(png(PLAIN_PNG, before=wrong_crc), PLAIN_PNG)
    if kind != b"tRNS":  # one of 40 zeros would be valid and change the image
        assert_decodes_as(png(PLAIN_PNG, before=right_crc), PLAIN_PNG)
        for added in (wrong_crc, right_crc, png_chunk(kind, body, length=2**31 - 1)):
            assert_decodes_as(png(PLAIN_PNG, after=added), PLAIN_PNG)
    truncated = png(PLAIN_PNG, after=png_chunk(kind, body + bytes(50)))[:-40]
    assert_decodes_as(truncated, PLAIN_PNG)


@pytest.mark.parametrize(
    "added",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        png_chunk(b"iCCP", b"ICC\0\0" + zlib.compress(bytes(3_000_000))),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) * 80,
    ],
    ids=["zTXt", "iTXt", "iCCP", "much text"],
)
def test_png_decodes_without_metadata_that_is_too_large(added: bytes) -> None:
    assert_decodes_as(png(PLAIN_PNG, before=added), PLAIN_PNG)
    assert_decodes_as(png(PLAIN_PNG, after=added), PLAIN_PNG)


BROKEN = png_chunk(b"pHYs", b"\0" * 9, crc=1)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "options",
    [
        {"exif": b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()},
    ],
    ids=["orientation", "profile"],
)
def test_png_keeps_the_readable_metadata_beside_a_damaged_chunk(options: dict[str, Any]) -> None:
    whole = encoded(rings_and_bars(), "PNG", **options)
    assert_decodes_as(png(whole, before=BROKEN), whole)
    kept = {kind for kind, _ in chunks_of(repaired(png(whole, before=BROKEN)) or PNG)}
    assert kept == {kind for kind, _ in chunks_of(whole)}


def test_png_keeps_the_orientation_of_xmp_beside_a_damaged_chunk() -> None:
    xmp = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    whole = png(PLAIN_PNG, before=xmp)
    assert not np.array_equal(decode(whole, SMALL), decode(PLAIN_PNG, SMALL))
    assert_decodes_as(png(PLAIN_PNG, before=xmp + BROKEN), whole)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", 0), ("P", bytes(range(200))), ("L", 128), ("RGB", (127, 0, 128))],
)
def test_png_keeps_its_transparency_beside_a_damaged_chunk(mode: str, transparency: Any) -> None:
    image = Image.new("RGB", (64, 48), (127, 0, 128))
    image.paste(rings_and_bars(30, 48))
    image = image.quantize() if mode == "P" else image.convert(mode)
    if mode == "L":
        image.paste(128, (30, 0, 64, 48))
    opaque = encoded(image, "PNG")
    whole = encoded(image, "PNG", transparency=transparency)
    assert not np.array_equal(decode(whole, SMALL), decode(opaque, SMALL))
    assert_decodes_as(png(whole, before=BROKEN), whole)


@pytest.mark.parametrize(
    ("mode", "damaged"),
    [
        ("P", png_chunk(b"tRNS", bytes(16), crc=1)),
        ("P", png_chunk(b"tRNS", bytes(300))),
        ("L", png_chunk(b"tRNS", b"\0\0", crc=1)),
        ("L", png_chunk(b"tRNS", b"\0")),
        ("RGB", png_chunk(b"tRNS", bytes(6), crc=1)),
        ("RGB", png_chunk(b"tRNS", bytes(5))),
    ],
)
def test_png_with_damaged_transparency_is_opaque_as_in_libpng(mode: str, damaged: bytes) -> None:
    opaque = encoded(rings_and_bars().convert(mode), "PNG")
    assert_decodes_as(png(opaque, before=damaged), opaque)


def test_png_with_a_damaged_animation_shows_its_default_image() -> None:
    turned = rings_and_bars().transpose(Image.Transpose.ROTATE_180)
    whole = encoded(rings_and_bars(), "PNG", save_all=True, append_images=[turned])
    parts = chunks_of(whole)
    assert {b"acTL", b"fcTL", b"fdAT"} <= {kind for kind, _ in parts}
    for broken in (b"acTL", b"fcTL"):
        for bad in (
            PNG + b"".join(png_chunk(k, body, crc=k == broken) for k, body in parts),
            PNG + b"".join(png_chunk(k, body[:3] if k == broken else body) for k, body in parts),
        ):
            assert np.array_equal(decode(bad, SMALL), decode(PLAIN_PNG, SMALL))


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"], ids=bytes.decode)
@pytest.mark.parametrize("others", [b"", BROKEN], ids=["alone", "with a damaged ancillary chunk"])
def test_png_with_a_damaged_critical_chunk_is_rejected(kind: bytes, others: bytes) -> None:
    whole = encoded(rings_and_bars().convert("P"), "PNG")
    assert {b"IHDR", b"PLTE", b"IDAT"} <= {kind for kind, _ in chunks_of(whole)}

    def damage(change: Callable[[bytes], bytes]) -> bytes:
        parts = [png_chunk(k, change(body) if k == kind else body) for k, body in chunks_of(whole)]
        return b"".join([PNG, parts[0], others, *parts[1:]])

    assert np.array_equal(decode(damage(bytes), SMALL), decode(whole, SMALL))
    if kind != b"PLTE":  # a shorter palette is valid, too
        assert reason(damage(lambda body: body[: len(body) // 2])) == "truncated_image"
    flipped = bytearray(png(whole, before=others))
    flipped[flipped.index(kind) + 12] ^= 0xFF
    assert reason(bytes(flipped)) in ("truncated_image", "not_an_image")


def test_png_with_damaged_metadata_and_missing_pixels_is_truncated() -> None:
    whole = png(PLAIN_PNG, before=BROKEN)
    end = whole.index(b"IEND") - 4
    for length in range(whole.index(b"IDAT") + 4, end - 16, 7):
        assert reason(whole[:length]) in ("truncated_image", "not_an_image")
    assert_decodes_as(whole[:end], PLAIN_PNG)


def test_png_with_damaged_metadata_and_too_many_pixels_is_rejected() -> None:
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    data = PNG + png_chunk(b"IHDR", header) + BROKEN + png_chunk(b"IDAT", zlib.compress(b""))
    assert reason(data) == "too_many_pixels"


# JPEG metadata, WebP


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


PLAIN_JPEG = encoded(rings_and_bars(), "JPEG")


@pytest.mark.parametrize(
    "added",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"ICC_PROFILE\0\1"),
        segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        segment(0xE1, b"Exif\0\0MM"),
        segment(0xFE, b""),
    ],
)
def test_jpeg_decodes_without_metadata_that_is_too_short(added: bytes) -> None:
    assert_decodes_as(PLAIN_JPEG[:20] + added + PLAIN_JPEG[20:], PLAIN_JPEG)
    assert_decodes_as(PLAIN_JPEG[:20] + added + PLAIN_JPEG[20:-2], PLAIN_JPEG)


def test_jpeg_keeps_its_orientation_beside_damaged_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(rings_and_bars(), "JPEG", exif=exif, comment=b"some")
    assert_decodes_as(whole[:20] + segment(0xE0, b"JFIF\0") + whole[20:], whole)


def webp_chunk(data: bytes, kind: bytes) -> int:
    return data.index(kind, 30)


def test_webp_decodes_without_metadata_that_is_truncated_or_has_a_wrong_length() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(rings_and_bars(), "WEBP", exif=exif, xmp=XMP)
    plain = encoded(rings_and_bars(), "WEBP", exif=exif)
    xmp = webp_chunk(whole, b"XMP ")
    for length in (xmp, xmp + 6, xmp + 20, len(whole) - 1):
        assert_decodes_as(whole[:length], plain)
    upright = encoded(rings_and_bars(), "WEBP")
    at = webp_chunk(whole, b"EXIF")
    assert_decodes_as(whole[: at + 4] + b"\xff\xff\xff\x7f" + whole[at + 8 :], upright)
    for size in (0, len(upright) - 30, len(upright) + 1000):
        assert_decodes_as(b"RIFF" + struct.pack("<I", size) + upright[8:], upright)
    for length in range(30, len(upright) - 10, 9):
        assert reason(upright[:length]) == "truncated_image"
        assert repaired(upright[:length]) is None


# JPEG without EOI


def non_interleaved(width: int, height: int, sampling: tuple[int, int, int]) -> bytes:
    """A baseline JPEG with a scan for each component, assembled from three grey JPEGs."""
    wide, high = max(s >> 4 for s in sampling), max(s & 15 for s in sampling)
    scans = []
    for s in sampling:
        size = (-(-width * (s >> 4) // wide), -(-height * (s & 15) // high))
        grey = encoded(rings_and_bars(*size).convert("L"), "JPEG")
        frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
        scans.append(grey[scan + 10 : -2])
    components = b"".join(bytes([i + 1, s, 0]) for i, s in enumerate(sampling))
    header = segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + components)
    return b"".join(
        [
            *(grey[:frame], header, grey[frame + 13 : scan]),
            *(segment(0xDA, bytes([1, i + 1, 0, 0, 63, 0])) + scans[i] for i in range(3)),
            b"\xff\xd9",
        ]
    )


@cache
def jpegs() -> dict[str, bytes]:
    """JPEGs with every kind of Huffman-coded scan; in some, the last blocks are all zeros."""
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    half = rings_and_bars(40, 40)
    half.paste(grey.crop((0, 0, 40, 20)), (0, 20))
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8))
    made = {
        "one block": encoded(rings_and_bars(8, 8).convert("L"), "JPEG"),
        "grey": encoded(rings_and_bars().convert("L"), "JPEG"),
        "CMYK": encoded(rings_and_bars().convert("CMYK"), "JPEG"),
        "progressive CMYK": encoded(rings_and_bars().convert("CMYK"), "JPEG", progressive=True),
        "tall": encoded(rings_and_bars(9, 203), "JPEG"),
        "wide": encoded(rings_and_bars(203, 9), "JPEG", progressive=True),
        "fine": encoded(noise, "JPEG", quality=100),
        "progressive and fine": encoded(noise, "JPEG", quality=100, progressive=True),
        "a scan each": non_interleaved(50, 41, (0x11, 0x11, 0x11)),
        "a scan each, 4:2:0": non_interleaved(50, 41, (0x22, 0x11, 0x11)),
    }
    for progressive in (False, True):
        for subsampling in (0, 1, 2):
            options = {"progressive": progressive, "subsampling": subsampling}
            made[f"{options}"] = encoded(rings_and_bars(), "JPEG", **options)
            made[f"{options} flat"] = encoded(grey, "JPEG", optimize=True, **options)
            made[f"{options} ends flat"] = encoded(half, "JPEG", optimize=True, **options)
        for blocks in (1, 5):
            made[f"{progressive}, {blocks} between restarts"] = encoded(
                rings_and_bars(), "JPEG", progressive=progressive, restart_marker_blocks=blocks
            )
    assert all(data.endswith(b"\xff\xd9") for data in made.values())
    return made


@pytest.mark.parametrize("kind", jpegs())
def test_jpeg_without_its_eoi_marker_decodes_only_if_nothing_else_is_missing(kind: str) -> None:
    whole = jpegs()[kind]
    for ending in (b"", b"\xff", b"\xff\xff", bytes(20), b"\r\n"):
        assert_decodes_as(whole[:-2] + ending, whole)
    first = whole.index(b"\xff\xda") + 10  # a file that ends before the pixels is not_an_image
    for length in range(max(len(whole) - 66, first), len(whole) - 2):
        assert reason(whole[:length]) == "truncated_image"
        assert repaired_jpeg(whole[:length]) is None


@pytest.mark.parametrize(
    "kind", [kind for kind, data in jpegs().items() if data.count(b"\xff\xda") > 1]
)
def test_jpeg_that_ends_between_two_scans_is_truncated(kind: str) -> None:
    whole = jpegs()[kind]
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    for start in scans[1:]:
        for end in (start, start + 1, start + 2, start + 5):
            assert reason(whole[:end]) == "truncated_image"


def test_jpeg_that_ends_at_a_restart_marker_is_truncated() -> None:
    whole = encoded(rings_and_bars(), "JPEG", restart_marker_blocks=2)
    restarts = [
        at for at in range(len(whole)) if whole[at] == 0xFF and whole[at + 1] in range(0xD0, 0xD8)
    ]
    assert len(restarts) > 3
    for at in restarts:
        assert reason(whole[:at]) == reason(whole[: at + 2]) == "truncated_image"


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_jpeg_with_damaged_headers_and_no_eoi_decodes_or_is_rejected(step: int) -> None:
    for kind in ("grey", "progressive CMYK", "a scan each, 4:2:0"):
        data = jpegs()[kind][:-2]
        for at in range(2, min(data.index(b"\xff\xda") + 14, len(data)), step):
            for value in (0, 1, 0xFF, data[at] ^ 0x10):
                bad = data[:at] + bytes([value]) + data[at + 1 :]
                try:
                    assert decode(bad, SMALL).shape == (16, 16, 3)
                except CoverError as error:
                    assert error.reason in ("truncated_image", "not_an_image", "too_many_pixels")


def test_jpeg_repair_is_linear_in_fill_bytes() -> None:
    """A search that restarts at each of them would take hours."""
    data = PLAIN_JPEG[:-2] + b"\xff" * 5_000_000 + b"\0" + b"\xff" * 5_000_000
    repaired_jpeg(data)
    assert_decodes_as(PLAIN_JPEG[:-2] + b"\xff" * 5_000_000, PLAIN_JPEG)


# Stray bytes before the image

STRAY = (b"\xef\xbb\xbf", b"\n", b"\r\n\r\n", b" \t", b"\xef\xbb\xbf\r\n", b"\n" * 16)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
def test_image_after_stray_bytes_decodes(form: str) -> None:
    whole = encoded(rings_and_bars(), form)
    for stray in STRAY:
        assert_decodes_as(stray + whole, whole)
        assert sha256(stray + whole) != sha256(whole)
    for other in (b"\n" * 17, b"x", b"\0", b"\nx\n", b"<html>"):
        assert reason(other + whole) == "not_an_image"


def test_damaged_image_after_stray_bytes_decodes() -> None:
    assert_decodes_as(b"\n" + PLAIN_JPEG[:-2], PLAIN_JPEG)
    assert_decodes_as(b"\xef\xbb\xbf" + png(PLAIN_PNG, before=BROKEN), PLAIN_PNG)
    assert reason(b"\n" + PLAIN_JPEG[:-40]) == "truncated_image"


@pytest.mark.parametrize(
    "data",
    [b"\n\n", b"\r\n<!DOCTYPE html><p>404", b"\xef\xbb\xbf<svg/>", b"\n{}", b"\nRIFF1234WAVE"],
)
def test_text_after_stray_bytes_is_not_an_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"
    assert without_stray_bytes(data) is data
