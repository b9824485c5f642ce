"""Training that is hurt for real, again and again, at random moments; it must end as if it was not.

Workers and drivers get kill -9, drivers ^C, and nodes are taken away. What happened when is
printed; COVERGENRE_CHAOS_SEED draws other moments. The short form is behind the marker `chaos`, the
long one, ten of each kind and three nodes, behind `slow`.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from covergenre.models.bundle import read_bundle
from covergenre.training.checkpoints import newest

SEED = int(os.environ.get("COVERGENRE_CHAOS_SEED", "0"))
EPOCHS = 4
STEPS = 14  # of an epoch
SETTINGS = [
    "--model",
    "tiny",
    "--epochs",
    str(EPOCHS),
    "--batch-size",
    "9",
    "--shuffle-window",
    "2",
]
HANG_SECONDS = 600.0
MARK = "COVERGENRE_CHAOS_RUN"


@pytest.fixture(scope="module")
def whole(dataset: Path) -> Path:
    """An uninterrupted run."""
    out = dataset.with_name("whole")
    Driver(dataset, out).finish()
    assert len(losses(out)) == EPOCHS * STEPS
    return out


def losses(model: Path) -> list[float]:
    lines = [json.loads(line) for line in (model / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def history(model: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (model / "history.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    return [{name: v for name, v in line.items() if name not in timed} for line in lines]


def weights_id(model: Path) -> str:
    return read_bundle(str(model)).weights_id


def latest_step(out: Path) -> int:
    names = out.with_name(f"{out.name}.training").glob("checkpoints/step-*")
    return max((int(name.name.split("-")[1]) for name in names), default=0)


def step_losses(out: Path) -> list[float]:
    """Of an unfinished run."""
    folder = f"{out}.training/checkpoints"
    found = newest(folder, out.parent, print)
    assert found is not None
    losses: list[float] = found.state()["step_losses"]
    return losses


class Driver:
    """`covergenre train` as a user runs it, in a terminal of its own."""

    def __init__(self, dataset: Path, out: Path, *flags: str, address: str = "") -> None:
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        command = [sys.executable, "-m", "covergenre", "train", str(dataset), "--out", str(out)]
        self._command = [*command, *SETTINGS, *flags]
        self._environment = os.environ | {"RAY_ADDRESS": address, MARK: str(out)}
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._begin = log.tell()
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, env=self._environment
            )
        self.began = time.monotonic()

    def said(self) -> str:
        """What this run has written, both streams."""
        return self.log.read_bytes()[self._begin :].decode()

    def check(self) -> None:
        """That it still runs, or has come to its good end."""
        if self._process.poll() in (None, 0):
            return
        # Ray itself gives a start 30 s. A machine that is too busy for that is not the subject.
        assert "node timed out during startup" in self.said(), self.said()
        print(f"{self.out.name}: Ray did not start in its 30 s; the same command again", flush=True)
        self._command += ["--resume"]
        self._start()

    @property
    def ended(self) -> bool:
        return self._process.poll() == 0

    def wait(self) -> int:
        """Its exit code; it must leave nothing running."""
        code = self._process.wait(HANG_SECONDS)
        end = time.monotonic() + HANG_SECONDS
        while left := self.family():
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.1)
        return code

    def finish(self) -> None:
        """Wait for its good end."""
        while self.wait() != 0:
            self.check()
        assert "Traceback" not in self.said(), self.said()

    def family(self) -> list[psutil.Process]:
        """The processes below it, also when it is gone: Ray's own and those that work in it."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.out) and process.pid != self.pid:
                    found.append(process)
        return found

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def interrupt(self) -> None:
        """^C: a terminal sends it to all that run in it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)


def training_workers(family: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in family:
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def await_step(driver: Driver, step: int, at_most: float = math.inf) -> None:
    """Wait for a checkpoint of `step` or more, for so many seconds, or for the run's end."""
    began = time.monotonic()
    while latest_step(driver.out) < step and time.monotonic() < began + at_most:
        driver.check()
        if driver.ended:
            return
        assert time.monotonic() < began + HANG_SECONDS, driver.said()
        time.sleep(0.01)


