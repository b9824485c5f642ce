"""Decoding in a child process: crashes, timeouts, memory limits, isolation."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from images import encoded, many_scans
from PIL import Image

import covergenre
from covergenre.data import decoder_process, image_decoding
from covergenre.data.decoder_process import Decoder
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.errors import CovergenreError

SMALL = Preprocessing(side=16)


def gradient(side: int = 64) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


GOOD = encoded(gradient(), "JPEG")


@pytest.fixture(scope="module")
def endless() -> bytes:
    """A file of 3 MB that takes 20 minutes to decode."""
    return many_scans(200_000)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with contextlib.closing(Decoder()) as made:
        yield made


def reason(action: Callable[[], object]) -> CoverError:
    with pytest.raises(CoverError) as caught:
        action()
    return caught.value


def children() -> set[psutil.Process]:
    """Running decoders of this process."""
    return {
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "decoder_process.serve" in " ".join(child.cmdline())
    }


def child_of(decoder: Decoder) -> psutil.Process:
    before = children()
    decoder.decode(GOOD, SMALL)
    (child,) = children() - before
    return child


@contextlib.contextmanager
def signalled(signal_number: int, times: int, before: set[psutil.Process]) -> Iterator[list[int]]:
    """Send a signal to `times` new decoders while they decode; yields the list of their pids."""
    hit: list[int] = []
    over = threading.Event()

    def send() -> None:
        while len(hit) < times and not over.wait(0.01):
            for child in children() - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # starting takes 0.2 s, and no other cover takes this long
                    if child.pid not in hit and child.cpu_times().user > 0.5:
                        child.send_signal(signal_number)
                        hit.append(child.pid)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield hit
    finally:
        over.set()
        thread.join()


# Equal to decoding in this process


def test_results_equal_those_of_image_decoding(decoder: Decoder) -> None:
    for form, side in itertools.product(("PNG", "JPEG", "WEBP", "GIF", "TIFF"), (1, 16, 300, 700)):
        data = encoded(gradient(side), form)
        for spec in (SMALL, Preprocessing()):
            assert np.array_equal(decoder.decode(data, spec), image_decoding.decode(data, spec))
        for max_side in (None, 100, 300):
            assert decoder.validate_and_reencode(
                data, max_side
            ) == image_decoding.validate_and_reencode(data, max_side)
    assert len(children()) == 1


def test_rejections_equal_those_of_image_decoding(decoder: Decoder) -> None:
    for data in (b"", b"\0", b"<html>", GOOD[:-99], GOOD[:30], b"GIF89a"):
        for ours, plain in (
            (partial(decoder.decode, data, SMALL), partial(image_decoding.decode, data, SMALL)),
            (
                partial(decoder.validate_and_reencode, data, 300),
                partial(image_decoding.validate_and_reencode, data, 300),
            ),
        ):
            refused, expected = reason(ours), reason(plain)
            assert (refused.reason, refused.detail) == (expected.reason, expected.detail)


def test_too_large_file_is_not_sent_to_the_child(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_decoding, "MAX_BYTES", len(GOOD) - 1)
    assert reason(lambda: decoder.decode(GOOD, SMALL)).reason == "file_too_large"
    assert not children()


def test_child_is_reused(decoder: Decoder) -> None:
    child = child_of(decoder)
    for data in (GOOD, GOOD[:-99], GOOD, b"no image", GOOD):
        with contextlib.suppress(CoverError):
            decoder.decode(data, SMALL)
            decoder.validate_and_reencode(data, 10)
    assert children() == {child}
    decoder.close()
    assert not children()
    assert decoder.decode(GOOD, SMALL).shape == (16, 16, 3)


def test_threads_share_a_decoder(decoder: Decoder) -> None:
    levels = list(range(0, 256, 3))
    data = [encoded(Image.new("L", (40, 40), level)) for level in levels]
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda one: decoder.decode(one, SMALL), data))
    assert [int(pixels.max()) for pixels in seen] == levels
    assert [int(pixels.min()) for pixels in seen] == levels
    assert len(children()) == 1


# Crashes, timeouts, memory


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_cover_that_crashes_the_decoder_is_rejected(
    decoder: Decoder, endless: bytes, number: signal.Signals
) -> None:
    """A signal, as from a crash in native code; after two, the cover is rejected."""
    with signalled(number, times=2, before=children()) as hit:
        refused = reason(lambda: decoder.decode(endless, SMALL))
    assert refused.reason == "decoder_crashed"
    assert str(signal.strsignal(number)) in refused.detail
    assert len(set(hit)) == 2
    assert np.array_equal(decoder.decode(GOOD, SMALL), image_decoding.decode(GOOD, SMALL))


def test_cover_is_decoded_again_if_the_decoder_is_killed(decoder: Decoder) -> None:
    slow = many_scans(200)
    with signalled(signal.SIGKILL, times=1, before=children()) as hit:
        pixels = decoder.decode(slow, SMALL)
    assert len(hit) == 1
    assert np.array_equal(pixels, image_decoding.decode(slow, SMALL))


def test_decoder_killed_between_covers_is_replaced(decoder: Decoder) -> None:
    child = child_of(decoder)
    child.kill()
    assert decoder.decode(GOOD, SMALL).shape == (16, 16, 3)
    assert child not in children()


def test_cover_that_takes_too_long_is_rejected(
    endless: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, the limit of wall-clock time would be exceeded first.
    monkeypatch.setattr(decoder_process, "_WALL_CLOCK_FACTOR", 60)
    with contextlib.closing(Decoder(seconds=0.5)) as decoder:
        child = child_of(decoder)
        for action in (
            lambda: decoder.decode(endless, SMALL),
            lambda: decoder.validate_and_reencode(endless, 300),
        ):
            refused = reason(action)
            assert refused.reason == "decode_timeout"
            assert "0.5 s" in refused.detail
        assert child not in children()
        assert decoder.validate_and_reencode(GOOD, 300) == GOOD


def test_suspended_decoder_is_replaced() -> None:
    with contextlib.closing(Decoder(seconds=0.5)) as decoder:
        child = child_of(decoder)
        child.suspend()
        assert decoder.decode(GOOD, SMALL).shape == (16, 16, 3)
        assert child not in children()


@pytest.fixture(scope="module")
def small_memory() -> int:
    """Bytes of address space that suffice for a small cover only."""
    with contextlib.closing(Decoder()) as decoder:
        return int(child_of(decoder).memory_info().vms) + 20 * 2**20


LARGE = Image.linear_gradient("L").resize((3000, 3000))


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {"method": 0}),
        ("AVIF", "RGB", {"speed": 10}),
        ("JPEG2000", "L", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("GIF", "L", {}),
        ("BMP", "L", {}),
    ],
)
def test_cover_that_takes_too_much_memory_is_rejected(
    small_memory: int, form: str, mode: str, options: dict[str, Any]
) -> None:
    """Also if the library reports a damaged file."""
    data = encoded(LARGE.convert(mode), form, **options)
    with contextlib.closing(Decoder(memory=small_memory)) as decoder:
        child = child_of(decoder)
        assert reason(lambda: decoder.validate_and_reencode(data, 1500)).reason == "too_much_memory"
        assert decoder.decode(GOOD, SMALL).shape == (16, 16, 3)
        # the child has not crashed, and a damaged file is still told from a lack of memory
        assert children() == {child}
        assert reason(lambda: decoder.decode(GOOD[:-99], SMALL)).reason == "truncated_image"
    with contextlib.closing(Decoder()) as decoder:
        assert len(decoder.validate_and_reencode(data, 1500)) > 100


def test_interrupted_cover_does_not_affect_the_next_one() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    slow = many_scans(200)
    over = threading.Event()
    before = signal.signal(signal.SIGUSR1, interrupt)
    with contextlib.closing(Decoder()) as decoder:
        child = child_of(decoder)

        def send() -> None:
            while child.cpu_times().user < 0.5:
                over.wait(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                decoder.decode(slow, SMALL)
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, before)
        assert np.array_equal(decoder.decode(GOOD, SMALL), image_decoding.decode(GOOD, SMALL))
        assert child not in children()


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo one line >&2; echo no such module >&2; exit 3", "exit code 3: no such module"),
        ("echo cause >&2; echo >&2; exit 1", "exit code 1: cause"),
        ("exit 0", "exit code 0"),
        ("kill -KILL $$", "Killed"),
    ],
)
def test_error_has_the_cause_if_the_decoder_does_not_start(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, cause: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(CovergenreError) as caught:
        decoder.decode(GOOD, SMALL)
    assert caught.value.code == "decoder_start" and str(caught.value).endswith(f": {cause}")
    monkeypatch.undo()
    assert decoder.decode(GOOD, SMALL).shape == (16, 16, 3)


def test_decoder_that_cannot_be_spawned_is_an_error(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CovergenreError, match="/nowhere/python") as caught:
        decoder.decode(GOOD, SMALL)
    assert caught.value.code == "decoder_start"


def test_decoder_that_does_not_respond_is_an_error(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(decoder_process, "_START_SECONDS", 0.1)
    with pytest.raises(CovergenreError, match=r"0\.1 s$") as caught:
        decoder.decode(GOOD, SMALL)
    assert caught.value.code == "decoder_start"


def test_decoder_imports_nothing_from_the_import_path_of_its_parent(tmp_path: Path) -> None:
    """PIL imports defusedxml and others if they are installed."""
    for name in ("token", "string", "random", "numpy", "PIL", "covergenre", "defusedxml", "cffi"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write('{name}')"
        )
    done = run(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        sys.path.append({str(tmp_path)!r})
        print(decoder_process.decode(encoded(Image.new("RGB", (9, 9)), "WEBP"), SMALL).shape)
        """,
        cwd=tmp_path.parent,
    )
    assert done.stdout == "(16, 16, 3)\n", done.stderr
    assert not (tmp_path / "ran").exists()


