"""Scoring that is hurt for real, at random moments; in the end every album is labelled once.

Drivers get kill -9 and ^C, workers kill -9, and whole Rays are taken away. What happened when is
printed; COVERGENRE_CHAOS_SEED draws other moments. The short form is behind the marker `chaos`; the
long one, twenty of each kind, or COVERGENRE_CHAOS_KILLS, behind `slow`.
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
import pyarrow.parquet as pq
import pytest

from covergenre.demo.sample import write_sample

SEED = int(os.environ.get("COVERGENRE_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("COVERGENRE_CHAOS_KILLS", "20"))
ALBUMS = 400
ROWS = ALBUMS + 2
UNIT_ROWS = 16
HANG_SECONDS = 900.0
"""A guard against hanging; nothing is measured by it."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Covers that decode, some that do not, some that repeat others."""
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
        command += ["--out", str(out), "--unit-rows", str(UNIT_ROWS), "--batch-size", "8", *flags]
        self._log = out.with_name(f"{out.name}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": ""}
            )
        self._family: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """Every process that it has started, Ray's too, and that still runs."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self._family |= {process.pid: process for process in found}
        return [process for process in self._family.values() if process.is_running()]

    def workers(self) -> list[psutil.Process]:
        """Those of Ray that do its work now."""
        found = []
        for process in self.family():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if title.startswith("ray::") and not any(n in title for n in ("IDLE", "Agent")):
                found.append(process)
        return found

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.family()  # while its head is there to tell them
            return False
        return True

    def end(self) -> int:
        """Its exit code. It must leave no process behind."""
        code = self.process.wait(HANG_SECONDS)
        _, alive = psutil.wait_procs(self.family(), HANG_SECONDS)
        assert not alive, alive
        return code

    def said(self) -> str:
        return self._log.read_text()


def contents(out: Path) -> dict[str, str]:
    """Every file of the result by its hash; the ledger without its rate."""
    found = {}
    for folder in ("labels", "rejected", "_state/duplicates"):
        for file in sorted((out / folder).iterdir()):
            name = str(file.relative_to(out))
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    ledger = json.loads((out / "ledger.json").read_text())
    found["ledger"] = json.dumps({**ledger, "covers_per_second": None})
    return found


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    contents: dict[str, str]
    seconds: float
    """That it took: moments are drawn from them."""


@pytest.fixture(scope="module")
def whole(untrained_model: str, catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    began = time.monotonic()
    run = Run(untrained_model, catalog, tmp_path_factory.mktemp("whole") / "labels")
    assert run.end() == 0, run.said()
    seconds = time.monotonic() - began
    ledger = json.loads((run.out / "ledger.json").read_text())
    assert ledger["rows"] == ROWS
    assert (ledger["rejected"], ledger["duplicates"]) == (2, 2)
    assert ledger["scored"] == ALBUMS - 2
    rows = [
        row
        for folder in ("labels", "rejected", "_state/duplicates")
        for row in pq.read_table(run.out / folder, columns=["row"])["row"].to_pylist()
    ]
    assert sorted(rows) == list(range(ROWS))
    print(f"whole: {seconds:.0f} s", flush=True)
    return Whole(contents(run.out), seconds)


def committed(out: Path) -> dict[str, int]:
    """The units that are done: file -> inode, which another write would change."""
    return {file.name: file.stat().st_ino for file in (out / "labels").glob("part-*")}


Hurt = Callable[[Run], None]


def driver(run: Run) -> None:
    run.process.kill()


def interrupt(run: Run) -> None:
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(HANG_SECONDS) in (130, 0), run.said()
    assert "Traceback" not in run.said(), run.said()


def cluster(run: Run) -> None:
    """All of Ray but the driver."""
    for process in run.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def worker(run: Run) -> None:
    """One of Ray's; the run goes on."""
    while not run.ends_within(0.1):
        if found := run.workers():
            found[0].kill()
            return


