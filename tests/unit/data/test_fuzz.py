"""A mutation fuzzer: damaged images decode, or are rejected with a reason.

A mutant depends only on SEED and its number: `mutant(SEED, number)` reproduces the file.
"""

import contextlib
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from images import encoded, rings_and_bars
from PIL import Image

from covergenre.data.decoder_process import Decoder
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.schema import REASONS

SEED = 20_260
SPEC = Preprocessing(side=32)
SECONDS = 5.0


@cache
def samples() -> list[bytes]:
    """A file of each supported kind, so small that most mutations have an effect."""
    small, large = rings_and_bars(48, 40), rings_and_bars(160, 120)
    rgba = small.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(small.size))
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(small.convert("L"), np.float32) / 255)
    turned = small.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 6
    several: dict[str, Any] = {"save_all": True, "append_images": [turned, small]}
    return [
        encoded(small, "JPEG", exif=exif),
        encoded(large, "JPEG", quality=60, subsampling=2),
        encoded(large, "JPEG", progressive=True),
        encoded(small.convert("L"), "JPEG", restart_marker_blocks=2),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(small, "MPO", **several),
        encoded(small, "PNG"),
        encoded(small.convert("P"), "PNG", transparency=3),
        encoded(rgba, "PNG", **several),
        encoded(deep, "PNG"),
        encoded(small.convert("1"), "PNG"),
        encoded(small.convert("P"), "GIF", **several),
        encoded(small.convert("P"), "GIF", transparency=2),
        encoded(small, "WEBP", quality=70, exif=exif),
        encoded(small, "WEBP", lossless=True),
        encoded(rgba, "WEBP", **several),
        encoded(small, "AVIF", speed=10, exif=exif),
        encoded(rgba, "AVIF", speed=10),
        encoded(small, "TIFF", compression="tiff_lzw"),
        encoded(large, "TIFF", compression="jpeg"),
        encoded(small.convert("1"), "TIFF", compression="group4"),
        encoded(rgba, "TIFF", compression="tiff_adobe_deflate"),
        encoded(deep, "TIFF"),
        encoded(real, "TIFF"),
        encoded(small.convert("CMYK"), "TIFF"),
        encoded(small, "BMP"),
        encoded(small.convert("P"), "BMP"),
        encoded(small, "JPEG2000"),
        encoded(rgba, "JPEG2000", irreversible=True, quality_layers=[20]),
        encoded(small, "PPM"),
        encoded(deep.convert("I"), "PPM"),
        encoded(real, "PPM"),
    ]


# Mutations: each changes the file in place


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: random.Random) -> None:
    """Set a few bytes to values that are critical for decoders."""
    at = rng.randrange(len(data))
    run = data[at : at + rng.choice((1, 2, 4, 16))]
    data[at : at + len(run)] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * len(run)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 64, 512))]


def splice(data: bytearray, rng: random.Random) -> None:
    """Join the beginning of this file to the end of another."""
    other = rng.choice(samples())
    data[rng.randrange(1, len(data)) :] = other[rng.randrange(len(other)) :]


def repeat(data: bytearray, rng: random.Random) -> None:
    """Insert copies of a part of the file."""
    start = rng.randrange(len(data))
    part = data[start : start + rng.choice((8, 64, 512))]
    at = rng.randrange(len(data))
    data[at:at] = part * rng.choice((1, 1, 2, 50))


