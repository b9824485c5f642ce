"""demo: the whole job on a drawn sample, in minutes, on a laptop."""

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
from covergenre.stages.evaluate import evaluate
from covergenre.stages.prepare import prepare
from covergenre.stages.score import score
from covergenre.stages.train import train

logger = logging.getLogger(__name__)

_ALBUMS = 1200
_UNLABELLED = 200
_EPOCHS = 10
_SYNTHETIC_COVER = re.compile(r"covers/synthetic_\d+\.jpg")


def make_sample(out: str, albums: int, seed: int) -> str:
    """Write a drawn catalog to the folder `out`; what the user is told.

    `out` is new, empty, or holds a sample that was interrupted (its catalog comes last).
    """
    place = storage.absolute(out)
    held = storage.list_sizes(place)
    if not all(name == "README.md" or _SYNTHETIC_COVER.fullmatch(name) for name in held):
        raise StorageError(f"{out}: is not empty; choose another --out, or empty it")
    if not storage.is_uri(place):
        write_sample(Path(place), albums, seed)
    else:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(16) as pool:
            catalog = write_sample(Path(folder), albums, seed)
            others = [f for f in Path(folder).rglob("*") if f.is_file() and f != catalog]

            def upload(file: Path) -> None:
                storage.put(storage.join(place, str(file.relative_to(folder))), file.read_bytes())

            list(pool.map(upload, others))
            upload(catalog)  # last, so that a sample with a catalog is a whole one
    path = storage.join(place, "catalog.csv")
    about = plural(albums, "drawn cover shows", "drawn covers show")
    return f"catalog {path}\n  {about} no real album"


def run_demo(out: str, *, verbose: bool) -> None:
    """Sample, prepare, train, evaluate, score; says where to look."""
    began = time.monotonic()
    root = storage.absolute(out)

    def place(name: str) -> str:
        return storage.join(root, name)

    for name, albums, seed in (("catalog", _ALBUMS, 0), ("new-albums", _UNLABELLED, 1)):
        if not storage.exists(place(f"{name}/catalog.csv")):
            logger.info(make_sample(place(name), albums, seed))
    prepared = prepare(
        PrepareConfig(
            catalog=place("catalog/catalog.csv"),
            out=place("dataset"),
            group_by="artist",
            shard_rows=256,
        ),
        verbose=verbose,
    )
    logger.info(prepared.summary())
    trained = train(
        TrainConfig(
            dataset=place("dataset"),
            out=place("model"),
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
        EvaluateConfig(model=place("model"), dataset=place("dataset"), out=place("metrics")),
        verbose=verbose,
    )
    logger.info(evaluated.summary())
    labelled = score(
        ScoreConfig(
            model=place("model"), catalog=place("new-albums/catalog.csv"), out=place("labels")
        ),
        verbose=verbose,
    )
    logger.info(labelled.summary())
    minutes = (time.monotonic() - began) / 60
    albums, genres = prepared.manifest.counts["albums"], len(prepared.manifest.genres)
    auc, over = evaluated.metrics["roc_auc_macro"], macro_over(evaluated.metrics)
    made = (
        ("catalog/catalog.csv", f"catalog: {_ALBUMS:,} labelled albums, drawn by a program"),
        (
            "dataset",
            f"dataset: {plural(albums, 'album')}, {plural(genres, 'genre')}, no artist in two"
            " splits",
        ),
        ("model", f"MODEL: the best of {plural(trained.epochs, 'epoch')} of the model `tiny`"),
        ("metrics", f"metrics: macro ROC AUC {auc:.3f} over {over}, on albums it has not seen"),
        ("labels", f"labels: {plural(labelled.ledger['scored'], 'new album')} labelled"),
    )
    pictures = (
        ("metrics/_report/covers.png", "covers, their genres, and what the model says"),
        ("metrics/_report/curves.png", "precision-recall and ROC curves"),
        ("metrics/_report/genres.png", "how well it tells each genre"),
        ("model/loss.png", "the loss by epoch"),
        ("dataset/_report/label_distribution.png", "how common each genre is"),
    )
    lines = [f"The whole job took {minutes:.1f} minutes, in {root}"]
    for title, entries in (("Made:", made), ("Worth looking at:", pictures)):
        lines += ["", title, *(f"  {name:32}{about}" for name, about in entries)]
    click.echo("\n".join(lines))
