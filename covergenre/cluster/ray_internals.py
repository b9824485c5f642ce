"""Every use of a private API of Ray, and of the process tables that Ray has no API for.

Written for Ray 2.60; tests/unit/cluster/test_ray_internals.py names what a later Ray has changed.
Imports Ray: import this module inside functions.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.node import Node
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.usage import UsageCallback
from ray.job_config import JobConfig

__all__ = [
    "PIPELINE_CALLBACKS",
    "InstalledCodeOnly",
    "autoscaler_config",
    "is_startup_timeout",
    "is_token_auth_enabled",
    "run_torch_trainer",
    "server_processes",
    "without_unused_processes",
]

_PAUSE_SECONDS = 0.02
_UNUSED_PROCESSES = ("start_api_server", "start_monitor")
_LOG_MONITOR = "start_log_monitor"


class Pause(ExecutionCallback):
    """Limits Ray Data's scheduling loop to 50 iterations a second.

    While its tasks wait for the consumer, the loop of Ray 2.60 runs without a pause: it took 0.6 of
    a core, and the interpreter lock from the training thread beside it, and halved the rate of
    training on two cores. An iteration handles all that is ready, so fewer of them lose nothing.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called after each iteration."""
        time.sleep(_PAUSE_SECONDS)


class NoUsageActor(ExecutionCallback):
    """Removes the callback with which Ray Data collects usage statistics of a pipeline.

    It starts an actor, whose process takes seconds to start, even where nothing is reported. The
    variables that disable it are read when a pipeline starts: they would have to stay set in the
    host process.
    """

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Called before the same method of Ray's callback, which is always the later one."""
        callbacks = executor._callbacks
        callbacks[:] = [each for each in callbacks if not isinstance(each, UsageCallback)]


PIPELINE_CALLBACKS: tuple[type[ExecutionCallback], ...] = (Pause, NoUsageActor)
"""Callbacks for every Ray Data pipeline of ours."""


class InstalledCodeOnly(JobConfig):
    """A job whose workers import from `code` and from installed packages only.

    Ray would put the directory of the script and the current directory before both, so that a
    token.py or torch.py beside a catalog hides the module of that name, and is executed.
    """

    def __init__(self, code: Path | None) -> None:
        super().__init__(_py_driver_sys_path=[str(code)] if code else [])

    def _runtime_env_has_working_dir(self) -> bool:
        return True  # with a working directory, Ray adds neither of the two directories


@contextlib.contextmanager
def without_unused_processes(*, keep_log_monitor: bool) -> Iterator[None]:
    """Let `ray.init` start no API server, no autoscaler and, unless wanted, no log monitor; and
    not rebuild the environment in each worker under `uv run`.

    Each process takes seconds to start. Without a dashboard the API server would only serve Ray's
    usage statistics, which ask each cloud's metadata service for the provider, even where they are
    disabled. No setting of Ray prevents that; and the one for `uv run` is read when Ray is
    imported, which may be over.
    """

    def start_nothing(node: Any, **_: Any) -> None:
        # As Ray itself sets it when the API server fails to start, which it tolerates.
        node._webui_url = None

    names = [*_UNUSED_PROCESSES, *([] if keep_log_monitor else [_LOG_MONITOR])]
    originals = {name: getattr(Node, name) for name in names}
    uv_run = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    for name in names:
        setattr(Node, name, start_nothing)
    if os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV") == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = uv_run
        for name, original in originals.items():
            setattr(Node, name, original)


def run_torch_trainer(train_loop: Callable[..., None], **options: Any) -> None:
    """TorchTrainer(train_loop, **options).fit(); ^C ends it at once, with its workers.

    Ray Train's own handler of SIGINT waits for its controller, for any length of time, while the
    workers continue to train.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    trainer = Trainer(train_loop, **options)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if trainer.controller is not None:
            ray.kill(trainer.controller)
        raise


def is_startup_timeout(error: object) -> bool:
    """Whether a TorchTrainer failed because the workers' machines did not start in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    failure = getattr(error, "controller_failure", None)
    return isinstance(failure, WorkerGroupStartupTimeoutError)


def autoscaler_config() -> dict[str, Any] | None:
    """The cluster file of the autoscaler that serves this cluster; None unless it runs here.

    Ray 2.60 has no API for an autoscaler's limits (its pull request 63012 would add one).
    """
    gcs_address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            flags = dict(word.partition("=")[::2] for word in process.cmdline())
            file = flags.get("--autoscaling-config")
            if file and flags.get("--gcs-address") == gcs_address:
                config: dict[str, Any] = yaml.safe_load(Path(file).expanduser().read_text())
                return config
    return None


def server_processes() -> list[psutil.Process]:
    """The GCS server and the raylet that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name() in ("gcs_server", "raylet")]