def edit_length(data: bytearray, rng: random.Random) -> None:
    """Change a number that may be a length, an offset or a side."""
    kind, size = rng.choice((("H", 2), ("I", 4)))
    order = rng.choice("<>")
    offsets = [
        at
        for at in range(len(data) - size)
        if 0 < struct.unpack_from(order + kind, data, at)[0] <= max(len(data), 255)
    ]
    if offsets:
        at = rng.choice(offsets)
        value = struct.unpack_from(order + kind, data, at)[0]
        top = 256**size - 1
        new = rng.choice((0, 1, value - 1, value + 1, value * 2, len(data), top, top // 2 + 1))
        struct.pack_into(order + kind, data, at, min(new, top))


def chunks(data: bytes) -> list[tuple[int, int]]:
    """(start, stop) of the segments, chunks or boxes of formats that have them."""
    found: list[tuple[int, int]] = []
    at = {b"\xff\xd8": 2, b"\x89P": 8, b"RI": 12}.get(data[:2], 0)
    while at + 8 <= len(data):
        if data[:2] == b"\xff\xd8":
            size = 2 + int.from_bytes(data[at + 2 : at + 4])
        elif data[:2] == b"\x89P":
            size = 12 + int.from_bytes(data[at : at + 4])
        elif data[:2] == b"RI":
            size = 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            size += size % 2
        elif data[4:8] in (b"ftyp", b"jP  "):
            size = max(8, int.from_bytes(data[at : at + 4]))
        else:
            break
        found.append((at, min(at + size, len(data))))
        at += size
    return found


def move_chunk(data: bytearray, rng: random.Random) -> None:
    """Copy, remove or move a chunk."""
    parts = chunks(bytes(data))
    if not parts:
        return repeat(data, rng)
    start, stop = rng.choice(parts)
    chunk = data[start:stop]
    if rng.random() < 0.5:
        del data[start:stop]
    if rng.random() < 0.7:
        at, _ = rng.choice(parts)
        data[at:at] = chunk
    return None


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip_bits, set_bytes, truncate, remove, splice, repeat, edit_length, move_chunk),
)


def with_checksums(data: bytearray) -> None:
    """Correct the checksums of a PNG; with wrong ones, Pillow would not decode the chunks."""
    for start, stop in chunks(bytes(data)):
        if stop - start >= 12:
            data[stop - 4 : stop] = struct.pack(">I", zlib.crc32(data[start + 4 : stop - 4]))


def mutant(seed: int, number: int) -> bytes:
    """A damaged file; the same for equal arguments and encoders."""
    rng = random.Random(f"{seed} {number}")
    data = bytearray(rng.choice(samples()))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(data) > 1:
            rng.choice(MUTATIONS)(data, rng)
    if data[:2] == b"\x89P" and rng.random() < 0.7:
        with_checksums(data)
    return bytes(data)


def outcome(decoder: Decoder, data: bytes) -> str:
    """`pixels` if the file decodes, else the reason for its rejection."""
    try:
        pixels = decoder.decode(data, SPEC)
    except CoverError as error:
        assert error.reason in REASONS
        assert "\n" not in error.detail
        reason = error.reason
    else:
        assert pixels.shape == (SPEC.side, SPEC.side, 3)
        assert pixels.dtype == np.uint8
        reason = "pixels"
    try:  # the bytes that prepare stores decode, too
        reencoded = decoder.validate_and_reencode(data, 32)
    except CoverError as error:
        assert error.reason in REASONS
    else:
        assert decoder.decode(reencoded, SPEC).shape == (SPEC.side, SPEC.side, 3)
    return reason


def fuzz(count: int) -> Counter[str]:
    """Number of mutants with each outcome."""
    seen: Counter[str] = Counter()
    with contextlib.closing(Decoder(seconds=SECONDS)) as decoder:
        for number in range(count):
            data = mutant(SEED, number)
            try:
                seen[outcome(decoder, data)] += 1
            except Exception as error:
                raise AssertionError(
                    f"mutant({SEED}, {number}): {data[:16].hex(' ')}..."
                ) from error
    assert seen.total() == count
    # Not all were rejected by their header, nor were all unaffected: the decoders were reached.
    assert min(seen["pixels"], seen["truncated_image"]) > count / 10
    print(dict(seen.most_common()))
    return seen


def test_samples_decode() -> None:
    with contextlib.closing(Decoder(seconds=SECONDS)) as decoder:
        assert {outcome(decoder, data) for data in samples()} == {"pixels"}


def test_mutants_are_reproducible() -> None:
    made = [mutant(SEED, number) for number in range(50)]
    assert [mutant(SEED, number) for number in range(50)] == made
    assert [mutant(SEED + 1, number) for number in range(50)] != made
    assert len({*made, *samples()}) > 45 + len(samples())


def test_500_mutants() -> None:
    fuzz(500)


@pytest.mark.slow
def test_10_000_mutants() -> None:
    fuzz(10_000)
