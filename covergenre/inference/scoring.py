"""Scores the output parts of a stage: on the cluster, or a small job in this process."""

from collections.abc import Callable, Iterator

from covergenre.cluster.workers import choose_workers, log_pending_resources
from covergenre.config import InferenceSettings
from covergenre.data.plan import Plan
from covergenre.inference import local_scoring, ray_scoring
from covergenre.inference.batches import Ranges, Seconds, add_seconds
from covergenre.inference.bottleneck import bottleneck
from covergenre.inference.scorer import Report, Write
from covergenre.models.bundle import Bundle, device_of


class Scoring:
    """Ranges of rows of a plan, to be scored and written as output parts.

    Iterating does it, and yields reports; each part is in one of them. Parts that are scored again
    get the same scores, as their batches depend on their rows only.
    """

    def __init__(
        self,
        plan: Plan,
        ranges: Ranges,
        bundle: Bundle,
        write: Write,
        settings: InferenceSettings,
        start_ray: Callable[[], None],
    ) -> None:
        """write: called where a part was scored. start_ray: called before Ray is used."""
        self._job = plan, ranges, bundle, write
        device = device_of(bundle, settings.device)
        self._settings = settings = settings.model_copy(update={"device": device})
        self.seconds: Seconds = {}
        """What took how long so far, in all processes."""
        self.rows = int((ranges[:, 2] - ranges[:, 1]).sum())
        self._workers = None
        if not local_scoring.is_small_job(self.rows, settings.workers):
            start_ray()
            self._workers = choose_workers(
                settings.workers, settings.device, settings.cpus_per_worker
            )

    @property
    def workers(self) -> int:
        """Number of processes that have the model."""
        return self._workers.count if self._workers else 1

    @property
    def bottleneck(self) -> str:
        """What limited the rate, in one line; see bottleneck.py."""
        use_gpu = (
            self._workers.use_gpu
            if self._workers
            else local_scoring.uses_gpu(self._settings.device)
        )
        return bottleneck(self.seconds, workers=self.workers, use_gpu=use_gpu)

    def __iter__(self) -> Iterator[Report]:
        for report in self._reports():
            add_seconds(self.seconds, report.seconds)
            yield report

    def _reports(self) -> Iterator[Report]:
        settings = self._settings
        if self._workers is None:
            yield from local_scoring.score_parts_locally(
                *self._job, batch_size=settings.batch_size, device=settings.device
            )
            return
        with log_pending_resources(*self._workers.required_resource):
            yield from ray_scoring.score_parts(
                *self._job, batch_size=settings.batch_size, workers=self._workers
            )
