"""What the driver passes to every training worker."""

from dataclasses import dataclass
from typing import Any

from covergenre.cluster.workers import Workers
from covergenre.config import TrainConfig
from covergenre.data.dataset import Manifest
from covergenre.data.image_decoding import Preprocessing
from covergenre.training.sampler import Steps


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run. Pickled for each worker; the backbone goes by reference."""

    config: TrainConfig
    """Resolved: nothing is None but max_steps, workers and checkpoint_every."""
    manifest: Manifest
    preprocessing: Preprocessing
    baseline_loss: float
    """Of always predicting the base rates of the training split: see metrics.base_rate_loss."""
    workers: Workers
    backbone: Any
    """ObjectRef of its weights, in a list (Ray would resolve a bare reference); None: random."""
    checkpoints: str
    """Folder of the checkpoints."""
    monitor: Any
    """Handle of a monitor.Monitor actor."""
    microbatch: int | None = None
    """The most rows that a worker computes at a time, where a step does not fit the GPU's memory;
    gradients are accumulated. None: its whole share of a step."""

    @property
    def steps(self) -> Steps:
        """The steps of the whole run."""
        config = self.config
        assert config.epochs is not None  # resolved
        rows = self.manifest.rows("train")
        return Steps.of(rows, config.batch_size, config.epochs, config.max_steps)
