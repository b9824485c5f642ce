"""The commands `demo` (all stages on a synthetic catalog, in minutes) and `sample`."""

import logging
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from covergenre.config import EvaluateConfig, PrepareConfig, ScoreConfig, TrainConfig
from covergenre.demo.sample import write_sample
from covergenre.errors import StorageError
from covergenre.formatting import plural
from covergenre.io import storage
from covergenre.metrics import macro_over
from covergenre.runs.output_dir import check_is_directory
from covergenre.stages.evaluate import Evaluated, evaluate
from covergenre.stages.prepare import Prepared, prepare
from covergenre.stages.score import Labelled, score
from covergenre.stages.train import Trained, train

logger = logging.getLogger(__name__)

_ALBUMS = 1200
_UNLABELED = 200
_EPOCHS = 10
_SYNTHETIC_COVER = re.compile(r"covers/synthetic_\d+\.jpg")


def make_sample(out: str, albums: int, seed: int) -> str:
    """Write a synthetic catalog to the directory `out`; returns the message to print.

    `out` must be new, empty, or contain an interrupted sample (whose catalog is written last).
    """
    directory = storage.absolute(out)
    check_is_directory(directory)
    existing = storage.list_sizes(directory)
    if not all(name == "README.md" or _SYNTHETIC_COVER.fullmatch(name) for name in existing):
        raise StorageError(
            f"{out}: is not empty; choose another --out, or empty it", code="not_empty"
        )
    if not storage.is_uri(directory):
        write_sample(Path(directory), albums, seed)
    else:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(16) as pool:
            catalog = write_sample(Path(folder), albums, seed)
            others = [f for f in Path(folder).rglob("*") if f.is_file() and f != catalog]

            def upload(file: Path) -> None:
                storage.put(
                    storage.join(directory, str(file.relative_to(folder))), file.read_bytes()
                )

            list(pool.map(upload, others))
            upload(catalog)  # last: a sample that has a catalog is complete
    path = storage.join(directory, "catalog.csv")
    about = plural(albums, "synthetic cover")
    return f"catalog {path}\n  {about}, showing no real albums"


def run_demo(out: str, *, verbose: bool) -> None:
    """Run sample, prepare, train, evaluate and score; print the paths of the results."""
    began = time.monotonic()
    root = storage.absolute(out)

    def path_of(name: str) -> str:
        return storage.join(root, name)

    for name, albums, seed in (("catalog", _ALBUMS, 0), ("new-albums", _UNLABELED, 1)):
        if not storage.exists(path_of(f"{name}/catalog.csv")):
            logger.info(make_sample(path_of(name), albums, seed))
    prepared = prepare(
        PrepareConfig(
            catalog=path_of("catalog/catalog.csv"),
            out=path_of("dataset"),
            group_by="artist",
            shard_rows=256,
        ),
        verbose=verbose,
    )
    logger.info(prepared.summary())
    trained = train(
        TrainConfig(
            dataset=path_of("dataset"),
            out=path_of("model"),
            model="tiny",
            epochs=_EPOCHS,
            learning_rate=2e-3,
            augment="color",
            schedule="cosine",
        ),
        verbose=verbose,
    )
    logger.info(trained.summary())
    evaluated = evaluate(
        EvaluateConfig(model=path_of("model"), dataset=path_of("dataset"), out=path_of("metrics")),
        verbose=verbose,
    )
    logger.info(evaluated.summary())
    labeled = score(
        ScoreConfig(
            model=path_of("model"), catalog=path_of("new-albums/catalog.csv"), out=path_of("labels")
        ),
        verbose=verbose,
    )
    logger.info(labeled.summary())
    minutes = (time.monotonic() - began) / 60
    click.echo(f"Finished in {minutes:.1f} minutes. Output directory: {root}")
    click.echo(_list_of_results(prepared, trained, evaluated, labeled))


def _list_of_results(
    prepared: Prepared, trained: Trained, evaluated: Evaluated, labeled: Labelled
) -> str:
    """The output directories and plots of the demo, one per line."""
    albums, genres = prepared.manifest.counts["albums"], len(prepared.manifest.genres)
    auc, over = evaluated.metrics["roc_auc_macro"], macro_over(evaluated.metrics)
    results = (
        ("catalog/catalog.csv", f"catalog: {_ALBUMS:,} synthetic albums with genres"),
        (
            "dataset",
            f"dataset: {plural(albums, 'album')}, {plural(genres, 'genre')}, no artist in two"
            " splits",
        ),
        ("model", f"model: the best of {plural(len(trained.history), 'epoch')} of `tiny`"),
        ("metrics", f"metrics: macro ROC AUC {auc:.3f} over {over}, on the test split"),
        ("labels", f"labels: {plural(labeled.ledger['scored'], 'new album')} labeled"),
    )
    plots = (
        ("metrics/_report/covers.png", "covers with their genres and scores"),
        ("metrics/_report/curves.png", "precision-recall and ROC curves"),
        ("metrics/_report/genres.png", "metrics by genre"),
        ("model/loss.png", "the loss by epoch"),
        ("dataset/_report/label_distribution.png", "share of albums per genre"),
    )
    width = max(len(name) for name, _ in (*results, *plots)) + 2
    lines: list[str] = []
    for title, entries in (("Results:", results), ("Plots:", plots)):
        lines += ["", title, *(f"  {name:{width}}{about}" for name, about in entries)]
    return "\n".join(lines)
