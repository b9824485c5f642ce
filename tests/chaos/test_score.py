"""Failures injected into score at random times; in the end every album is labelled once.

Drivers get kill -9 and Ctrl-C, workers kill -9, and whole Rays are killed. Each failure and its
time are printed; COVERGENRE_CHAOS_SEED selects other times. The short form has the marker `chaos`;
the long one, 20 failures of each kind, or COVERGENRE_CHAOS_KILLS, has the marker `slow`.
"""

import contextlib
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from outputs import read_duplicates, read_labels, read_rejected

from covergenre.demo.sample import write_sample

SEED = int(os.environ.get("COVERGENRE_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("COVERGENRE_CHAOS_KILLS", "20"))
ALBUMS = 400
ROWS = ALBUMS + 2
PART_ROWS = 16
HERE: tuple[str, ...] = ()
"""Flags of a run without Ray: the default of small jobs."""
RAY = ("--workers", "1")
TIMEOUT_SECONDS = 900.0
"""Fails a test that hangs; nothing else depends on it."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with a missing cover, a conflicting cover, and duplicates."""
    synthetic_catalog = write_sample(tmp_path_factory.mktemp("catalog"), ALBUMS, seed=0)
    lines = synthetic_catalog.read_text().splitlines()
    header, first, *rest = lines
    rest[40] = rest[40].replace(".jpg", "-missing.jpg")
    rest[90] = rest[90].replace(rest[90].split(",")[0], first.split(",")[0], 1)  # a conflict
    synthetic_catalog.write_text("\n".join([header, first, *rest, first, rest[7]]) + "\n")
    return synthetic_catalog


class Run:
    """`covergenre score` as a user runs it."""

    def __init__(self, model: str, catalog: Path, out: Path, *flags: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "covergenre", "score", model, str(catalog)]
        command += ["--out", str(out), "--part-rows", str(PART_ROWS), "--batch-size", "8", *flags]
        self._log = out.with_name(f"{out.name}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | {"RAY_ADDRESS": ""},
                start_new_session=True,
            )
        self._family: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """Every running process that it has started, including those of Ray."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self._family |= {process.pid: process for process in found}
        return [process for process in self._family.values() if process.is_running()]

    def workers(self) -> list[psutil.Process]:
        """Ray workers that run one of its tasks or actors now; without Ray, its children."""
        found = []
        for process in self.family():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            in_ray = title.startswith("ray::") and not any(n in title for n in ("IDLE", "Agent"))
            if in_ray or "local_tasks" in title:
                found.append(process)
        return found

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.family()  # while the head process can still list them
            return False
        return True

    def end(self) -> int:
        """Its exit code. It must leave no process behind."""
        code = self.process.wait(TIMEOUT_SECONDS)
        _, alive = psutil.wait_procs(self.family(), TIMEOUT_SECONDS)
        assert not alive, alive
        return code

    def output(self) -> str:
        return self._log.read_text()


def contents(out: Path) -> dict[str, str]:
    """Every file of the result by its hash; the ledger without its rate and times."""
    found = {}
    for file in sorted(file for file in out.rglob("part-*") if "plan" not in file.parts):
        name = str(file.relative_to(out))
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    ledger = json.loads((out / "_ledger.json").read_text())
    found["ledger"] = json.dumps(
        ledger | dict.fromkeys(("covers_per_second", "seconds", "bottleneck"))
    )
    return found


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run without Ray."""

    contents: dict[str, str]
    seconds: float
    """How long it took."""

    def longest_delay(self, flags: tuple[str, ...]) -> float:
        """Seconds after its start in which a run may be hit; Ray takes some to start, too."""
        return self.seconds * (3 if flags == RAY else 1)


@pytest.fixture(scope="module")
def reference(
    untrained_model: str, catalog: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    began = time.monotonic()
    run = Run(untrained_model, catalog, tmp_path_factory.mktemp("reference") / "labels")
    assert run.end() == 0, run.output()
    seconds = time.monotonic() - began
    ledger = json.loads((run.out / "_ledger.json").read_text())
    assert ledger["rows"] == ROWS
    assert (ledger["rejected"], ledger["duplicates"]) == (2, 2)
    assert ledger["scored"] == ALBUMS - 2
    rows = [
        row["row"]
        for read in (read_labels, read_rejected, read_duplicates)
        for row in read(run.out)
    ]
    assert sorted(rows) == list(range(ROWS))
    print(f"reference: {seconds:.0f} s", flush=True)
    return Reference(contents(run.out), seconds)


def committed(out: Path) -> dict[str, int]:
    """Finished output parts: file -> inode, which another write would change."""
    return {file.name: file.stat().st_ino for file in out.glob("part-*.parquet")}


Failure = Callable[[Run], None]


def kill_driver(run: Run) -> None:
    run.process.kill()


def interrupt_driver(run: Run) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.process.wait(TIMEOUT_SECONDS) in (130, 0), run.output()
    assert "Traceback" not in run.output(), run.output()


def kill_children(run: Run) -> None:
    """Kill all processes except the driver: all of Ray."""
    for process in run.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_worker(run: Run) -> None:
    """Kill one worker; the run continues."""
    while not run.ends_within(0.1):
        if found := run.workers():
            found[0].kill()
            return


def run_with_failures(
    model: str,
    catalog: Path,
    out: Path,
    reference: Reference,
    failures: list[Failure],
    rng: random.Random,
    flags: tuple[str, ...] = RAY,
) -> None:
    """Repeat the same command to its end, with failures while `failures` last."""
    done: dict[str, int] = {}
    code = -1
    while code != 0:
        run = Run(model, catalog, out, *flags)
        failure: Failure | None = kill_worker
        what = ""
        while failure is kill_worker:
            delay = rng.uniform(0, reference.longest_delay(flags))
            failure = failures.pop() if failures and not run.ends_within(delay) else None
            if failure:
                failure(run)
                what += f"{failure.__name__} after {delay:.1f} s, "
        code = run.end()
        now = committed(out)
        assert done.items() <= now.items(), "a finished output part was written again"
        print(f"{what}exit {code}, {len(now)} of {-(-ROWS // PART_ROWS)} parts", flush=True)
        done = now
    assert contents(out) == reference.contents


@pytest.mark.chaos
@pytest.mark.parametrize("flags", [HERE, RAY], ids=["here", "ray"])
def test_one_failure_of_each_kind(
    flags: tuple[str, ...],
    untrained_model: str,
    catalog: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    rng = random.Random(SEED)
    failures: list[Failure] = [kill_driver, kill_children, kill_worker]
    if flags == HERE:  # with Ray, Ctrl-C is tested with train, and in the long form
        failures.append(interrupt_driver)
    rng.shuffle(failures)
    while failures:  # a job may end before all failures had their time
        run_with_failures(
            untrained_model, catalog, tmp_path / f"{len(failures)}", reference, failures, rng, flags
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure", [kill_driver, interrupt_driver, kill_children], ids=lambda f: f.__name__
)
def test_many_failures_of_one_kind(
    failure: Failure, untrained_model: str, catalog: Path, reference: Reference, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED}{failure.__name__}")
    failures = [failure] * KILLS
    while failures:
        print(f"{KILLS - len(failures)} of {KILLS} done; another job (seed {SEED})", flush=True)
        run_with_failures(
            untrained_model, catalog, tmp_path / f"{len(failures)}", reference, failures, rng
        )


@pytest.mark.slow
def test_killed_workers_are_restarted(
    untrained_model: str, catalog: Path, reference: Reference, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED}workers")
    made = jobs = 0
    while made < KILLS:
        run = Run(untrained_model, catalog, tmp_path / f"labels-{jobs}", *RAY)
        jobs += 1
        while made < KILLS and not run.ends_within(rng.uniform(0.2, 5)):
            if workers := run.workers():
                victim = rng.choice(workers)
                print(f"worker {made}: {' '.join(victim.cmdline())[:60]}", flush=True)
                victim.kill()
                made += 1
        assert run.end() == 0, run.output()
        assert contents(run.out) == reference.contents
    print(f"workers: {made} killed over {jobs} jobs (seed {SEED})")


@pytest.fixture
def killer_url() -> Iterator[str]:
    """A URL: the process that requests it is killed before there is a response."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            client_port = self.client_address[1]
            for process in psutil.process_iter():
                try:
                    ports = [c.laddr.port for c in process.net_connections() if c.laddr]
                except psutil.Error:
                    continue
                if client_port in ports and process.pid != os.getpid():
                    process.kill()
                    killed.append(process.pid)

        def log_message(self, *_: object) -> None:
            pass

    killed: list[int] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/cover.jpg"
    server.shutdown()
    thread.join()
    server.server_close()
    assert len(killed) > 3


@pytest.mark.chaos
@pytest.mark.parametrize("flags", [HERE, RAY], ids=["here", "ray"])
def test_row_that_kills_its_worker_is_rejected(
    flags: tuple[str, ...], killer_url: str, untrained_model: str, catalog: Path, tmp_path: Path
) -> None:
    lines = catalog.read_text().splitlines()[:101]
    folder = str(catalog.parent)
    lines.insert(50, f"poison,{killer_url}" + "," * (lines[0].count(",") - 1))
    poisoned = tmp_path / "poisoned.csv"
    poisoned.write_text("\n".join(lines) + "\n")
    allowed = ("--covers", folder, "--allow-private-addresses")
    run = Run(untrained_model, poisoned, tmp_path / "labels", *allowed, *flags)
    assert run.end() == 0, run.output()
    assert "Traceback" not in run.output(), run.output()
    ledger = json.loads((run.out / "_ledger.json").read_text())
    assert ledger["reasons"] == {"missing_file": 1, "conflicting_cover": 1, "worker_died": 1}
    assert ledger["scored"] == 98
    rejected = read_rejected(run.out)
    assert [row["row"] for row in rejected if row["reason"] == "worker_died"] == [49]
