"""Draws synthetic covers: each genre has palettes and motifs."""

import colorsys
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, ImageStat

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
class Album:
    """One album of the catalog, and how it is to look."""

    album_id: str
    genres: tuple[str, ...]
    title: str
    artist: str
    palette: str
    """The genre whose colours the cover has."""
    motif: str
    """The genre whose shapes the cover has."""
    variant: int
    """Which of the motif's three forms: 0, 1 or 2."""
    hue: float
    """Shift of the hue of all colours, in full turns; characteristic of the artist."""


@dataclass(frozen=True)
class Palette:
    """Colours of one cover."""

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


def film_grain(side: int) -> NDArray[np.float32]:
    """Film grain, [2 * side, 2 * side, 1], standard deviation 1; each cover uses a crop of it."""
    noise = np.random.default_rng(0).standard_normal((2 * side, 2 * side, 1))
    return noise.astype(np.float32)


def draw_cover(album: Album, rnd: Random, side: int, grain: NDArray[np.float32]) -> Image.Image:
    """The album's cover, RGB, `side` pixels a side."""
    size = (
        2 * side
    )  # drawn at twice the size and downscaled, because Pillow does not antialias shapes
    palette = _palette(album.palette, album.hue, rnd)
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


def _palette(genre: str, hue: float, rnd: Random) -> Palette:
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


def _mix(a: Color, b: Color, share: float) -> Color:
    """`share` of b in a."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _light(color: Color) -> float:
    """Luminance, 0 to 255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _by_light(palette: Palette) -> list[Color]:
    """All colours of a palette, darkest first."""
    return sorted({palette.ground, *palette.accents, palette.ink}, key=_light)


def _wave(y: float, height: float, rnd: Random, steps: int = 40) -> list[Point]:
    """A wavy line from the left to the right edge, around `y`."""
    turns, start = rnd.uniform(0.6, 2.2), rnd.random()
    bend = rnd.uniform(-0.5, 0.5)
    return [
        (
            i / steps,
            y
            + height * math.sin(math.tau * (turns * i / steps + start))
            + height * bend * math.sin(math.tau * 2.7 * i / steps),
        )
        for i in range(steps + 1)
    ]


def _fade(sheet: Sheet, top: Color, bottom: Color) -> None:
    """Fill with a vertical gradient from `top` to `bottom`."""
    sheet.blend(np.array([[_mix(top, bottom, i / 7)] for i in range(8)], dtype=np.uint8))


