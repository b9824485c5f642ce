"""What a cluster can have once its autoscaler has started all the machines that it may."""

from contextlib import suppress
from pathlib import Path
from typing import Any


def max_resources(resource: str) -> float:
    """How much of `resource` ("CPU", "GPU") the cluster has, or can ever have.

    Ray 2.60 tells an autoscaler's limits to nobody (its pull request 63012 would), so they are read
    from the autoscaler's own file, where this process runs on the head, as the driver of a job
    does. Elsewhere, and where nothing is started by itself, this is what there is now.
    """
    import ray

    now = float(ray.cluster_resources().get(resource, 0))
    config = _config(ray.get_runtime_context().gcs_address)
    if config is None:
        return now
    seen = [node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]]
    return max(now, max_resources_of(config, resource, max(seen, default=0.0)))


def max_resources_of(config: dict[str, Any], resource: str, unknown: float) -> float:
    """How much of `resource` a cluster of this Ray cluster file can have, its head included.

    unknown: how much a machine has whose kind does not say, as with `provider: local`.
    """

    def each(kind: dict[str, Any]) -> float:
        known = kind.get("resources")
        return float(known.get(resource, 0)) if known else unknown

    kinds = config["available_node_types"]
    total, room = each(kinds[config["head_node_type"]]), config["max_workers"]
    for kind in sorted(kinds.values(), key=each, reverse=True):
        count = min(kind.get("max_workers", 0), room)
        total += count * each(kind)
        room -= count
    return total


def _config(gcs_address: str) -> dict[str, Any] | None:
    """The file of the autoscaler that serves the cluster of `gcs_address` from this machine."""
    import psutil
    import yaml

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            flags = dict(word.partition("=")[::2] for word in process.cmdline())
            file = flags.get("--autoscaling-config")
            if file and flags.get("--gcs-address") == gcs_address:
                config: dict[str, Any] = yaml.safe_load(Path(file).expanduser().read_text())
                return config
    return None
