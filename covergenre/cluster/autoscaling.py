"""Resources that a cluster can have after its autoscaler has started all machines it may."""

from typing import Any


def max_resources(resource: str) -> float:
    """How many of `resource` ("CPU" or "GPU") the cluster has, or can have after scaling up.

    The autoscaler's limits are known only on the head node, where the drivers of jobs run.
    Elsewhere, and without an autoscaler, the current resources are returned.
    """
    import ray

    from covergenre.cluster.ray_internals import autoscaler_config

    now = float(ray.cluster_resources().get(resource, 0))
    config = autoscaler_config()
    if config is None:
        return now
    seen = [node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]]
    return max(now, max_resources_of(config, resource, max(seen, default=0.0)))


def max_resources_of(config: dict[str, Any], resource: str, unknown: float) -> float:
    """How many of `resource` a cluster with this Ray cluster file can have, including its head.

    unknown: the resource of a machine whose node type does not declare it (`provider: local`).
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
