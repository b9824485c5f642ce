"""Private APIs of Ray, each with the reason for its use. Checked with Ray 2.60."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

_SECONDS = 0.02


class Pause(ExecutionCallback):
    """Holds the loop to 50 rounds a second.

    While its tasks wait for the consumer, the loop of Ray 2.60 goes round without a pause: it took
    0.6 of a core, and the interpreter lock from the training thread beside it, and halved the rate
    of training on two cores. A round handles all that is ready, so fewer rounds lose nothing.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called after each round."""
        time.sleep(_SECONDS)


def run_torch_trainer(train_loop: Callable[..., None], **options: Any) -> None:
    """TorchTrainer(train_loop, **options).fit(); ^C ends it at once, with its workers.

    Ray Train's own handler of SIGINT waits for its controller, for any length of time, while the
    workers continue to train.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    trainer = Trainer(train_loop, **options)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if trainer.controller is not None:
            ray.kill(trainer.controller)
        raise


def is_startup_timeout(error: BaseException) -> bool:
    """Whether a TorchTrainer failed because the workers' machines did not start in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    failure = getattr(error, "controller_failure", None)
    return isinstance(failure, WorkerGroupStartupTimeoutError)
