"""The start of a stage: its order, and what it leaves behind when it fails."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covergenre.config import EvaluateConfig
from covergenre.errors import ConfigError, ModelError, StorageError
from covergenre.io import storage
from covergenre.runs import output_dir
from covergenre.runs.lock import LOCK_DIRECTORY, OutputLock
from covergenre.runs.stage_run import StageRun, check_reachable, stage_run


class Stage:
    """A stage that notes what happens; its result is the file OUT/result."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.events: list[str] = []
        self.identity: dict[str, Any] = {"weights_id": "abc"}
        self.shared_filesystem = False
        self.at_lock: Callable[[], object] = lambda: None

    def read_inputs(self) -> int:
        self.events.append("read")
        return 7

    def identify(self, inputs: int) -> dict[str, Any]:
        assert inputs == 7
        self.events.append("identify")
        return self.identity

    @contextlib.contextmanager
    def start(self, **others: Any) -> Iterator[StageRun[int]]:
        config = EvaluateConfig(
            model="m", dataset="d", out=str(self.out), shared_filesystem=self.shared_filesystem
        )
        arguments: dict[str, Any] = {
            "sources": {"dataset": str(self.out.parent / "d")},
            "read_inputs": self.read_inputs,
            "identify": self.identify,
            "is_finished": (self.out / "result").exists,
        }
        with stage_run("evaluate", config, str(self.out), **(arguments | others)) as run:
            yield run

    def work(self, **others: Any) -> StageRun[int]:
        """Run it to its end."""
        with self.start(**others) as run:
            if not run.is_finished:
                run.start_ray({"--out": str(self.out)})
                run.record()
                (self.out / "result").write_bytes(b"x")
        return run

    def locks(self) -> list[str]:
        return sorted(storage.list_sizes(self.out / LOCK_DIRECTORY))

    def refused(self, code: str, error: type[Exception] = StorageError, **others: Any) -> None:
        """Nothing is changed, and Ray is not started."""
        before = storage.list_sizes(self.out.parent)
        with pytest.raises(error) as caught:
            self.work(**others)
        assert getattr(caught.value, "code", "") == code
        assert storage.list_sizes(self.out.parent) == before
        assert "ray" not in self.events


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(tmp_path / "out")
    acquire = OutputLock.acquire

    def noted(lock: OutputLock) -> None:
        stage.at_lock()
        acquire(lock)
        stage.events.append("lock")

    monkeypatch.setattr(OutputLock, "acquire", noted)
    runtime = "covergenre.runs.stage_run.ray_runtime"
    monkeypatch.setattr(f"{runtime}.start_ray", lambda **_: stage.events.append("ray"))
    monkeypatch.setattr("covergenre.runs.stage_run.node_count", lambda: 1)
    return stage


def test_stage_starts_in_order(stage: Stage) -> None:
    with stage.start() as run:
        assert (run.inputs, run.is_finished) == (7, False)
        assert stage.events == ["read", "lock"]
        assert len(stage.locks()) == 1
        run.start_ray({"--out": str(stage.out)})
        assert not output_dir.has_run_record(str(stage.out))
        run.record()
        assert stage.events == ["read", "lock", "ray", "identify"]
        run.check_lock()
    assert stage.locks() == []
    record = storage.read_json(stage.out / "_state/run.json")
    assert (record["stage"], record["inputs"]) == ("evaluate", stage.identity)


def test_finished_run_is_neither_locked_nor_repeated(stage: Stage) -> None:
    stage.work()
    stage.events.clear()
    run = stage.work()
    assert run.is_finished
    assert stage.events == ["read", "identify"]
    run.check_lock()  # nothing to lose


def test_unfinished_run_is_resumed(stage: Stage) -> None:
    with pytest.raises(KeyError), stage.start() as run:
        run.record()
        raise KeyError
    assert stage.locks() == []
    stage.events.clear()
    assert not stage.work().is_finished
    assert stage.events == ["read", "identify", "lock", "ray", "identify"]


def test_run_that_finishes_while_this_one_waits_for_the_lock_is_not_repeated(stage: Stage) -> None:
    def finish() -> None:
        stage.at_lock = lambda: None
        Stage.work(stage)

    stage.at_lock = finish
    with stage.start() as run:
        assert run.is_finished
    assert stage.locks() == []


def test_other_run_that_finishes_while_this_one_waits_for_the_lock_is_refused(
    stage: Stage,
) -> None:
    def finish() -> None:
        stage.at_lock, stage.identity = lambda: None, {"weights_id": "other"}
        Stage.work(stage)
        stage.identity = {"weights_id": "abc"}

    stage.at_lock = finish
    with pytest.raises(StorageError) as caught, stage.start():
        pass
    assert caught.value.code == "other_run"
    assert stage.locks() == []


def test_other_run_is_refused_before_anything_is_locked_or_started(stage: Stage) -> None:
    stage.work()
    stage.events.clear()
    stage.identity = {"weights_id": "other"}
    stage.refused("other_run")
    assert "lock" not in stage.events


def test_output_directory_is_checked_before_inputs_are_read(stage: Stage) -> None:
    stage.out.mkdir()
    (stage.out / "thesis.txt").write_bytes(b"x")
    stage.refused("not_empty")
    stage.refused("inside_input", sources={"dataset": str(stage.out)})
    stage.refused("unsupported_scheme", sources={"dataset": "gs://x"})
    assert stage.events == []


def test_invalid_input_leaves_nothing_behind(stage: Stage) -> None:
    def read_inputs() -> int:
        raise ModelError("m: no such directory")

    stage.refused("", ModelError, read_inputs=read_inputs)
    assert not stage.out.exists()


def test_locked_directory_is_refused(stage: Stage) -> None:
    with stage.start():
        stage.refused("locked")


def test_lock_and_record_may_be_in_another_directory(stage: Stage) -> None:
    state = Path(f"{stage.out}.training")
    with stage.start(state=str(state)) as run:
        run.record()
        assert sorted(p.name for p in (state / "_state").iterdir()) == ["lock", "run.json"]
        assert not stage.out.exists()


def test_run_record_may_get_an_identity_that_is_known_late(stage: Stage) -> None:
    with stage.start() as run:
        run.record({"catalog": "hash"})
    assert storage.read_json(stage.out / "_state/run.json")["inputs"] == {"catalog": "hash"}
    assert "identify" not in stage.events


@pytest.fixture
def three_machines(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covergenre.runs.stage_run.node_count", lambda: 3)


@pytest.mark.usefixtures("three_machines")
def test_local_path_is_refused_on_a_cluster_unless_shared(stage: Stage) -> None:
    with pytest.raises(ConfigError) as caught:
        stage.work()
    assert caught.value.code == "not_shared"
    assert str(caught.value).startswith(f"--out {stage.out}: ")
    assert stage.locks() == [] and not output_dir.has_run_record(str(stage.out))
    stage.shared_filesystem = True
    stage.work()


@pytest.mark.usefixtures("three_machines")
@pytest.mark.parametrize("path", [None, "s3://bucket/out", "https://host/x.jpg"])
def test_uris_are_reachable_from_all_machines(path: str | None) -> None:
    check_reachable({"--out": path}, shared_filesystem=False)


@pytest.mark.usefixtures("three_machines")
def test_file_uri_is_local(stage: Stage) -> None:
    with pytest.raises(ConfigError) as caught:
        check_reachable({"--out": "file:///x"}, shared_filesystem=False)
    assert caught.value.code == "not_shared"
