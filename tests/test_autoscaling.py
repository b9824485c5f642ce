"""A cluster that starts its machines when they are wanted: Ray's own autoscaler, on this machine.

The head does no work, as in cluster.yaml, and each worker is a raylet of its own that the
autoscaler starts. Commands are run as by a user who is outside: RAY_ADDRESS names the dashboard.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)

from benchmarks import untrained_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cluster:
    """A head whose dashboard is at `address`, and the user's environment."""

    address: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "covergenre", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def nodes(self) -> int:
        """Machines that were ever there."""
        from ray.util.state import list_nodes

        return len(list_nodes(address=self.address))


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from ray.util import get_node_ip_address

    folder = Path(tempfile.mkdtemp(prefix="covergenre-"))  # short: Ray's sockets lie in it
    gcs, dashboard, agent, client = free_ports(4)
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    store = {"object_store_memory": 200 * 2**20}
    kinds = {
        "cpu": {"resources": {"CPU": 2, **store}, "max_workers": 2},
        # No such device is there: what is asked of them here is only how many there can be.
        "gpu": {"resources": {"CPU": 2, "GPU": 1, **store}, "max_workers": 3},
    }
    settings = {
        "cluster_name": "covergenre",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{get_node_ip_address()}:{gcs}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: head,
            **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in kinds.items()},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "max_workers": 5,
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": 5,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
    }
    (folder / "cluster.json").write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"} | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=0"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--autoscaling-config={folder}/cluster.json"),
        f"--object-store-memory={200 * 2**20}",
    ]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment
            | {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=out,
            stderr=out,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(480):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version"):
                break
            assert process.poll() is None, (folder / "out").read_text()
            threading.Event().wait(0.25)
        yield Cluster(address, environment | {"RAY_ADDRESS": address})
    finally:
        # All of it, and nothing else of Ray's: `ray stop` would end every Ray of this machine.
        head_process = psutil.Process(process.pid)
        processes = [*head_process.children(recursive=True), head_process]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return untrained_model(tmp_path_factory.mktemp("model") / "m")


def test_more_than_there_can_ever_be_is_refused_with_the_numbers(
    cluster: Cluster, model: str, drawn: Path, tmp_path: Path
) -> None:
    score = ("score", model, str(drawn), "--out", str(tmp_path / "labels"), "--shared-filesystem")
    for arguments, said in (
        (("--workers", "4"), "--workers 4: one GPU each, and the cluster has 3 at most"),
        (("--workers", "40", "--device", "cpu"), "and the cluster has 10 at most"),
    ):
        done = cluster.run(*score, *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("covergenre: --workers ") and said in last
    assert cluster.nodes() == 1  # nothing was started for it


def test_what_is_still_to_be_started_is_waited_for(
    cluster: Cluster, model: str, drawn: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    done = cluster.run(
        *("score", model, str(drawn), "--out", str(out), "--shared-filesystem"),
        *("--workers", "2", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for machines: 1 CPUs are needed, 0 are there" in done.stdout
    assert "150 rows = 150 scored + 0 rejected + 0 duplicates" in done.stdout
    assert cluster.nodes() > 1