def ordeal(
    model: str, catalog: Path, out: Path, whole: Whole, harms: list[Hurt], chance: random.Random
) -> None:
    """One job to its end by the same command again and again, hurt while `harms` last."""
    done: dict[str, int] = {}
    code = -1
    while code != 0:
        run = Run(model, catalog, out)
        hurt: Hurt | None = worker
        what = ""
        while hurt is worker:
            moment = chance.uniform(0, whole.seconds)
            hurt = harms.pop() if harms and not run.ends_within(moment) else None
            if hurt:
                hurt(run)
                what += f"{hurt.__name__} after {moment:.1f} s, "
        code = run.end()
        now = committed(out)
        assert done.items() <= now.items(), "a finished unit was done again"
        print(f"{what}exit {code}, {len(now)} of {-(-ROWS // UNIT_ROWS)} units", flush=True)
        done = now
    assert contents(out) == whole.contents


@pytest.mark.chaos
def test_some_of_each(untrained_model: str, catalog: Path, whole: Whole, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    harms: list[Hurt] = [driver, interrupt, cluster, worker]
    chance.shuffle(harms)
    while harms:  # a job may end before its time has come for all
        ordeal(untrained_model, catalog, tmp_path / f"{len(harms)}", whole, harms, chance)


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [driver, interrupt, cluster], ids=lambda f: f.__name__)
def test_many_of_one_kind(
    hurt: Hurt, untrained_model: str, catalog: Path, whole: Whole, tmp_path: Path
) -> None:
    chance = random.Random(f"{SEED}{hurt.__name__}")
    harms = [hurt] * KILLS
    while harms:
        print(f"{KILLS - len(harms)} of {KILLS} done; another job (seed {SEED})", flush=True)
        ordeal(untrained_model, catalog, tmp_path / f"{len(harms)}", whole, harms, chance)


@pytest.mark.slow
def test_workers_that_are_killed_are_made_up_for(
    untrained_model: str, catalog: Path, whole: Whole, tmp_path: Path
) -> None:
    chance = random.Random(f"{SEED}workers")
    made = jobs = 0
    while made < KILLS:
        run = Run(untrained_model, catalog, tmp_path / f"labels-{jobs}")
        jobs += 1
        while made < KILLS and not run.ends_within(chance.uniform(0.2, 5)):
            if workers := run.workers():
                victim = chance.choice(workers)
                print(f"worker {made}: {' '.join(victim.cmdline())[:60]}", flush=True)
                victim.kill()
                made += 1
        assert run.end() == 0, run.said()
        assert contents(run.out) == whole.contents
    print(f"workers: {made} killed over {jobs} jobs (seed {SEED})")


@pytest.fixture
def deadly() -> Iterator[str]:
    """An address: whoever asks for it is killed before there is an answer."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asker = self.client_address[1]
            for process in psutil.process_iter():
                try:
                    ports = [c.laddr.port for c in process.net_connections() if c.laddr]
                except psutil.Error:
                    continue
                if asker in ports and process.pid != os.getpid():
                    process.kill()
                    killed.append(process.pid)

        def log_message(self, *_: object) -> None:
            pass

    killed: list[int] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/cover.jpg"
    server.shutdown()
    thread.join()
    server.server_close()
    assert len(killed) > 3


@pytest.mark.chaos
def test_a_row_that_kills_its_worker_is_set_aside(
    deadly: str, untrained_model: str, catalog: Path, tmp_path: Path
) -> None:
    lines = catalog.read_text().splitlines()[:101]
    folder = str(catalog.parent)
    lines.insert(50, f"poison,{deadly}" + "," * (lines[0].count(",") - 1))
    poisoned = tmp_path / "poisoned.csv"
    poisoned.write_text("\n".join(lines) + "\n")
    run = Run(
        *(
            untrained_model,
            poisoned,
            tmp_path / "labels",
            "--covers",
            folder,
            "--allow-private-addresses",
        )
    )
    assert run.end() == 0, run.said()
    assert "Traceback" not in run.said(), run.said()
    ledger = json.loads((run.out / "ledger.json").read_text())
    assert ledger["reasons"] == {"missing_file": 1, "conflicting_cover": 1, "worker_died": 1}
    assert ledger["scored"] == 98
    rejected = pq.read_table(run.out / "rejected").to_pylist()
    assert [row["row"] for row in rejected if row["reason"] == "worker_died"] == [49]
