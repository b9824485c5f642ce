"""Rates of scoring and training, relative to the bare model on tensors in memory.

    uv run python -m benchmarks.throughput                       # mobilenet_v2, on this machine
    uv run python -m benchmarks.throughput --model vgg16 --precision bf16 --covers 4096

Everything runs in one process, so that the ratios are comparable between machines. The bare model's
forward pass and training step on random pixels on the device are measured before and after
covergenre's train and score on synthetic covers; the faster counts. Train is measured in its second
epoch and score from its first batch, so that starting Ray's processes is excluded. A ratio of 1
would mean that reading, decoding, transfers and writing cost nothing. Uses a GPU if there is one.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import run_benchmark
from covergenre.cluster import autoscaling
from covergenre.cluster.ray_runtime import start_ray
from covergenre.config import PrepareConfig, ScoreConfig, TrainConfig
from covergenre.data.image_decoding import Preprocessing
from covergenre.demo.sample import GENRES, write_sample
from covergenre.io import storage
from covergenre.models import networks
from covergenre.models.inference import InferenceModel
from covergenre.models.predictor import autocast, normalise, to_device, to_unit
from covergenre.registry import MODELS
from covergenre.stages.prepare import prepare
from covergenre.stages.score import score
from covergenre.stages.train import train
from covergenre.training.worker import BETAS, EPSILON

logger = logging.getLogger(__name__)


def _rate(rows: int, run: Callable[[], object], seconds: float) -> float:
    """Images per second of `run`, which processes `rows`, over at least `seconds`."""
    for _ in range(2):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run()
        done += rows
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return done / (time.perf_counter() - began)


def bare_rates(
    name: str, precision: str, device: str, score_batch: int, train_batch: int, seconds: float
) -> tuple[float, float]:
    """Images per second of the bare model (forward, training), with pixels on the device."""
    spec = Preprocessing()
    model = to_device(networks.build_model(name, len(GENRES), seed=0), device)
    networks.freeze(model, MODELS[name].freeze)
    rng = np.random.default_rng(0)

    def pixels(n: int) -> torch.Tensor:
        shape = (n, spec.side, spec.side, 3)
        return to_unit(rng.integers(0, 255, shape, np.uint8), device)

    fast = InferenceModel(model.eval(), spec, device, precision)
    covers = rng.integers(0, 255, (score_batch, spec.side, spec.side, 3), np.uint8)
    forward = _rate(score_batch, lambda: fast.scores(covers, score_batch), seconds)

    images, targets = pixels(train_batch), torch.rand(train_batch, len(GENRES), device=device)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], betas=BETAS, eps=EPSILON, fused=True
    )
    networks.training_mode(model, freeze_batch_norm=False, rows=train_batch)

    def step() -> None:
        with autocast(device, precision):
            logits = model(normalise(images, spec)).float()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()

    return forward, _rate(train_batch, step, seconds)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2", choices=sorted(MODELS))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--covers", type=int, default=1024, help="synthetic covers to train on")
    parser.add_argument(
        "--repeats", type=int, default=4, help="number of times that each cover is scored"
    )
    parser.add_argument("--score-batch", type=int, default=64)
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of each measurement of the bare model"
    )
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def bare() -> tuple[float, float]:
        rates = bare_rates(
            args.model, args.precision, device, args.score_batch, args.train_batch, args.seconds
        )
        logger.info(
            f"bare {args.model} {args.precision}: {rates[0]:.1f} scored/s, {rates[1]:.1f} trained/s"
        )
        return rates

    before = bare()
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        synthetic_catalog = write_sample(root / "catalog", args.covers)
        catalog = str(synthetic_catalog)
        dataset, model, labels = (str(root / name) for name in ("dataset", "model", "labels"))
        prepare(PrepareConfig(catalog=catalog, out=dataset, min_share=0.0))
        train(
            TrainConfig(
                dataset=dataset,
                out=model,
                model=args.model,
                weights="none",
                epochs=2,
                batch_size=args.train_batch,
                precision=args.precision,
                workers=1,
            )
        )
        history = storage.read_bytes(f"{model}/history.jsonl").decode().splitlines()
        # The first epoch includes the start of the workers.
        trained = json.loads(history[-1])["images_per_second"]
        header, *rows = synthetic_catalog.read_text().splitlines()
        many = synthetic_catalog.with_name("many.csv")
        again = [f"{repeat}-{row}" for repeat in range(args.repeats) for row in rows]
        many.write_text("\n".join([header, *again]) + "\n")
        ledger = score(
            ScoreConfig(
                model=model, catalog=str(many), out=labels, batch_size=args.score_batch, workers=1
            )
        ).ledger
    forward, backward = (max(rates) for rates in zip(before, bare(), strict=True))
    scored = ledger["covers_per_second"]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPUs"
    result = {
        "model": args.model,
        "precision": args.precision,
        "device": where,
        "gpus": int(autoscaling.max_resources("GPU")),
        "covers_trained": args.covers,
        "covers_scored": ledger["scored"],
        "bare_scored_per_second": round(forward, 1),
        "scored_per_second": round(scored, 1),
        "score_ratio": round(scored / forward, 3),
        "bare_trained_per_second": round(backward, 1),
        "trained_per_second": round(trained, 1),
        "train_ratio": round(trained / backward, 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_benchmark(main)
