"""Output directories: a stage writes to a new or empty one, or resumes the same run.

OUT/_state/run.json   the run record: stage, settings and inputs of the run
OUT/_state/lock/      see lock.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covergenre import __version__
from covergenre.config import StageConfig, flag
from covergenre.errors import StorageError
from covergenre.formatting import with_article
from covergenre.io import storage

STATE = "_state"
_RUN_RECORD = f"{STATE}/run.json"


def check_not_inside(out: str, inputs: Mapping[str, str]) -> None:
    """Raises StorageError if `out` is inside one of `inputs` (name -> path or URI), which the run
    would change, or if a URI has an unsupported scheme."""
    storage.check_scheme(out)
    for what, uri in inputs.items():
        storage.check_scheme(uri)
        uri = storage.absolute(uri)
        if out == uri or out.startswith(f"{uri}/"):
            raise StorageError(
                f"{out}: is inside the {what} {uri}; choose another --out", code="inside_input"
            )


def check_is_directory(out: str) -> None:
    """Raises StorageError if `out`, or a parent of it, is a file."""
    paths = [out] if storage.is_uri(out) else [out, *map(str, Path(out).parents)]
    existing = next(filter(storage.exists, paths), None)
    if existing is not None and not storage.is_directory(existing):
        raise StorageError(
            f"{existing}: is a file; choose a directory with --out", code="not_a_directory"
        )


def check_available(out: str) -> None:
    """Raises StorageError if `out` contains files but no run record."""
    check_is_directory(out)
    if has_run_record(out):
        return
    # Files in _state/ without a record are those of a run that failed before it wrote any result.
    files = [name for name in storage.list_sizes(out) if not name.startswith(f"{STATE}/")]
    if files:
        raise StorageError(
            f"{out}: is not empty (contains {files[0]}); choose another --out, or empty it",
            code="not_empty",
        )


def has_run_record(out: str) -> bool:
    """Whether `out` belongs to a run."""
    return storage.exists(storage.join(out, _RUN_RECORD))


def run_record(stage: str, config: StageConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The content of run.json.

    inputs: identity of what the run reads, such as a hash of the catalog. The same settings with
    other inputs are another run.
    """
    return {
        "stage": stage,
        "fingerprint": config.fingerprint(),
        "inputs": dict(inputs),
        "settings": config.saved(),
        "covergenre": __version__,
    }


def write_run_record(out: str, record: dict[str, Any], config: StageConfig) -> None:
    """Make `out` belong to the run of `record`. Raises StorageError if it belongs to another."""
    check_available(out)
    if has_run_record(out):
        check_same_run(out, record, config)
        return
    uri = storage.join(out, _RUN_RECORD)
    if not storage.put_if_absent(uri, storage.json_bytes(record)):
        raise StorageError(
            f"{out}: another run started in this directory just now; choose another --out",
            code="other_run",
        )


def check_same_run(out: str, record: dict[str, Any], config: StageConfig) -> None:
    """Raises StorageError (code "other_run") if the run record of `out` is not that of `record`."""
    uri = storage.join(out, _RUN_RECORD)
    found = storage.read_json(uri)
    if not isinstance(found, dict):
        raise StorageError(
            f"{uri}: was not written by covergenre; choose another --out", code="other_run"
        )
    if difference := _difference(found, record, config):
        raise StorageError(
            f"{out}: contains {difference}; choose another --out, or remove it", code="other_run"
        )


def _difference(found: dict[str, Any], record: dict[str, Any], config: StageConfig) -> str:
    """How the run of `found` differs from that of `record`; empty if it does not."""
    stage = record["stage"]
    run = with_article(f"{stage} run")
    if found.get("stage") != stage:
        return f"a run of {found.get('stage')}"
    if found.get("fingerprint") != record["fingerprint"]:
        was, settings = _mapping(found.get("settings")), record["settings"]
        names = sorted(n for n in config.result_settings() if was.get(n) != settings[n])
        changes = ", ".join(f"{flag(n)} {was.get(n)}, not {settings[n]}" for n in names[:3])
        return f"{run} with other settings" + (f" ({changes})" if changes else "")
    if found.get("inputs") != record["inputs"]:
        was = _mapping(found.get("inputs"))
        names = [name for name, value in record["inputs"].items() if was.get(name) != value]
        return f"{run} with other inputs ({', '.join(names)}), or they have changed since"
    return ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
