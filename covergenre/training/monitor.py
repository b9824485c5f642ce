"""Progress of training: an actor collects the workers' reports, a thread shows them."""

import logging
import math
import threading
from typing import Any

from covergenre.metrics import dev_metrics, macro_over
from covergenre.progress import Progress

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.3


class Monitor:
    """A Ray actor between the training workers and the driver.

    Workers report their progress to it and ask it whether the driver wants to resize their group.
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
        """The reports since the last call, oldest first."""
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


class ProgressReporter:
    """Shows what the monitor collects, on a thread, while the `with` block runs."""

    def __init__(self, monitor: Any, epochs: int, rows: int) -> None:
        """monitor: handle of a Monitor actor; epochs, rows: of the whole run."""
        self._monitor, self._epochs = monitor, epochs
        self._progress = Progress("train", rows, "covers")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressReporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show_reports()
        self._progress.__exit__(None, None, None)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._show_reports()

    def _show_reports(self) -> None:
        import ray

        for kind, value in ray.get(self._monitor.drain.remote()):
            if kind == "progress":
                epoch, rows, loss = value
                self._progress.update_to(rows, f"epoch {epoch + 1}/{self._epochs} loss {loss:.3f}")
            elif kind == "message":
                logger.info(value)
            else:
                self._progress.epoch_ended(value)
                best = "  (best so far)" if value["best"] else ""
                logger.info(
                    f"epoch {value['epoch']}/{self._epochs}: loss {value['train_loss']:.4f},"
                    f" dev {format_dev_metrics(value)},"
                    f" {value['images_per_second']:.1f} covers/s{best}"
                )


def format_dev_metrics(record: dict[str, Any]) -> str:
    """The dev metrics of an epoch's record in one line, with the genres of the macro means."""

    def shown(name: str) -> str:
        value = record[f"dev_{name}"]
        return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"

    over = macro_over(dev_metrics(record))
    return (
        f"loss {shown('loss')}, PR AUC {shown('pr_auc_micro')} micro {shown('pr_auc_macro')} macro,"
        f" ROC AUC {shown('roc_auc_micro')} micro {shown('roc_auc_macro')} macro"
        f"{f' (macro over {over})' if over else ''}"
    )
