"""doctor: checks of a cluster, made by the driver and by a task on every node."""

import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from covergenre import __version__, dependencies
from covergenre.cluster import ray_runtime
from covergenre.cluster.autoscaling import max_resources
from covergenre.cluster.workers import choose_workers
from covergenre.errors import ConfigError, StorageError, essential_line
from covergenre.formatting import plural
from covergenre.io import storage

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow")
_MIN_SHM_BYTES = 2 * 2**30
_MIN_DISK_BYTES = 10 * 2**30
_NODE_TIMEOUT_SECONDS = 120

Finding = tuple[str, str]
"""(what was checked and found, problem or fix; the latter is empty if the check passed)"""


def doctor(address: str | None, storage_uri: str | None, workers: int | None) -> int:
    """Print a line for each check; returns the exit code: 2 if a check failed, else 0.

    address: URL of a cluster's dashboard, to run the checks in a job of that cluster; None: that of
    RAY_ADDRESS if it is one, else the checks run here, on the cluster that RAY_ADDRESS names or on
    a Ray embedded in this process.
    """
    if address := address or ray_runtime.dashboard():
        from covergenre.cluster.jobs import run_job

        if not Path("covergenre", "__main__.py").is_file():
            raise ConfigError(
                "doctor --address: uploads the current directory, which has no"
                " covergenre/__main__.py; run it in covergenre's directory",
                code="no_source",
            )
        arguments = ["python", "-m", "covergenre", "doctor"]
        arguments += ["--storage", storage_uri] if storage_uri else []
        arguments += ["--workers", str(workers)] if workers else []
        return run_job(arguments, address=address, wait=True, working_dir=".")
    failed = 0
    for check, problem in _findings(storage_uri, workers):
        failed += bool(problem)
        print(f"FAIL  {check}: {problem}" if problem else f"ok    {check}", flush=True)
    return 2 if failed else 0


def _findings(storage_uri: str | None, workers: int | None) -> Iterator[Finding]:
    if storage_uri:
        storage_uri = storage.absolute(storage_uri)
        yield _storage_finding("driver", storage_problem(storage_uri), storage_uri)
    try:
        ray_runtime.start_ray()
    except Exception as error:  # any failure to start is a finding
        yield "cluster", essential_line(str(error) or type(error).__name__)
        return
    import ray

    from covergenre.cluster.ray_internals import is_token_auth_enabled

    driver = inspect_machine(None)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    size = f"{plural(max_resources('CPU'), 'CPU')}, {plural(max_resources('GPU'), 'GPU')} at most"
    token = "on" if is_token_auth_enabled() else "off"
    yield f"cluster: {plural(len(nodes), 'machine')} now, {size}, token authentication {token}", ""
    yield from _node_findings(nodes, driver, storage_uri)
    try:
        found = choose_workers(workers, "auto", 0.5)
    except ConfigError as error:
        yield "workers", str(error)
    else:
        kind = "GPU" if found.use_gpu else "CPU"
        yield f"workers: {plural(found.count, f'{kind} worker')} can be scheduled", ""


def _node_findings(
    nodes: list[dict[str, Any]], driver: dict[str, Any], storage_uri: str | None
) -> Iterator[Finding]:
    """Checks by a task on each node: first whether covergenre can be imported there at all."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on_every_node(function: Callable[..., Any], *args: object) -> list[Any]:
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        return [task.options(scheduling_strategy=each).remote(*args) for each in strategies]

    # Pickled by value: by reference, the worker would have to import covergenre to load it.
    ray.cloudpickle.register_pickle_by_value(dependencies)
    missing = on_every_node(dependencies.missing_requirements)
    ray.cloudpickle.unregister_pickle_by_value(dependencies)
    inspected = on_every_node(inspect_machine, storage_uri)
    for node, missing_ref, machine_ref in zip(nodes, missing, inspected, strict=True):
        name = node["NodeManagerHostname"]
        try:
            if advice := ray.get(missing_ref, timeout=_NODE_TIMEOUT_SECONDS):
                yield f"{name}: packages", advice
                continue
            machine = ray.get(machine_ref, timeout=_NODE_TIMEOUT_SECONDS)
        except Exception as error:  # any failure of a node is a finding
            yield f"{name}: no answer", essential_line(str(error) or type(error).__name__)
        else:
            yield from _machine_findings(name, machine, driver, storage_uri)


def _machine_findings(
    name: str, machine: dict[str, Any], driver: dict[str, Any], storage_uri: str | None
) -> Iterator[Finding]:
    versions = machine["versions"]
    differ = [
        f"{package} {versions[package]}, the driver has {expected}"
        for package, expected in driver["versions"].items()
        if versions[package] != expected
    ]
    shown = ", ".join(f"{package} {number}" for package, number in versions.items())
    advice = f"install the same requirements.txt on all machines ({'; '.join(differ)})"
    yield f"{name}: versions {shown}", advice if differ else ""
    for gpu in machine["gpus"]:
        yield f"{name}: GPU {gpu}", ""
    for what, free, least in (
        ("Ray's object store (/dev/shm)", machine["shm"], _MIN_SHM_BYTES),
        ("temporary files (/tmp)", machine["disk"], _MIN_DISK_BYTES),
    ):
        advice = f"at least {least >> 30} GiB are needed" if free < least else ""
        yield f"{name}: {what}: {free / 2**30:.1f} GiB free", advice
    if storage_uri:
        yield _storage_finding(name, machine["storage"], storage_uri)


def _storage_finding(name: str, problem: str, uri: str) -> Finding:
    return f"{name}: storage {uri}{'' if problem else ': write, read and delete'}", problem


def inspect_machine(storage_uri: str | None) -> dict[str, Any]:
    """Versions, GPUs, free space and access to the storage, of the machine of this process."""
    return {
        "versions": {"python": platform.python_version(), "covergenre": __version__}
        | {name: _version(name) for name in _PACKAGES},
        "gpus": _gpus(),
        "shm": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize,
        "disk": shutil.disk_usage("/tmp").free,
        "storage": storage_problem(storage_uri) if storage_uri else "",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpus() -> list[str]:
    """Name and free memory of each GPU. From nvidia-smi, because Ray hides GPUs from a task that
    reserves none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, check=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [[part.strip() for part in line.split(",")] for line in found.stdout.splitlines()]
    return [f"{name}, {free} of {total} free" for name, free, total in gpus]


def storage_problem(uri: str) -> str:
    """Why this process cannot write, read or delete a file in `uri`; empty if it can."""
    folder = storage.join(uri, f"covergenre-doctor-{uuid.uuid4().hex}")
    probe, data = storage.join(folder, "probe"), os.urandom(1000)
    try:
        storage.put(probe, data)
        if storage.read_bytes(probe) != data:
            return "the bytes that were read are not those that were written"
        storage.delete_directory(folder)
    except StorageError as error:
        return str(error)
    return ""
