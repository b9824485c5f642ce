"""Ray's autoscaler on this machine: machines are started when they are needed.

The head has no CPUs, as in cluster.yaml, and each worker machine is a separate raylet that the
autoscaler starts.
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
    FakeMultiNodeProvider,
)

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cluster:
    """A head whose dashboard is at `address`, and the user's environment."""

    address: str
    gcs: str
    environment: dict[str, str]

    def run(self, *arguments: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
        """As from outside, where no other address is given: the command is submitted as a job."""
        return subprocess.run(
            [sys.executable, "-m", "covergenre", *arguments],
            cwd=ROOT,
            env=self.environment | {"RAY_ADDRESS": self.address if address is None else address},
            capture_output=True,
            text=True,
            timeout=600,
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
    """For tests in this order: the first starts no machine, the second has to wait for one."""
    with started_cluster() as cluster:
        yield cluster


@contextlib.contextmanager
def started_cluster() -> Iterator[Cluster]:
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
    gcs_address = f"{get_node_ip_address()}:{gcs}"
    settings = {
        "cluster_name": "covergenre",
        "provider": {
            # Ray's own fake provider, by its class: what its short name reads is in no wheel.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": gcs_address,
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
        **{
            key: []
            for key in (
                *("initialization_commands", "setup_commands"),
                *("head_setup_commands", "worker_setup_commands"),
                *("head_start_ray_commands", "worker_start_ray_commands"),
                "cluster_synced_files",
            )
        },
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
                # Machines take longer than this to come, as real ones do than Ray Train's minute.
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1",
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
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{address}/nodes?view=summary") as answer,
            ):
                if json.load(answer)["data"]["summary"]:  # the head itself, last of all
                    break
            assert process.poll() is None, (folder / "out").read_text()
            threading.Event().wait(0.25)
        yield Cluster(address, gcs_address, environment)
    finally:
        # All of it, and nothing else of Ray's: `ray stop` would end every Ray of this machine.
        head_process = psutil.Process(process.pid)
        processes = [*head_process.children(recursive=True), head_process]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_training_starts_on_one_machine_and_grows(dataset: Path, tmp_path: Path) -> None:
    # On the head: machines of one computer would share, and overwrite, the folder a job works in.
    with started_cluster() as cluster:
        trained = cluster.run(
            *("train", str(dataset), "--out", str(tmp_path / "model"), "--shared-filesystem"),
            *("--device", "cpu", "--model", "tiny", "--workers", "1:2", "--max-steps", "60"),
            address=cluster.gcs,
        )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "waiting for machines" in trained.stderr
    assert "workers failed" not in trained.stderr, trained.stderr
    assert "resources for 2 workers: resizing" in trained.stderr, trained.stderr


def test_more_workers_than_the_cluster_can_have_are_refused(
    cluster: Cluster, untrained_model: str, synthetic_catalog: Path, tmp_path: Path
) -> None:
    score = (
        "score",
        untrained_model,
        str(synthetic_catalog),
        "--out",
        str(tmp_path / "labels"),
        "--shared-filesystem",
    )
    for arguments, limit in (
        (("--workers", "4"), "the cluster has at most 3"),
        (("--workers", "40", "--device", "cpu"), "the cluster has at most 10"),
    ):
        done = cluster.run(*score, *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith(f"covergenre: --workers {arguments[1]}: ") and limit in last
    looked = cluster.run("doctor", "--workers", "4")
    assert looked.returncode == 2, looked.stdout + looked.stderr
    assert "1 machine now, 10 CPUs, 3 GPUs at most" in looked.stdout
    assert "FAIL  workers: --workers 4: " in looked.stdout
    # Nor is a disk taken for shared because there is one machine now.
    local = cluster.run(*score[:-1])
    assert local.returncode == 2 and "--shared-filesystem" in local.stdout
    assert cluster.nodes() == 1  # nothing was started for it


def test_prepare_and_score_wait_for_machines_to_start(
    cluster: Cluster, untrained_model: str, synthetic_catalog: Path, tmp_path: Path
) -> None:
    prepared = cluster.run(
        *(
            "prepare",
            str(synthetic_catalog),
            "--out",
            str(tmp_path / "dataset"),
            "--shared-filesystem",
        )
    )
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert "waiting for machines: 1 CPU is needed, 0 available" in prepared.stdout
    scored = cluster.run(
        *(
            "score",
            untrained_model,
            str(synthetic_catalog),
            "--out",
            str(tmp_path / "labels"),
            "--shared-filesystem",
        ),
        *("--workers", "2", "--device", "cpu"),
    )
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "150 rows = 150 scored + 0 rejected + 0 duplicates" in scored.stdout
    assert cluster.nodes() > 1
