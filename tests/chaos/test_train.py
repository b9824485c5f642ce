"""Failures injected into train at random times; the result must be that of an uninterrupted run.

Workers and drivers get kill -9, drivers Ctrl-C, and nodes are removed. Each failure and its time
are printed; COVERGENRE_CHAOS_SEED selects other times. The short form has the marker `chaos`; the
long one, ten failures of each kind and three nodes, has the marker `slow`.
"""

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
from local_training import training_in_this_process
from training_runs import losses, read_jsonl

from covergenre.cli import main
from covergenre.models.bundle import read_bundle
from covergenre.training.checkpoints import newest

SEED = int(os.environ.get("COVERGENRE_CHAOS_SEED", "0"))
EPOCHS = 4
STEPS = 14  # of an epoch
SETTINGS = ["--model", "tiny", "--epochs", str(EPOCHS), "--batch-size", "9"]
SETTINGS += ["--shuffle-window", "2"]
TIMEOUT_SECONDS = 600.0
MARK = "COVERGENRE_CHAOS_RUN"


@pytest.fixture(scope="module")
def reference(dataset: Path) -> Path:
    """An uninterrupted run, in this process."""
    out = dataset.with_name("reference")
    with training_in_this_process():
        main(["train", str(dataset), "--out", str(out), *SETTINGS])
    assert len(losses(out)) == EPOCHS * STEPS
    return out


def history(model: Path) -> list[dict[str, float]]:
    lines = read_jsonl(model / "history.jsonl")
    timed = ("seconds", "images_per_second", "data_wait_share")
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

    def output(self) -> str:
        """What this process has written to both streams."""
        return self.log.read_bytes()[self._begin :].decode()

    def check(self) -> None:
        """Raise where it has failed; start it again where Ray did not start in time."""
        if self._process.poll() in (None, 0):
            return
        # Ray limits its start to 30 s, which a busy machine may exceed; that is not tested here.
        assert "node timed out during startup" in self.output(), self.output()
        print(f"{self.out.name}: Ray did not start in its 30 s; the same command again", flush=True)
        self._command += ["--resume"]
        self._start()

    @property
    def ended(self) -> bool:
        return self._process.poll() == 0

    def wait(self) -> int:
        """Its exit code; it must leave no process running."""
        code = self._process.wait(TIMEOUT_SECONDS)
        end = time.monotonic() + TIMEOUT_SECONDS
        while left := self.family():
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.1)
        return code

    def finish(self) -> None:
        """Wait until it has succeeded."""
        while self.wait() != 0:
            self.check()
        assert "Traceback" not in self.output(), self.output()

    def family(self) -> list[psutil.Process]:
        """Its descendants, also after its end: all processes of its Ray."""
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
        """Ctrl-C: a terminal sends it to the whole process group."""
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
        assert time.monotonic() < began + TIMEOUT_SECONDS, driver.output()
        time.sleep(0.01)


