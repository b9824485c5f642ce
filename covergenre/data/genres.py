"""The genre vocabulary: which genres a model predicts, and in which order.

The order is alphabetical and is saved, so that column 3 means the same genre in every file. It
never depends on the order of the data.
"""

import hashlib
import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covergenre.errors import ConfigError, DatasetError, did_you_mean

RARE = 10
"""A genre with fewer albums in a split causes a warning."""
_MAX_LISTED = 5
_MAX_TABLE_ROWS = 40


@dataclass(frozen=True)
class Genres:
    """Names in column order."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)) or not all(self.names):
            raise DatasetError("genres must be sorted, unique and not empty")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """sha256 over the names in order."""
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()

    def multi_hot(self, albums: Sequence[Iterable[str]]) -> NDArray[np.float32]:
        """float32 [albums, genres], 1.0 where album i has genre j. KeyError for other genres."""
        index = {name: column for column, name in enumerate(self.names)}
        out = np.zeros((len(albums), len(self.names)), np.float32)
        for i, genres in enumerate(albums):
            for genre in genres:
                out[i, index[genre]] = 1.0
        return out


@dataclass(frozen=True)
class Selection:
    """The selected genres, and the number of albums with each genre of the catalog."""

    genres: Genres
    counts: dict[str, int]
    """Albums of every genre of the catalog, most common first."""
    labelled: int
    """Albums with at least one genre; shares are relative to them."""


def select(
    counts: Mapping[str, int],
    labelled: int,
    *,
    top: int,
    min_share: float,
    explicit: Sequence[str] = (),
) -> Selection:
    """Select genres as the paper does: the `top` most common, each on at least `min_share` of the
    albums with genres; or exactly the `explicit` ones, if any.

    counts: albums of each genre. labelled: albums with at least one genre. Equal counts are
    ordered by name. Raises ConfigError if nothing is selected or no album has an explicit genre.
    """
    counts = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    if not counts:
        raise ConfigError(
            "no album of the catalog has a genre; check --genres-column", code="no_genres"
        )
    if explicit:
        for genre in explicit:
            if genre not in counts:
                raise ConfigError(
                    f"--genres: no album has {genre!r}{did_you_mean(genre, counts)}",
                    code="unknown_genre",
                )
        return Selection(Genres(tuple(sorted(set(explicit)))), counts, labelled)
    # Divided, not multiplied: 0.07 * 100 is above 7.
    common = [genre for genre, n in counts.items() if n / labelled >= min_share]
    if not common:
        genre, n = next(iter(counts.items()))
        raise ConfigError(
            f"--min-share {min_share:g}: no genre is that common; {genre!r} is the most common, on"
            f" {n / labelled:.2%} of the albums with genres",
            code="min_share_too_high",
        )
    return Selection(Genres(tuple(sorted(common[:top]))), counts, labelled)


def unselected_reason(
    genres: Collection[str], selected: Collection[str], *, require_all: bool
) -> str | None:
    """Why an album with these genres is rejected (a key of schema.REASONS), or None.

    require_all: reject albums that also have genres which are not selected.
    """
    if not genres:
        return "unlabelled"
    hits = sum(genre in selected for genre in genres)
    if hits == 0:
        return "no_selected_genre"
    return "genre_not_selected" if require_all and hits < len(genres) else None


def name_warnings(counts: Mapping[str, int]) -> list[str]:
    """Warnings about genre names that may be spellings of one genre, or several genres in one name.

    counts: albums of each genre, most common first.
    """
    by_case: dict[str, list[str]] = {}
    for name in counts:
        by_case.setdefault(name.casefold(), []).append(name)
    warnings = []
    if alike := [names for names in by_case.values() if len(names) > 1]:
        shown = _listed([" / ".join(f"{n!r} ({counts[n]:,})" for n in names) for names in alike])
        warnings.append(f"genre names differ only in case: {shown}; merge them with --genre-map")
    if escaped := [name for name in counts if html.unescape(name) != name]:
        shown = _listed([f"{name!r} ({html.unescape(name)})" for name in escaped])
        warnings.append(f"genre names contain HTML entities: {shown}; decode them in the catalog")
    if joined := [name for name in counts if _JOINED.search(name)]:
        warnings.append(
            f"genre names contain separators: {_listed(list(map(repr, joined)))}; set"
            " --genres-separator if each is several genres"
        )
    return warnings


_JOINED = re.compile(r"[;,|\t\n]")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED:,} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more


def split_table(by_split: Mapping[str, Mapping[str, int]], albums: Mapping[str, int]) -> list[str]:
    """A text table of the albums of each genre in each split, the rarest genre last.

    by_split: genre -> split -> albums. albums: split -> albums.
    """
    ranked = sorted(by_split, key=lambda genre: (-sum(by_split[genre].values()), genre))
    shown = ranked if len(ranked) <= _MAX_TABLE_ROWS else ranked[-_MAX_TABLE_ROWS:]
    title = "albums of each genre"
    width = max(len(name) for name in (title, *shown))
    lines = [f"{title:{width}}" + "".join(f"{split:>9}" for split in albums)]
    if len(shown) < len(ranked):
        lines.append(f"({len(ranked) - len(shown):,} more common genres: see _manifest.json)")
    for genre in shown:
        counts = by_split[genre]
        lines.append(f"{genre:{width}}" + "".join(f"{counts[s]:>9,}" for s in albums))
    return lines


def split_warnings(
    by_split: Mapping[str, Mapping[str, int]], albums: Mapping[str, int]
) -> list[str]:
    """Warnings about genres that are missing or rare in a split that has albums.

    With fewer than RARE albums of a genre, the standard error of its ROC AUC is about 0.1 and
    more (Hanley and McNeil 1982).
    """
    fix = "try another --split-seed or --group-by, larger --split-fractions, or fewer genres"
    warnings = []
    for split in (split for split in albums if albums[split]):
        if missing := [genre for genre, counts in by_split.items() if not counts[split]]:
            effect = "it cannot be learned" if split == "train" else "macro averages exclude it"
            warnings.append(f"no album in {split} has {_listed(missing)}: {effect}; {fix}")
        if rare := [genre for genre, counts in by_split.items() if 0 < counts[split] < RARE]:
            shown = _listed([f"{genre} ({by_split[genre][split]})" for genre in rare])
            warnings.append(
                f"fewer than {RARE} albums in {split} have {shown}: their metrics are"
                f" uncertain; {fix}"
            )
    return warnings


def over_threshold(
    scores: NDArray[np.float32], genres: Genres, thresholds: Mapping[str, float]
) -> list[list[str]]:
    """Predicted genres of each album: those whose score is at least their threshold.

    scores: float32 [albums, genres].
    """
    # Compared as float32, as scores are stored.
    limits = np.array([thresholds[name] for name in genres.names], np.float32)
    return [[genres.names[j] for j in np.flatnonzero(row)] for row in scores >= limits]
