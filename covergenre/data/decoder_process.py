"""Decodes covers in a child process, so that a file that crashes the decoder harms nothing else.

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
"""CPU time after which a cover is set aside; the largest that are opened take 1 to 4.
Not time by the clock: on a machine that is busy, a good cover takes many times as long."""

MEMORY_BYTES = 3 * 2**30
"""Address space of the child, of which 0.1 GiB are Python's (Linux only)."""

_CLOCK = 4
"""Times as long by the clock, and a child that stands still is given up."""
_ATTEMPTS = 2
"""Before a cover is blamed: the child may have been killed, or the machine have stood still."""
_START_SECONDS = 120.0
_END_SECONDS = 10.0
"""For a child that failed to start to end by itself, with its exit code."""
_ALARM_SECONDS = 5.0
"""After the parent's patience: the child ends itself where no parent is left to do it."""

# What a child is started with. Nothing else: the environment may hold credentials, and a decoder
# that a hostile cover took over should find none.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
# Python's isolated mode leaves the standard library and installed packages on the import path. No
# directory of the parent's is added, be it the current one: only these packages, each by its path.
_IMPORT_AND_SERVE = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
for name, directory in {packages}.items():
    spec = spec_from_file_location(
        name, directory + "/__init__.py", submodule_search_locations=[directory]
    )
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
from covergenre.data import decoder_process
decoder_process.serve({memory})
"""
_SIZES = struct.Struct("!II")  # of a message's JSON, and of the bytes that go with it


def decode(data: bytes, spec: Preprocessing) -> NDArray[np.uint8]:
    """Pixels of an encoded cover, uint8 [side, side, 3]. Raises CoverError."""
    return _own_decoder().decode(data, spec)


def validate_and_reencode(data: bytes, max_side: int | None) -> bytes:
    """Prove that a cover decodes, and give the bytes to store; see image_decoding."""
    return _own_decoder().validate_and_reencode(data, max_side)


class Decoder:
    """A child process that decodes, started when first needed. Threads may share it."""

    def __init__(self, *, seconds: float = DECODE_SECONDS, memory: int = MEMORY_BYTES) -> None:
        """seconds: CPU time for each cover. memory: address space of the child, in bytes."""
        self._seconds = seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def decode(self, data: bytes, spec: Preprocessing) -> NDArray[np.uint8]:
        """Pixels of an encoded cover, uint8 [side, side, 3]. Raises CoverError."""
        _, pixels = self._ask({"spec": spec.to_json()}, data)
        return np.frombuffer(pixels, np.uint8).reshape(spec.side, spec.side, 3)

    def validate_and_reencode(self, data: bytes, max_side: int | None) -> bytes:
        """Prove that a cover decodes, and give the bytes to store; see image_decoding."""
        answer, reencoded = self._ask({"max_side": max_side}, data)
        return data if answer["kept"] else bytes(reencoded)

    def close(self) -> None:
        """End the child; the next cover would start another."""
        with self._lock:
            if self._child is not None:
                self._child.end()
            self._child = None

    def _ask(self, question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        image_decoding.check_size(data)
        failure = CoverError("decoder_crashed")
        with self._lock:
            for _ in range(_ATTEMPTS):
                child, self._child = self._child or _Child(self._memory), None
                try:
                    answer, body = child.ask(question, data, self._seconds)
                    # Kept only now: a child whose answer was not waited for would give it to
                    # the next cover.
                    self._child = child
                    break
                except (TimeoutError, EOFError, ConnectionError) as error:
                    code = child.end()
                    late = isinstance(error, TimeoutError) or code == -signal.SIGALRM
                    failure = _stood_still(self._seconds) if late else _died(code, self._seconds)
                    if code == -signal.SIGPROF:  # spent: the next child would spend as much
                        raise failure from None
                finally:
                    if self._child is None:
                        child.end()
            else:
                raise failure
        if "reason" in answer:
            raise CoverError(answer["reason"], answer["detail"])
        return answer, body


_decoders: dict[int, Decoder] = {}


def _own_decoder() -> Decoder:
    """Of this process: after a fork, the parent's child is not the child's to ask."""
    decoder = _decoders.get(os.getpid())
    if decoder is None:
        decoder = _decoders.setdefault(os.getpid(), Decoder())
        atexit.register(decoder.close)
    return decoder


def _stood_still(seconds: float) -> CoverError:
    return CoverError("decode_timeout", f"the decoder stood still for {_CLOCK * seconds:g} s")


def _died(code: int, seconds: float) -> CoverError:
    """Why, of the exit code of a child that ended of itself or by a signal."""
    if code == -signal.SIGPROF:
        return CoverError("decode_timeout", f"not decoded in {seconds:g} s of CPU time")
    return CoverError("decoder_crashed", f"the decoder ended: {_how_it_ended(code)}")


def _how_it_ended(code: int) -> str:
    """`code` is negative for a signal, as subprocess has it."""
    return str(signal.strsignal(-code)) if code < 0 else f"exit code {code}"


def _package_directories() -> dict[str, str]:
    """Name of each package that the child imports from where this process has it."""
    import PIL

    own = Path(__file__).resolve().parents[1]
    return {
        module.__name__: os.path.dirname(os.path.abspath(module.__file__))
        for module in (np, PIL)
        if module.__file__
    } | {own.name: str(own)}


class _Child:
    """The process, and the socket that is its standard input."""

    def __init__(self, memory: int) -> None:
        code = _IMPORT_AND_SERVE.format(packages=_package_directories(), memory=memory)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._socket, its = socket.socketpair()
        with its:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code],
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env=environment | _ONE_THREAD,
                )
            except OSError as error:
                self._socket.close()
                raise CovergenreError(f"the decoder did not start: {error}") from error
        try:
            _receive(self._socket, time.monotonic() + _START_SECONDS)
        except TimeoutError:
            self.end()
            words = self._last_words()
            raise CovergenreError(
                f"the decoder did not start: no answer in {_START_SECONDS:g} s{words}"
            ) from None
        except (OSError, EOFError):
            # It has closed its socket, and is about to end, or has ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
            how = _how_it_ended(self.end())
            raise CovergenreError(f"the decoder did not start: {how}{self._last_words()}") from None
        finally:
            assert self._process.stderr is not None
            self._process.stderr.close()

    def _last_words(self) -> str:
        """`: ` and the last line that it wrote on its standard error, if any."""
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def ask(
        self, question: dict[str, Any], data: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytearray]:
        """Raises TimeoutError; EOFError or ConnectionError where the child has ended."""
        until = time.monotonic() + _CLOCK * seconds
        self._socket.settimeout(_CLOCK * seconds)
        _send(self._socket, question | {"seconds": seconds}, data)
        return _receive(self._socket, until)

    def end(self) -> int:
        """End the process, whatever it does. Its exit code: of its own end, if that was first."""
        self._process.kill()
        self._socket.close()
        code: int = self._process.wait()
        return code


def _send(connection: socket.socket, said: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(said).encode()
    connection.sendall(_SIZES.pack(len(text), len(data)) + text + data)


def _receive(
    connection: socket.socket, until: float | None = None
) -> tuple[dict[str, Any], bytearray]:
    """A message. Raises EOFError, or TimeoutError where it is not whole `until` then."""
    said, data = _SIZES.unpack(_exactly(connection, _SIZES.size, until))
    return json.loads(_exactly(connection, said, until)), _exactly(connection, data, until)


def _exactly(connection: socket.socket, size: int, until: float | None) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.001))
        count = connection.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return data


# In the child


def serve(memory: int) -> None:
    """Answer what comes on standard input, a socket, until it is closed."""
    from PIL import AvifImagePlugin, Image

    connection = socket.socket(fileno=0)
    _confine(memory)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a thread a core takes memory, and cores of others
    Image.init()  # imports the decoders
    # From here on nobody reads what libraries say of damaged files.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _send(connection, {})
    errno_of_c = _errno_of_c()
    while True:
        try:
            question, data = _receive(connection)
        except (EOFError, ConnectionError):
            return
        _set_timers(question["seconds"])
        errno_of_c.value = 0
        answer, body = _answer(question, data)
        # Most libraries take a refused allocation for a damaged file. The C library tells.
        if answer.get("reason") == "truncated_image" and errno_of_c.value == errno.ENOMEM:
            answer["reason"] = "too_much_memory"
        _set_timers(0)
        try:
            _send(connection, answer, body)
        except ConnectionError:
            return


def _confine(memory: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, in the midst of C code too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS has the limit, and does not keep it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _set_timers(seconds: float) -> None:
    """Of CPU time, and of the clock. 0: off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds and _CLOCK * seconds + _ALARM_SECONDS)


def _errno_of_c() -> ctypes.c_int:
    """The C library's own errno: a failing allocation sets it, and a good one lets it be."""
    libc = ctypes.CDLL(None)
    place = libc.__error if sys.platform == "darwin" else libc.__errno_location
    place.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes.c_int = place().contents
    return found


def _answer(question: dict[str, Any], received: bytearray) -> tuple[dict[str, Any], bytes]:
    try:
        data = bytes(received)
        if "spec" in question:
            return {}, image_decoding.decode(data, _spec(json.dumps(question["spec"]))).tobytes()
        reencoded = image_decoding.validate_and_reencode(data, question["max_side"])
        kept = reencoded is data
        return {"kept": kept}, b"" if kept else reencoded
    except CoverError as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except MemoryError as error:
        return {"reason": "too_much_memory", "detail": image_decoding.one_line(error)}, b""
    except Exception as error:  # nothing known: as good as a crash, and the child is still well
        return {"reason": "decoder_crashed", "detail": image_decoding.one_line(error)}, b""


@lru_cache(maxsize=4)
def _spec(text: str) -> Preprocessing:
    return Preprocessing.from_json(json.loads(text))
