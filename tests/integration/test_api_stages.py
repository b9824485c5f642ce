"""The Python API with Ray: the stages, to_ray and BatchPredictor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_training import scoring_without_ray

import covergenre as cg
from covergenre.errors import StorageError


@pytest.fixture(scope="module")
def scored(
    synthetic_catalog: Path,
    untrained_model: str,
    local_ray: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> cg.ScoringRun:
    out = tmp_path_factory.mktemp("scored") / "labels"
    with scoring_without_ray():
        return cg.score(Path(untrained_model), synthetic_catalog, out=out, device="cpu")


def test_predict_gives_the_scores_of_score(
    scored: cg.ScoringRun, synthetic_catalog: Path, untrained_model: str
) -> None:
    labels = scored.labels().to_pylist()
    assert len(labels) == scored.ledger["scored"] == 150
    covers = [synthetic_catalog.parent / "covers" / f"{row['album_id']}.jpg" for row in labels]
    scores = cg.load_model(untrained_model, device="cpu").predict(covers)
    expected = [[dict(row["scores"])[genre] for genre in scores.genres] for row in labels]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.labels() == [row["genres"] for row in labels]
    assert "150" in repr(scored) and scored.uri in repr(scored)


def test_train_returns_its_history_and_model(
    dataset: Path, local_ray: None, local_training: None, tmp_path: Path
) -> None:
    events: list[cg.ProgressEvent] = []
    run = cg.train(
        dataset,
        out=tmp_path / "m",
        model="tiny",
        epochs=2,
        device="cpu",
        callbacks=[events.append],
    )
    assert run.history["epoch"].tolist() == [1, 2]
    assert [event.metrics["epoch"] for event in events if event.metrics] == [1, 2]
    assert run.model is run.model and run.model.weights_id == run.weights_id
    assert run.model.config["epochs"] == 2
    assert run.uri in repr(run) and run.uri in run._repr_html_()
    test = cg.load_dataset(dataset, "test", transform=run.model.transform)
    scores = run.model.predict([test.encoded(index) for index in range(len(test))])
    measured = cg.evaluate(run.uri, dataset, out=tmp_path / "e", device="cpu")
    assert measured["albums"] == len(test)
    assert list(measured.by_genre.index) == list(scores.genres)
    assert set(measured) >= {"roc_auc_macro", "pr_auc_micro"}


def test_prepare_returns_its_dataset(
    dataset: Path, synthetic_catalog: Path, local_ray: None, tmp_path: Path
) -> None:
    done = cg.prepare(synthetic_catalog, out=dataset, shard_rows=20, min_share=0)
    assert done.uri == str(dataset)
    assert done.counts["albums"] == 150
    assert len(done.load("train")) + len(done.load("dev")) + len(done.load("test")) == 150
    with pytest.raises(StorageError):
        cg.prepare(synthetic_catalog, out=dataset, shard_rows=30)


def test_ray_dataset_has_the_encoded_covers(dataset: Path, local_ray: None) -> None:
    test = cg.load_dataset(dataset, "test")
    rows = sorted(test.to_ray().take_all(), key=lambda row: row["row"])
    assert [row["image"] for row in rows] == [test.encoded(index) for index in range(len(test))]
    assert [row["album_id"] for row in rows] == test.to_pandas()["album_id"].tolist()


def test_batch_predictor_in_a_pipeline_of_ray_data(
    dataset: Path, untrained_model: str, local_ray: None
) -> None:
    import ray.data

    test = cg.load_dataset(dataset, "test")
    mapped = test.to_ray().map_batches(
        cg.BatchPredictor,
        fn_constructor_args=[untrained_model],
        fn_constructor_kwargs={"prefix": "predicted_"},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=8,
    )
    rows: list[dict[str, Any]] = sorted(mapped.take_all(), key=lambda row: row["row"])
    scores = cg.load_model(untrained_model).predict([row["image"] for row in rows])
    np.testing.assert_allclose([row["predicted_scores"] for row in rows], scores, atol=1e-5)
    assert [row["predicted_top_genre"] for row in rows] == [top[0][0] for top in scores.top(1)]
    assert {row["predicted_reason"] for row in rows} == {None}
