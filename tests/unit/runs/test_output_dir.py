"""Output places: whose a folder is, and that nobody else writes there."""

import json
from pathlib import Path
from typing import Any

import pytest

from covergenre.config import EvaluateConfig, TrainConfig
from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.runs import output_dir

INPUTS = {"dataset_id": "abc", "sizes": [1, 2]}


def settings(out: Path, **others: Any) -> TrainConfig:
    return TrainConfig(dataset="dataset", out=str(out), **others)


def refused(place: Path, stage: str = "train", inputs: Any = INPUTS, **others: Any) -> str:
    """The message; the place must stay as it was."""
    before = storage.list_sizes(str(place.parent))
    with pytest.raises(StorageError) as caught:
        output_dir.claim(str(place), stage, settings(place, **others), inputs)
    assert storage.list_sizes(str(place.parent)) == before
    text = str(caught.value)
    assert text.startswith(f"{place}: ") and "\n" not in text and "--out" in text
    return text


def test_a_new_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nested/empty").mkdir(parents=True)
    for name in ("new", "deep/new", "empty", "nested"):
        place = tmp_path / name
        output_dir.claim(str(place), "train", settings(place), INPUTS)
        assert storage.list_files(str(place)) == [str(place / "_state/run.json")]


def test_the_claim_says_whose_it_is(tmp_path: Path) -> None:
    config = settings(tmp_path / "x", epochs=3)
    output_dir.claim(str(tmp_path / "x"), "train", config, INPUTS)
    value = json.loads((tmp_path / "x/_state/run.json").read_text())
    assert value["stage"] == "train"
    assert value["fingerprint"] == config.fingerprint()
    assert value["inputs"] == INPUTS
    assert value["settings"]["epochs"] == 3
    assert value["covergenre"]


def test_the_same_run_is_taken_up_again(tmp_path: Path) -> None:
    output_dir.claim(str(tmp_path), "train", settings(tmp_path), INPUTS)
    (tmp_path / "half-done").write_bytes(b"x")
    claim = (tmp_path / "_state/run.json").read_bytes()
    for others in ({}, {"workers": 4}, {"device": "cpu"}, {"cpus_per_worker": 1.0}):
        output_dir.claim(str(tmp_path), "train", settings(tmp_path, **others), INPUTS)
    moved = TrainConfig(dataset="elsewhere", out="elsewhere")  # the same content
    output_dir.claim(str(tmp_path), "train", moved, INPUTS)
    assert (tmp_path / "_state/run.json").read_bytes() == claim


def test_another_run_is_refused(tmp_path: Path) -> None:
    output_dir.claim(str(tmp_path), "train", settings(tmp_path), INPUTS)
    assert "a train run with other settings" in refused(tmp_path, epochs=3)
    assert "a train run on other inputs" in refused(tmp_path, inputs={"dataset_id": "abd"})
    assert "a train run on other inputs" in refused(tmp_path, inputs={})
    assert "holds a run of train" in refused(tmp_path, stage="evaluate")


def test_message_about_an_evaluate_run_says_an(tmp_path: Path) -> None:
    config = EvaluateConfig(model="m", dataset="d", out=str(tmp_path))
    output_dir.claim(str(tmp_path), "evaluate", config, INPUTS)
    other = config.model_copy(update={"split": "dev"})
    with pytest.raises(StorageError, match=r"holds an evaluate run with other settings \(--split"):
        output_dir.claim(str(tmp_path), "evaluate", other, INPUTS)


def test_another_stage_of_the_same_settings_is_refused(tmp_path: Path) -> None:
    config = EvaluateConfig(model="m", dataset="d", out=str(tmp_path))
    output_dir.claim(str(tmp_path), "evaluate", config, {})
    with pytest.raises(StorageError, match="holds a run of evaluate"):
        output_dir.claim(str(tmp_path), "score", config, {})


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter-1.txt").write_bytes(b"x")
    assert "is not empty (holds thesis/chapter-1.txt)" in refused(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert "is a file" in refused(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"x"
    with pytest.raises(StorageError, match="file: is a file; choose a folder with --out"):
        output_dir.check_folder(str(tmp_path / "file/deep/out"))
    output_dir.check_folder(str(tmp_path / "deep/out"))


def test_a_place_in_what_is_read_is_refused(tmp_path: Path) -> None:
    inputs = {"MODEL": str(tmp_path / "m"), "catalog": f"{tmp_path}/d/"}
    for inside in ("m", "m/labels", "d/labels/new"):
        place = str(tmp_path / inside)
        with pytest.raises(StorageError, match=f"{place}: lies in the .*; choose another --out"):
            output_dir.check_apart(place, inputs)
    for beside in ("m.training", "labels", "dd"):
        output_dir.check_apart(str(tmp_path / beside), inputs)
    with pytest.raises(StorageError, match="lies in the dataset s3://b/d"):
        output_dir.check_apart("s3://b/d/x", {"dataset": "s3://b/d"})


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", "{}"])
def test_a_claim_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "_state").mkdir()
    (tmp_path / "_state/run.json").write_text(text)
    with pytest.raises(StorageError) as caught:
        output_dir.claim(str(tmp_path), "train", settings(tmp_path), INPUTS)
    assert "\n" not in str(caught.value)


def test_of_two_runs_at_once_one_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "put_if_absent", lambda *_: False)
    with pytest.raises(StorageError, match="another run took this place just now"):
        output_dir.claim(str(tmp_path / "x"), "train", settings(tmp_path), INPUTS)
