"""The start of a stage, the same for all four:

1. check the output directory
2. read the inputs, which finds most mistakes of the user before anything is written or started
3. compare with the run record, if there is one: the directory of another run is refused
4. check whether the same command has already finished
5. lock the output directory
6. start Ray, and check that all machines of the cluster can reach the paths (`start_ray`)
7. write the run record (`record`); then the stage writes its first result
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from covergenre.cluster import ray_runtime
from covergenre.cluster.workers import node_count
from covergenre.config import StageConfig
from covergenre.errors import ConfigError
from covergenre.io import storage
from covergenre.runs import output_dir
from covergenre.runs.lock import OutputLock

T = TypeVar("T")


class StageRun(Generic[T]):
    """A run of a stage that has been started by `stage_run`."""

    def __init__(
        self,
        stage: str,
        config: StageConfig,
        directory: str,
        inputs: T,
        identify: Callable[[T], Mapping[str, Any]],
        verbose: bool,
    ) -> None:
        self.inputs = inputs
        """What `read_inputs` returned."""
        self.is_finished = False
        """Whether the same command has finished before: there is nothing to do."""
        self._stage, self._config, self._directory = stage, config, directory
        self._identify, self._verbose = identify, verbose
        self._lock: OutputLock | None = None

    def start_ray(self, paths: Mapping[str, str | None]) -> None:
        """Start or join Ray. Raises ConfigError if a machine of the cluster cannot reach a path.

        paths: what workers read and write, name -> path or URI, or None if there is none.
        """
        ray_runtime.start_ray(verbose=self._verbose)
        check_reachable(paths, self._config.shared_filesystem)

    def record(self, identity: Mapping[str, Any] | None = None) -> None:
        """Write the run record: from now on the output directory belongs to this run.

        Call it after all checks, and before the first result is written.
        identity: see `stage_run`; by default what `identify` returns. Raises StorageError if the
        directory belongs to another run.
        """
        record = self._record(identity)
        output_dir.write_run_record(self._directory, record, self._config)

    def check_lock(self) -> None:
        """Raises StorageError if another run has taken over the lock on the output directory."""
        if self._lock is not None:
            self._lock.check()

    def _record(self, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if identity is None:
            identity = self._identify(self.inputs)
        return output_dir.run_record(self._stage, self._config, identity)

    def _check_record(self) -> None:
        if output_dir.has_run_record(self._directory):
            output_dir.check_same_run(self._directory, self._record(), self._config)


@contextlib.contextmanager
def stage_run(
    stage: str,
    config: StageConfig,
    out: str,
    *,
    sources: Mapping[str, str],
    read_inputs: Callable[[], T],
    identify: Callable[[T], Mapping[str, Any]],
    is_finished: Callable[[], bool],
    state: str | None = None,
    verbose: bool = False,
) -> Iterator[StageRun[T]]:
    """Start a stage, in the order above; its output directory is locked in the `with` block.

    out: absolute path or URI of the output directory.
    sources: what the stage reads, name -> path or URI; `out` must not be inside any of them.
    read_inputs: reads and checks the inputs; raises UserError for a user's mistake.
    identify: identity of the inputs by content, for the run record. It must not write; where there
        is no run record yet, it is not called before `record`.
    is_finished: whether `out` contains a complete result.
    state: the directory of the run record and the lock, if not `out`.
    """
    directory = state or out
    output_dir.check_not_inside(out, sources)
    output_dir.check_available(directory)
    run = StageRun(stage, config, directory, read_inputs(), identify, verbose)
    run._check_record()
    if is_finished():
        run.is_finished = True
        yield run
        return
    with OutputLock(directory) as lock:
        run._lock = lock
        if is_finished():  # by another process, before this one acquired the lock
            run._check_record()
            run.is_finished = True
        yield run


def check_reachable(paths: Mapping[str, str | None], shared_filesystem: bool) -> None:
    """Raises ConfigError if a path is local to one machine and the cluster has several.

    paths: name -> path or URI, or None; workers read and write there. Ray has been started.
    """
    for what, path in paths.items():
        if path is None or storage.scheme(path) not in ("", "file") or shared_filesystem:
            continue
        if (count := node_count()) > 1:
            raise ConfigError(
                f"{what} {path}: is local to one machine, and the cluster has {count} or more; use"
                " s3:// or, if all machines see this path, --shared-filesystem",
                code="not_shared",
            )
