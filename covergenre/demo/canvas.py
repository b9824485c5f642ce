"""The canvas and the colors of synthetic covers."""

import colorsys
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]

# Each palette: background, three accents, ink.
PALETTES: dict[str, tuple[str, ...]] = {
    "Ambient": (
        "#c9d6df #8fb3c4 #e8d5cf #f4efe6 #44596b",
        "#b8b5d6 #e6c7d3 #8aa0c8 #f3ead9 #3f3d63",
        "#a9c5b8 #dfe7d2 #7da3a1 #f1e3c8 #2f4f4f",
        "#3b5268 #7d93a6 #b6a7b8 #e3d3c4 #eef2f3",
    ),
    "Blues": (
        "#14244a #2c4f8f #6f93c8 #d39b45 #e9e3d0",
        "#0d1b2f #1f4768 #4b7ea3 #c4693a #dfe6ea",
        "#1d2f6f #3f5fb5 #92a9dd #efc35a #f5efe0",
    ),
    "Classical": (
        "#efe4cb #8c2f2b #c2a05a #d8c59c #2d2018",
        "#f3ecdc #2f4a3a #b8924a #cdbf9d #1f1c18",
        "#e6dac3 #34425f #b58c52 #f6efe0 #241d1a",
        "#3a2a22 #8f6b3c #d9bd84 #6e2c25 #f0e4c8",
    ),
    "Country": (
        "#e8b878 #b5532a #6f7f4b #f4d9a4 #4a2b1b",
        "#9fb6c0 #d98a3d #8a5a3c #ecd6a8 #37281f",
        "#d9743f #8e3b25 #f0c069 #5c6b48 #2e1c15",
    ),
    "Electronic": (
        "#0b0a1e #00d8e6 #f033b8 #6a35ff #e8f9ff",
        "#05161a #18f0a0 #0f8bff #d8ff3e #eafff6",
        "#1a0933 #ff4f6d #ffb03a #8a3cff #fff0fa",
        "#101418 #f2f4f5 #2f7bff #ff5a1f #ffffff",
    ),
    "Jazz": (
        "#efe7d4 #0f6f7c #e08a2c #b8372c #16181c",
        "#1f6f8b #f2c14e #e4572e #f3ead7 #0f1a20",
        "#d8a73a #1c3d5a #a63d2f #f2e6c9 #17130f",
        "#17202a #d96c2c #3a8c94 #efe3c6 #f6efdf",
    ),
    "Metal": (
        "#0d0c0d #7d1215 #3a3a3d #c9c4ba #e6e1d6",
        "#16181b #4d545c #a63a12 #1f2d33 #d8d8d4",
        "#1a0a0a #b31217 #5a1113 #e0c9a8 #efe6da",
        "#d6d3cb #17171a #6f1417 #55565a #0c0c0d",
    ),
    "Pop": (
        "#ff8fb8 #ffd84d #3cc7d6 #ffffff #d81b72",
        "#ffe14d #ff5a8a #5a6bff #ffffff #2a1f5c",
        "#66dcd0 #ff7a59 #fff3b8 #c65bdb #27306b",
        "#f7f2ff #ff4f7b #ffb52e #46b8ff #3a1d5e",
        "#ff6f52 #ffe9c9 #ff3f8f #4dd0b5 #5b1049",
    ),
}


@dataclass(frozen=True)
class Palette:
    """Colors of one cover."""

    ground: Color
    accents: tuple[Color, Color, Color]
    ink: Color


@dataclass(frozen=True)
class Sheet:
    """A square canvas with coordinates from (0, 0), top left, to (1, 1), bottom right."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    size: int
    """Side in pixels."""

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        s = self.size
        left, right = sorted((x0 * s, x1 * s))
        top, bottom = sorted((y0 * s, y1 * s))
        self.draw.rectangle((left, top, right, bottom), fill=color)

    def frame(self, margin: float, width: float, color: Color) -> None:
        low, high = margin * self.size, (1 - margin) * self.size
        self.draw.rectangle((low, low, high, high), outline=color, width=self._pixels(width))

    def disc(self, x: float, y: float, rx: float, color: Color, ry: float | None = None) -> None:
        self.draw.ellipse(self._box(x, y, rx, rx if ry is None else ry), fill=color)

    def ring(
        self, x: float, y: float, rx: float, width: float, color: Color, ry: float | None = None
    ) -> None:
        box = self._box(x, y, rx, rx if ry is None else ry)
        self.draw.ellipse(box, outline=color, width=self._pixels(width))

    def slice(self, x: float, y: float, r: float, start: float, end: float, color: Color) -> None:
        """A slice of a disc; angles in degrees, clockwise from three o'clock."""
        self.draw.pieslice(self._box(x, y, r, r), start, end, fill=color)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        scaled = [(x * self.size, y * self.size) for x, y in points]
        self.draw.line(scaled, fill=color, width=self._pixels(width))

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        self.draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=color)

    def blend(self, colors: NDArray[np.uint8]) -> None:
        """Fill with `colors`, [rows, columns, RGB], interpolated smoothly."""
        smooth = Image.fromarray(colors).resize((self.size, self.size), Image.Resampling.BICUBIC)
        self.image.paste(smooth)

    def glow(self, x: float, y: float, r: float, color: Color) -> None:
        """A spot of light that fades out towards radius `r`."""
        left, top, right, bottom = (round(edge) for edge in self._box(x, y, r, r))
        mask = _spot().resize((right - left, bottom - top))
        self.image.paste(color, (left, top), mask)

    def _box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        s = self.size
        return ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)

    def _pixels(self, width: float) -> int:
        return max(1, round(width * self.size))


def random_palette(genre: str, hue: float, rnd: Random) -> Palette:
    """One of the palettes of the genre, with small random changes."""
    turn = hue + rnd.gauss(0, 0.025)
    strength, light = rnd.uniform(0.7, 1.15), rnd.uniform(0.85, 1.1)

    def jitter(code: str) -> Color:
        red, green, blue = ImageColor.getrgb(code)[:3]
        h, s, v = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        shifted = colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * strength), min(1, v * light))
        r, g, b = (round(255 * channel) for channel in shifted)
        return r, g, b

    ground, first, second, third, ink = map(jitter, rnd.choice(PALETTES[genre]).split())
    accents = [first, second, third]
    rnd.shuffle(accents)
    return Palette(ground, (accents[0], accents[1], accents[2]), ink)


def mix(a: Color, b: Color, share: float) -> Color:
    """`share` of b in a."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def luminance(color: Sequence[float]) -> float:
    """Luminance of an RGB color, 0 to 255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def darkest_first(palette: Palette) -> list[Color]:
    """All colors of a palette, darkest first."""
    return sorted({palette.ground, *palette.accents, palette.ink}, key=luminance)


@functools.cache
def _spot() -> Image.Image:
    """A round mask, 255 in the middle, 0 at the edge."""
    return Image.radial_gradient("L").point([max(0, 200 - 2 * far) for far in range(256)])
