"""Starts Ray: connects to the cluster of RAY_ADDRESS, or embeds a Ray in this process."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
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
"""Of an embedded Ray. It holds encoded covers and a few batches of pixels."""
PIPELINE_BYTES = 384 * 2**20
"""Limit of one Ray Data pipeline in the object store, 40 batches of 64 covers; its readers wait
when it is reached."""

_CONNECT_SECONDS = 10
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # RFC 9113, 3.4
_START_ATTEMPTS = 3
"""Of an embedded Ray: it gives its processes 15 s to start, which no setting changes."""


class ProcessPolicy:
    """What `start_ray` does in this process besides starting Ray: in a library, nothing."""

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
    """Use the Ray that this process has initialized; without one, connect to the cluster of
    RAY_ADDRESS, or embed a Ray in this process.

    A Ray that the caller has initialized is not changed. Environment variables are set while Ray
    starts and restored afterwards; no signal handler is installed. The embedded Ray ends with the
    process, or at ray.shutdown(). Raises ConfigError or RayStartError if Ray does not start.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":  # Ray's name for an embedded Ray
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
    """Environment variables of Ray, except those that name a directory. Variables that the user
    has set take precedence."""
    settings = {
        # Under `uv run` Ray would rebuild the environment in each worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Ray warns that its default is deprecated.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # By default Ray retries a task that ran out of memory without limit.
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


def _environment(variables: dict[str, str]) -> contextlib.AbstractContextManager[None]:
    """Set environment variables and, in a library, restore them and those that ray.init sets."""
    if process_policy.restores_environment:
        return temporary_environment(variables, also_restored=_SET_BY_RAY)
    os.environ.update(variables)
    return contextlib.nullcontext()


@contextlib.contextmanager
def temporary_environment(
    variables: Mapping[str, str | None], *, also_restored: Iterable[str] = ()
) -> Iterator[None]:
    """Set environment variables (None: unset) and restore them at the end."""
    before = {name: os.environ.get(name) for name in (*variables, *also_restored)}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _sigterm_handler_restored() -> Iterator[None]:
    """Restore the host process's handler of SIGTERM, which ray.init replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: a handler that was not installed from Python, which Python cannot restore.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(address: str, verbose: bool) -> None:
    """Raises ConfigError if no cluster answers, or if it refuses this process."""
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
                # No process of Ray imports from the current directory, where `python -c` would
                # search first.
                temporary_environment({"PYTHONSAFEPATH": "1"}),
                without_unused_processes(keep_log_monitor=verbose),
            ):
                _init(
                    verbose,
                    address="local",
                    # Logical CPUs: a model and its readers must fit even on a small machine.
                    num_cpus=max(4, available_cores()),
                    object_store_memory=_EMBEDDED_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    _temp_dir=str(directory.ray),
                    job_config=InstalledCodeOnly(directory.code),
                )
            return
        # Anything may fail to start; Ray raises a bare Exception after a timeout.
        except Exception as error:
            cause = _one_line(error)
            timed_out = "timed out" in cause.lower()
            if not (timed_out and attempts_left):
                directory.keep()
                advice = "; try again when the machine is less busy" if timed_out else ""
                raise RayStartError(
                    f"Ray did not start on this machine: {cause}{advice}; its logs are in"
                    f" {directory.logs}"
                ) from error
        logger.info("Ray did not start in time; retrying")
        kill(set(psutil.Process().children(recursive=True)) - children)


def kill(processes: Iterable[Any]) -> None:
    """Kill processes that may have ended already."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _init(verbose: bool, **settings: Any) -> None:
    import ray

    with (
        contextlib.nullcontext() if verbose else process_policy.starting(),
        _sigterm_handler_restored(),
    ):
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
    # Installers write RECORD; a directory of sources may have other metadata.
    if any(found.read_text("RECORD") for found in distributions(name="covergenre")):
        return None
    return {"py_modules": [str(Path(__file__).resolve().parents[1])]}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Where Ray wraps a CovergenreError in another error, raise the CovergenreError itself."""
    from ray.exceptions import RayError

    try:
        yield
    except Exception as error:
        pending: list[BaseException | None] = [error]
        while pending:
            inner = pending.pop()
            if isinstance(inner, CovergenreError) and not isinstance(inner, RayError):
                # Ray Data appends lines to the message.
                raise type(inner)(str(inner).splitlines()[0], code=inner.code) from error
            if inner is not None:
                pending += [inner.__cause__, getattr(inner, "cause", None)]
                pending += getattr(inner, "worker_failures", {}).values()
        raise


def dashboard() -> str | None:
    """The URL of a dashboard in RAY_ADDRESS, which means that commands are submitted as jobs; None
    if it has another value.

    Raises ConfigError for ray://, because a lost connection would end the driver; a submitted job
    continues.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {redacted(address)}: ray:// is not supported; set it to the URL of the"
            " dashboard, RAY_ADDRESS=http://HEAD:8265, and the command is submitted as a job",
            code="ray_client",
        )
    return address if address.startswith(("http://", "https://")) else None


def _check_address(address: str) -> None:
    """Raises ConfigError if no cluster answers at `address`; Ray would wait for minutes."""
    if dashboard():
        raise ConfigError(
            f"RAY_ADDRESS {redacted(address)}: the URL of a dashboard, to which a driver cannot"
            " connect; use `covergenre submit`, or unset RAY_ADDRESS to run on this machine alone",
            code="dashboard_address",
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                # gRPC answers this; on a port that never answers, Ray would wait for minutes.
                connection.sendall(_HTTP2_PREFACE)
                if not connection.recv(1):
                    raise ConnectionError
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> ConfigError:
    return ConfigError(
        f"RAY_ADDRESS {redacted(address)}: no Ray cluster answers at this address; correct it, or"
        " unset it to run on this machine alone",
        code="no_cluster",
    )


def silence_ray_loggers() -> None:
    """Log only errors of Ray, and nothing of Ray Data, whose errors are raised as exceptions."""
    import ray.data  # noqa: F401 - configures its loggers when it is imported

    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def data_context(*, pipelines: int) -> Iterator[None]:
    """Settings for the ordered Ray Data pipelines that are created in the `with` block; the
    DataContext of this process is not changed.

    pipelines: how many of them run at a time on the cluster; each has its share of half of the
    object store, at most PIPELINE_BYTES.
    """
    import ray
    from ray.data import DataContext, ExecutionResources

    from covergenre.cluster.ray_internals import PIPELINE_CALLBACKS

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    # A row is a whole batch: blocks of this size contain one batch, or few.
    context.target_max_block_size = 2**20
    context.execution_options.preserve_order = True
    context.max_errored_blocks = 0
    store = ray.cluster_resources().get("object_store_memory", 0) / 2
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=min(PIPELINE_BYTES, int(store / pipelines))
    )
    for callback in PIPELINE_CALLBACKS:
        if callback not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(callback)
    with DataContext.current(context):
        yield
