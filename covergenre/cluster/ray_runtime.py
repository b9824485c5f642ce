"""Starts Ray: connects to the cluster of RAY_ADDRESS, or embeds a Ray in this process."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from covergenre.cluster import embedded
from covergenre.cluster.embedded import EmbeddedRayDirectory
from covergenre.cluster.workers import available_cores
from covergenre.errors import ConfigError, CovergenreError, RayStartError
from covergenre.io.urls import redacted

logger = logging.getLogger(__name__)

_EMBEDDED_OBJECT_STORE_BYTES = 2 * 2**30
"""Of an embedded Ray: encoded covers and a few batches of pixels; the rest is for the model."""
PIPELINE_BYTES = 384 * 2**20
"""What one Ray Data pipeline may hold in the object store before its readers wait."""

_CONNECT_SECONDS = 10
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # RFC 9113, 3.4
_START_ATTEMPTS = 3
"""Of an embedded Ray: its processes have 15 s to start, which no setting of Ray's changes."""


class ProcessPolicy:
    """What start_ray may change in this process besides starting Ray: as a library, nothing."""

    restores_environment = True

    def starting(self) -> contextlib.AbstractContextManager[None]:
        """Entered around ray.init, unless verbose."""
        return contextlib.nullcontext()

    def started(self, *, embedded: bool, verbose: bool) -> None:
        """Called once Ray runs."""


process_policy = ProcessPolicy()
"""Replaced by the command line: see command_process.py."""

_embedded_directory: EmbeddedRayDirectory | None = None


def start_ray(*, verbose: bool = False) -> None:
    """Use the Ray of this process if it has one, else connect to the cluster of RAY_ADDRESS, or
    embed a Ray in this process.

    A Ray that the caller has initialised stays as it is. Environment variables are set while Ray
    starts and restored then; no handler is installed. The embedded Ray ends with the process, or at
    ray.shutdown(). Raises ConfigError or RayStartError where Ray does not start.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":  # Ray's own word for an embedded one
        address = ""
    with _environment(_settings(verbose, embedded=not address)):
        if address:
            if address != "auto":
                _check_address(address)
            _connect(address, verbose)
        else:
            _embed(verbose)
    if not verbose:
        silence_ray_loggers()
    process_policy.started(embedded=not address, verbose=verbose)


def _settings(verbose: bool, *, embedded: bool) -> dict[str, str]:
    """Environment variables of Ray, except those that name a directory. The user's own win."""
    settings = {
        # Under `uv run` Ray would rebuild the environment in each worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Today's default is deprecated, and Ray warns of that.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Without a limit Ray retries a task for ever that was killed because memory ran out.
        "RAY_task_oom_retries": "3",
    }
    if not verbose:
        # Messages of the raylet, which log_to_driver=False does not stop.
        settings["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"
    if embedded:
        # A process that an embedded Ray does not need; it takes seconds to start.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    return settings | ({"RAY_ADDRESS": ""} if embedded else {})  # it may be "local"


_SET_BY_RAY = ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED", "PYTHONBREAKPOINT")
"""Variables that ray.init sets in this process."""


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables and restore them at the end, with those that ray.init sets."""
    before = {name: os.environ.get(name) for name in (*variables, *_SET_BY_RAY)}
    os.environ.update(variables)
    try:
        yield
    finally:
        if process_policy.restores_environment:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Undo that ray.init installs a handler of SIGTERM: the host process keeps its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: a handler that was not installed from Python, which Python cannot restore.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(address: str, verbose: bool) -> None:
    """Raises ConfigError where no cluster answers, or one that refuses this process."""
    from covergenre.cluster.ray_internals import InstalledCodeOnly

    try:
        _init(verbose, job_config=InstalledCodeOnly(None), runtime_env=_shipped_code())
    except ConnectionError as error:
        raise _no_cluster(address) from error
    # Ray raises RuntimeError for another version, AuthenticationError, and a bare Exception.
    except Exception as error:
        raise ConfigError(f"RAY_ADDRESS {redacted(address)}: {_one_line(error)}") from error


def _embed(verbose: bool) -> None:
    """Raises RayStartError with the cause and the path of Ray's logs."""
    global _embedded_directory
    if _embedded_directory is not None:  # of a Ray that was shut down
        _embedded_directory.remove()
    directory = _embedded_directory = EmbeddedRayDirectory()
    with _environment(embedded.environment(directory)):
        _start_embedded(directory, verbose)


def _start_embedded(directory: EmbeddedRayDirectory, verbose: bool) -> None:
    import psutil

    from covergenre.cluster.ray_internals import InstalledCodeOnly, without_unused_processes

    for attempts_left in reversed(range(_START_ATTEMPTS)):
        children = set(psutil.Process().children(recursive=True))
        try:
            with (
                embedded.safe_import_path(),
                without_unused_processes(keep_log_monitor=verbose),
            ):
                _init(
                    verbose,
                    address="local",
                    # Logical CPUs: even on a small machine a model and its readers must both fit.
                    num_cpus=max(4, available_cores()),
                    object_store_memory=_EMBEDDED_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=str(directory.ray),
                    job_config=InstalledCodeOnly(directory.code),
                )
            return
        # Whatever keeps a process from starting; Ray raises a bare Exception when time is up.
        except Exception as error:
            cause = _one_line(error)
            timed_out = "timed out" in cause.lower()
            if not (timed_out and attempts_left):
                directory.keep()
                advice = "; run the same command again when it is less busy" if timed_out else ""
                raise RayStartError(
                    f"Ray did not start on this machine: {cause}{advice}; its logs are in"
                    f" {directory.logs}"
                ) from error
        logger.info("Ray did not start in its time on this busy machine; trying again")
        kill(set(psutil.Process().children(recursive=True)) - children)


def kill(processes: Iterable[Any]) -> None:
    """Kill processes that may have ended already."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _init(verbose: bool, **settings: Any) -> None:
    import ray

    with contextlib.nullcontext() if verbose else process_policy.starting(), _sigterm_kept():
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            **settings,
        )


def _shipped_code() -> dict[str, list[str]] | None:
    """Runtime environment that sends this package to a cluster's workers.

    None where it is installed, or where a submitted job has sent it already.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    # RECORD: what an installer writes; a folder of sources may have metadata, too.
    if any(found.read_text("RECORD") for found in distributions(name="covergenre")):
        return None
    return {"py_modules": [str(Path(__file__).resolve().parents[1])]}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Raise an error of ours as itself where Ray wrapped it in its own: a mistake is one line."""
    from ray.exceptions import RayError

    try:
        yield
    except Exception as error:
        pending: list[BaseException | None] = [error]
        while pending:
            inner = pending.pop()
            if isinstance(inner, CovergenreError) and not isinstance(inner, RayError):
                # Ray Data writes its own advice below our line.
                raise type(inner)(str(inner).splitlines()[0], code=inner.code) from error
            if inner is not None:
                pending += [inner.__cause__, getattr(inner, "cause", None)]
                pending += getattr(inner, "worker_failures", {}).values()
        raise


def dashboard() -> str | None:
    """The dashboard that RAY_ADDRESS names: this process is outside of its cluster, and submits.

    None where it names none. Raises ConfigError for ray://: a driver whose connection breaks is
    lost with its job, and a submitted job is not.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {redacted(address)}: Ray's client is not supported; name the"
            " cluster's dashboard instead, as RAY_ADDRESS=http://HEAD:8265, and the command is"
            " submitted as a job"
        )
    return address if address.startswith(("http://", "https://")) else None


