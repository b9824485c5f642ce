"""doctor: is a cluster fit for the work? Asked of the driver, and of a worker on every node."""

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
from covergenre.cluster.workers import place_workers
from covergenre.errors import ConfigError, StorageError, essential_line
from covergenre.formatting import plural
from covergenre.io import storage

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow")
_LEAST_SHM_BYTES = 2 * 2**30
_LEAST_DISK_BYTES = 10 * 2**30
_NODE_TIMEOUT_SECONDS = 120

Finding = tuple[str, str]
"""(what was looked at and seen, what to do; empty where it is well)"""


def doctor(address: str | None, storage_uri: str | None, workers: int | None) -> int:
    """Look, print a line for each thing, and give the exit code: 2 where something is to mend.

    address: a dashboard's, to look from a job of that cluster; None: the one of RAY_ADDRESS, or
    from here, at this machine or the cluster that it is of.
    """
    if address := address or ray_runtime.dashboard():
        from covergenre.cluster.jobs import run_job

        if not Path("covergenre", "__main__.py").is_file():
            raise ConfigError(
                "doctor --address: sends the current folder, which has no covergenre/__main__.py;"
                " be in covergenre's folder"
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
        yield _of_storage("driver", storage_trouble(storage_uri), storage_uri)
    try:
        ray_runtime.start_ray()
    except Exception as error:  # whatever keeps Ray from starting is a finding
        yield "cluster", essential_line(str(error) or type(error).__name__)
        return
    import ray

    from covergenre.cluster.ray_internals import is_token_auth_enabled

    here = look(None)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    token = "with" if is_token_auth_enabled() else "without"
    size = f"{plural(max_resources('CPU'), 'CPU')}, {plural(max_resources('GPU'), 'GPU')} at most"
    yield f"cluster: {plural(len(nodes), 'machine')} now, {size}, {token} a token", ""
    yield from _of_nodes(nodes, here, storage_uri)
    try:
        placed = place_workers(workers, "auto", 0.5)
    except ConfigError as error:
        yield "workers", str(error)
    else:
        kind = "GPU" if placed.use_gpu else "CPU"
        yield f"workers: {plural(placed.count, f'{kind} worker')} can be placed", ""


def _of_nodes(
    nodes: list[dict[str, Any]], here: dict[str, Any], storage_uri: str | None
) -> Iterator[Finding]:
    """What a worker on each node finds: first whether covergenre can be imported there at all."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on_every_node(function: Callable[..., Any], *args: object) -> list[Any]:
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        return [task.options(scheduling_strategy=place).remote(*args) for place in places]

    # By value: by reference, the worker would import covergenre to know the function.
    ray.cloudpickle.register_pickle_by_value(dependencies)
    checks = on_every_node(dependencies.missing_requirements)
    ray.cloudpickle.unregister_pickle_by_value(dependencies)
    answers = on_every_node(look, storage_uri)
    for node, check, answer in zip(nodes, checks, answers, strict=True):
        name = node["NodeManagerHostname"]
        try:
            if advice := ray.get(check, timeout=_NODE_TIMEOUT_SECONDS):
                yield f"{name}: packages", advice
                continue
            found = ray.get(answer, timeout=_NODE_TIMEOUT_SECONDS)
        except Exception as error:  # whatever a node does is a finding
            yield f"{name}: no answer", essential_line(str(error) or type(error).__name__)
        else:
            yield from _of_node(name, found, here, storage_uri)


def _of_node(
    name: str, found: dict[str, Any], here: dict[str, Any], storage_uri: str | None
) -> Iterator[Finding]:
    differ = [
        f"{package} {found['versions'][package]} there, {mine} at the driver"
        for package, mine in here["versions"].items()
        if found["versions"][package] != mine
    ]
    shown = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    advice = f"install the same requirements.txt on all machines ({'; '.join(differ)})"
    yield f"{name}: versions {shown}", advice if differ else ""
    for gpu in found["gpus"]:
        yield f"{name}: GPU {gpu}", ""
    for what, free, least in (
        ("memory for Ray's objects (/dev/shm)", found["shm"], _LEAST_SHM_BYTES),
        ("disk for what spills (/tmp)", found["disk"], _LEAST_DISK_BYTES),
    ):
        advice = f"give it at least {least >> 30} GiB" if free < least else ""
        yield f"{name}: {what}: {free / 2**30:.1f} GiB free", advice
    if storage_uri:
        yield _of_storage(name, found["storage"], storage_uri)


def _of_storage(who: str, trouble: str, uri: str) -> Finding:
    return f"{who}: storage {uri}{'' if trouble else ' can be written, read and deleted'}", trouble


def look(storage_uri: str | None) -> dict[str, Any]:
    """What a process sees of its machine; run by a worker on every node."""
    return {
        "versions": {"python": platform.python_version(), "covergenre": __version__}
        | {name: _version(name) for name in _PACKAGES},
        "gpus": _gpus(),
        "shm": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize,
        "disk": shutil.disk_usage("/tmp").free,
        "storage": storage_trouble(storage_uri) if storage_uri else "",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpus() -> list[str]:
    """Name and free memory of each; from the driver's own tool, as Ray hides GPUs from a task."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, check=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [[part.strip() for part in line.split(",")] for line in found.stdout.splitlines()]
    return [f"{name}, {free} of {total} free" for name, free, total in gpus]


def storage_trouble(uri: str) -> str:
    """What keeps this process from writing, reading or deleting at `uri`; empty if nothing."""
    folder = storage.join(uri, f"covergenre-doctor-{uuid.uuid4().hex}")
    probe, data = storage.join(folder, "probe"), os.urandom(1000)
    try:
        storage.put(probe, data)
        if storage.read_bytes(probe) != data:
            return "other bytes came back than were written"
        storage.delete_directory(folder)
    except StorageError as error:
        return str(error)
    return ""
