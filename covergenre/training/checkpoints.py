"""Checkpoints of a training run: written whole, known by their content, the newest good one used.

    FOLDER/step-<steps done>-<sha256>.safetensors   weights and Adam's state; in its header, as
                                                    JSON, all else that training needs to go on
    FOLDER/best-<steps done>-<sha256>.safetensors   the weights of the best epoch so far, alone

One atomic put each. The name carries the first digits of the content's hash: a damaged file is
not the file that its name says, and the one before it is taken. They are no checkpoints of Ray
Train's, which are folders of several objects, without hashes, and at the mercy of a crash between
two of them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covergenre.errors import StorageError
from covergenre.io import storage

if TYPE_CHECKING:
    import torch

_KEPT = 2
"""The newest, and the one before in case that is damaged."""
_HASH_DIGITS = 16
_PIECE_BYTES = 8 * 2**20
_HEADER = "covergenre"


@dataclass(frozen=True)
class Checkpoint:
    """A file of the folder, read and found whole."""

    name: str
    step: int
    """Steps done, of the whole run."""
    file: Path
    """A local copy."""

    def state(self) -> dict[str, Any]:
        """What `save` was given as `state`."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            state: dict[str, Any] = json.loads(opened.metadata()[_HEADER])
            return state

    def tensors(self) -> "dict[str, torch.Tensor]":
        """What `save` was given as `tensors`, on the CPU; read where they are used."""
        from safetensors.torch import load_file

        return load_file(self.file)


def save(
    folder: str,
    kind: str,
    step: int,
    tensors: "Mapping[str, torch.Tensor]",
    state: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint; its name. kind: "step" or "best". Tensors may be on any device."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER: json.dumps(state)} if state is not None else None
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "checkpoint")
        try:
            save_file(on_cpu, file, metadata)
        except (OSError, SafetensorError) as error:  # the disk is full, say
            raise StorageError(f"{file}: cannot write: {str(error).splitlines()[0]}") from error
        name = f"{kind}-{step:09d}-{_digest(file)}.safetensors"
        storage.put_file(storage.join(folder, name), file)
    return name


def latest_step(folder: str) -> int:
    """Steps done by the newest checkpoint, whole or not; 0 where there is none."""
    names = _names(folder)
    return _step_of(names[-1]) if names else 0


def newest(folder: str, into: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, copied below `into`; None where there is none.

    Damaged ones are deleted, and `log` gets a line.
    """
    for name in reversed(_names(folder)):
        found = fetch(folder, name, into)
        if found is not None:
            return found
        uri = storage.join(folder, name)
        log(f"{uri}: damaged (sha256); the checkpoint before it is used")
        storage.delete_file(uri)
    return None


def fetch(folder: str, name: str, into: Path) -> Checkpoint | None:
    """The file `name`, copied below `into`; None where it is damaged or gone."""
    file = into / name
    uri = storage.join(folder, name)
    if not storage.exists(uri):
        return None
    storage.get_file(uri, file)
    if _digest(file) != name.rpartition("-")[2].partition(".")[0]:
        file.unlink()
        return None
    return Checkpoint(name, _step_of(name), file)


def prune(folder: str, best: set[str | None]) -> None:
    """Delete all but the newest checkpoints and the weights that they name as the `best`."""
    keep = {*_names(folder)[-_KEPT:], *best}
    for name in storage.list_sizes(folder):
        if name not in keep:
            storage.delete_file(storage.join(folder, name))


def _names(folder: str) -> list[str]:
    """Of the checkpoints, oldest first."""
    return [name for name in storage.list_sizes(folder) if name.startswith("step-")]


def _step_of(name: str) -> int:
    try:
        return int(name.split("-")[1])
    except (IndexError, ValueError):
        raise StorageError(f"{name}: no name of a checkpoint; remove it") from None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()[:_HASH_DIGITS]
