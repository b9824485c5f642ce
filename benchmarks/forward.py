"""The forward pass on this machine's CPU: uint8 pixels in memory -> scores, by implementation.

    python -m benchmarks.forward --model mobilenet_v2

Prints a table in Markdown: covers per second, relative to a plain PyTorch script (eager, float32,
NCHW), by wall time and by CPU time. Rounds run all implementations in alternating order; figures
are medians of the ratios of the rounds, with the smallest and the largest. The weights are random,
which does not change the speed. "not measured": the CPU has no bf16 instructions, or the extra int8
is not installed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import run_benchmark
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import ModelError
from covergenre.models.bundle import Bundle
from covergenre.models.inference import InferenceModel, cpu_has_bf16, fold_batch_norm
from covergenre.models.int8 import Int8Model, quantize_network
from covergenre.models.networks import CoverModel, build_model
from covergenre.models.predictor import CPU_ROWS, normalise, to_device, to_unit
from covergenre.registry import MODELS

SPEC = Preprocessing()
GENRES = Genres(tuple("abcde"))
Pixels = NDArray[np.uint8]
Score = Callable[[Pixels], object]


@dataclass(frozen=True)
class Rate:
    """Covers per second of one implementation in one round."""

    wall: float
    cpu: float


def eager(network: CoverModel, *, channels_last: bool) -> Score:
    """As a plain script: whole batches, in the layout of the weights."""

    def score(pixels: Pixels) -> object:
        with torch.inference_mode():
            images = normalise(to_unit(pixels, "cpu"), SPEC)
            return network(images if channels_last else images.contiguous()).sigmoid()

    return score


def implementations(name: str, batch: int, pixels: Pixels) -> dict[str, Score | None]:
    """By name; None: cannot be measured here."""
    plain = build_model(name, len(GENRES), seed=0).eval()
    last = to_device(build_model(name, len(GENRES), seed=0).eval(), "cpu")
    folded = fold_batch_norm(last)
    fp32 = InferenceModel(last, SPEC, "cpu", "fp32")
    bf16 = InferenceModel(last, SPEC, "cpu", "bf16") if cpu_has_bf16() else None
    int8 = int8_model(name, last, pixels)
    return {
        "plain script: eager, NCHW": eager(plain, channels_last=False),
        "channels-last": eager(last, channels_last=True),
        "batch norm folded": eager(folded, channels_last=True),
        f"covergenre fp32: folded, {CPU_ROWS} rows": in_batches(fp32, batch),
        "covergenre bf16": in_batches(bf16, batch) if bf16 is not None else None,
        "covergenre int8": in_batches(int8, batch) if int8 is not None else None,
    }


def in_batches(model: InferenceModel | Int8Model, batch: int) -> Score:
    """As covergenre does."""
    return lambda pixels: model.scores(pixels, batch)


def int8_model(name: str, network: CoverModel, pixels: Pixels) -> Int8Model | None:
    """The quantized network; None if the extra is not installed."""
    try:
        files = quantize_network(network, SPEC, pixels[:CPU_ROWS])
    except ModelError:
        return None
    bundle = Bundle("", name, GENRES, SPEC, "int8", {}, weights_id="", decision_id="", files={})
    return Int8Model(bundle, *files.values())


def measure(score: Score, pixels: Pixels, seconds: float) -> Rate:
    """The rate over at least `seconds`."""
    done, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        score(pixels)
        done += len(pixels)
    return Rate(done / (time.perf_counter() - wall), done / (time.process_time() - cpu))


def ratios(rates: list[Rate], base: list[Rate], clock: str) -> str:
    """Median (smallest to largest) ratio of the rounds."""
    values = [getattr(a, clock) / getattr(b, clock) for a, b in zip(rates, base, strict=True)]
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = (args.batch, SPEC.side, SPEC.side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    every = implementations(args.model, args.batch, pixels)
    measured = {name: score for name, score in every.items() if score is not None}
    rates: dict[str, list[Rate]] = {name: [] for name in measured}
    for score in measured.values():
        score(pixels)
    for number in range(args.rounds):
        for name in list(measured)[:: -1 if number % 2 else 1]:
            rates[name].append(measure(measured[name], pixels, args.seconds))
    base = rates[next(iter(measured))]
    print(f"{args.model}, {args.threads} threads, batches of {args.batch}\n")
    print("| forward pass | covers/s | ratio, wall time | ratio, CPU time |\n|---|---|---|---|")
    for name in every:
        if name not in rates:
            print(f"| {name} | not measured | | |")
            continue
        median = np.median([rate.wall for rate in rates[name]])
        wall, cpu = (ratios(rates[name], base, clock) for clock in ("wall", "cpu"))
        print(f"| {name} | {median:.1f} | {wall} | {cpu} |")


if __name__ == "__main__":
    run_benchmark(main)
