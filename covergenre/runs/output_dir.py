"""Places: a stage writes only where nothing is, or where the same command was before, and on a
cluster only where every machine can.

    PLACE/_state/run.json     whose run this is, for good
    PLACE/_state/at-work/N    the run that is at work there now, if any: see leases.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covergenre import __version__
from covergenre.cluster import ray_runtime
from covergenre.config import StageConfig, flag
from covergenre.errors import ConfigError, StorageError
from covergenre.formatting import with_article
from covergenre.io import storage

STATE = "_state"
_RUN = f"{STATE}/run.json"


def is_claimed(place: str) -> bool:
    """Whether `place` is some run's."""
    return storage.exists(storage.join(place, _RUN))


def check_apart(place: str, inputs: Mapping[str, str]) -> None:
    """Raises StorageError where `place` lies in one of `inputs` (what it is -> where it is), which
    would be another one then, and where nothing can be stored at URIs like one of them."""
    storage.check_scheme(place)
    for what, where in inputs.items():
        storage.check_scheme(where)
        where = storage.absolute(where)
        if place == where or place.startswith(f"{where}/"):
            raise StorageError(f"{place}: lies in the {what} {where}; choose another --out")


def check_folder(place: str) -> None:
    """Raises StorageError where `place`, or what it is to lie in, is a file."""
    ways = [place] if storage.is_uri(place) else [place, *map(str, Path(place).parents)]
    there = next(filter(storage.exists, ways), None)
    if there is not None and not storage.is_directory(there):
        raise StorageError(f"{there}: is a file; choose a folder with --out")


def check_free(place: str) -> None:
    """Raises StorageError where `place` is no run's and yet holds something."""
    check_folder(place)
    if is_claimed(place):
        return
    # What a run left there before it had a claim is nobody's.
    held = [name for name in storage.list_sizes(place) if not name.startswith(f"{STATE}/")]
    if held:
        raise StorageError(
            f"{place}: is not empty (holds {held[0]}); choose another --out, or empty it"
        )


def claim(place: str, stage: str, config: StageConfig, inputs: dict[str, Any]) -> None:
    """Make `place` this run's, or find that it already is. Raises StorageError where it is not.

    `inputs` identifies what goes in (the hash of a catalog, the id of a model): with other inputs
    the same settings are another run.
    """
    check_free(place)
    claim_file = storage.join(place, _RUN)
    run = {
        "stage": stage,
        "fingerprint": config.fingerprint(),
        "inputs": inputs,
        "settings": config.saved(),
        "covergenre": __version__,
    }
    if storage.exists(claim_file):
        found = storage.read_json(claim_file)
        if not isinstance(found, dict):
            raise StorageError(f"{claim_file}: was not written by covergenre; choose another --out")
        if difference := _difference(found, run, config):
            raise StorageError(f"{place}: holds {difference}; choose another --out, or remove it")
        return
    text = json.dumps(run, indent=2) + "\n"
    if not storage.put_if_absent(claim_file, text.encode()):
        raise StorageError(f"{place}: another run took this place just now; choose another --out")


def check_shared(reached: Mapping[str, str | None], shared_filesystem: bool) -> None:
    """Raises ConfigError where a place lies on one machine's disk, and the cluster has several.

    reached: what a place is -> where it is, or None; workers read and write there, not the driver
    alone. Ray has been started.
    """
    for what, place in reached.items():
        if place is None or storage.scheme(place) not in ("", "file") or shared_filesystem:
            continue
        if (count := ray_runtime.machines()) > 1:
            raise ConfigError(
                f"{what} {place}: a path of one machine, and the cluster has {count} or more; use"
                " s3:// or, if all of them see it, --shared-filesystem"
            )


def _difference(found: dict[str, Any], run: dict[str, Any], config: StageConfig) -> str:
    """In what the run that is there differs from this one; empty where it is the same."""
    stage = run["stage"]
    run_name = with_article(f"{stage} run")
    if found.get("stage") != stage:
        return f"a run of {found.get('stage')}"
    if found.get("fingerprint") != run["fingerprint"]:
        was, settings = found.get("settings"), run["settings"]
        was = was if isinstance(was, dict) else {}
        names = sorted(n for n in config.deciding() if was.get(n) != settings[n])
        changes = ", ".join(f"{flag(n)} {was.get(n)}, not {settings[n]}" for n in names[:3])
        return f"{run_name} with other settings" + (f" ({changes})" if changes else "")
    if found.get("inputs") != run["inputs"]:
        was = found.get("inputs")
        was = was if isinstance(was, dict) else {}
        names = [name for name, value in run["inputs"].items() if was.get(name) != value]
        return f"{run_name} on other inputs ({', '.join(names)}), or they have changed since"
    return ""
