"""Draws the motifs of synthetic covers: the shapes of each genre, in three variants."""

import math
from collections.abc import Callable
from random import Random

import numpy as np

from covergenre.demo.canvas import Color, Palette, Point, Sheet, darkest_first, mix


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
    sheet.blend(np.array([[mix(top, bottom, i / 7)] for i in range(8)], dtype=np.uint8))


def _mist(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Ambient: soft clouds of color; plain, with a pale sun, or over hills in fog."""
    colors = (palette.ground, palette.ground, *palette.accents)
    rows, columns = rnd.randint(3, 6), rnd.randint(2, 4)
    clouds = [
        [mix(palette.ground, rnd.choice(colors), rnd.uniform(0.2, 0.9)) for _ in range(columns)]
        for _ in range(rows)
    ]
    sheet.blend(np.array(clouds, dtype=np.uint8))
    pale = darkest_first(palette)[-1]
    if variant == 1:
        x, y, r = rnd.uniform(0.25, 0.75), rnd.uniform(0.25, 0.6), rnd.uniform(0.08, 0.26)
        sheet.glow(x, y, r * 2.6, pale)
        sheet.disc(x, y, r, mix(palette.ground, pale, 0.75))
    elif variant == 2:
        layers = rnd.randint(3, 5)
        far, near = mix(palette.ground, pale, 0.4), mix(palette.ground, palette.ink, 0.7)
        for i in range(layers):
            ridge = _wave(0.5 + 0.45 * i / layers, rnd.uniform(0.02, 0.06), rnd)
            sheet.polygon([*ridge, (1, 1), (0, 1)], mix(far, near, i / layers))


def _strings(sheet: Sheet, palette: Palette, rnd: Random, variant: int) -> None:
    """Blues: strings from top to bottom; over a sound hole, frets, or a moon."""
    first, second, third = palette.accents
    _fade(sheet, palette.ground, mix(palette.ground, first, rnd.uniform(0.3, 0.8)))
    x = rnd.uniform(0.35, 0.65)
    if variant == 0:
        y, r = rnd.uniform(0.4, 0.65), rnd.uniform(0.2, 0.3)
        sheet.disc(x, y, r * 1.18, second)
        sheet.ring(x, y, r * 1.1, 0.012, third)
        sheet.disc(x, y, r, mix(palette.ground, (0, 0, 0), 0.55))
    elif variant == 1:
        width = rnd.uniform(0.2, 0.28)
        sheet.rect(x - width, 0, x + width, 1, mix(palette.ground, second, 0.5))
        y = rnd.uniform(0.02, 0.12)
        for i in range(8):
            sheet.rect(x - width, y, x + width, y + 0.01, third)
            if i % 2:
                sheet.disc(x, y + 0.07, 0.022, palette.ink)
            y += 0.19 * 0.93**i
    else:
        moon = rnd.uniform(0.12, 0.2)
        sheet.disc(x, rnd.uniform(0.2, 0.4), moon, mix(third, palette.ink, 0.3))
        sheet.polygon([*_wave(0.8, 0.04, rnd), (1, 1), (0, 1)], mix(second, (0, 0, 0), 0.5))
    strings, gap = rnd.choice((4, 5, 6, 6)), rnd.uniform(0.05, 0.075)
    plucked, swing = rnd.randrange(strings), rnd.uniform(0.008, 0.022)
    for i in range(strings):
        left = x + (i - (strings - 1) / 2) * gap
        sway = swing if i == plucked else 0
        points = [(left + sway * math.sin(math.tau * 2 * j / 40), j / 40) for j in range(41)]
        sheet.line(points, 0.004 + 0.0016 * i, mix(palette.ink, third, 0.25))


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
    inner = mix(third, palette.ground, 0.3)
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
    shades = darkest_first(palette)
    line = rnd.uniform(0.5, 0.68)
    sky, bands = shades[-2], rnd.randint(4, 7)
    for i in range(bands):
        warm = mix(palette.ground, sky, i / bands)
        sheet.rect(0, line * i / bands, 1, line * (i + 1) / bands, warm)
    x, r = rnd.uniform(0.25, 0.75), rnd.uniform(0.12, 0.24)
    sheet.disc(x, line - rnd.uniform(-0.3, 0.7) * r, r, mix(shades[-1], second, 0.35))
    if variant == 2:
        peaks = [(i / 6, line - rnd.uniform(0.03, 0.22)) for i in range(7)]
        sheet.polygon([*peaks, (1, line), (0, line)], mix(first, palette.ink, 0.3))
    for i, color in enumerate((first, third, mix(second, palette.ink, 0.45))):
        hill = _wave(line + (1 - line) * (0.06 + 0.3 * i), 0.022, rnd)
        sheet.polygon([*hill, (1, 1), (0, 1)], color)
    dark = shades[0]
    if variant == 0:
        for i in range(-6, 7):
            foot = (x + 0.22 * i, 1.0)
            sheet.line([(x + 0.025 * i, line + 0.12), foot], 0.008, mix(dark, third, 0.3))
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
            color = mix(first, second, i / rings) if i % 3 else third
            sheet.ring(x, y, reach * i / rings, rnd.uniform(0.006, 0.022), color)
        sheet.disc(x, y, reach / rings * 0.5, third)
    elif variant == 1:
        line, x = rnd.uniform(0.48, 0.62), rnd.uniform(0.35, 0.65)
        _fade(sheet, palette.ground, mix(palette.ground, third, 0.55))
        r = rnd.uniform(0.18, 0.28)
        sheet.disc(x, line - r * 0.5, r, second)
        for i in range(4):
            cut = line - r * (0.1 + 0.3 * i)
            sheet.rect(x - r, cut, x + r, cut - 0.03 + 0.006 * i, mix(palette.ground, third, 0.3))
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
                color = mix(first, second, row / rows) if row < height - 1 else third
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
        _fade(sheet, palette.ground, mix(palette.ground, first, 0.8))
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
        _fade(sheet, mix(palette.ground, second, 0.6), palette.ground)
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
            sheet.polygon(stripe, mix(palette.ground, first, 0.55))
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
