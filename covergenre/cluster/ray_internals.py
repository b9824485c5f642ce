"""A pause for Ray Data's scheduling loop."""

import time

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
