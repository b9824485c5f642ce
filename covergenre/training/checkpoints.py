"""Checkpoint files of a training run: written atomically, verified by hash when they are read.

    FOLDER/step-<steps done>-<sha256>.safetensors   weights and Adam's state; in its header, as
                                                    JSON, everything else that resuming needs
    FOLDER/best-<steps done>-<sha256>.safetensors   the weights of the best epoch so far
    FOLDER/quarantine/<name>                        a damaged checkpoint

Each is written atomically, and its name contains the first digits of its hash. If the content does
not match, the previous checkpoint is used. Ray Train's checkpoints are not used, because they are
directories of several files without hashes, which a crash can leave incomplete.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre.errors import StorageError
from covergenre.io import storage

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_KEPT = 2
"""The newest, and the previous one in case the newest is damaged."""
_HASH_DIGITS = 16
_CHUNK_BYTES = 8 * 2**20
_HEADER = "covergenre"
_QUARANTINE = "quarantine"
_DOWNLOADS = 2
"""Downloads with a wrong hash after which the file, and not its transfer, counts as damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was downloaded and is intact."""

    name: str
    step: int
    """Steps done, of the whole run."""
    file: Path
    """The local copy."""

    def state(self) -> dict[str, Any]:
        """The argument `state` of `save`."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            state: dict[str, Any] = json.loads(opened.metadata()[_HEADER])
            return state

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The argument `tensors` of `save`, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.file)


def save(
    folder: str,
    kind: str,
    step: int,
    tensors: "Mapping[str, torch.Tensor]",
    state: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint and return its name. kind: "step" or "best"."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER: json.dumps(state)} if state is not None else None
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "checkpoint")
        try:
            save_file(on_cpu, file, metadata)
        except (OSError, SafetensorError) as error:  # the disk is full, for example
            raise StorageError(f"{file}: cannot write: {str(error).splitlines()[0]}") from error
        name = f"{kind}-{step:09d}-{_digest(file)}.safetensors"
        storage.put_file(storage.join(folder, name), file)
    return name


def latest_step(folder: str) -> int:
    """Steps done at the newest checkpoint, intact or not; 0 if there is none."""
    names = _names(folder)
    return _step_of(names[-1]) if names else 0


def newest(
    folder: str, into: Path, log: Callable[[str], None] = logger.warning
) -> Checkpoint | None:
    """Download the newest intact checkpoint to the local folder `into`; None if there is none.

    Damaged ones are moved to FOLDER/quarantine, and logged.
    """
    for name in reversed(_names(folder)):
        file, intact = _download(folder, name, into)
        if file is None:
            continue
        if intact:
            return Checkpoint(name, _step_of(name), file)
        quarantined = storage.join(folder, _QUARANTINE, name)
        storage.put_file(quarantined, file)
        storage.delete_file(storage.join(folder, name))
        file.unlink()
        log(
            f"{storage.join(folder, name)}: damaged checkpoint (sha256 does not match); moved to"
            f" {quarantined}; using the previous one"
        )
    return None


def fetch(folder: str, name: str, into: Path) -> Checkpoint | None:
    """Download the checkpoint `name` to the local folder `into`; None if it is damaged or
    missing."""
    file, intact = _download(folder, name, into)
    if file is None:
        return None
    if not intact:
        file.unlink()
        return None
    return Checkpoint(name, _step_of(name), file)


def _download(folder: str, name: str, into: Path) -> tuple[Path | None, bool]:
    """(local copy, or None if the file is missing; whether it is intact)"""
    file, uri = into / name, storage.join(folder, name)
    for _ in range(_DOWNLOADS):
        if not storage.exists(uri):
            return None, False
        storage.get_file(uri, file)
        if _digest(file) == name.rpartition("-")[2].partition(".")[0]:
            return file, True
    return file, False


def prune(folder: str, best: set[str | None]) -> None:
    """Delete all but the newest checkpoints and the files named in `best`."""
    keep = {*_names(folder)[-_KEPT:], *best}
    for name in storage.list_sizes(folder):
        if name not in keep and not name.startswith(f"{_QUARANTINE}/"):
            storage.delete_file(storage.join(folder, name))


def _names(folder: str) -> list[str]:
    """Names of the checkpoints, oldest first."""
    return [name for name in storage.list_sizes(folder) if name.startswith("step-")]


def _step_of(name: str) -> int:
    try:
        return int(name.split("-")[1])
    except (IndexError, ValueError):
        raise StorageError(
            f"{name}: not a valid name of a checkpoint; remove the file", code="checkpoint_name"
        ) from None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:_HASH_DIGITS]
