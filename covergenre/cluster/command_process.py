"""How commands, which own their process, start and end Ray: signals, exit codes, quiet stderr.

A library does none of this: see ray_runtime.ProcessPolicy.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from covergenre.cluster import ray_runtime

logger = logging.getLogger(__name__)

_CHECK_RAY_SECONDS = 1.0


def install() -> None:
    """Use the policy of commands, in a process that runs nothing else."""
    ray_runtime.process_policy = _CommandProcess()
    _handle_sigterm()
    # It warns if it cannot write its cache to the home directory.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


class _CommandProcess(ray_runtime.ProcessPolicy):
    restores_environment = False

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        # Ray Data's actor pools log an error of the C++ part at every start, without a cause.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with _silent_stderr():
            yield

    def started(self, *, embedded: bool, verbose: bool) -> None:
        if embedded:
            threading.Thread(target=_exit_with_ray, daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            _handle_sigterm()  # Ray's own handler writes a stack trace of its C++ part
            # Ctrl-C is ignored during exit. Registered after Ray's exit handler, so called first.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _handle_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    logger.info("covergenre: terminated")
    sys.exit(128 + signal.SIGTERM)


def _exit_with_ray() -> None:
    """Exit with a message when the embedded Ray has crashed; Ray would end this process a minute
    later, without a message."""
    import psutil
    import ray

    from covergenre.cluster.ray_internals import server_processes

    servers = server_processes()

    def all_running() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return all(server.status() != psutil.STATUS_ZOMBIE for server in servers)
        return False

    while all_running():
        time.sleep(_CHECK_RAY_SECONDS)
    if ray.is_initialized():  # else it was shut down
        logger.error(
            "covergenre: the embedded Ray crashed; run the same command again to continue (train:"
            " with --resume)"
        )
        os._exit(1)


def end_now(code: int) -> NoReturn:
    """End this process and the Ray embedded in it at once.

    Ray's shutdown takes seconds, and sometimes changed the exit code to 1, when one of its threads
    queried a process that had ended.
    """
    import psutil

    children = psutil.Process().children(recursive=True)
    if not any(child.name() == "raylet" for child in children):
        sys.exit(code)
    ray_runtime.kill(children)
    if ray_runtime._embedded_directory is not None:
        ray_runtime._embedded_directory.delete()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2, where Ray's C++ part reports that its log level
    was reduced. Errors of ray.init are exceptions and not affected."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
