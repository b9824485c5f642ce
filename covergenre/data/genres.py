"""The genre vocabulary: which genres a model tells, and in which order.

The order is alphabetical and is saved, so that column 3 means the same genre in every file. It is
never taken from the order in which data happened to arrive.
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
"""Albums of a genre in a split; with fewer there is a warning."""
_MOST_LISTED = 5
_MOST_ROWS = 40


@dataclass(frozen=True)
class Genres:
    """Names in column order."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)) or not all(self.names):
            raise DatasetError("genres.json: genres must be sorted, unique and not empty")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """sha256 over the names in order."""
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()

    def multi_hot(self, albums: Sequence[Iterable[str]]) -> NDArray[np.float32]:
        """1.0 where album i has genre j, [albums, genres]. Raises KeyError on another genre."""
        index = {name: column for column, name in enumerate(self.names)}
        out = np.zeros((len(albums), len(self.names)), np.float32)
        for i, genres in enumerate(albums):
            for genre in genres:
                out[i, index[genre]] = 1.0
        return out


@dataclass(frozen=True)
class Selection:
    """Which raw genres are kept, and how many albums have each."""

    kept: Genres
    counts: dict[str, int]
    """Albums of each raw genre, most common first."""
    albums: int
    """Albums with at least one raw genre: what shares are shares of."""


def select(
    albums: Sequence[Collection[str]],
    *,
    top: int,
    min_share: float,
    explicit: Sequence[str] = (),
) -> Selection:
    """Choose the genres to keep, as the paper does: the `top` most common, each on at least
    `min_share` of the labelled albums; or exactly the `explicit` ones, where given.

    Ties at the edge of `top` go to the name that sorts first. Raises ConfigError where nothing is
    left or an explicit genre is on no album.
    """
    counts: dict[str, int] = {}
    labelled = 0
    for genres in albums:
        labelled += bool(genres)
        for genre in genres:
            counts[genre] = counts.get(genre, 0) + 1
    counts = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    if not counts:
        raise ConfigError("no album of the catalog has a genre; look at --genres-column")
    if explicit:
        for genre in explicit:
            if genre not in counts:
                raise ConfigError(f"--genres: no album has {genre!r}{did_you_mean(genre, counts)}")
        kept = sorted(set(explicit))
    else:
        # Divided, not multiplied: 0.07 * 100 is above 7.
        common = [genre for genre, n in counts.items() if n / labelled >= min_share]
        kept = sorted(common[:top])
    if not kept:
        most, n = next(iter(counts.items()))
        raise ConfigError(
            f"no genre is left: the most common, {most!r}, is on {n / labelled:.2%} of the labelled"
            f" albums, under --min-share {min_share:g}; lower it"
        )
    return Selection(Genres(tuple(kept)), counts, labelled)


def keep_albums(
    albums: Sequence[Collection[str]], kept: Genres, require_all: bool
) -> list[str | None]:
    """For each album None where it is kept, else the reason (a key of schema.REASONS)."""
    names = set(kept.names)
    reasons: list[str | None] = []
    for genres in albums:
        hits = sum(genre in names for genre in genres)
        if not genres:
            reasons.append("unlabelled")
        elif hits == 0:
            reasons.append("no_selected_genre")
        elif require_all and hits < len(genres):
            reasons.append("genre_not_selected")
        else:
            reasons.append(None)
    return reasons


def name_warnings(counts: Mapping[str, int]) -> list[str]:
    """Warnings about raw genre names that may mean one genre, or are not what is meant.

    counts: albums of each raw genre, most common first.
    """
    by_case: dict[str, list[str]] = {}
    for name in counts:
        by_case.setdefault(name.casefold(), []).append(name)
    warnings = []
    if alike := [names for names in by_case.values() if len(names) > 1]:
        shown = _listed([" / ".join(f"{n!r} ({counts[n]:,})" for n in names) for names in alike])
        warnings.append(f"genres differ only in case: {shown}; merge them with --genre-map")
    if escaped := [name for name in counts if html.unescape(name) != name]:
        shown = _listed([f"{name!r} ({html.unescape(name)})" for name in escaped])
        warnings.append(f"genre names have HTML entities: {shown}; decode them in the catalog")
    if joined := [name for name in counts if _JOINED.search(name)]:
        warnings.append(
            f"genre names have separators in them: {_listed(list(map(repr, joined)))}; if they are"
            " several genres, give --genres-separator"
        )
    return warnings


_JOINED = re.compile(r"[;,|\t\n]")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MOST_LISTED:,} more" if len(items) > _MOST_LISTED else ""
    return ", ".join(items[:_MOST_LISTED]) + more


def split_table(by_split: Mapping[str, Mapping[str, int]], albums: Mapping[str, int]) -> list[str]:
    """Albums of each genre in each split as lines of text: genres with the fewest are last.

    by_split: genre -> split -> albums; albums: split -> albums.
    """
    ranked = sorted(by_split, key=lambda genre: (-sum(by_split[genre].values()), genre))
    shown = ranked if len(ranked) <= _MOST_ROWS else ranked[-_MOST_ROWS:]
    title = "albums of each genre"
    width = max(len(name) for name in (title, *shown))
    lines = [f"{title:{width}}" + "".join(f"{split:>9}" for split in albums)]
    if len(shown) < len(ranked):
        lines.append(f"({len(ranked) - len(shown):,} more common genres: see manifest.json)")
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
            effect = "it is never learned" if split == "train" else "means over genres leave it out"
            warnings.append(f"no album in {split} has {_listed(missing)}: {effect}; {fix}")
        if rare := [genre for genre, counts in by_split.items() if 0 < counts[split] < RARE]:
            shown = _listed([f"{genre} ({by_split[genre][split]})" for genre in rare])
            warnings.append(
                f"fewer than {RARE} albums in {split} have {shown}: what is measured on them is"
                f" uncertain; {fix}"
            )
    return warnings


def over_threshold(
    scores: NDArray[np.float32], kept: Genres, thresholds: Mapping[str, float]
) -> list[list[str]]:
    """Labels of each album: the genres whose score is at least their threshold.

    scores: float32 [albums, genres].
    """
    # Compared as float32, so that what is decided is what is stored.
    limits = np.array([thresholds[name] for name in kept.names], np.float32)
    return [[kept.names[j] for j in np.flatnonzero(row)] for row in scores >= limits]
