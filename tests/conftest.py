"""Fixtures for all tests: an S3 server, one embedded Ray, and a dataset and models made once."""

import contextlib
import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flaky_proxy import FlakyProxy
from local_training import scoring_without_ray, training_in_this_process
from training_runs import scaled_dev_logits, train_config

from covergenre.demo.sample import write_sample, write_untrained_model

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

    from covergenre.stages.train import Trained

# As covergenre does before it imports ray; here a test may import ray first.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Ray's workers have nice 15: beside the unit tests they would get no more than the idle CPU.
os.environ.update(RAY_worker_niceness="0")

# What runs in the background is started with ^C ignored, and hands that on to what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"

RAY_FOLDERS = ("integration", "chaos", "cluster")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n logical`: one for each core where no path is given; for chosen paths none, since they
    are sooner done in pytest's own process."""
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if chosen else os.cpu_count() or 1


def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    """All tests that may use Ray go to one process, where they share one Ray; of the others, each
    file to any. (`--dist loadgroup` of pytest-xdist 3.8 does nothing with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):  # type: ignore[misc]  # it is not typed
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.split("/")[1] in RAY_FOLDERS else file

    return OneRay(config, log)


@pytest.fixture(autouse=True)
def captured_log_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Let `caplog` capture the package's messages of level INFO too."""
    caplog.set_level(logging.INFO, "covergenre")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on moto's S3 server, or with COVERGENRE_TEST_S3 on the store that AWS_* names."""
    import boto3

    from covergenre.io.s3_client import reset_clients

    bucket = f"covergenre-{uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as stack:
        if not os.environ.get("COVERGENRE_TEST_S3"):
            from moto.server import ThreadedMotoServer

            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            host, port = server.get_host_and_port()
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "none")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "none")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket=bucket)
        reset_clients()
        yield f"s3://{bucket}"
        reset_clients()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=bucket, Key=found["Key"])
        client.delete_bucket(Bucket=bucket)


@pytest.fixture
def flaky_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FlakyProxy]]:
    """(a bucket, the proxy in front of its store that fails one request in five)

    This process, and others that it starts, use the proxy; a Ray that runs already does not.
    Timeouts are short: retries are tested, not their duration.
    """
    from covergenre.io import s3_client

    with FlakyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name in ("READ_SECONDS", "PROBE_READ_SECONDS", "FIRST_WAIT_SECONDS"):
            monkeypatch.setattr(s3_client, name, 0.5 if "READ" in name else 0.01)
        s3_client.reset_clients()
        yield s3, proxy
    s3_client.reset_clients()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """A function that writes a file of this name and content below tmp_path."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


@pytest.fixture(scope="session")
def local_ray(s3: str) -> Iterator[None]:
    """An embedded Ray, shared by all tests of this process, started as the commands start it.

    Its workers inherit the environment of its start, with the settings of `s3`.
    """
    import ray

    from covergenre.cluster.ray_runtime import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def synthetic_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of 150 synthetic covers."""
    folder = tmp_path_factory.mktemp("synthetic")
    return write_sample(folder, 150, seed=0)


@pytest.fixture(scope="session")
def dataset(
    synthetic_catalog: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`synthetic_catalog`, prepared: 118 albums in the train split, in shards far smaller than the
    splits, so that training steps span several. To be read, not changed."""
    from covergenre.config import PrepareConfig
    from covergenre.stages.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(
        PrepareConfig(catalog=str(synthetic_catalog), out=str(out), shard_rows=20, min_share=0.0)
    )
    return out


@pytest.fixture(scope="session")
def untrained_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory of random weights, for tests to which the scores do not matter."""
    return write_untrained_model(str(tmp_path_factory.mktemp("untrained") / "model"))


@pytest.fixture
def without_ray() -> Iterator[None]:
    """`score` and `evaluate` do without Ray, though this process has one: they are faster."""
    with scoring_without_ray():
        yield


@pytest.fixture
def local_training() -> Iterator[None]:
    """`train` trains in this process: see helpers/local_training.py."""
    with training_in_this_process():
        yield


@pytest.fixture(scope="session")
def trained_model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of two epochs, trained in this process. To be read, not changed."""
    from covergenre.stages.train import train

    out = tmp_path_factory.mktemp("trained") / "model"
    with training_in_this_process():
        train(train_config(dataset, out, workers=1))
    return out


@pytest.fixture(scope="session")
def frozen_run(
    dataset: Path, trained_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Trained":
    """One step with another seed, from the backbone of `trained_model`, which is frozen; in the dev
    evaluation all covers have the same scores."""
    from covergenre.stages.train import train

    out = tmp_path_factory.mktemp("frozen") / "model"
    weights = str(trained_model / "model.safetensors")
    config = train_config(dataset, out, weights=weights, freeze="all", seed=1, max_steps=1)
    with training_in_this_process(), scaled_dev_logits(0.0):
        return train(config)