class Moments:
    """When to hurt a run next: some steps on and a little later, or while it starts."""

    def __init__(self, harms: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._harms, self._number = harms, 0
        self._at_start = False

    def await_next(self, driver: Driver) -> str:
        """Wait for the moment; in words, when it was."""
        draw = self._random
        # Never twice in a row while it starts: three losses without a new step end a run.
        self._at_start = not self._at_start and draw.random() < 0.25
        window = (EPOCHS - 1) * STEPS // self._harms
        step = self._number * window + draw.randrange(1, window)
        step = max(step, latest_step(driver.out) + 1)
        self._number += 1
        seconds = draw.uniform(0, 30) if self._at_start else math.inf
        later = draw.uniform(0, 0.5)
        await_step(driver, step, seconds)
        time.sleep(later)
        return (
            f"at its checkpoint of step {latest_step(driver.out)} + {later:.2f} s,"
            f" {time.monotonic() - driver.began:.1f} s after its start"
        )


def hurt(driver: Driver, harm: str) -> bool:
    """Whether it came in time: a run may end before."""
    if harm == "worker":
        end = time.monotonic() + HANG_SECONDS
        while not (found := training_workers(driver.family())):
            driver.check()
            if driver.ended:
                return False
            assert time.monotonic() < end, driver.said()
            time.sleep(0.01)
        found[0].kill()
        return True
    if harm == "driver":
        driver.kill()
        return driver.wait() == -signal.SIGKILL
    driver.interrupt()
    if driver.wait() == 0:
        return False
    assert driver.wait() == 130, driver.said()
    assert driver.said().splitlines()[-1] == "covergenre: interrupted", driver.said()
    return True


def ordeal(dataset: Path, out: Path, harms: list[str], seed: int) -> None:
    """One run to its end, hurt by worker, driver or interrupt while `harms` last; those that it did
    not live to see are left there."""
    moments = Moments(len(harms), seed)
    driver = Driver(dataset, out)
    while harms:
        when = moments.await_next(driver)
        driver.check()
        began = time.monotonic()
        if not hurt(driver, harms[-1]):
            break
        harm = harms.pop()
        took = time.monotonic() - began
        print(f"{out.name}: {harm} {when}; {took:.1f} s; {len(harms)} to come", flush=True)
        assert "Traceback" not in driver.said(), driver.said()
        if harm != "worker":
            driver = Driver(dataset, out, "--resume")
    driver.finish()


def assert_equal(model: Path, whole: Path) -> None:
    """Bit for bit: the loss of every step, every epoch's figures on dev, and the weights."""
    assert losses(model) == losses(whole)
    assert history(model) == history(whole)
    assert weights_id(model) == weights_id(whole)


@pytest.mark.chaos
def test_a_worker_and_the_driver(dataset: Path, whole: Path, tmp_path: Path) -> None:
    harms = ["worker", "driver"]  # ^C: test_resume.py
    random.Random(SEED).shuffle(harms)
    while harms:
        out = tmp_path / f"m-{len(harms)}"
        ordeal(dataset, out, harms, SEED)
        assert_equal(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["worker", "driver", "interrupt"])
def test_many_of_one_kind(harm: str, dataset: Path, whole: Path, tmp_path: Path) -> None:
    to_come, run = 10, 0
    while to_come:
        harms = [harm] * min(5, to_come)
        to_come -= len(harms)
        out, run = tmp_path / f"{harm}-{run}", run + 1
        ordeal(dataset, out, harms, 1000 * SEED + run)
        to_come += len(harms)
        assert_equal(out, whole)


class Nodes:
    """A Ray cluster of three nodes on this machine, each with room for one training worker."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        args = {"num_cpus": 2, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=args)
        self._nodes = [self._cluster.add_node(num_cpus=2) for _ in range(2)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def lose(self, draw: random.Random) -> None:
        """One node dies at once, with all that runs on it; never the head."""
        node = self._nodes.pop(draw.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)

    def join(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=2))

    def end(self) -> None:
        self._cluster.shutdown()


def await_said(driver: Driver, text: str, times: int) -> None:
    end = time.monotonic() + HANG_SECONDS
    while driver.said().count(text) < times:
        driver.check()
        assert time.monotonic() < end, driver.said()
        time.sleep(0.1)


def lose_nodes(dataset: Path, out: Path, times: int, seed: int) -> None:
    """A run that goes on with fewer workers where a node is lost, and with more when one comes."""
    flags = ["--workers", "1:2", "--cpus-per-worker", "2", "--shared-filesystem"]
    flags += ["--learning-rate", "1e-5", "--epochs", "1000"]
    draw = random.Random(seed)
    nodes = Nodes()
    try:
        driver = Driver(dataset, out, *flags, address=nodes.address)
        step = lost = 0
        for number in range(1, times + 1):
            await_step(driver, step + draw.randrange(1, 30))
            time.sleep(draw.uniform(0, 0.5))
            step = latest_step(out)
            began = time.monotonic()
            nodes.lose(draw)
            replaced = draw.random() < 0.5 and number > 1
            if replaced:  # at once; else first it goes on with what is left
                nodes.join()
            await_step(driver, step + 8)
            if not replaced:
                nodes.join()
            now = driver.said().count("workers were lost")
            what = "workers lost" if now > lost else "no worker was on it"
            if now > lost and not replaced:
                grown = driver.said().count("there is room for 2 workers: regrouping")
                step = latest_step(out)
                await_said(driver, "there is room for 2 workers: regrouping", grown + 1)
                what += ", later regrouped for 2"
                await_step(driver, step + 8)
            lost, step = now, latest_step(out)
            print(
                f"{out.name} {number}/{times}: node at step {step}: {what};"
                f" {time.monotonic() - began:.0f} s",
                flush=True,
            )
        driver.interrupt()
        assert driver.wait() == 130, driver.said()
        assert "Traceback" not in driver.said(), driver.said()
        assert lost, driver.said()
        done = step_losses(out)
        whole = out.with_name("whole")
        Driver(dataset, whole, *flags[-4:], "--max-steps", str(len(done))).finish()
        np.testing.assert_allclose(done, losses(whole), atol=1e-4)
    finally:
        nodes.end()


@pytest.mark.slow
def test_nodes_lost_and_others_joined(dataset: Path, tmp_path: Path) -> None:
    lose_nodes(dataset, tmp_path / "m", 3, SEED)