# Isolation


def run(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    prelude = """
        import io, os, sys, threading
        from PIL import Image
        from covergenre.data import decoder_process, image_decoding
        from covergenre.data.image_decoding import CoverError, Preprocessing
        def encoded(image, form="PNG", **options):
            out = io.BytesIO()
            image.save(out, form, **options)
            return out.getvalue()
        SMALL = Preprocessing(side=16)
        GOOD = encoded(Image.new("RGB", (20, 20), (1, 2, 3)))
    """
    text = textwrap.dedent(prelude) + textwrap.dedent(script)
    command = [sys.executable, "-c", text]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_decoder_prints_nothing() -> None:
    """libtiff prints warnings to standard error."""
    script = """
        data = bytearray(encoded(Image.new("L", (600, 600), 7), "TIFF", compression="tiff_lzw"))
        data[12:400] = bytes(388)
        try:
            MODULE.decode(bytes(data), SMALL)
        except CoverError as error:
            print(error.reason)
    """
    plain = run(script.replace("MODULE", "image_decoding"))
    assert plain.stdout == "truncated_image\n" and plain.stderr
    child = run(script.replace("MODULE", "decoder_process"))
    assert (child.stdout, child.stderr) == ("truncated_image\n", "")


def test_decoder_exits_with_its_parent() -> None:
    done = run(
        """
        assert decoder_process.decode(GOOD, SMALL).shape == (16, 16, 3)
        print(decoder_process._process_decoder()._child._process.pid)
        """
    )
    assert done.stderr == ""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(60)


def test_decoder_exits_when_its_parent_is_killed(endless: bytes, tmp_path: Path) -> None:
    """Whether it is idle or decoding."""
    (tmp_path / "endless.jpg").write_bytes(endless)
    script = f"""
        import sys
        from pathlib import Path
        from covergenre.data.image_decoding import Preprocessing
        from covergenre.data.decoder_process import Decoder
        decoders = [Decoder(seconds=1), Decoder(seconds=1)]
        data = Path({str(tmp_path / "endless.jpg")!r}).read_bytes()
        for decoder in decoders:
            decoder.validate_and_reencode({GOOD!r}, None)
        print("ready", flush=True)
        decoders[0].decode(data, Preprocessing())
        sys.stdin.read()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    orphans = psutil.Process(parent.pid).children()
    assert len(orphans) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.wait(60)
        assert not orphan.is_running()


def test_decoder_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    """It imports the package that its parent imported, wherever that is."""
    packages, here = tmp_path / "packages", tmp_path / "here"
    shutil.copytree(Path(covergenre.__file__).parent, packages / "covergenre")
    with (packages / "covergenre" / "data" / "image_decoding.py").open("a") as file:
        file.write("\nMAX_PIXELS = 100\n")
    here.mkdir()
    for name in ("numpy", "PIL", "json", "covergenre"):
        (here / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    script = f"""
        import sys
        sys.path[:0] = [{str(packages)!r}]
        sys.path.remove("")
        from covergenre.data import decoder_process, image_decoding
        assert image_decoding.__file__.startswith({str(packages)!r})
        sys.path.insert(1, "")
        try:
            decoder_process.decode({encoded(gradient(11))!r}, image_decoding.Preprocessing(side=16))
        except image_decoding.CoverError as error:
            print(error.reason)
        spec = image_decoding.Preprocessing(side=16)
        print(decoder_process.decode({encoded(gradient(10))!r}, spec).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": "", "PYTHONSTARTUP": ""},
    )
    assert done.stderr == ""
    assert done.stdout == "too_many_pixels\n(16, 16, 3)\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_environment_of_the_decoder_has_no_credentials(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "AWS_SECRET_ACCESS_KEY" not in child_of(decoder).environ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoder_has_one_thread(decoder: Decoder) -> None:
    child = child_of(decoder)
    decoder.decode(encoded(gradient(900), "AVIF", speed=10), SMALL)
    assert child.num_threads() == 1


def test_forked_process_gets_its_own_decoder() -> None:
    """Also if another thread holds the lock during the fork."""
    done = run(
        """
        slow = encoded(Image.new("L", (4000, 4000), 99), "JPEG", progressive=True)
        last = slow.rindex(b"\\xff\\xda")
        slow = slow[:last] + slow[last:-2] * 150 + slow[-2:]
        mine = decoder_process._process_decoder()
        mine.decode(GOOD, SMALL)
        child = mine._child
        thread = threading.Thread(target=mine.decode, args=(slow, SMALL))
        thread.start()
        while mine._child is not None:
            pass
        pid = os.fork()
        if pid == 0:
            good = decoder_process.decode(GOOD, SMALL).shape == (16, 16, 3)
            own = decoder_process._process_decoder() is not mine
            os._exit(0 if good and own else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert thread.is_alive()
        thread.join()
        assert mine._child is child
        assert decoder_process.decode(GOOD, SMALL).shape == (16, 16, 3)
        print("good")
        """
    )
    assert (done.stdout, done.stderr) == ("good\n", "")


def test_functions_of_the_module_decode() -> None:
    assert np.array_equal(decoder_process.decode(GOOD, SMALL), image_decoding.decode(GOOD, SMALL))
    assert decoder_process.validate_and_reencode(GOOD, 300) == GOOD
    decoder_process._process_decoder().close()
