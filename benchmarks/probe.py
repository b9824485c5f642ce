"""A baseline for fine-tuned models: logistic regression on frozen features.

    uv run python -m benchmarks.probe DATASET --model mobilenet_v2 --weights FILE

Features are the backbone's output for each cover of a prepared dataset, with the dataset's own
splits. One logistic regression per genre (scikit-learn, standardized features); C is selected by
macro ROC AUC on dev, and the metrics are computed once on test. Does not use Ray.
"""

import argparse
import json
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import run_benchmark
from covergenre.data.dataset import Manifest, read_manifest, read_table
from covergenre.data.image_decoding import Preprocessing, decode
from covergenre.metrics import multilabel_metrics
from covergenre.models.networks import build_model
from covergenre.models.predictor import normalise, to_unit
from covergenre.models.pretrained import load_backbone_weights
from covergenre.progress import Progress
from covergenre.registry import MODELS

logger = logging.getLogger(__name__)

Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]


def features(manifest: Manifest, split: str, backbone: torch.nn.Module) -> Arrays:
    """(features [albums, D], multi-hot genres [albums, G]) of a split."""
    spec = Preprocessing()
    out, genres = [], []
    with Progress(f"features of {split}", manifest.rows(split), "covers") as progress:
        for uri in manifest.shard_uris(split):
            table = read_table(uri, ["image", "genres"])
            for start in range(0, table.num_rows, 64):
                part = table.slice(start, 64)
                pixels = np.stack([decode(image, spec) for image in part["image"].to_pylist()])
                with torch.inference_mode():
                    out.append(backbone(normalise(to_unit(pixels, "cpu"), spec)).numpy())
                genres += part["genres"].to_pylist()
                progress.advance(part.num_rows)
    return np.concatenate(out), manifest.genres.multi_hot(genres)


def fit_and_score(c: float, train: Arrays, other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [rows of `other`, G] by one logistic regression per genre."""
    columns = []
    for j in range(train[1].shape[1]):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        probe.fit(train[0], train[1][:, j])
        columns.append(probe.predict_proba(other)[:, 1])
    return np.stack(columns, 1).astype(np.float32)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--model", default="mobilenet_v2", choices=sorted(MODELS))
    parser.add_argument("--weights", default="imagenet")
    args = parser.parse_args()

    manifest = read_manifest(args.dataset)
    model = build_model(args.model, len(manifest.genres), seed=0)
    load_backbone_weights(model, args.weights)
    backbone = model.backbone.eval()
    train, dev, test = (features(manifest, s, backbone) for s in ("train", "dev", "test"))
    names = manifest.genres.names
    by_c: dict[float, float] = {}
    for c in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        scores = fit_and_score(c, train, dev[0])
        by_c[c] = multilabel_metrics(dev[1], scores, names)["roc_auc_macro"]
        logger.info(f"C {c:g}: macro ROC AUC {by_c[c]:.4f} on dev")
    best = max(by_c, key=lambda c: by_c[c])
    metrics = multilabel_metrics(test[1], fit_and_score(best, train, test[0]), names)
    keys = ("albums", "roc_auc_macro", "roc_auc_micro", "pr_auc_macro", "pr_auc_micro")
    print(json.dumps({"C": best, **{k: metrics[k] for k in (*keys, "precision", "recall")}}))


if __name__ == "__main__":
    run_benchmark(main)
