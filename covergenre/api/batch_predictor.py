"""BatchPredictor: a model in a Ray Data pipeline of the user."""

import os
from typing import Any

import pyarrow as pa

from covergenre.api.model import load_model
from covergenre.api.scores import Scores
from covergenre.errors import ConfigError


class BatchPredictor:
    """Scores a column of covers; an argument of `map_batches` of Ray Data.

        ds.map_batches(
            cg.BatchPredictor,
            fn_constructor_args=["s3://music/models/vgg16"],
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=64,
            num_gpus=1,
        )

    Every actor has one model on its device, and decodes encoded covers in one child process. Set
    `num_gpus` to use GPUs, or else `device="cpu"`; then `num_cpus` is also the number of threads of
    torch. All values of batch_format are supported: "numpy", "pyarrow" and "pandas".

    Columns that are added:
        top_genre, top_score: the genre with the highest score.
        genres: names of the genres whose score reaches the threshold.
        scores: float32, one for each genre in the order of the attribute `genres`.
        reason: why a cover has no scores, as in the table of reasons; null for all others. The
            columns above are null then (scores and top_score NaN in NumPy batches).

    Attributes:
        genres: names of the genres.
    """

    def __init__(
        self,
        model_uri: str | os.PathLike[str],
        device: str = "auto",
        *,
        column: str = "image",
        prefix: str = "",
        batch_size: int = 64,
    ) -> None:
        """
        Args:
            model_uri: model directory that `train` wrote, local or s3://.
            device: see `load_model`.
            column: column of the covers: encoded bytes, paths or URLs, or pixels (uint8).
            prefix: prefix of the names of the added columns, if the batch has columns of the same
                names.
            batch_size: covers in a forward pass, whatever the size of the batches.
        """
        self._model = load_model(model_uri, device)
        self.genres = self._model.genres
        self._column, self._prefix, self._batch_size = column, prefix, batch_size

    def __call__(self, batch: Any) -> Any:
        """The batch with the added columns, of the same type.

        Raises ConfigError if the batch lacks the column of covers (code "no_column") or already has
        one of the columns to add (code "column_exists").
        """
        is_arrow = isinstance(batch, pa.Table)
        names = list(batch.column_names if is_arrow else batch)
        if self._column not in names:
            raise ConfigError(
                f"BatchPredictor: no column {self._column!r}; the batch has {', '.join(names)}",
                code="no_column",
            )
        column = batch[self._column]
        covers = column.to_pylist() if is_arrow else list(column)
        # Hugging Face datasets store images as {bytes, path}.
        covers = [cover.get("bytes") if isinstance(cover, dict) else cover for cover in covers]
        scores = self._model.predict(covers, batch_size=self._batch_size, errors="nan")
        added = {self._prefix + name: values for name, values in _columns(scores).items()}
        if existing := [name for name in names if name in added]:
            raise ConfigError(
                f"BatchPredictor: the batch already has a column {existing[0]!r}; set a prefix,"
                " such as prefix='predicted_'",
                code="column_exists",
            )
        if is_arrow:
            for name, values in added.items():
                batch = batch.append_column(name, values)
            return batch
        if isinstance(batch, dict):
            arrays = {name: a.to_numpy(zero_copy_only=False) for name, a in added.items()}
            return batch | arrays | {f"{self._prefix}scores": scores.values}
        return batch.assign(**{name: array.to_pandas().to_numpy() for name, array in added.items()})


def _columns(scores: Scores) -> dict[str, pa.Array]:
    good = [reason is None for reason in scores.reasons]
    best = [top[0] if top else (None, None) for top in scores.top(1)]
    labels = [names if ok else None for names, ok in zip(scores.labels(), good, strict=True)]
    values = [list(row) if ok else None for row, ok in zip(scores.values, good, strict=True)]
    reasons = [reason and reason.partition(":")[0] for reason in scores.reasons]
    return {
        "top_genre": pa.array([genre for genre, _ in best], pa.string()),
        "top_score": pa.array([score for _, score in best], pa.float32()),
        "genres": pa.array(labels, pa.list_(pa.string())),
        "scores": pa.array(values, pa.list_(pa.float32())),
        "reason": pa.array(reasons, pa.string()),
    }
