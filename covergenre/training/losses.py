"""The loss of each training step, and the check that training has not diverged."""

import math
from collections.abc import Sequence

import numpy as np

from covergenre.errors import TrainingDivergedError
from covergenre.formatting import plural
from covergenre.training import checkpoints
from covergenre.training.sampler import Steps

_DIVERGED = 10.0
"""Times the loss of always predicting the base rates: beyond that, training has diverged."""
_UNTRAINED_LOSS = math.log(2)
"""Of a model that scores everything 0.5, as an untrained one nearly does."""


def largest_loss(baseline: float) -> float:
    """The mean loss of an epoch, or of the dev split, above which training counts as diverged.

    baseline: the loss of always predicting the base rates. Where genres are very rare (or all
    albums have them) it is near 0, and a model that has not learned that yet is far above it: the
    limit is at least twice the loss of an untrained model.
    """
    return max(_DIVERGED * baseline, 2 * _UNTRAINED_LOSS)


class LossHistory:
    """Mean loss of every step so far, over all ranks.

    Raises TrainingDivergedError where training diverged; code: loss_not_finite, loss_too_large or
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

        Raises TrainingDivergedError as soon as the mean loss of the epoch is bound to exceed the
        limit: no loss is negative, so the losses so far can be enough. The outcome does not depend
        on how often this is called, nor on where a run was resumed.
        """
        for step, loss in enumerate(losses, done - len(losses)):
            if not math.isfinite(loss):
                raise self.diverged(
                    f"the loss is not finite (NaN or Inf) from step {step + 1} of epoch"
                    f" {epoch + 1} on",
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
        """Mean over all albums in the last `done` steps, which are the first of an epoch."""
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
            f"the last checkpoint is of step {step}, in {self._checkpoints}; lower --learning-rate,"
            " and choose another --out"
            if step
            else "there is no checkpoint yet; lower --learning-rate"
        )
        return TrainingDivergedError(
            f"training diverged: {what}; always predicting the base rates of the genres has a loss"
            f" of {self._baseline:.3g} (limit {self.limit:.3g}); the learning rate is"
            f" {self._learning_rate:g}; {last}",
            code=code,
        )

    def _sum(self, done: int) -> float:
        sizes = [self._steps.size(step) for step in range(done)]
        return float(np.dot(self.losses[-done:], sizes))
