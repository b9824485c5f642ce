"""Progress of training: an actor collects the events of workers, and the driver reports them."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from covergenre.formatting import decimal
from covergenre.metrics import dev_metrics, macro_over
from covergenre.polling import polling
from covergenre.progress import Progress

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.3


class Monitor:
    """A Ray actor between the training workers and the driver.

    Workers report events to it, and ask it whether the driver requests a resize of the group.
    """

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._resize_requested = False
        self._workers: list[Any] = []

    def report_progress(self, epoch: int, rows: int, loss: float) -> None:
        """`rows` of the whole run are trained; `loss` is that of the last step."""
        self._events.append(("progress", (epoch, rows, loss)))

    def report_epoch(self, record: dict[str, Any]) -> None:
        """An epoch has ended; record: as in history.jsonl."""
        self._events.append(("epoch", record))

    def report_message(self, line: str) -> None:
        """A line for the driver's log."""
        self._events.append(("message", line))

    def drain(self) -> list[tuple[str, Any]]:
        """The events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def request_resize(self) -> None:
        """Ask the workers to save a checkpoint and exit."""
        self._resize_requested = True

    def is_resize_requested(self) -> bool:
        """Whether the workers should save a checkpoint and exit."""
        return self._resize_requested

    def add_worker(self, worker: Any) -> None:
        """Register a worker of the current group, by its actor handle."""
        self._workers.append(worker)

    def kill_workers(self) -> None:
        """Kill every worker of the current group."""
        import ray

        for worker in self._workers:
            ray.kill(worker)

    def end_group(self) -> None:
        """Forget the workers of the current group, and any request to resize it."""
        self._resize_requested = False
        self._workers = []


@contextlib.contextmanager
def progress_reported(monitor: Any, epochs: int, rows: int) -> Iterator[None]:
    """While the body runs, report the events of the monitor as progress and log lines.

    monitor: handle of a Monitor actor. epochs, rows: of the whole run.
    """
    import ray

    with Progress("train", rows, "covers") as progress:

        def report() -> bool:
            for kind, value in ray.get(monitor.drain.remote()):
                _report(kind, value, progress, epochs)
            return False

        try:
            with polling(report, _POLL_SECONDS):
                yield
        finally:
            report()


def _report(kind: str, value: Any, progress: Progress, epochs: int) -> None:
    if kind == "progress":
        epoch, rows, loss = value
        progress.update_to(rows, f"epoch {epoch + 1}/{epochs} loss {loss:.3f}")
    elif kind == "message":
        logger.info(value)
    else:
        progress.epoch_ended(value)
        best = "  (best so far)" if value["best"] else ""
        logger.info(
            f"epoch {value['epoch']}/{epochs}: loss {value['train_loss']:.4f},"
            f" dev {format_dev_metrics(value)}, {value['images_per_second']:.1f} covers/s{best}"
        )


def format_dev_metrics(record: dict[str, Any]) -> str:
    """The dev metrics in the record of an epoch, in one line."""

    def shown(name: str) -> str:
        return decimal(record[f"dev_{name}"], 3)

    over = macro_over(dev_metrics(record))
    return (
        f"loss {shown('loss')}, PR AUC {shown('pr_auc_micro')} micro {shown('pr_auc_macro')} macro,"
        f" ROC AUC {shown('roc_auc_micro')} micro {shown('roc_auc_macro')} macro"
        f"{f' (macro over {over})' if over else ''}"
    )
