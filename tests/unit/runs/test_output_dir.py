"""Output directories: which run they belong to, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from covergenre.config import EvaluateConfig, StageConfig, TrainConfig
from covergenre.errors import StorageError
from covergenre.io import storage
from covergenre.runs import output_dir

INPUTS = {"dataset_id": "abc", "sizes": [1, 2]}


def settings(out: Path, **others: Any) -> TrainConfig:
    return TrainConfig(dataset="dataset", out=str(out), **others)


def write(out: Path, config: StageConfig, stage: str = "train", inputs: Any = INPUTS) -> None:
    record = output_dir.run_record(stage, config, inputs)
    output_dir.write_run_record(str(out), record, config)


def refused(out: Path, code: str, stage: str = "train", inputs: Any = INPUTS, **others: Any) -> str:
    """The message, one line; nothing in or beside `out` is changed."""
    before = storage.list_sizes(out.parent)
    with pytest.raises(StorageError) as caught:
        write(out, settings(out, **others), stage, inputs)
    assert storage.list_sizes(out.parent) == before
    text = str(caught.value)
    assert caught.value.code == code, text
    assert text.startswith(f"{out}: ") and "\n" not in text and "--out" in text
    return text


def test_new_or_empty_directory_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nested/empty").mkdir(parents=True)
    for name in ("new", "deep/new", "empty", "nested"):
        out = tmp_path / name
        write(out, settings(out))
        assert storage.list_files(out) == [str(out / "_state/run.json")]


def test_run_record_has_stage_settings_and_inputs(tmp_path: Path) -> None:
    config = settings(tmp_path / "x", epochs=3)
    write(tmp_path / "x", config)
    value = json.loads((tmp_path / "x/_state/run.json").read_text())
    assert value["stage"] == "train"
    assert value["fingerprint"] == config.fingerprint()
    assert value["inputs"] == INPUTS
    assert value["settings"]["epochs"] == 3
    assert value["covergenre"]


def test_same_run_is_resumed(tmp_path: Path) -> None:
    write(tmp_path, settings(tmp_path))
    (tmp_path / "half-done").write_bytes(b"x")
    record = (tmp_path / "_state/run.json").read_bytes()
    for others in ({}, {"workers": 4}, {"device": "cpu"}, {"cpus_per_worker": 1.0}):
        write(tmp_path, settings(tmp_path, **others))
    write(tmp_path, TrainConfig(dataset="elsewhere", out="elsewhere"))  # moved, the same content
    assert (tmp_path / "_state/run.json").read_bytes() == record


def test_other_settings_inputs_or_stage_are_refused(tmp_path: Path) -> None:
    write(tmp_path, settings(tmp_path))
    assert "--epochs None, not 3" in refused(tmp_path, "other_run", epochs=3)
    assert "dataset_id" in refused(tmp_path, "other_run", inputs={"dataset_id": "abd"})
    refused(tmp_path, "other_run", inputs={})
    assert "train" in refused(tmp_path, "other_run", stage="evaluate")


def test_same_settings_of_another_stage_are_refused(tmp_path: Path) -> None:
    config = EvaluateConfig(model="m", dataset="d", out=str(tmp_path))
    write(tmp_path, config, "evaluate", {})
    with pytest.raises(StorageError) as caught:
        write(tmp_path, config, "score", {})
    assert caught.value.code == "other_run"


def test_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter-1.txt").write_bytes(b"x")
    assert "thesis/chapter-1.txt" in refused(tmp_path, "not_empty")


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", "not_a_directory")
    assert (tmp_path / "file").read_bytes() == b"x"
    with pytest.raises(StorageError) as caught:
        output_dir.check_is_directory(str(tmp_path / "file/deep/out"))
    assert caught.value.code == "not_a_directory"
    assert str(caught.value).startswith(f"{tmp_path}/file: ")
    output_dir.check_is_directory(str(tmp_path / "deep/out"))


def test_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    inputs = {"model directory": str(tmp_path / "m"), "catalog": f"{tmp_path}/d/"}
    for inside in ("m", "m/labels", "d/labels/new"):
        with pytest.raises(StorageError) as caught:
            output_dir.check_not_inside(str(tmp_path / inside), inputs)
        assert caught.value.code == "inside_input"
        assert str(caught.value).startswith(f"{tmp_path}/{inside}: ")
    for beside in ("m.training", "labels", "dd"):
        output_dir.check_not_inside(str(tmp_path / beside), inputs)
    with pytest.raises(StorageError) as caught:
        output_dir.check_not_inside("s3://b/d/x", {"dataset": "s3://b/d"})
    assert caught.value.code == "inside_input"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", "{}"])
def test_invalid_run_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "_state").mkdir()
    (tmp_path / "_state/run.json").write_text(text)
    with pytest.raises(StorageError) as caught:
        write(tmp_path, settings(tmp_path))
    assert caught.value.code in ("invalid_json", "other_run")
    assert "\n" not in str(caught.value)


def test_second_of_two_runs_that_start_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "put_if_absent", lambda *_: False)
    refused(tmp_path / "x", "other_run")
