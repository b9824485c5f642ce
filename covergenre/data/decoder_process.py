"""Decodes covers in a child process, so that a crash of a decoder affects only one cover.

`decode` and `validate_and_reencode` do what the functions of the same names in `image_decoding` do,
in a child process that each process starts once and reuses. A cover that crashes the child, needs
too much memory or takes too long is rejected with that reason, and the child is replaced.
"""

import atexit
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covergenre.data import image_decoding
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.errors import CovergenreError

DECODE_SECONDS = 30.0
"""CPU time after which a cover is rejected; the largest allowed covers take 1 to 4 s.
Not wall-clock time, because decoding takes many times as long on a busy machine."""

MEMORY_BYTES = 3 * 2**30
"""Address space of the child, including 0.1 GiB for Python (Linux only)."""

_WALL_CLOCK_FACTOR = 4
"""A child that needs this many times the CPU limit in wall-clock time is considered hung."""
_ATTEMPTS = 2
"""Attempts before a cover is rejected: the child may have been killed or suspended."""
_START_SECONDS = 120.0
_END_SECONDS = 10.0
"""How long to wait for the exit code of a child that failed to start."""
_ALARM_SECONDS = 5.0
"""The child exits by itself this long after the parent's timeout, if the parent has exited."""

# The only environment variables of the child: others may contain credentials, which a hostile cover
# could read if it took over the decoder.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_IMPORT_AND_CALL = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
for name, directory in {packages}.items():
    spec = spec_from_file_location(
        name, directory + "/__init__.py", submodule_search_locations=[directory]
    )
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
from {parent} import {module}
{module}.serve({arguments})
"""
_SIZES = struct.Struct("!II")  # sizes of the JSON and of the binary data of a message


def decode(data: bytes, spec: Preprocessing) -> NDArray[np.uint8]:
    """Pixels of an encoded cover, uint8 [side, side, 3]. Raises CoverError."""
    return _process_decoder().decode(data, spec)


def validate_and_reencode(data: bytes, max_side: int | None) -> bytes:
    """Check that a cover decodes, and return the bytes to store; see image_decoding."""
    return _process_decoder().validate_and_reencode(data, max_side)


class Decoder:
    """A child process that decodes covers, started on first use. Thread-safe."""

    def __init__(self, *, seconds: float = DECODE_SECONDS, memory: int = MEMORY_BYTES) -> None:
        """seconds: CPU time per cover. memory: address space of the child, in bytes."""
        self._seconds = seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes, spec: Preprocessing) -> NDArray[np.uint8]:
        """Pixels of an encoded cover, uint8 [side, side, 3]. Raises CoverError."""
        _, pixels = self._request({"spec": spec.to_json()}, data)
        return np.frombuffer(pixels, np.uint8).reshape(spec.side, spec.side, 3)

    def validate_and_reencode(self, data: bytes, max_side: int | None) -> bytes:
        """Check that a cover decodes, and return the bytes to store; see image_decoding."""
        answer, reencoded = self._request({"max_side": max_side}, data)
        return data if answer["unchanged"] else bytes(reencoded)

    def close(self) -> None:
        """Stop the child. The next cover starts a new one."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
            self._child = None

    def _request(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        image_decoding.check_size(data)
        failure = CoverError("decoder_crashed")
        with self._lock:
            for _ in range(_ATTEMPTS):
                child, self._child = self._child or _Child(self._memory), None
                try:
                    answer, body = child.request(request, data, self._seconds)
                    # Only now: else, after an interrupt, the next cover would get this answer.
                    self._child = child
                    break
                except (TimeoutError, EOFError, ConnectionError) as error:
                    code = child.kill()
                    late = isinstance(error, TimeoutError) or code == -signal.SIGALRM
                    failure = _hung(self._seconds) if late else _crashed(code, self._seconds)
                    if code == -signal.SIGPROF:  # another attempt would exceed the limit, too
                        raise failure from None
                finally:
                    if self._child is None:
                        child.kill()
            else:
                raise failure
        if "reason" in answer:
            raise CoverError(answer["reason"], answer["detail"])
        return answer, body


_decoders: dict[int, Decoder] = {}


def _process_decoder() -> Decoder:
    """The decoder of this process: a forked process must not use its parent's."""
    decoder = _decoders.get(os.getpid())
    if decoder is None:
        decoder = _decoders.setdefault(os.getpid(), Decoder())
        atexit.register(decoder.close)
    return decoder


def _hung(seconds: float) -> CoverError:
    return CoverError("decode_timeout", f"the decoder hung for {_WALL_CLOCK_FACTOR * seconds:g} s")


def _crashed(code: int, seconds: float) -> CoverError:
    """The error for a child that exited with `code`."""
    if code == -signal.SIGPROF:
        return CoverError("decode_timeout", f"not decoded in {seconds:g} s of CPU time")
    return CoverError("decoder_crashed", f"the decoder crashed: {_exit_reason(code)}")


def _exit_reason(code: int) -> str:
    """`code` is negative for a signal, as in subprocess."""
    return str(signal.strsignal(-code)) if code < 0 else f"exit code {code}"


def child_code(module: str, arguments: str = "", packages: dict[str, str] | None = None) -> str:
    """Code for `python -c` that calls `module.serve(arguments)`, a module of this package.

    packages: name -> directory of other packages to import from there. Like this package, they are
    imported by their paths: it may not be installed, and nothing else of the parent's import path
    is added.
    """
    own = Path(__file__).resolve().parents[1]
    directories = (packages or {}) | {own.name: str(own)}
    parent, _, name = module.rpartition(".")
    return _IMPORT_AND_CALL.format(
        packages=directories, parent=parent, module=name, arguments=arguments
    )


def _decoding_packages() -> dict[str, str]:
    """Name -> directory of the packages that the child needs. Python's isolated mode keeps only the
    standard library and installed packages on the import path."""
    import PIL

    return {
        module.__name__: os.path.dirname(os.path.abspath(module.__file__))
        for module in (np, PIL)
        if module.__file__
    }


def _start_error(reason: str) -> CovergenreError:
    return CovergenreError(f"the decoder did not start: {reason}", code="decoder_start")


class _Child:
    """The child process, and the socket that is its standard input."""

    def __init__(self, memory: int) -> None:
        code = child_code(__name__, str(memory), _decoding_packages())
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._socket, child_socket = socket.socketpair()
        with child_socket:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code],
                    stdin=child_socket.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env=environment | _ONE_THREAD,
                )
            except OSError as error:
                self._socket.close()
                raise _start_error(str(error)) from error
        try:
            _receive(self._socket, time.monotonic() + _START_SECONDS)
        except TimeoutError:
            self.kill()
            reason = f"no response in {_START_SECONDS:g} s"
            raise _start_error(f"{reason}{self._last_stderr_line()}") from None
        except (OSError, EOFError):
            # The child closed its socket: it has exited, or is about to.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            reason = _exit_reason(self.kill())
            raise _start_error(f"{reason}{self._last_stderr_line()}") from None
        finally:
            assert self._process.stderr is not None
            self._process.stderr.close()

    def _last_stderr_line(self) -> str:
        """`: ` and the last line of its standard error, if any."""
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def request(
        self, request: dict[str, Any], data: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytearray]:
        """Raises TimeoutError, or EOFError or ConnectionError if the child has exited."""
        deadline = time.monotonic() + _WALL_CLOCK_FACTOR * seconds
        self._socket.settimeout(_WALL_CLOCK_FACTOR * seconds)
        _send(self._socket, request | {"seconds": seconds}, data)
        return _receive(self._socket, deadline)

    def kill(self) -> int:
        """Kill the process if it is running. Returns its exit code."""
        self._process.kill()
        self._socket.close()
        code: int = self._process.wait()
        return code


