"""The losses of training steps, and the check that training has not diverged."""

import math
from collections.abc import Sequence

import numpy as np

from covergenre.errors import TrainingDivergedError
from covergenre.formatting import plural
from covergenre.training import checkpoints
from covergenre.training.sampler import Steps

_DIVERGED = 10.0
"""Training has diverged above this multiple of the loss of always predicting the base rates."""
_UNTRAINED_LOSS = math.log(2)
"""Loss if all scores are 0.5, as they nearly are in an untrained model."""


def largest_loss(baseline: float) -> float:
    """The mean loss of an epoch, or of the dev split, above which training counts as diverged.

    baseline: the loss of always predicting the base rates. It is near 0 if genres are very rare or
    very common, so the limit is at least twice the loss of an untrained model.
    """
    return max(_DIVERGED * baseline, 2 * _UNTRAINED_LOSS)


class LossHistory:
    """Mean loss of every step so far, over all ranks.

    The methods raise TrainingDivergedError with the code loss_not_finite, loss_too_large or
    weights_not_finite.
    """

    def __init__(
        self,
        steps: Steps,
        baseline: float,
        learning_rate: float,
        checkpoint_folder: str,
        losses: Sequence[float] = (),
    ) -> None:
        """losses: of the steps before the checkpoint that training resumed from."""
        self.losses = list(losses)
        self.limit = largest_loss(baseline)
        self._steps, self._baseline = steps, baseline
        self._learning_rate, self._checkpoints = learning_rate, checkpoint_folder

    def append(self, losses: Sequence[float], *, epoch: int, done: int, steps: int) -> None:
        """Add the losses of consecutive steps; `done` of the epoch's `steps` steps are done.

        Raises TrainingDivergedError as soon as the mean loss of the epoch must exceed the limit,
        even if all further losses are 0. The outcome does not depend on how often this is called,
        nor on the step at which a run was resumed.
        """
        for step, loss in enumerate(losses, done - len(losses)):
            if not math.isfinite(loss):
                raise self.diverged(
                    f"the loss is not finite (NaN or Inf) at step {step + 1} of epoch {epoch + 1}",
                    "loss_not_finite",
                )
            self.losses.append(loss)
        total = self._sum(done)
        if total > self.limit * self._steps.rows_in(steps):
            raise self.diverged(
                f"the mean training loss over {plural(done, 'step')} of epoch {epoch + 1} is"
                f" {total / self._steps.rows_in(done):.3g}",
                "loss_too_large",
            )

    def epoch_mean(self, done: int) -> float:
        """Mean loss over the albums of an epoch, after its first `done` steps."""
        return self._sum(done) / self._steps.rows_in(done)

    def check_dev(self, loss: float, epoch: int) -> None:
        """Check the mean loss of the dev split after an epoch."""
        if not math.isfinite(loss):
            what = f"the dev loss is not finite (NaN or Inf) after epoch {epoch + 1}"
            raise self.diverged(what, "loss_not_finite")
        if loss > self.limit:
            what = f"the dev loss after epoch {epoch + 1} is {loss:.3g}"
            raise self.diverged(what, "loss_too_large")

    def diverged(self, what: str, code: str) -> TrainingDivergedError:
        """The error, with the limit, the learning rate and the last checkpoint."""
        step = checkpoints.latest_step(self._checkpoints)
        last = (
            f"the last checkpoint is of step {step}, in {self._checkpoints}; use a lower"
            " --learning-rate and another --out"
            if step
            else "there is no checkpoint yet; use a lower --learning-rate"
        )
        return TrainingDivergedError(
            f"training diverged: {what} (limit {self.limit:.3g}; always predicting the base rates"
            f" of the genres has a loss of {self._baseline:.3g}); the learning rate is"
            f" {self._learning_rate:g}; {last}",
            code=code,
        )

    def _sum(self, done: int) -> float:
        sizes = [self._steps.size(step) for step in range(done)]
        return float(np.dot(self.losses[-done:], sizes))
