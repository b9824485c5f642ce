"""quantize: model + dataset -> an int8 model, which scores faster on CPUs.

The covers of the dev split show which values the layers take (calibration). The result is a model
directory; while it is made, OUT.quantizing/ has the run record and the lock.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covergenre.config import QuantizeConfig
from covergenre.data import dataset
from covergenre.data.dataset import Manifest, read_manifest
from covergenre.data.image_decoding import CoverError, Preprocessing, decode
from covergenre.errors import DatasetError, ModelError, StorageError
from covergenre.formatting import decimal, plural
from covergenre.io import storage
from covergenre.metrics import multilabel_metrics, nan_to_none
from covergenre.models.bundle import (
    BUNDLE_FILES,
    Bundle,
    BundleContents,
    check_genres,
    check_weights,
    is_bundle,
    load_model,
    read_bundle,
    write_bundle,
)
from covergenre.models.model_card import quantized_card
from covergenre.progress import Progress
from covergenre.runs.stage_run import stage_run


@dataclass(frozen=True)
class Quantized:
    """A complete int8 model directory."""

    uri: str
    weights_id: str
    metrics: dict[str, Any]
    """On the covers of the calibration; see docs/formats.md."""
    note: str = ""

    def summary(self) -> str:
        """The text that the command prints at the end."""
        m = self.metrics
        return (
            f"model {self.uri} ({self.weights_id}), int8{self.note}\n"
            f"  on {plural(m['covers'], 'cover')} of the dev split: macro ROC AUC"
            f" {decimal(m['roc_auc_macro'], 4)}, source model"
            f" {decimal(m['source_roc_auc_macro'], 4)}; scores differ by"
            f" {m['mean_score_difference']:.4f} on average, {m['max_score_difference']:.4f} at most"
        )


def quantize(config: QuantizeConfig, *, verbose: bool = False) -> Quantized:
    """Quantize a model. Raises UserError for an invalid setting or input."""
    out = storage.absolute(config.out)
    state = f"{out}.quantizing"
    with stage_run(
        "quantize",
        config,
        out,
        sources={"model directory": config.model, "dataset": config.dataset},
        read_inputs=lambda: _read_inputs(config, out),
        identify=lambda inputs: _ids(*inputs),
        is_finished=lambda: is_bundle(out),
        state=state,
        verbose=verbose,
    ) as run:
        bundle, manifest = run.inputs
        origin = {"fingerprint": config.fingerprint(), "inputs": _ids(bundle, manifest)}
        if run.is_finished:
            done = _already_quantized(out, origin)
        else:
            run.record()
            done = _quantize(config, bundle, manifest, out, origin)
    storage.delete_directory(state)
    return done


def _read_inputs(config: QuantizeConfig, out: str) -> tuple[Bundle, Manifest]:
    from covergenre.models.int8 import check_packages

    check_packages()
    files = set(storage.list_sizes(out))
    if not is_bundle(out) and (others := files - BUNDLE_FILES):
        raise StorageError(
            f"{out}: is not empty (contains {min(others)}); choose another --out, or empty it",
            code="not_empty",
        )
    bundle = read_bundle(config.model)
    if bundle.precision == "int8":
        raise ModelError(
            f"{bundle.uri}: is an int8 model already; use the model that was quantized:"
            f" {bundle.source}",
            code="int8",
        )
    check_weights(bundle)
    manifest = read_manifest(config.dataset)
    manifest.require("dev")
    check_genres(bundle, manifest)
    return bundle, manifest


def _ids(bundle: Bundle, manifest: Manifest) -> dict[str, Any]:
    return {"weights_id": bundle.weights_id, "dataset_id": manifest.dataset_id}


def _quantize(
    config: QuantizeConfig, bundle: Bundle, manifest: Manifest, out: str, origin: dict[str, Any]
) -> Quantized:
    """Quantize, compare with the source model and write the model directory."""
    from covergenre.models.inference import InferenceModel
    from covergenre.models.int8 import Int8Model, quantize_network

    with Progress("quantize", 4, "steps") as progress:
        pixels, truth = _dev_covers(manifest, config.dev_covers, bundle.preprocessing)
        progress.advance(1)
        network = load_model(bundle)
        files = quantize_network(network, bundle.preprocessing, pixels)
        progress.advance(1)
        scores = Int8Model(bundle, *files.values()).scores(pixels, len(pixels))
        progress.advance(1)
        fast = InferenceModel(network, bundle.preprocessing, "cpu", bundle.precision)
        source_scores = fast.scores(pixels, len(pixels))
        progress.advance(1)
    metrics = _metrics(bundle, truth, scores, source_scores)
    written = write_bundle(
        out,
        BundleContents(
            weights=files,
            model=bundle.model,
            genres=bundle.genres,
            preprocessing=bundle.preprocessing,
            precision="int8",
            thresholds=bundle.thresholds,
            training=storage.read_json(storage.join(bundle.uri, "config.json"))["train"],
            quantization={"source": bundle.uri, "run": origin},
            other_files={
                "metrics.json": storage.json_bytes(metrics),
                "README.md": quantized_card(bundle, metrics).encode(),
            },
        ),
    )
    return Quantized(written.uri, written.weights_id, metrics)


def _dev_covers(
    manifest: Manifest, count: int, spec: Preprocessing
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """`count` covers spread over the dev split: pixels [covers, side, side, 3], and their genres
    [covers, genres]."""
    rows = manifest.rows("dev")
    chosen = np.unique(np.linspace(0, rows - 1, min(count, rows), dtype=np.int64))
    pixels, genres, first = [], [], 0
    for shard, uri in zip(manifest.shards["dev"], manifest.shard_uris("dev"), strict=True):
        here = chosen[(chosen >= first) & (chosen < first + shard.rows)] - first
        first += shard.rows
        for batch in dataset.stream_rows(uri, here.tolist(), ["image", "genres"]):
            for row in batch.to_pylist():
                try:
                    pixels.append(decode(row["image"], spec))
                except CoverError as error:
                    raise DatasetError(
                        f"{uri}: has a damaged cover ({error}); prepare it again", code="bad_cover"
                    ) from error
                genres.append(row["genres"])
    return np.stack(pixels), manifest.genres.multi_hot(genres)


def _metrics(
    bundle: Bundle,
    truth: NDArray[np.float32],
    scores: NDArray[np.float32],
    source_scores: NDArray[np.float32],
) -> dict[str, Any]:
    difference = np.abs(scores - source_scores)
    macro = [
        multilabel_metrics(truth, values, bundle.genres.names)["roc_auc_macro"]
        for values in (scores, source_scores)
    ]
    metrics: dict[str, Any] = nan_to_none(
        {
            "covers": len(scores),
            "roc_auc_macro": macro[0],
            "source_roc_auc_macro": macro[1],
            "mean_score_difference": float(difference.mean()),
            "max_score_difference": float(difference.max()),
        }
    )
    return metrics


def _already_quantized(out: str, origin: dict[str, Any]) -> Quantized:
    """The complete model at `out`. Raises StorageError unless this same command wrote it."""
    bundle = read_bundle(out)
    quantization = storage.read_json(storage.join(out, "config.json")).get("quantize", {})
    if quantization.get("run") != origin:
        raise StorageError(f"{out}: contains another model; choose another --out", code="other_run")
    metrics = storage.read_json(storage.join(out, "metrics.json"))
    return Quantized(out, bundle.weights_id, metrics, ": already quantized by this command")
