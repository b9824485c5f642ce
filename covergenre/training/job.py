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
    """A training run. Pickled for each worker; the weights are passed by reference."""

    config: TrainConfig
    """Resolved: only max_steps, microbatch, workers and checkpoint_every may be None."""
    manifest: Manifest
    preprocessing: Preprocessing
    baseline_loss: float
    """Loss of always predicting the base rates of the train split: metrics.base_rate_loss."""
    workers: Workers
    backbone: Any
    """ObjectRef of the pretrained weights, in a list because Ray would resolve a bare reference;
    None: random weights."""
    checkpoints: str
    """Folder of the checkpoints."""
    features: str
    """Folder of the cached features."""
    monitor: Any
    """Handle of a monitor.Monitor actor."""
    microbatch: int | None = None
    """The maximum number of rows in a forward pass, with accumulated gradients: --microbatch, or
    fewer if a step did not fit in GPU memory. None: the worker's whole share of a step."""

    @property
    def steps(self) -> Steps:
        """The steps of the whole run."""
        config = self.config
        assert config.epochs is not None  # resolved
        rows = self.manifest.rows("train")
        return Steps.of(rows, config.batch_size, config.epochs, config.max_steps)
