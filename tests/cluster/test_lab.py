"""clusters/on-premises.yaml on two hosts of one machine: `ray up`, jobs, `ray down`.

    uv run pytest -m cluster

Needs root and, from Debian, iproute2, openssh-server, rsync for the hosts, and radosgw, ceph-mon,
ceph-osd, ceph-common, uuid-runtime, curl for a real S3 store. Skips where it may not run; with
COVERGENRE_CI set it fails instead.
"""

import ast
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
HEAD, WORKER = "10.99.0.2", "10.99.0.3"
PORT = 18265
DASHBOARD = f"http://127.0.0.1:{PORT}"
STORE = "10.99.0.1"
ALBUMS = 128
"""A multiple of PART_ROWS: repeated, the same covers come together again."""
PART_ROWS = 32
NEEDED = ("ip", "sshd", "rsync", "radosgw", "ceph-mon", "ceph-osd", "uuidgen", "curl")


def cannot(reason: str) -> None:
    if os.environ.get("COVERGENRE_CI"):
        pytest.fail(f"in CI the lab must run: {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Lab:
    """Two hosts with a Ray cluster on them, and a store."""

    root: str
    """s3:// prefix of this test run."""
    environment: dict[str, str]
    """Of a user of the cluster, on this machine."""
    hosts: dict[str, str]
    """What hosts.sh is told."""
    began: float = 0.0
    """When `ray up` did."""

    def run(self, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout + done.stderr

    def ray_job(self, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As the README says it with plain Ray."""
        ray = (str(Path(sys.prefix, "bin/ray")), "job", "submit", "--working-dir", str(ROOT))
        return self.run(*ray, "--", "python", f"jobs/{stage}.py", *arguments)


def script(name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [str(ROOT / "tests/helpers" / name), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{name} {arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0:
        cannot("not root")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        cannot(f"not installed: {', '.join(missing)}")
    # Hosts have a /tmp and a home of their own, and share the rest.
    folder = Path(tempfile.mkdtemp(prefix="covergenre-lab-", dir="/var/tmp"))
    hosts = {"LAB": str(folder), "KEEP": f"{sys.prefix}:{sys.base_prefix}"}
    ceph = {"CEPH_LAB": str(folder / "ceph")}
    file = folder / "cluster.yaml"
    try:
        script("hosts.sh", "up", "2", **hosts)
        exports = script("ceph_s3.sh", "up", STORE, **ceph).removeprefix("export ").split()
        home = folder / "home"
        environment = {
            # Without what this process set for its own embedded Ray, the token above all.
            **{n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "RAY_"))},
            **dict(pair.split("=", 1) for pair in exports),
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": DASHBOARD,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        write_user(home, environment)
        file.write_text(yaml.safe_dump(filled_in(folder, home)))
        lab = Lab("s3://lab/run", environment, hosts, time.monotonic())
        lab.ok(sys.executable, "-c", "import boto3; boto3.client('s3').create_bucket(Bucket='lab')")
        covergenre, ray = (str(Path(sys.prefix, "bin", name)) for name in ("covergenre", "ray"))
        lab.ok(covergenre, "sample", "--out", f"{lab.root}/catalog", "--albums", str(ALBUMS))
        lab = replace(lab, began=time.monotonic())
        lab.ok(ray, "up", "--yes", "--no-config-cache", str(file))
        command = [ray, "dashboard", "--no-config-cache", "--port", str(PORT), str(file)]
        forward = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for_dashboard()
            yield lab
        finally:
            forward.terminate()
            forward.wait()
            lab.ok(ray, "down", "--yes", str(file))
    finally:
        script("ceph_s3.sh", "down", **ceph)
        script("hosts.sh", "down", **hosts)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_dashboard() -> None:
    for _ in range(240):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), 1):
            return
        threading.Event().wait(0.25)
    raise TimeoutError("the dashboard was not forwarded")


def write_user(home: Path, environment: dict[str, str]) -> None:
    """What a user has at home: the token of the cluster, and the settings of the store."""
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text(secrets.token_hex(32))
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(
        "[default]\n"
        f"aws_access_key_id = {environment['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {environment['AWS_SECRET_ACCESS_KEY']}\n"
    )
    (home / ".aws/config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {environment['AWS_ENDPOINT_URL']}\n"
    )


def filled_in(folder: Path, home: Path) -> dict[str, Any]:
    """The project's own file, with this lab's addresses; nothing has to be installed here."""
    text = (ROOT / "clusters/on-premises.yaml").read_text()
    text = text.replace("~/covergenre-env", sys.prefix)
    config: dict[str, Any] = yaml.safe_load(text)
    config["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "id")}
    config["setup_commands"] = []
    config["min_workers"] = config["max_workers"] = 1
    config["file_mounts"] = {
        there: here.replace("~", str(home), 1) if here.startswith("~") else str(ROOT / here)
        for there, here in config["file_mounts"].items()
    }
    return config


@pytest.mark.slow
def test_startup_time_and_scaling(lab: Lab) -> None:
    """From `ray up` to the first label, and the rate of two hosts over one, both printed.

    uv run pytest -m "cluster and slow" -k startup_time -s

    PIN=1 in the environment gives each host one core.
    """
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    root, catalog = lab.root, f"{lab.root}/catalog/many.csv"
    write_model = "import sys; from covergenre.demo.sample import write_untrained_model as write"
    lab.ok(sys.executable, "-c", f"{write_model}; write(sys.argv[1])", f"{root}/untrained")
    lab.ok(sys.executable, "-c", REPEATED, f"{root}/catalog/catalog.csv", catalog, "30")

    def score(out: str, workers: int) -> subprocess.Popen[bytes]:
        command = [covergenre, "submit", "score", f"{root}/untrained", catalog, "--out", out]
        command += ["--workers", str(workers), "--part-rows", "64"]
        return subprocess.Popen(
            command, cwd=ROOT, env=lab.environment, stdout=subprocess.DEVNULL, stderr=None
        )

    def rate(out: str) -> float:
        read = f"from covergenre.io import storage; print(storage.read_json('{out}/_ledger.json'))"
        found: float = ast.literal_eval(lab.ok(sys.executable, "-c", read))["covers_per_second"]
        return found

    first = score(f"{root}/first", 1)
    while parts(lab, f"{root}/first") == 0:
        assert first.poll() is None
    print(f"from `ray up` to the first label: {time.monotonic() - lab.began:.0f} s")
    assert first.wait() == 0
    wait_for_two(lab)
    assert score(f"{root}/two", 2).wait() == 0
    with cut_off(lab):
        wait_for_hosts(lab, 1)
        assert score(f"{root}/one", 1).wait() == 0
    two, one = rate(f"{root}/two"), rate(f"{root}/one")
    print(f"covers a second: {two} with two hosts, {one} with one: {two / one:.2f}")
    wait_for_two(lab)


def test_all_stages_on_two_hosts(lab: Lab, tmp_path: Path) -> None:
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    root = lab.root
    catalog = f"{root}/catalog/catalog.csv"

    # The second host joins while the first jobs run.
    prepared = lab.ray_job("prepare", catalog, "--out", f"{root}/dataset", "--min-share", "0")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert f"{ALBUMS} albums of {ALBUMS} rows" in prepared.stdout
    wait_for_two(lab)

    trained = lab.ok(
        *(covergenre, "submit", "train", f"{root}/dataset", "--out", f"{root}/model"),
        *("--model", "tiny", "--epochs", "2", "--workers", "2"),
    )
    assert "2 CPU workers" in trained and "model s3://" in trained
    measured = lab.ok(
        *(covergenre, "submit", "evaluate", f"{root}/model", f"{root}/dataset"),
        *("--out", f"{root}/metrics", "--workers", "2"),
    )
    assert "ROC AUC" in measured
    scored = lab.ok(
        *(covergenre, "submit", "score", f"{root}/model", catalog, "--out", f"{root}/labels"),
        *("--workers", "2", "--part-rows", str(PART_ROWS)),
    )
    assert f"{ALBUMS} rows = {ALBUMS} scored + 0 rejected + 0 duplicates" in scored

    # The labels are those of a run on this machine alone.
    alone = {name: value for name, value in lab.environment.items() if not name.startswith("RAY_")}
    here = Lab(root, alone, lab.hosts)
    here.ok(
        *(covergenre, "score", f"{root}/model", catalog, "--out", f"{root}/alone"),
        *("--part-rows", str(PART_ROWS)),
    )
    here.ok(sys.executable, "-c", COMPARE, f"{root}/labels", f"{root}/alone", "1")


COMPARE = """
import sys
from covergenre.data import dataset
from covergenre.io import storage
there, here, times = sys.argv[1:]
names, once = (
    [name for name in storage.list_sizes(place) if name.startswith("part-")]
    for place in (there, here)
)
assert len(names) == len(once) * int(times) > 0, (names, once)
for n, name in enumerate(names):
    a, b = (dataset.read_table(f) for f in (f"{there}/{name}", f"{here}/{once[n % len(once)]}"))
    if int(times) > 1:  # rows and ids are others
        a, b = (table.drop_columns(["row", "album_id"]) for table in (a, b))
    assert a.equals(b), name
"""
REPEATED = """
import sys
from covergenre.io import storage
source, to, times = sys.argv[1:]
header, *rows = storage.read_bytes(source).decode().splitlines()
many = [f"{n}-{row}" for n in range(int(times)) for row in rows]
storage.put(to, "\\n".join([header, *many]).encode())
"""


@contextlib.contextmanager
def cut_off(lab: Lab) -> Iterator[None]:
    """The second host is off the network meanwhile; whoever is connected to it is not told."""
    script("hosts.sh", "disconnect", WORKER.rpartition(".")[2], **lab.hosts)
    try:
        yield
    finally:
        script("hosts.sh", "reconnect", WORKER.rpartition(".")[2], **lab.hosts)


def parts(lab: Lab, place: str) -> int:
    find = "from covergenre.inference.parts import finished_parts"
    count = f"{find}; print(len(finished_parts('{place}')))"
    return int(lab.ok(sys.executable, "-c", count))


def test_score_survives_a_disconnected_host(lab: Lab) -> None:
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    root, catalog = lab.root, f"{lab.root}/catalog/repeated.csv"
    times = 20
    rows, total = f"{times * ALBUMS:,}", times * ALBUMS // PART_ROWS
    lab.ok(sys.executable, "-c", REPEATED, f"{root}/catalog/catalog.csv", catalog, str(times))
    wait_for_two(lab)
    command = [covergenre, "submit", "score", f"{root}/model", catalog, "--out", f"{root}/cut"]
    command += ["--workers", "2", "--part-rows", str(PART_ROWS)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=lab.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and parts(lab, f"{root}/cut") < 3:
        pass
    at = parts(lab, f"{root}/cut")
    with cut_off(lab):
        said, _ = process.communicate(timeout=600)
    print(f"cut off after {at} of {total} output parts")
    assert process.returncode == 0, said.decode()
    assert at < total
    assert f"{rows} rows = {rows} scored + 0 rejected + 0 duplicates" in said.decode()
    # What the whole job made of the same covers, undisturbed.
    compared = (f"{root}/cut", f"{root}/labels", str(times))
    lab.ok(sys.executable, "-c", COMPARE, *compared)
    wait_for_two(lab)  # Ray's autoscaler takes a host that is back in again


@pytest.mark.slow
def test_train_survives_a_disconnected_host(lab: Lab) -> None:
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    root = lab.root
    # So small a rate that the last digits, which depend on the number of workers, stay the last.
    settings = ["--model", "tiny", "--epochs", "20", "--learning-rate", "1e-5"]
    settings += ["--checkpoint-every", "2"]
    dataset = f"{root}/cut-dataset"
    lab.ok(
        *(covergenre, "submit", "prepare", f"{root}/catalog/catalog.csv"),
        *("--out", dataset, "--min-share", "0"),
    )
    wait_for_two(lab)
    process = subprocess.Popen(
        [
            *(covergenre, "submit", "train", dataset, "--out", f"{root}/cut-model"),
            *(*settings, "--workers", "1:2"),
        ],
        cwd=ROOT,
        env=lab.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    latest = (
        "from covergenre.training.checkpoints import latest_step;"
        f"print(latest_step('{root}/cut-model.training/checkpoints'))"
    )
    while process.poll() is None and int(lab.ok(sys.executable, "-c", latest)) < 2:
        pass
    with cut_off(lab):
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()
    # Whichever is noticed first: the machine that is gone, or its worker.
    gone = b"resources for only 1 worker" in said or b"workers failed" in said
    assert b"2 CPU workers" in said and gone, said.decode()
    wait_for_two(lab)
    lab.ok(
        *(covergenre, "submit", "train", dataset, "--out", f"{root}/uncut-model"),
        *settings,
    )
    losses = (
        "import json, sys; from covergenre.io import storage\n"
        "a, b = ([json.loads(line)['loss'] for line in storage.read_bytes(f'{m}/steps.jsonl')"
        ".splitlines()] for m in sys.argv[1:])\n"
        "assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) < 1e-4, (a, b)\n"
    )
    lab.ok(sys.executable, "-c", losses, f"{root}/cut-model", f"{root}/uncut-model")


def wait_for_two(lab: Lab) -> None:
    """`ray up` returns when the head is there; the other host follows."""
    wait_for_hosts(lab, 2)


def wait_for_hosts(lab: Lab, count: int) -> None:
    nodes = (
        "import sys, threading; from ray.util.state import list_nodes\n"
        "def alive(): return [n for n in list_nodes(address=sys.argv[1]) if n.state == 'ALIVE']\n"
        "for _ in range(360):\n"
        "    if len(alive()) == int(sys.argv[2]): sys.exit()\n"
        "    threading.Event().wait(0.5)\n"
        "sys.exit(f'{len(alive())} hosts are there')"
    )
    lab.ok(sys.executable, "-c", nodes, DASHBOARD, str(count))


def test_doctor_checks_both_hosts(lab: Lab) -> None:
    wait_for_two(lab)
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    done = lab.run(
        *(covergenre, "doctor", "--address", DASHBOARD, "--storage", lab.root, "--workers", "2")
    )
    found = done.stdout.splitlines()
    assert "ok    workers: 2 CPU workers can be scheduled" in found
    for host in ("driver", "cg2", "cg3"):
        assert any(line.startswith(f"ok    {host}: storage {lab.root}") for line in found), found
    (cluster,) = (line for line in found if "cluster: " in line)
    assert "2 machines now" in cluster and "token authentication on" in cluster


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        ("train", ["s3://lab/none", "--out", "s3://lab/x"], "s3://lab/none: no such dataset"),
        ("train", ["s3://lab/none", "--out", "s3://lab/x", "--epoch", "2"], "'--epochs'?"),
    ],
)
def test_failed_job_ends_with_its_reason(
    lab: Lab, stage: str, arguments: list[str], said: str
) -> None:
    done = lab.ray_job(stage, *arguments)
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert "covergenre: " in last and said in last, done.stdout + done.stderr


def test_local_path_is_refused_on_two_hosts(lab: Lab) -> None:
    wait_for_two(lab)
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    done = lab.run(
        *(covergenre, "submit", "prepare", f"{lab.root}/catalog/catalog.csv"),
        *("--out", f"{lab.hosts['LAB']}/refused", "--min-share", "0"),
    )
    assert done.returncode == 2
    assert "is local to one machine, and the cluster has 2" in done.stdout


def test_submission_without_the_token_is_refused(lab: Lab) -> None:
    stranger = Lab(
        lab.root, {**lab.environment, "HOME": "/nowhere", "RAY_AUTH_MODE": "disabled"}, lab.hosts
    )
    covergenre = str(Path(sys.prefix, "bin/covergenre"))
    done = stranger.run(covergenre, "submit", "score", "m", "c", "--out", "s3://lab/x")
    assert done.returncode == 2
    assert "the cluster requires a token" in done.stderr
