"""The training loop in this process, and in two that exchange gradients; without Ray."""

import contextlib
import io
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from local_training import local_shares
from PIL import Image

from covergenre import schema
from covergenre.config import TrainConfig
from covergenre.data import dataset
from covergenre.data.dataset import Manifest
from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import TrainingDivergedError
from covergenre.training import checkpoints
from covergenre.training.job import Job

GENRES = Genres(("Jazz", "Rock"))
TrainTwoRanks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """43 albums in shards of 10 to train with, 12 for dev."""
    root = str(tmp_path_factory.mktemp("dataset"))
    rng = np.random.default_rng(0)
    shards: dict[str, tuple[dataset.Shard, ...]] = {"test": ()}
    row = 0
    for split, sizes in (("train", (10, 10, 10, 10, 3)), ("dev", (12,))):
        found = []
        for part, size in enumerate(sizes):
            rows = []
            for _ in range(size):
                cover = io.BytesIO()
                pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(cover, "PNG")
                genres = [["Jazz"], ["Rock"], ["Jazz", "Rock"]][row % 3]
                rows.append(
                    {"album_id": f"a{row}", "row": row, "image": cover.getvalue()}
                    | {"cover_sha256": "", "genres": genres, "split": split}
                )
                row += 1
            table = pa.Table.from_pylist(rows, schema=schema.DATASET)
            found.append(dataset.write_shard(root, f"{split}/part-{part:05d}.parquet", table))
        shards[split] = tuple(found)
    return Manifest(root, GENRES, shards, "id", {})


class Ignored:
    """Stands for the monitor: takes every report."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: None)


@contextlib.contextmanager
def tiny_with_batch_norm() -> Iterator[None]:
    """Meanwhile the model `tiny` has a batch norm."""
    from torch import nn

    from covergenre.models import networks

    tiny = networks._tiny

    def with_batch_norm(num_genres: int) -> tuple[nn.Module, nn.Module]:
        backbone, head = tiny(num_genres)
        return nn.Sequential(nn.BatchNorm2d(3), backbone), head

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(networks, "_tiny", with_batch_norm)
        yield


def local_job(
    manifest: Manifest, folder: str, *, microbatch: int | None = None, **settings: Any
) -> Job:
    defaults = {"model": "tiny", "epochs": 2, "batch_size": 6, "shuffle_window": 2}
    return Job(
        config=TrainConfig(dataset="d", out="o", **(defaults | settings)).resolved(),
        manifest=manifest,
        preprocessing=Preprocessing(side=32),
        baseline_loss=0.6,
        workers=None,  # type: ignore[arg-type]
        backbone=None,
        checkpoints=folder,
        features=f"{folder}.features",
        monitor=Ignored(),
        microbatch=microbatch,
    )


def run(
    manifest: Manifest, folder: str, rank: int = 0, world: int = 1, stop: int = 0, **settings: Any
) -> list[float]:
    """Train, on `rank` of `world`; the losses of all steps. stop: step before which to fail."""
    from covergenre.training import loader, worker
    from covergenre.training.ranks import Ranks

    loader.decoded_shares = local_shares
    job = local_job(manifest, folder, **settings)
    subject = worker.Worker(job, Ranks(rank, world, "cpu"), None)
    if stop:
        train_step = subject._train_step

        def failing(epoch: int, step: int) -> Any:
            if subject._state.steps_done == stop:
                raise InterruptedError
            return train_step(epoch, step)

        subject._train_step = failing  # type: ignore[method-assign]
    subject.run()
    return subject._losses.losses


def run_rank(
    manifest: Manifest, folder: str, rank: int, settings: dict[str, Any], batch_norm: bool
) -> list[float] | str:
    """The losses of all steps; or the error of a run that diverges."""
    from torch import distributed

    store = f"file://{folder}.rendezvous"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        with tiny_with_batch_norm() if batch_norm else contextlib.nullcontext():
            return run(manifest, folder, rank, 2, **settings)
    except TrainingDivergedError as error:
        return str(error)
    finally:
        distributed.destroy_process_group()


def final_state(folder: str, into: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = checkpoints.newest(folder, into, pytest.fail)
    assert found is not None
    state = found.state()
    for record in state["history"]:
        del record["seconds"], record["images_per_second"]
        assert 0 <= record.pop("data_wait_share") <= 1
    return state, found.tensors()


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_resumed_run_is_bit_for_bit_as_an_uninterrupted_one(
    manifest: Manifest, stop: int, tmp_path: Path
) -> None:
    whole = run(manifest, str(tmp_path / "whole"))
    assert len(whole) == 16 and np.isfinite(whole).all()
    folder = str(tmp_path / "resumed")
    with pytest.raises(InterruptedError):
        run(manifest, folder, stop=stop, checkpoint_every=2)
    assert 0 < checkpoints.latest_step(folder) < 16
    assert run(manifest, folder, checkpoint_every=5) == whole
    (state, tensors), (other, others) = (
        final_state(str(tmp_path / name), tmp_path) for name in ("whole", "resumed")
    )
    assert state == other and tensors.keys() == others.keys()
    assert all(tensors[name].equal(others[name]) for name in tensors)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TrainTwoRanks]:
    """A function that trains on two ranks, each in a process: what `run_rank` returns of both."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:

        def train(
            manifest: Manifest, folder: Path, *, batch_norm: bool = False, **settings: Any
        ) -> list[Any]:
            ranks = [(manifest, str(folder), rank, settings, batch_norm) for rank in range(2)]
            return pool.starmap(run_rank, ranks, chunksize=1)

        yield train


