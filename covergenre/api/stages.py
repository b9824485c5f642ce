"""The stages as functions with keyword arguments, and their results."""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import pyarrow as pa

from covergenre import config
from covergenre.api.labels import read_labels
from covergenre.api.model import Model, load_model
from covergenre.config import StageConfig
from covergenre.io import storage
from covergenre.progress import Callback, reporting

if TYPE_CHECKING:
    import pandas as pd

    from covergenre.api.torch_dataset import CoverDataset, Split
    from covergenre.stages import evaluate as evaluate_stage
    from covergenre.stages import prepare as prepare_stage
    from covergenre.stages import quantize as quantize_stage
    from covergenre.stages import score as score_stage
    from covergenre.stages import train as train_stage

Uri: TypeAlias = str | os.PathLike[str]
Function = TypeVar("Function", bound=Callable[..., Any])


class _Result:
    """The result of a stage; its repr is the summary that the command prints."""

    uri: str
    _summary: str

    def summary(self) -> str:
        """The text that the command prints at the end, in several lines."""
        return self._summary

    def __repr__(self) -> str:
        return self._summary

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(self._summary)}</pre>"


class PreparedDataset(_Result):
    """Result of `prepare`.

    Attributes:
        uri: the dataset.
        dataset_id: identity of its content.
        genres: names of the selected genres, in the order of the targets.
        counts: rows, albums, duplicates, rejected and others, as in _manifest.json.
    """

    def __init__(self, done: "prepare_stage.Prepared") -> None:
        self.uri = done.manifest.uri
        self.dataset_id = done.manifest.dataset_id
        self.genres = done.manifest.genres.names
        self.counts = done.manifest.counts
        self._summary = done.summary()

    def load(
        self, split: "Split", *, transform: Callable[[Any], Any] | None = None
    ) -> "CoverDataset":
        """A split as a map-style dataset of torch; see `load_dataset`."""
        from covergenre.api.torch_dataset import load_dataset

        return load_dataset(self.uri, split, transform=transform)


class TrainingRun(_Result):
    """Result of `train`.

    Attributes:
        uri: the model directory.
        weights_id: identity of the weights, genres, preprocessing and precision.
        best: metrics of the best epoch, whose weights the model has.
    """

    def __init__(self, done: "train_stage.Trained") -> None:
        self.uri = done.uri
        self.weights_id = done.weights_id
        self.best = done.best
        self._summary = done.summary()

    @property
    def history(self) -> "pd.DataFrame":
        """Metrics, one row per epoch."""
        import pandas as pd

        lines = storage.read_bytes(storage.join(self.uri, "history.jsonl")).splitlines()
        return pd.DataFrame([json.loads(line) for line in lines])

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded on first access; see `load_model`."""
        return load_model(self.uri)


class Evaluation(_Result, Mapping[str, Any]):
    """Result of `evaluate`: a mapping of metrics by name, as in _metrics.json.

    Attributes:
        uri: directory of the metrics, with plots and predictions.
        split: the split that was measured.
    """

    def __init__(self, done: "evaluate_stage.Evaluated") -> None:
        self.uri = done.uri
        self.split = done.split
        self._metrics = done.metrics
        self._summary = done.summary()

    @property
    def by_genre(self) -> "pd.DataFrame":
        """Metrics of each genre, indexed by its name."""
        import pandas as pd

        return pd.DataFrame.from_dict(self["genres"], orient="index").rename_axis("genre")

    def __getitem__(self, name: str) -> Any:
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


class QuantizedModel(_Result):
    """Result of `quantize`.

    Attributes:
        uri: the model directory.
        weights_id: identity of the weights, genres, preprocessing and precision.
        metrics: comparison with the source model on the covers of the calibration, as in
            metrics.json.
    """

    def __init__(self, done: "quantize_stage.Quantized") -> None:
        self.uri = done.uri
        self.weights_id = done.weights_id
        self.metrics = done.metrics
        self._summary = done.summary()

    @cached_property
    def model(self) -> Model:
        """The int8 model, loaded on first access; see `load_model`."""
        return load_model(self.uri)


class ScoringRun(_Result):
    """Result of `score`.

    Attributes:
        uri: output directory.
        ledger: counts of all rows, as in _ledger.json: rows = scored + rejected + duplicates, and
            the reasons of those that were rejected.
    """

    def __init__(self, done: "score_stage.Labelled") -> None:
        self.uri = done.uri
        self.ledger = done.ledger
        self._summary = done.summary()

    def labels(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The labels; see `read_labels`."""
        return read_labels(self.uri, columns=columns)


def _stage(settings: type[StageConfig]) -> Callable[[Function], Function]:
    """Adds the settings of a stage to the signature and the docstring of a function."""

    def decorate(function: Function) -> Function:
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        known = {parameter.name for parameter in parameters}
        lines = []
        for name, field in settings.model_fields.items():
            if name in known:
                continue
            default = field.get_default()
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=field.annotation,
                )
            )
            about = (field.description or "").partition("  [")[0]
            if name in config.PREPARE_ONLY and settings is not config.PrepareConfig:
                about += " (used only by prepare)"
            lines.append(f"        {name} ({default!r}): {about}.")
        function.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        function.__doc__ = f"{function.__doc__}\n    Settings, with their defaults:\n" + "\n".join(
            [*lines, "    "]
        )
        return function

    return decorate