def _mist(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Ambient: soft clouds of colour; plain, with a pale sun, or over hills in fog."""
    colors = (palette.ground, palette.ground, *palette.accents)
    rows, columns = rnd.randint(3, 6), rnd.randint(2, 4)
    clouds = [
        [_mix(palette.ground, rnd.choice(colors), rnd.uniform(0.2, 0.9)) for _ in range(columns)]
        for _ in range(rows)
    ]
    sheet.blend(np.array(clouds, dtype=np.uint8))
    pale = _by_light(palette)[-1]
    if variant == 1:
        x, y, r = rnd.uniform(0.25, 0.75), rnd.uniform(0.25, 0.6), rnd.uniform(0.08, 0.26)
        sheet.glow(x, y, r * 2.6, pale)
        sheet.disc(x, y, r, _mix(palette.ground, pale, 0.75))
    elif variant == 2:
        layers = rnd.randint(3, 5)
        far, near = _mix(palette.ground, pale, 0.4), _mix(palette.ground, palette.ink, 0.7)
        for i in range(layers):
            ridge = _wave(0.5 + 0.45 * i / layers, rnd.uniform(0.02, 0.06), rnd)
            sheet.polygon([*ridge, (1, 1), (0, 1)], _mix(far, near, i / layers))


def _strings(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Blues: strings from top to bottom; over a sound hole, frets, or a moon."""
    first, second, third = palette.accents
    _fade(sheet, palette.ground, _mix(palette.ground, first, rnd.uniform(0.3, 0.8)))
    x = rnd.uniform(0.35, 0.65)
    if variant == 0:
        y, r = rnd.uniform(0.4, 0.65), rnd.uniform(0.2, 0.3)
        sheet.disc(x, y, r * 1.18, second)
        sheet.ring(x, y, r * 1.1, 0.012, third)
        sheet.disc(x, y, r, _mix(palette.ground, (0, 0, 0), 0.55))
    elif variant == 1:
        width = rnd.uniform(0.2, 0.28)
        sheet.rect(x - width, 0, x + width, 1, _mix(palette.ground, second, 0.5))
        y = rnd.uniform(0.02, 0.12)
        for i in range(8):
            sheet.rect(x - width, y, x + width, y + 0.01, third)
            if i % 2:
                sheet.disc(x, y + 0.07, 0.022, palette.ink)
            y += 0.19 * 0.93**i
    else:
        moon = rnd.uniform(0.12, 0.2)
        sheet.disc(x, rnd.uniform(0.2, 0.4), moon, _mix(third, palette.ink, 0.3))
        sheet.polygon([*_wave(0.8, 0.04, rnd), (1, 1), (0, 1)], _mix(second, (0, 0, 0), 0.5))
    strings, gap = rnd.choice((4, 5, 6, 6)), rnd.uniform(0.05, 0.075)
    plucked, swing = rnd.randrange(strings), rnd.uniform(0.008, 0.022)
    for i in range(strings):
        left = x + (i - (strings - 1) / 2) * gap
        sway = swing if i == plucked else 0
        points = [(left + sway * math.sin(math.tau * 2 * j / 40), j / 40) for j in range(41)]
        sheet.line(points, 0.004 + 0.0016 * i, _mix(palette.ink, third, 0.25))


def _cameo(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Classical: an oval in a double frame; with a staff, a twig, or an arch."""
    first, second, third = palette.accents
    margin = rnd.uniform(0.02, 0.045)
    sheet.frame(margin, rnd.uniform(0.006, 0.02), first)
    sheet.frame(margin + 0.03, 0.004, second)
    y, rx = rnd.uniform(0.4, 0.43), rnd.uniform(0.2, 0.26)
    ry = rx * rnd.uniform(1.0, 1.2)
    sheet.disc(0.5, y, rx, first, ry)
    sheet.ring(0.5, y, rx + 0.02, 0.006, second, ry + 0.02)
    inner = _mix(third, palette.ground, 0.3)
    if variant == 0:
        for i in range(5):
            line = y + 0.035 * (i - 2)
            sheet.rect(0.5 - rx * 0.85, line, 0.5 + rx * 0.85, line + 0.003, inner)
        for i in range(rnd.randint(3, 5)):
            x, note = 0.5 - rx * 0.65 + rx * 0.33 * i, y + 0.0175 * rnd.randint(-4, 4)
            sheet.disc(x, note, 0.02, inner, 0.014)
            sheet.rect(x + 0.014, note - 0.11, x + 0.019, note, inner)
    elif variant == 1:
        sheet.rect(0.495, y - ry * 0.6, 0.505, y + ry * 0.7, inner)
        for i in range(-4, 5):
            lean, leaf = 0.075 * (1 if i % 2 else -1), y + ry * 0.13 * i
            tip = (0.5 + lean * rnd.uniform(1.2, 1.9), leaf - 0.07)
            sheet.polygon([(0.5, leaf), (0.5 + lean, leaf), tip, (0.5, leaf - 0.04)], inner)
    else:
        sheet.disc(0.5, y, rx * 0.6, inner, ry * 0.62)
        sheet.rect(0.5 - rx * 0.6, y, 0.5 + rx * 0.6, y + ry * 0.62, inner)
        for i in range(4):
            x = 0.5 + rx * (0.3 * i - 0.5)
            sheet.rect(x, y - ry * 0.15, x + rx * 0.1, y + ry * 0.62, first)
    sheet.rect(0.3, 0.765, 0.7, 0.769, second)


def _horizon(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Country: a low sun over bands of land; with furrows, a fence, or far mountains."""
    first, second, third = palette.accents
    shades = _by_light(palette)
    line = rnd.uniform(0.5, 0.68)
    sky, bands = shades[-2], rnd.randint(4, 7)
    for i in range(bands):
        warm = _mix(palette.ground, sky, i / bands)
        sheet.rect(0, line * i / bands, 1, line * (i + 1) / bands, warm)
    x, r = rnd.uniform(0.25, 0.75), rnd.uniform(0.12, 0.24)
    sheet.disc(x, line - rnd.uniform(-0.3, 0.7) * r, r, _mix(shades[-1], second, 0.35))
    if variant == 2:
        peaks = [(i / 6, line - rnd.uniform(0.03, 0.22)) for i in range(7)]
        sheet.polygon([*peaks, (1, line), (0, line)], _mix(first, palette.ink, 0.3))
    for i, color in enumerate((first, third, _mix(second, palette.ink, 0.45))):
        hill = _wave(line + (1 - line) * (0.06 + 0.3 * i), 0.022, rnd)
        sheet.polygon([*hill, (1, 1), (0, 1)], color)
    dark = shades[0]
    if variant == 0:
        for i in range(-6, 7):
            foot = (x + 0.22 * i, 1.0)
            sheet.line([(x + 0.025 * i, line + 0.12), foot], 0.008, _mix(dark, third, 0.3))
    elif variant == 1:
        top = rnd.uniform(0.72, 0.78)
        for rail in (0.04, 0.11):
            sheet.line([(0, top + rail), (1, top + rail - 0.02)], 0.012, dark)
        for i in range(6):
            post = 0.06 + 0.18 * i
            sheet.rect(post, top, post + 0.022, 0.93, dark)


def _circuit(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Electronic: glowing rings, a grid running to the horizon, or bars of sound."""
    first, second, third = palette.accents
    if variant == 0:
        x, y = rnd.uniform(0.3, 0.7), rnd.uniform(0.3, 0.7)
        rings, reach = rnd.randint(7, 13), rnd.uniform(0.45, 0.8)
        for i in range(rings, 0, -1):
            color = _mix(first, second, i / rings) if i % 3 else third
            sheet.ring(x, y, reach * i / rings, rnd.uniform(0.006, 0.022), color)
        sheet.disc(x, y, reach / rings * 0.5, third)
    elif variant == 1:
        line, x = rnd.uniform(0.48, 0.62), rnd.uniform(0.35, 0.65)
        _fade(sheet, palette.ground, _mix(palette.ground, third, 0.55))
        r = rnd.uniform(0.18, 0.28)
        sheet.disc(x, line - r * 0.5, r, second)
        for i in range(4):
            cut = line - r * (0.1 + 0.3 * i)
            sheet.rect(x - r, cut, x + r, cut - 0.03 + 0.006 * i, _mix(palette.ground, third, 0.3))
        sheet.rect(0, line, 1, 1, palette.ground)
        for i in range(9):
            depth = line + (1 - line) * (i / 8) ** 1.8
            sheet.line([(0, depth), (1, depth)], 0.006, first)
        for i in range(-9, 10):
            sheet.line([(x + 0.05 * i, line), (x + 0.3 * i, 1)], 0.006, first)
    else:
        bars, rows = rnd.randint(10, 18), 14
        phase, speed = rnd.random(), rnd.uniform(0.5, 2.0)
        for i in range(bars):
            loud = 0.55 + 0.35 * math.sin(math.tau * (speed * i / bars + phase))
            height = round(rows * min(1.0, max(0.1, loud + rnd.uniform(-0.15, 0.15))))
            for row in range(height):
                color = _mix(first, second, row / rows) if row < height - 1 else third
                left, top = 0.06 + 0.88 * i / bars, 0.86 - 0.055 * row
                sheet.rect(left, top, left + 0.62 / bars, top + 0.034, color)


def _blocks(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Jazz: flat paper cuts; columns of rectangles, slanted bars, or quarter discs on a grid."""
    colors = (*palette.accents, palette.accents[0], palette.ink)
    top = rnd.choice((0.0, 0.2, 0.26))  # room for the words
    if variant == 0:
        x = 0.0
        while x < 1:
            width, y = rnd.uniform(0.07, 0.24), top
            while y < 1:
                height = rnd.uniform(0.12, 0.5)
                if rnd.random() < 0.72:
                    sheet.rect(x, y, x + width - 0.012, y + height - 0.012, rnd.choice(colors))
                y += height
            x += width
    elif variant == 1:
        bars, lean = rnd.randint(5, 9), rnd.uniform(-0.35, 0.35)
        for i in range(bars):
            x, width = (i + 0.1) / bars, rnd.uniform(0.35, 0.8) / bars
            start = top + rnd.uniform(0, 0.3)
            corners = [(x, start), (x + width, start + rnd.uniform(-0.08, 0.08))]
            sheet.polygon([*corners, (x + width + lean, 1), (x + lean, 1)], rnd.choice(colors))
        sheet.disc(rnd.uniform(0.2, 0.8), rnd.uniform(0.4, 0.8), 0.1, palette.accents[0])
    else:
        cells = rnd.choice((3, 4))
        step = (1 - top) / cells if top else 1 / cells
        for row in range(cells):
            for column in range(math.ceil(1 / step)):
                x, y = column * step, top + row * step
                sheet.rect(x, y, x + step, y + step, rnd.choice((palette.ground, *colors)))
                quarter = rnd.randrange(4)
                corner = (x + step * (quarter in (1, 2)), y + step * (quarter in (2, 3)))
                color = rnd.choice((palette.ground, *colors))
                sheet.slice(*corner, step, 90 * quarter, 90 * quarter + 90, color)


def _shards(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Metal: a burst of spikes, teeth from above and below, or cracks of lightning."""
    first, second, third = palette.accents
    if variant == 0:
        x, y = rnd.uniform(0.42, 0.58), rnd.uniform(0.48, 0.6)
        spikes = rnd.randint(11, 19)
        for reach, color in ((0.75, second), (0.5, first), (0.3, third)):
            points = []
            for i in range(2 * spikes):
                far = reach * rnd.uniform(0.6, 1.1) if i % 2 else reach * rnd.uniform(0.22, 0.34)
                angle = math.tau * (i + rnd.uniform(-0.3, 0.3)) / (2 * spikes)
                points.append((x + far * math.cos(angle), y + far * math.sin(angle)))
            sheet.polygon(points, color)
        sheet.polygon([(x, y - 0.14), (x + 0.09, y), (x, y + 0.2), (x - 0.09, y)], palette.ground)
    elif variant == 1:
        _fade(sheet, palette.ground, _mix(palette.ground, first, 0.8))
        for depth, color in ((0.6, second), (0.42, third), (0.26, palette.ground)):
            for edge, way in ((1.0, -1), (0.0, 1)):
                teeth, points = rnd.randint(6, 11), [(0.0, edge)]
                for i in range(teeth):
                    tip = edge + way * depth * rnd.uniform(0.45, 1.0) * (0.7 if way > 0 else 1)
                    points.append(((i + rnd.uniform(0.3, 0.7)) / teeth, tip))
                    root = edge + way * depth * rnd.uniform(0.1, 0.3)
                    points.append(((i + 1) / teeth, root))
                sheet.polygon([*points, (1.0, edge)], color)
    else:
        _fade(sheet, _mix(palette.ground, second, 0.6), palette.ground)
        for color in (first, first, third, palette.ink):
            x, y = rnd.uniform(0.2, 0.8), -0.02
            width, left, right = rnd.uniform(0.02, 0.07), [], []
            while y < 1.0:
                left.append((x - width, y))
                right.append((x + width, y + 0.03))
                x += rnd.uniform(-0.17, 0.17)
                y += rnd.uniform(0.07, 0.17)
                width *= 0.82
            sheet.polygon([*left, (x, y), *reversed(right)], color)


def _confetti(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Pop: rows of dots, a burst of stripes, or a big heart, flower or ball on slanted stripes."""
    first, second, third = palette.accents
    if variant == 0:
        across, start = rnd.randint(5, 9), rnd.random()
        for row in range(across + 1):
            for column in range(across + 1):
                x, y = (column + (row % 2) / 2) / across, (row + 0.5) / across
                swell = 0.32 + 0.13 * math.sin(math.tau * (x * 0.8 + y * 0.5 + start))
                color = (first, second, third, palette.ink)[(row + 2 * column) % 4]
                sheet.disc(x, y, swell / across, color)
    elif variant == 1:
        x, y, rays = rnd.uniform(0.3, 0.7), rnd.uniform(0.35, 0.7), rnd.randint(9, 14)
        start = rnd.uniform(0, 90)
        for i in range(rays):
            angle = start + 360 * i / rays
            color = first if i % 2 else second
            sheet.slice(x, y, 1.5, angle, angle + 190 / rays, color)
        sheet.disc(x, y, 0.2, third)
        sheet.ring(x, y, 0.23, 0.012, third)
    else:
        step, lean = rnd.uniform(0.09, 0.16), rnd.choice((-0.5, 0.5, 1.0))
        for i in range(-12, 13):
            x = 0.5 + 2 * step * i
            stripe = [(x, 0.0), (x + step, 0.0), (x + step + lean, 1.0), (x + lean, 1.0)]
            sheet.polygon(stripe, _mix(palette.ground, first, 0.55))
        shape, tilt = rnd.choice(("heart", "flower", "ball")), rnd.uniform(-0.35, 0.35)
        x, y, r = rnd.uniform(0.36, 0.64), rnd.uniform(0.38, 0.48), rnd.uniform(0.2, 0.34)
        for scale, color in ((1.18, palette.ink), (1.0, second), (0.5, third)):
            sheet.polygon(_shape(shape, x, y, r * scale, tilt), color)


def _shape(shape: str, x: float, y: float, r: float, tilt: float) -> list[Point]:
    """Outline of a heart, flower or ball about (x, y), turned by `tilt` radians."""
    points = []
    for i in range(60):
        t = math.tau * i / 60
        if shape == "heart":
            across = math.sin(t) ** 3
            up = 0.81 * math.cos(t) - 0.31 * math.cos(2 * t) - 0.12 * math.cos(3 * t)
        else:
            # A flower's edge runs out and in five times a turn.
            far = 1.0 if shape == "ball" else 0.5 + 0.5 * abs(i % 12 - 6) / 6
            across, up = far * math.sin(t), far * math.cos(t)
        turned = across * math.cos(tilt) + up * math.sin(tilt)
        points.append((x + r * turned, y + r * (across * math.sin(tilt) - up * math.cos(tilt))))
    return points


MOTIFS: dict[str, Callable[[Sheet, Palette, Random, int], None]] = {
    "Ambient": _mist,
    "Blues": _strings,
    "Classical": _cameo,
    "Country": _horizon,
    "Electronic": _circuit,
    "Jazz": _blocks,
    "Metal": _shards,
    "Pop": _confetti,
}


@dataclass(frozen=True)
class Words:
    """Typography of title and artist for a motif."""

    y: float
    """Middle of the title."""
    size: float
    """Height of the title's letters; the artist's are smaller."""
    anchor: str
    """l, m or r: flush left, centred or flush right."""
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
    """Draw the title, and the artist below it, in a legible colour."""
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
    red, green, blue = behind.mean
    backdrop = 0.299 * red + 0.587 * green + 0.114 * blue
    if max(behind.stddev) > 38:  # too busy to read: draw a strip under the text
        strip = rnd.choice((palette.ground, palette.ink))
        sheet.draw.rectangle(box, fill=strip)
        backdrop = _light(strip)
    color = max(_by_light(palette), key=lambda shade: abs(_light(shade) - backdrop))
    for y, text, font in lines:
        sheet.draw.text((x, y), text, fill=color, font=font, anchor=anchor)


@functools.cache
def _spot() -> Image.Image:
    """A round mask, 255 in the middle, 0 at the edge."""
    return Image.radial_gradient("L").point([max(0, 200 - 2 * far) for far in range(256)])


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # comes with Pillow: the same letters on every machine
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow has no FreeType"
    return font
