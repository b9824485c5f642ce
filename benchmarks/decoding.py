"""Decoding of covers against plain Pillow, and the round trip to the decoder process.

    uv run python -m benchmarks.decoding

Plain Pillow decodes at full size, converts to RGB and resizes. Times are CPU times, except those of
the round trip: how much longer `decoder_process.decode` takes than `image_decoding.decode`. Medians
of runs in alternating order, with the range of the ratios of single runs.
"""

import argparse
import io
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from PIL import Image

from benchmarks import run_benchmark
from covergenre.data import decoder_process, image_decoding
from covergenre.data.image_decoding import Preprocessing

SPEC = Preprocessing()
HEADER = (
    "| cover | plain Pillow, ms | of it loading | ours, ms | faster | round trip, ms (median) |"
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    print(HEADER, "|---|---|---|---|---|---|", sep="\n")
    for name, data in covers().items():
        print(row(name, data, args.runs if "3000" in name else 10 * args.runs))


def covers() -> dict[str, bytes]:
    """Name -> an encoded cover: smooth areas with the noise of a scan."""
    large, small, alpha = _image(3000), _image(600), _image(3000)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return {
        "JPEG 3000x3000": _encoded(large, "JPEG", quality=92),
        "JPEG 3000x3000, progressive": _encoded(large, "JPEG", quality=92, progressive=True),
        "PNG 3000x3000": _encoded(large, "PNG"),
        "PNG 3000x3000 with alpha": _encoded(alpha, "PNG"),
        "WebP 3000x3000": _encoded(large, "WEBP", quality=90),
        "JPEG 600x600": _encoded(small, "JPEG", quality=92),
    }


def _image(side: int) -> Image.Image:
    random = np.random.default_rng(0)
    blocks = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
    smooth = np.asarray(blocks.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + random.normal(0, 6, (side, side, 1)).astype(np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def row(name: str, data: bytes, runs: int) -> str:
    """A row of the table."""

    def load() -> None:
        Image.open(io.BytesIO(data)).load()

    def plain() -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        np.asarray(image.resize((SPEC.side, SPEC.side), Image.Resampling.BILINEAR))

    def ours() -> None:
        image_decoding.decode(data, SPEC)

    def in_process() -> None:
        decoder_process.decode(data, SPEC)

    cpu = _times((load, plain, ours), time.process_time, runs)
    wall = _times((ours, in_process), time.perf_counter, runs)
    ratios = [a / b for a, b in zip(cpu[plain], cpu[ours], strict=True)]
    trips = [b - a for a, b in zip(wall[ours], wall[in_process], strict=True)]
    return (
        f"| {name}, {len(data) / 1e6:.1f} MB | {median(cpu[plain]):.1f} |"
        f" {median(cpu[load]) / median(cpu[plain]):.0%} | {median(cpu[ours]):.1f} |"
        f" {median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}) |"
        f" {median(trips):.2f} |"
    )


def _times(
    functions: tuple[Callable[[], None], ...], clock: Callable[[], float], runs: int
) -> dict[Callable[[], None], list[float]]:
    """Function -> milliseconds of its runs; the first of each warms up."""
    found: dict[Callable[[], None], list[float]] = {function: [] for function in functions}
    for _ in range(runs + 1):
        for function in functions:
            began = clock()
            function()
            found[function].append(1000 * (clock() - began))
    return {function: times[1:] for function, times in found.items()}


if __name__ == "__main__":
    run_benchmark(main)