def _check_address(address: str) -> None:
    """Raises ConfigError where `address` is no cluster's: Ray would wait for minutes, or warn."""
    if dashboard():
        raise ConfigError(
            f"RAY_ADDRESS {redacted(address)}: is a dashboard's, and this runs on a machine of"
            " the cluster; use `covergenre submit`, or unset RAY_ADDRESS to run on this machine"
            " alone"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                # What gRPC answers to; Ray itself would wait for minutes on a port that is mute.
                connection.sendall(_HTTP2_PREFACE)
                if not connection.recv(1):
                    raise ConnectionError
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> ConfigError:
    return ConfigError(
        f"RAY_ADDRESS {redacted(address)}: no Ray cluster answers there; correct it, or unset it to"
        " run on this machine alone"
    )


def silence_ray_loggers() -> None:
    """Log errors of Ray only, and none of Ray Data: its errors reach us as exceptions, or are
    handled."""
    import ray.data  # noqa: F401 - configures its loggers when it is imported

    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def data_context(*, ordered: bool = False, skip_failed_blocks: bool = False) -> Iterator[None]:
    """Settings of the Ray Data pipelines that are created inside; this process's own stay as they
    are.

    skip_failed_blocks: blocks whose tasks fail are left out without an error; the caller compares
    what came with what it asked for.
    """
    from ray.data import DataContext, ExecutionResources

    from covergenre.cluster.ray_internals import PIPELINE_CALLBACKS

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    # A row is a whole batch: blocks of this size contain one batch, or few.
    context.target_max_block_size = 2**20
    context.execution_options.preserve_order = ordered
    context.max_errored_blocks = -1 if skip_failed_blocks else 0
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=PIPELINE_BYTES
    )
    for callback in PIPELINE_CALLBACKS:
        if callback not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(callback)
    with DataContext.current(context):
        yield
