"""Draws synthetic covers: each genre has palettes and a motif; most covers have a caption."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageStat

from covergenre.demo.canvas import Palette, Sheet, darkest_first, luminance, random_palette
from covergenre.demo.motifs import MOTIFS


@dataclass(frozen=True)
class Album:
    """An album of the catalog, and the style of its cover."""

    album_id: str
    genres: tuple[str, ...]
    title: str
    artist: str
    palette: str
    """The genre whose colors the cover has."""
    motif: str
    """The genre whose shapes the cover has."""
    variant: int
    """Which of the motif's three forms: 0, 1 or 2."""
    hue: float
    """Shift of the hue of all colors, in full turns; characteristic of the artist."""


def film_grain(side: int) -> NDArray[np.float32]:
    """Film grain, [2 * side, 2 * side, 1], standard deviation 1; each cover uses a crop of it."""
    noise = np.random.default_rng(0).standard_normal((2 * side, 2 * side, 1))
    return noise.astype(np.float32)


def draw_cover(album: Album, rnd: Random, side: int, grain: NDArray[np.float32]) -> Image.Image:
    """The album's cover, RGB, `side` pixels a side."""
    size = 2 * side  # downscaled at the end, because Pillow does not antialias shapes
    palette = random_palette(album.palette, album.hue, rnd)
    image = Image.new("RGB", (size, size), palette.ground)
    sheet = Sheet(image, ImageDraw.Draw(image), size)
    MOTIFS[album.motif](sheet, palette, rnd, album.variant)
    if rnd.random() < 0.5:
        image.paste(ImageOps.mirror(image))
    if rnd.random() < 0.85:
        _caption(sheet, palette, rnd, album)

    pixels = np.asarray(image.reduce(2), dtype=np.float32)
    contrast, light = rnd.uniform(0.82, 1.08), rnd.gauss(0, 9)
    x, y = rnd.randrange(side), rnd.randrange(side)
    noise = grain[y : y + side, x : x + side] * np.float32(rnd.uniform(1, 7))
    pixels = (pixels - 128) * np.float32(contrast) + np.float32(128 + light) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Words:
    """Typography of title and artist for a motif."""

    y: float
    """Middle of the title."""
    size: float
    """Height of the title's letters; the artist's are smaller."""
    anchor: str
    """l, m or r: flush left, centered or flush right."""
    case: Callable[[str], str] = str
    spaced: bool = False


WORDS = {
    "Ambient": Words(0.86, 0.055, "m", str.lower, spaced=True),
    "Blues": Words(0.1, 0.085, "l"),
    "Classical": Words(0.815, 0.062, "m"),
    "Country": Words(0.1, 0.085, "m"),
    "Electronic": Words(0.88, 0.055, "r", str.upper, spaced=True),
    "Jazz": Words(0.09, 0.1, "l", str.lower),
    "Metal": Words(0.11, 0.095, "m", str.upper),
    "Pop": Words(0.86, 0.1, "m", str.upper),
}


def _caption(sheet: Sheet, palette: Palette, rnd: Random, album: Album) -> None:
    """Draw the title, and the artist below it, in a legible color."""
    words = WORDS[album.motif]
    x = {"l": 0.07, "m": 0.5, "r": 0.93}[words.anchor] * sheet.size
    y = words.y * sheet.size
    anchor = words.anchor + "m"
    lines = []
    for text, height in ((album.title, words.size), (album.artist, max(0.042, words.size * 0.58))):
        cased = words.case(text)
        if words.spaced:
            cased = " ".join(cased)
        widest = 0.84 / (_font(100).getlength(cased) / 100)
        # Whole pixels, so that few font sizes are created.
        font = _font(max(6, int(sheet.size * min(height, widest))))
        lines.append((y, cased, font))
        y += words.size * sheet.size * 0.5 + 0.045 * sheet.size
    boxes = [sheet.draw.textbbox((x, y), text, font=font, anchor=anchor) for y, text, font in lines]
    left, top, right, bottom = zip(*boxes, strict=True)
    pad = 0.02 * sheet.size
    box = (int(min(left) - pad), int(min(top) - pad), int(max(right) + pad), int(max(bottom) + pad))
    behind = ImageStat.Stat(sheet.image.crop(box))
    backdrop = luminance(behind.mean)
    if max(behind.stddev) > 38:  # too busy to read: draw a strip under the text
        strip = rnd.choice((palette.ground, palette.ink))
        sheet.draw.rectangle(box, fill=strip)
        backdrop = luminance(strip)
    color = max(darkest_first(palette), key=lambda shade: abs(luminance(shade) - backdrop))
    for y, text, font in lines:
        sheet.draw.text((x, y), text, fill=color, font=font, anchor=anchor)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # comes with Pillow: the same letters on every machine
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow has no FreeType"
    return font
