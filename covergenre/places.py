"""Places: a stage writes only where nothing is, or where the same command was before, and on a
cluster only where every machine can."""

import json
from collections.abc import Mapping
from typing import Any

from covergenre import __version__, runtime, storage
from covergenre.config import StageConfig
from covergenre.errors import ConfigError, StorageError

_RUN = "_state/run.json"


def claim(place: str, stage: str, config: StageConfig, inputs: dict[str, Any]) -> None:
    """Make `place` this run's, or find that it already is. Raises StorageError where it is not.

    `inputs` identifies what goes in (the hash of a catalog, the id of a model): with other inputs
    the same settings are another run.
    """
    if storage.exists(place) and not storage.is_folder(place):
        raise StorageError(f"{place}: is a file; choose a folder with --out")
    claim_file = storage.join(place, _RUN)
    run = {"stage": stage, "fingerprint": config.fingerprint(), "inputs": inputs}
    if storage.exists(claim_file):
        found = storage.read_json(claim_file)
        if not isinstance(found, dict):
            raise StorageError(f"{claim_file}: was not written by covergenre; choose another --out")
        if {key: found.get(key) for key in run} == run:
            return
        raise StorageError(
            f"{place}: holds {_difference(found, run)}; choose another --out, or remove it"
        )
    held = storage.list_sizes(place)
    if held:
        first = next(iter(held))
        raise StorageError(
            f"{place}: is not empty (holds {first}); choose another --out, or empty it"
        )
    record = run | {"settings": config.model_dump(mode="json"), "covergenre": __version__}
    text = json.dumps(record, indent=2) + "\n"
    if not storage.put_if_absent(claim_file, text.encode()):
        raise StorageError(f"{place}: another run took this place just now; choose another --out")


def check_shared(reached: Mapping[str, str | None], shared_filesystem: bool) -> None:
    """Raises ConfigError where a place lies on one machine's disk, and the cluster has several.

    reached: what a place is -> where it is, or None; workers read and write there, not the driver
    alone. Ray has been started.
    """
    for what, place in reached.items():
        if place is None or storage.is_uri(place) or shared_filesystem:
            continue
        if (count := runtime.machines()) > 1:
            raise ConfigError(
                f"{what} {place}: a path of one machine, and the cluster has {count} or more; use"
                " s3:// or, if all of them see it, --shared-filesystem"
            )


def _difference(found: dict[str, Any], run: dict[str, Any]) -> str:
    if found.get("stage") != run["stage"]:
        return f"a run of {found.get('stage')}"
    if found.get("fingerprint") != run["fingerprint"]:
        return f"a {run['stage']} run with other settings"
    return f"a {run['stage']} run on other inputs, or they have changed since"