class FailureTimes:
    """When to inject the next failure: some steps and a little later, or while the run starts."""

    def __init__(self, failures: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._failures, self._number = failures, 0
        self._at_start = False

    def await_next(self, driver: Driver) -> str:
        """Wait until then; returns a description of the time."""
        draw = self._random
        # Never twice in a row while it starts: three losses without a new step end a run.
        self._at_start = not self._at_start and draw.random() < 0.25
        window = (EPOCHS - 1) * STEPS // self._failures
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


def inject(driver: Driver, failure: str) -> bool:
    """Whether the failure came in time: the run may have ended before."""
    if failure == "worker":
        end = time.monotonic() + TIMEOUT_SECONDS
        while not (found := training_workers(driver.family())):
            driver.check()
            if driver.ended:
                return False
            assert time.monotonic() < end, driver.output()
            time.sleep(0.01)
        found[0].kill()
        return True
    if failure == "driver":
        driver.kill()
        return driver.wait() == -signal.SIGKILL
    driver.interrupt()
    if driver.wait() == 0:
        return False
    assert driver.wait() == 130, driver.output()
    assert driver.output().splitlines()[-1] == "covergenre: interrupted", driver.output()
    return True


def run_with_failures(dataset: Path, out: Path, failures: list[str], seed: int) -> None:
    """One run to its end, with failures (worker, driver, interrupt) while `failures` last; those
    for which the run ended too early stay in the list."""
    times = FailureTimes(len(failures), seed)
    driver = Driver(dataset, out)
    while failures:
        when = times.await_next(driver)
        driver.check()
        began = time.monotonic()
        if not inject(driver, failures[-1]):
            break
        failure = failures.pop()
        took = time.monotonic() - began
        print(f"{out.name}: {failure} {when}; {took:.1f} s; {len(failures)} to come", flush=True)
        assert "Traceback" not in driver.output(), driver.output()
        if failure != "worker":
            driver = Driver(dataset, out, "--resume")
    driver.finish()


def assert_equal(model: Path, reference: Path) -> None:
    """Bit for bit: the loss of every step, every epoch's figures on dev, and the weights."""
    assert losses(model) == losses(reference)
    assert history(model) == history(reference)
    assert weights_id(model) == weights_id(reference)


@pytest.mark.chaos
def test_killed_worker_and_killed_driver(dataset: Path, reference: Path, tmp_path: Path) -> None:
    failures = ["worker", "driver"]  # Ctrl-C: test_resume.py
    random.Random(SEED).shuffle(failures)
    while failures:
        out = tmp_path / f"m-{len(failures)}"
        run_with_failures(dataset, out, failures, SEED)
        assert_equal(out, reference)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["worker", "driver", "interrupt"])
def test_many_failures_of_one_kind(
    failure: str, dataset: Path, reference: Path, tmp_path: Path
) -> None:
    to_come, run = 10, 0
    while to_come:
        failures = [failure] * min(5, to_come)
        to_come -= len(failures)
        out, run = tmp_path / f"{failure}-{run}", run + 1
        run_with_failures(dataset, out, failures, 1000 * SEED + run)
        to_come += len(failures)
        assert_equal(out, reference)


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
        """Kill a node, never the head, with all that runs on it."""
        node = self._nodes.pop(draw.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)

    def join(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=2))

    def end(self) -> None:
        self._cluster.shutdown()


def await_output(driver: Driver, text: str, times: int) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while driver.output().count(text) < times:
        driver.check()
        assert time.monotonic() < end, driver.output()
        time.sleep(0.1)


def lose_nodes(dataset: Path, out: Path, times: int, seed: int) -> None:
    """A run continues with fewer workers where a node is lost, with more once one joins."""
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
            now = driver.output().count("workers failed")
            what = "workers lost" if now > lost else "no worker was on it"
            if now > lost and not replaced:
                grown = driver.output().count("resources for 2 workers: resizing")
                step = latest_step(out)
                await_output(driver, "resources for 2 workers: resizing", grown + 1)
                what += ", later resized to 2"
                await_step(driver, step + 8)
            lost, step = now, latest_step(out)
            print(
                f"{out.name} {number}/{times}: node at step {step}: {what};"
                f" {time.monotonic() - began:.0f} s",
                flush=True,
            )
        driver.interrupt()
        assert driver.wait() == 130, driver.output()
        assert "Traceback" not in driver.output(), driver.output()
        assert lost, driver.output()
        done = step_losses(out)
        reference = out.with_name("reference")
        Driver(dataset, reference, *flags[-4:], "--max-steps", str(len(done))).finish()
        np.testing.assert_allclose(done, losses(reference), atol=1e-4)
    finally:
        nodes.end()


@pytest.mark.slow
def test_lost_nodes_and_new_nodes(dataset: Path, tmp_path: Path) -> None:
    lose_nodes(dataset, tmp_path / "m", 3, SEED)