def _send(connection: socket.socket, header: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    connection.sendall(_SIZES.pack(len(text), len(data)) + text + data)


def _receive(
    connection: socket.socket, deadline: float | None = None
) -> tuple[dict[str, Any], bytearray]:
    """A message. Raises EOFError, or TimeoutError if it is not complete at `deadline`."""
    header, data = _SIZES.unpack(_read_exactly(connection, _SIZES.size, deadline))
    return (
        json.loads(_read_exactly(connection, header, deadline)),
        _read_exactly(connection, data, deadline),
    )


def _read_exactly(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    remaining = memoryview(data)
    while remaining:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        count = connection.recv_into(remaining)
        if not count:
            raise EOFError
        remaining = remaining[count:]
    return data


# Runs in the child process


def serve(memory: int) -> None:
    """Handle requests on standard input, a socket, until it is closed."""
    from PIL import AvifImagePlugin, Image

    connection = socket.socket(fileno=0)
    _set_limits(memory)
    AvifImagePlugin.DEFAULT_MAX_THREADS = (
        1  # one per core would use memory and other workers' cores
    )
    Image.init()  # imports the decoders
    # Discard what libraries print about damaged files; nobody reads it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _send(connection, {})
    libc_errno = _libc_errno()
    while True:
        try:
            request, data = _receive(connection)
        except (EOFError, ConnectionError):
            return
        _set_timers(request["seconds"])
        libc_errno.value = 0
        answer, body = _answer(request, data)
        # Most libraries report a failed allocation as a damaged file; errno tells them apart.
        if answer.get("reason") == "truncated_image" and libc_errno.value == errno.ENOMEM:
            answer["reason"] = "too_much_memory"
        _set_timers(0)
        try:
            _send(connection, answer, body)
        except ConnectionError:
            return


def _set_limits(memory: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, even within C code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS does not enforce the limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _set_timers(seconds: float) -> None:
    """Set the limits of CPU time and wall-clock time; 0 turns them off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds and _WALL_CLOCK_FACTOR * seconds + _ALARM_SECONDS)


def _libc_errno() -> ctypes.c_int:
    """The errno of the C library, which a failed allocation sets."""
    libc = ctypes.CDLL(None)
    location = libc.__error if sys.platform == "darwin" else libc.__errno_location
    location.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes.c_int = location().contents
    return found


def _answer(request: dict[str, Any], received: bytearray) -> tuple[dict[str, Any], bytes]:
    try:
        data = bytes(received)
        if "spec" in request:
            return {}, image_decoding.decode(data, _spec(json.dumps(request["spec"]))).tobytes()
        reencoded = image_decoding.validate_and_reencode(data, request["max_side"])
        unchanged = reencoded is data
        return {"unchanged": unchanged}, b"" if unchanged else reencoded
    except CoverError as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except MemoryError as error:
        return {"reason": "too_much_memory", "detail": image_decoding.one_line(error)}, b""
    except Exception as error:  # unexpected: treated as a crash, but the child can continue
        return {"reason": "decoder_crashed", "detail": image_decoding.one_line(error)}, b""


@lru_cache(maxsize=4)
def _spec(text: str) -> Preprocessing:
    return Preprocessing.from_json(json.loads(text))