def test_two_workers_compute_the_losses_of_one(
    manifest: Manifest, two_ranks: TrainTwoRanks, tmp_path: Path
) -> None:
    alone = run(manifest, str(tmp_path / "one"), l2=1e-3)
    first, second = two_ranks(manifest, tmp_path / "two", l2=1e-3)
    assert first == second
    np.testing.assert_allclose(first, alone, atol=1e-4)


def test_smaller_microbatch_computes_the_same_losses(
    manifest: Manifest, two_ranks: TrainTwoRanks, tmp_path: Path
) -> None:
    alone = run(manifest, str(tmp_path / "one"), epochs=1)
    first, second = two_ranks(manifest, tmp_path / "two", epochs=1, microbatch=2)
    assert first == second
    np.testing.assert_allclose(first, alone, atol=1e-4)


@pytest.mark.parametrize("freeze", ["2", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_give_the_same_losses(
    manifest: Manifest, freeze: str, precision: str, tmp_path: Path
) -> None:
    """Not always the same bits: some layers round differently in batches of another size."""
    settings: dict[str, Any] = {
        "freeze": freeze,
        "precision": precision,
        "augment": "none",
        "epochs": 3,
    }
    found: list[list[float]] = []
    for name, cache in (("without", False), ("with", True)):
        run(manifest, str(tmp_path / name), cache_features=cache, **settings)
        state, _ = final_state(str(tmp_path / name), tmp_path)
        found.append([*state["step_losses"], *(record["dev_loss"] for record in state["history"])])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5 if precision == "fp32" else 1e-2)


def test_cached_features_are_read_row_by_row_if_large(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from covergenre.training import features

    settings: dict[str, Any] = {"freeze": "2", "augment": "none", "cache_features": True}
    whole = run(manifest, str(tmp_path / "whole"), **settings)
    monkeypatch.setattr(features, "_IN_MEMORY_BYTES", 0)
    assert run(manifest, str(tmp_path / "rows"), **settings) == whole


def test_two_workers_share_a_cache_of_features(
    manifest: Manifest, two_ranks: TrainTwoRanks, tmp_path: Path
) -> None:
    """Rows change ranks between epochs."""
    settings: dict[str, Any] = {"freeze": "2", "augment": "none"}
    alone = run(manifest, str(tmp_path / "one"), **settings)
    first, second = two_ranks(manifest, tmp_path / "two", cache_features=True, **settings)
    assert first == second
    np.testing.assert_allclose(first, alone, atol=1e-4)


def test_resumed_run_keeps_cached_features_and_completes_them(
    manifest: Manifest, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"freeze": "all", "augment": "none", "cache_features": True}
    settings["checkpoint_every"] = 2
    whole = run(manifest, str(tmp_path / "whole"), **settings)
    with pytest.raises(InterruptedError):
        run(manifest, str(tmp_path / "resumed"), stop=5, **settings)
    folder = tmp_path / "resumed.features"
    kept, lost, truncated = sorted((folder / "train").iterdir())[:3]
    size = truncated.stat().st_size
    written = kept.stat().st_mtime_ns
    lost.unlink()
    truncated.write_bytes(b"")
    assert run(manifest, str(tmp_path / "resumed"), **settings) == whole
    assert kept.stat().st_mtime_ns == written
    assert lost.exists() and truncated.stat().st_size == size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_on_a_cpu_without_it_is_reported(
    manifest: Manifest, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from covergenre.training import worker

    lines: list[str] = []
    monkeypatch.setattr(worker, "_is_bf16_slow", lambda _: True)
    monkeypatch.setattr(worker.Worker, "_log", lambda _, line: lines.append(line))
    run(manifest, str(tmp_path / "run"), precision=precision, max_steps=1)
    assert lines == ([worker._SLOW_BF16] if precision == "bf16" else [])


def test_diverged_run_raises_the_same_error_on_every_rank(
    manifest: Manifest, two_ranks: TrainTwoRanks, tmp_path: Path
) -> None:
    messages = two_ranks(manifest, tmp_path / "two", learning_rate=1e30)
    assert messages[0] == messages[1] and "1e+30" in str(messages[0])


def test_dev_metrics_of_two_workers_are_those_of_the_saved_batch_norm_statistics(
    manifest: Manifest,
    two_ranks: TrainTwoRanks,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Running statistics differ between workers: evaluation and checkpoint use those of rank 0."""
    from covergenre.models import networks
    from covergenre.models.predictor import Predictor, to_unit
    from covergenre.training import loader
    from covergenre.training.dev_evaluation import evaluate_dev
    from covergenre.training.ranks import Ranks
    from covergenre.training.worker import _training_data

    # 7 rows to the last step, after which DDP does not share the statistics any more.
    two_ranks(manifest, tmp_path / "two", epochs=1, batch_size=9, batch_norm=True)
    state, tensors = final_state(str(tmp_path / "two"), tmp_path)
    job = local_job(manifest, str(tmp_path / "two"), epochs=1)
    with tiny_with_batch_norm():
        model = networks.build_model("tiny", len(GENRES))
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    model.load_state_dict(weights)
    assert int(weights["backbone.0.num_batches_tracked"]) > 0
    one = Ranks(0, 1, "cpu")
    monkeypatch.setattr(loader, "decoded_shares", local_shares)
    data = _training_data(job, one)
    stream = loader.BatchStream(data, loader.pixel_batches(data, [(0, 0)]))
    predictor = Predictor(model, job.preprocessing, "cpu", "fp32")
    found = evaluate_dev(
        stream, lambda batch: predictor.logits_of(to_unit(batch.inputs, "cpu")), manifest, one
    )
    (record,) = state["history"]
    for name in ("dev_loss", "dev_roc_auc_micro", "dev_pr_auc_macro", "dev_recall"):
        assert found[name] == pytest.approx(record[name], abs=1e-6)