@_stage(config.PrepareConfig)
def prepare(
    catalog: Uri,
    *,
    out: Uri,
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    verbose: bool = False,
    **settings: Any,
) -> PreparedDataset:
    """Make a dataset from a catalog: check every cover, select genres, split, write shards.

    Repeating the call resumes an unfinished run, and returns the result of a finished one at once.

    Args:
        catalog: CSV, TSV, JSON Lines or Parquet: a file, a directory or a glob, local or s3://.
        out: directory to write, local or s3://.
        progress: show a progress bar, or log lines if stderr is not a terminal.
        callbacks: functions that are called with a ProgressEvent as rows are processed.
        verbose: also show the logs of Ray.

    Raises:
        ConfigError, CatalogError, StorageError: the problem and its fix, in one line.
    """
    from covergenre.stages.prepare import prepare as run

    checked = config.PrepareConfig(catalog=catalog, out=out, **settings)
    with reporting(progress, callbacks):
        return PreparedDataset(run(checked, verbose=verbose))


@_stage(config.TrainConfig)
def train(
    dataset: Uri,
    *,
    out: Uri,
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    verbose: bool = False,
    **settings: Any,
) -> TrainingRun:
    """Fine-tune a model on a dataset, on all GPUs of the Ray cluster or on CPUs.

    None means the default of the model.

    Args:
        dataset: dataset directory that `prepare` wrote, local or s3://.
        out: model directory to write, local or s3://.
        progress: show a progress bar, or log lines if stderr is not a terminal.
        callbacks: functions that are called with a ProgressEvent as covers are done, and at the end
            of each epoch with its `metrics`.
        verbose: also show the logs of Ray and torch.

    Raises:
        ConfigError, DatasetError, StorageError, ModelError: the problem and its fix, in one line.
        TrainingDivergedError: the loss is not finite.
        DeviceMemoryError: a step does not fit in GPU memory.
    """
    from covergenre.stages.train import train as run

    checked = config.TrainConfig(dataset=dataset, out=out, **settings)
    with reporting(progress, callbacks):
        return TrainingRun(run(checked, verbose=verbose))


@_stage(config.EvaluateConfig)
def evaluate(
    model: Uri,
    dataset: Uri,
    *,
    out: Uri,
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    verbose: bool = False,
    **settings: Any,
) -> Evaluation:
    """Measure a model on a split of a dataset, every album once.

    Repeating the call resumes an unfinished run, and returns the result of a finished one at once.

    Args:
        model: model directory that `train` wrote, local or s3://.
        dataset: dataset directory that `prepare` wrote, local or s3://.
        out: directory of the metrics, local or s3://.
        progress: show a progress bar, or log lines if stderr is not a terminal.
        callbacks: functions that are called with a ProgressEvent as covers are processed.
        verbose: also show the logs of Ray.

    Raises:
        ConfigError, DatasetError, ModelError, StorageError: the problem and its fix, in one line.
    """
    from covergenre.stages.evaluate import evaluate as run

    checked = config.EvaluateConfig(model=model, dataset=dataset, out=out, **settings)
    with reporting(progress, callbacks):
        return Evaluation(run(checked, verbose=verbose))


@_stage(config.QuantizeConfig)
def quantize(
    model: Uri,
    dataset: Uri,
    *,
    out: Uri,
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    verbose: bool = False,
    **settings: Any,
) -> QuantizedModel:
    """Make an int8 model, which scores faster on CPUs. Needs the extra `int8` (NNCF, OpenVINO).

    The int8 model has scores only: `embed` and `module` raise ModelError, which names the source
    model.

    Args:
        model: model directory that `train` wrote, local or s3://.
        dataset: dataset directory that `prepare` wrote, with the genres of the model.
        out: model directory to write, local or s3://.
        progress: show a progress bar, or log lines if stderr is not a terminal.
        callbacks: functions that are called with a ProgressEvent after each step.
        verbose: has no effect.

    Raises:
        ConfigError, DatasetError, ModelError, StorageError: the problem and its fix, in one line.
    """
    from covergenre.stages.quantize import quantize as run

    checked = config.QuantizeConfig(model=model, dataset=dataset, out=out, **settings)
    with reporting(progress, callbacks):
        return QuantizedModel(run(checked, verbose=verbose))


@_stage(config.ScoreConfig)
def score(
    model: Uri,
    catalog: Uri,
    *,
    out: Uri,
    progress: bool = False,
    callbacks: Iterable[Callback] = (),
    verbose: bool = False,
    **settings: Any,
) -> ScoringRun:
    """Label every cover of a catalog, or of a dataset, with a model.

    Repeating the call resumes an unfinished run, and returns the result of a finished one at once.

    Args:
        model: model directory that `train` wrote, local or s3://.
        catalog: CSV, TSV, JSON Lines or Parquet: a file, a directory or a glob; or a dataset.
        out: directory to write, local or s3://.
        progress: show a progress bar, or log lines if stderr is not a terminal.
        callbacks: functions that are called with a ProgressEvent as covers are processed.
        verbose: also show the logs of Ray.

    Raises:
        ConfigError, CatalogError, ModelError, StorageError: the problem and its fix, in one line.
        RejectedError: more rows were rejected than `max_rejected` allows.
    """
    from covergenre.stages.score import score as run

    checked = config.ScoreConfig(model=model, catalog=catalog, out=out, **settings)
    with reporting(progress, callbacks):
        return ScoringRun(run(checked, verbose=verbose))
