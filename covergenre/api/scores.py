"""Scores: the result of Model.predict."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from covergenre.data.genres import Genres, over_threshold
from covergenre.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_ROWS = 10
_SHOWN_GENRES = 3


class Scores:
    """Scores of covers, float32 [covers, genres] in 0 to 1; NumPy functions accept it as an array.

    `scores[i]` is the row of cover i, `scores["Jazz"]` the column of a genre; a slice, a mask or a
    list of indices returns Scores.

    Attributes:
        values: float32 [covers, genres].
        genres: names of the columns.
        thresholds: threshold of each genre.
        names: path or URL of each cover, or its type and index.
        reasons: why a cover has no scores (with `errors="nan"`); None for all others.
    """

    def __init__(
        self,
        values: NDArray[np.float32],
        genres: Sequence[str],
        thresholds: Mapping[str, float],
        names: Sequence[str],
        reasons: Sequence[str | None],
    ) -> None:
        self.values = values
        self.genres = tuple(genres)
        self.thresholds = dict(thresholds)
        self.names = list(names)
        self.reasons = list(reasons)

    @property
    def shape(self) -> tuple[int, int]:
        """(covers, genres)"""
        return len(self.values), len(self.genres)

    def labels(self, thresholds: float | Mapping[str, float] | None = None) -> list[list[str]]:
        """The genres of each cover whose score reaches the threshold, in the order of `genres`.

        Args:
            thresholds: one for all genres, or one for each; by default those of the model.

        Returns:
            A list for each cover; empty where no genre reaches its threshold.
        """
        if thresholds is None:
            thresholds = self.thresholds
        elif not isinstance(thresholds, Mapping):
            thresholds = dict.fromkeys(self.genres, thresholds)
        elif missing := [genre for genre in self.genres if genre not in thresholds]:
            raise ConfigError(f"thresholds: no threshold for {missing[0]!r}", code="missing")
        return over_threshold(self.values, Genres(self.genres), thresholds)

    def top(self, k: int = 1) -> list[list[tuple[str, float]]]:
        """The k highest scores of each cover as (genre, score), the highest first.

        Empty for a cover without scores.
        """
        order = np.argsort(-self.values, axis=1, kind="stable")[:, : max(k, 0)]
        return [
            [] if reason else [(self.genres[j], float(row[j])) for j in best]
            for row, best, reason in zip(self.values, order, self.reasons, strict=True)
        ]

    def to_pandas(self) -> "pd.DataFrame":
        """A DataFrame with a column for each genre, indexed by `names`."""
        import pandas as pd

        return pd.DataFrame(
            self.values, columns=list(self.genres), index=pd.Index(self.names, name="cover")
        )

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return iter(self.values)

    @overload
    def __getitem__(self, key: int | str) -> NDArray[np.float32]: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | NDArray[Any]) -> "Scores": ...
    def __getitem__(self, key: Any) -> "NDArray[np.float32] | Scores":
        if isinstance(key, str):
            if key not in self.genres:
                raise KeyError(f"no genre {key!r}{did_you_mean(key, self.genres)}")
            return self.values[:, self.genres.index(key)]
        if isinstance(key, int | np.integer | tuple):
            return self.values[key]
        kept = np.arange(len(self))[key]
        return Scores(
            self.values[kept],
            self.genres,
            self.thresholds,
            [self.names[i] for i in kept],
            [self.reasons[i] for i in kept],
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        lines = [f"Scores({len(self)} covers, {len(self.genres)} genres)"]
        lines += [f"  {name}: {best}" for name, best in self._shown()]
        if len(self) > _SHOWN_ROWS:
            lines.append(f"  ... {len(self) - _SHOWN_ROWS} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """HTML for notebooks: a table of covers and their highest scores."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(best)}</td></tr>"
            for name, best in self._shown()
        )
        more = f"<p>... {len(self) - _SHOWN_ROWS} more</p>" if len(self) > _SHOWN_ROWS else ""
        return (
            f"<p>Scores: {len(self)} covers, {len(self.genres)} genres</p>"
            f"<table><tr><th>cover</th><th>highest scores</th></tr>{rows}</table>{more}"
        )

    def _shown(self) -> list[tuple[str, str]]:
        """(name, highest scores as text) of the first covers."""
        first = self[:_SHOWN_ROWS]
        return [
            (name, reason or ", ".join(f"{genre} {score:.2f}" for genre, score in best))
            for name, reason, best in zip(
                first.names, first.reasons, first.top(_SHOWN_GENRES), strict=True
            )
        ]
