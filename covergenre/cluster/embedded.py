"""The temporary directory and the settings of a Ray that runs inside this process.

It needs no home directory, ignores the current directory, and connects to this machine only.
"""

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

from covergenre.errors import ConfigError

_PREFIX = "cg-"
_RANDOM_CHARACTERS = 8
"""Length of the suffix that mkdtemp appends."""
_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""The longest path of a Unix domain socket."""
_SOCKET_NAME = "/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path below the directory; the number is a process id."""
MAX_BASE_BYTES = (
    _SOCKET_PATH_BYTES - len(_SOCKET_NAME) - len("/") - len(_PREFIX) - _RANDOM_CHARACTERS
)
_MIN_FREE_BYTES = 32 * 2**20
_LOCK, _TOKEN, _CODE, _RAY = "lock", "auth_token", "code", "r"
_UNLOCKED_SECONDS = 3600.0
"""Age at which a directory without a lock file is a leftover."""


class EmbeddedRayDirectory:
    """A temporary directory of one embedded Ray: logs, sockets, token; mode 0700.

    While this process lives it holds a flock on a file of the directory, which shows other runs
    that the directory is in use. Directories of killed runs are removed by the next run of the same
    user in the same base directory.
    """

    def __init__(self) -> None:
        """Raises ConfigError if no base directory has a short path, is writable and has space."""
        problems = []
        for base in _base_directories():
            try:
                self._create(base)
            except OSError as error:
                problems.append(f"{base}: {error.strerror or error}")
            else:
                break
        else:
            raise ConfigError(
                f"no directory for Ray's temporary files ({'; '.join(problems)}); set RAY_TMPDIR to"
                f" a writable directory whose path has at most {MAX_BASE_BYTES} bytes",
                code="no_temporary_directory",
            )
        atexit.register(self.remove)
        _remove_leftovers(self.path.parent)

    def _create(self, base: str) -> None:
        if len(os.fsencode(base)) > MAX_BASE_BYTES:
            raise OSError(f"path is longer than {MAX_BASE_BYTES} bytes")
        if (free := shutil.disk_usage(base).free) < _MIN_FREE_BYTES:
            raise OSError(f"only {free / 2**20:.0f} MiB are free")
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            self.token.touch(mode=0o600)
            self.token.write_text(secrets.token_hex(32))
            # Only the package: other files beside it could shadow modules that workers import.
            self.code.mkdir()
            package = Path(__file__).resolve().parents[1]
            (self.code / package.name).symlink_to(package)
            # Renamed once it is locked, so that other runs never find it unlocked.
            unlocked = self.path / "unlocked"
            self._lock = unlocked.open("w")
            with contextlib.suppress(OSError):  # no locks on this file system: never cleaned up
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unlocked.rename(self.path / _LOCK)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    @property
    def token(self) -> Path:
        """File of the token with which the processes of this Ray authenticate."""
        return self.path / _TOKEN

    @property
    def code(self) -> Path:
        """Directory for the import path of workers; contains only this package."""
        return self.path / _CODE

    @property
    def ray(self) -> Path:
        """Ray's temporary directory. Ray makes it world-writable; its parent is private."""
        return self.path / _RAY

    @property
    def logs(self) -> Path:
        """Where Ray writes its logs."""
        return self.ray / "session_latest" / "logs"

    def keep(self) -> None:
        """Leave the removal to the next run, because an error message refers to the logs."""
        atexit.unregister(self.remove)

    def remove(self) -> None:
        """Stop the Ray that uses it, if any, and remove it. May be called repeatedly."""
        if ray := sys.modules.get("ray"):
            ray.shutdown()
        self.delete()

    def delete(self) -> None:
        """Remove the files, after Ray has ended or was killed."""
        atexit.unregister(self.remove)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _base_directories() -> list[str]:
    named = (os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR"))
    found = [os.path.abspath(name) for name in named if name]
    return list(dict.fromkeys([*found, "/tmp", "/var/tmp", "/dev/shm"]))


def _remove_leftovers(base: Path) -> None:
    """Remove the directories of this user's runs that were killed."""
    with contextlib.suppress(OSError):
        for path in base.glob(f"{_PREFIX}*"):
            found = path.lstat()
            if (
                found.st_uid == os.geteuid()
                and stat.S_ISDIR(found.st_mode)
                # A directory of another program may have such a name.
                and (path / _CODE / Path(__file__).resolve().parents[1].name).is_symlink()
                and _is_leftover(path, found.st_mtime)
            ):
                shutil.rmtree(path, ignore_errors=True)


def _is_leftover(path: Path, modified: float) -> bool:
    try:
        with (path / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except FileNotFoundError:  # partly removed, or about to be locked
        return (path / _TOKEN).is_file() and time.time() - modified > _UNLOCKED_SECONDS
    except OSError:  # locked, or not accessible
        return False


def python_path() -> dict[str, str]:
    """The variable PYTHONPATH without empty entries, as in `PYTHONPATH=$PYTHONPATH:/more`: they
    mean the current directory."""
    if "PYTHONPATH" not in os.environ:
        return {}
    entries = os.environ["PYTHONPATH"].split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join(filter(None, entries))}


def environment(directory: EmbeddedRayDirectory) -> dict[str, str]:
    """Environment variables for the embedded Ray and its processes."""
    variables = {
        # Ray's default, ~/.ray/auth_token, may not be writable, or is the token of a cluster.
        "RAY_AUTH_TOKEN_PATH": str(directory.token),
        # Empty: no proxy. gRPC would use http_proxy even for connections to this machine.
        "grpc_proxy": "",
    }
    variables |= python_path()
    if not os.path.isabs(os.path.expanduser("~")):
        # No HOME and no such user: Ray Train and others need one when they are imported.
        variables["HOME"] = str(directory.path)
    return variables
