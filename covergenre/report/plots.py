"""Plots of a dataset, a training run and an evaluation: plain data in, PNG bytes out.

Bytes, so that the caller can store them like its other files. matplotlib is imported where it is
needed, because that is slow; pyplot, which keeps every figure alive, is not used.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from covergenre.data.genres import RARE
from covergenre.formatting import plural
from covergenre.metrics import dev_metrics, macro_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
MAX_BARS = 40
MAX_CURVES = 20
MAX_POINTS = 1000
"""Points plotted per curve: enough for a curve of millions of decisions."""
MAX_NAME_LENGTH = 30
"""Characters of a genre name; longer names are truncated."""
TOP_GENRES = 3
"""Predicted genres shown under a cover."""

INK = "#1f2933"
MUTED = "#7b8794"
FAINT = "#e4e7eb"
GREY = "#c3cad2"
BLUE = "#2f6fde"
ORANGE = "#e8743b"
GREEN = "#2f9e6e"
RED = "#d64550"

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.title_fontsize": 8.5,
    "lines.linewidth": 2,
    "savefig.bbox": None,
    "text.color": INK,
    "text.parse_math": False,  # a genre may have a $ in its name
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


def label_distribution(counts: Mapping[str, int], albums: int, selected: Collection[str]) -> bytes:
    """Percent of albums that have each genre, before filtering: Figure 1 of the paper.

    `counts`: genre -> albums that have it; `albums`: all albums, with a genre or not;
    `selected`: the selected genres, in color. Returns a PNG with at most the `MAX_BARS` most
    common genres.
    """
    if not counts or albums < 1:
        return _message("Genres before filtering", "no genres")
    from matplotlib.patches import Patch

    ranked = sorted(counts, key=lambda genre: (-counts[genre], genre))
    shown = ranked[:MAX_BARS]
    percents = [100 * counts[genre] / albums for genre in shown]
    chosen = set(selected)
    with _figure(9, 1.4 + 0.25 * len(shown)) as (figure, png):
        title = f"Genres of {plural(albums, 'album')} before filtering"
        if len(ranked) > len(shown):
            title += f": the {len(shown)} most common ({len(ranked) - len(shown):,} more not shown)"
        _title(figure, title)
        axes = figure.add_subplot()
        colors = [BLUE if genre in chosen else GREY for genre in shown]
        _bars(axes, [_name(genre) for genre in shown], percents, colors)
        for bar, (genre, percent) in enumerate(zip(shown, percents, strict=True)):
            _beside(axes, percent, bar, f"{percent:.1f} %  ({counts[genre]:,})")
        # Room for the text beside the longest bar, but no tick above 100 %.
        longest = max(percents) * 1.22 or 1
        axes.set_xlim(0, longest)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, longest)])
        axes.set_xlabel("albums with the genre, in percent")
        kept = len(chosen & set(ranked))
        figure.legend(
            handles=[
                Patch(color=BLUE, label=f"selected ({kept:,})"),
                Patch(color=GREY, label=f"not selected ({len(ranked) - kept:,})"),
            ],
            loc="outside lower right",
            ncols=2,
        )
        return png()


def genres_by_split(by_split: Mapping[str, Mapping[str, int]], albums: Mapping[str, int]) -> bytes:
    """Percent of the albums of each split that have each genre; marks genres with few or none.

    by_split: genre -> split -> albums that have it; albums: split -> albums. Returns a PNG with at
    most the `MAX_BARS` least common genres.
    """
    splits = [split for split in albums if albums[split]]
    if not by_split or not splits:
        return _message("Genres by split", "no genres")
    ranked = sorted(by_split, key=lambda genre: (-sum(by_split[genre].values()), genre))
    shown = ranked[-MAX_BARS:]
    height = 0.8 / len(splits)
    with _figure(9, 1.6 + 0.2 * len(splits) * len(shown)) as (figure, png):
        title = "Genres by split"
        if len(shown) < len(ranked):
            title += f": the {len(shown)} least common of {len(ranked):,}"
        _title(figure, title)
        axes = figure.add_subplot()
        longest = 0.0
        for at, split in enumerate(splits):
            rows = [row - 0.4 + (at + 0.5) * height for row in range(len(shown))]
            counts = [by_split[genre][split] for genre in shown]
            percents = [100 * count / albums[split] for count in counts]
            color = {"train": GREY, "dev": BLUE, "test": GREEN}.get(split, ORANGE)
            label = f"{split} ({albums[split]:,} albums)"
            axes.barh(rows, percents, height=height * 0.9, color=color, label=label)
            longest = max(longest, *percents)
            for row, count, percent in zip(rows, counts, percents, strict=True):
                axes.annotate(
                    f"{count:,}" if count else "none",
                    (percent, row),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    color=RED if count < RARE else MUTED,
                )
        axes.set_yticks(range(len(shown)), [_name(genre) for genre in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, longest * 1.15 or 1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(
            f"albums of the split that have the genre, in percent; red: fewer than {RARE}"
        )
        figure.legend(loc="outside lower right", ncols=len(splits))
        return png()


def loss_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss by epoch, Figure 3 of the paper, and beside it the dev scores by epoch.

    One mapping an epoch, with `epoch` (from 1), `train_loss`, `dev_loss`, and
    `dev_pr_auc_micro`, `dev_pr_auc_macro`, `dev_roc_auc_micro`, `dev_roc_auc_macro`; all but
    `epoch` may be missing, None or NaN. Where `dev_macro_genres` and `dev_genres_without_auc` say
    which genres the macro means are over, the legend does too. The epoch with the highest
    dev_pr_auc_micro is marked. Returns a PNG.
    """
    if not history:
        return _message("Training", "no epoch was finished")
    from matplotlib.ticker import MaxNLocator

    epochs = _series(history, "epoch")
    micro = _series(history, "dev_pr_auc_micro")
    best = None if np.isnan(micro).all() else int(epochs[np.nanargmax(micro)])
    panels: dict[str, list[tuple[str, str, str, str]]] = {
        "Loss": [
            ("train_loss", "training", INK, "-"),
            ("dev_loss", "dev", ORANGE, "-"),
        ],
        "Dev scores": [
            ("dev_pr_auc_micro", "PR AUC, micro", BLUE, "-"),
            ("dev_pr_auc_macro", "PR AUC, macro", BLUE, ":"),
            ("dev_roc_auc_micro", "ROC AUC, micro", GREEN, "-"),
            ("dev_roc_auc_macro", "ROC AUC, macro", GREEN, ":"),
        ],
    }
    with _figure(10.5, 4.2) as (figure, png):
        both = figure.subplots(1, 2)
        dot = 4 if len(epochs) <= 40 else 0  # a single epoch has no line, only dots
        for axes, (title, lines) in zip(both, panels.items(), strict=True):
            drawn = 0
            for key, label, color, dashes in lines:
                values = _series(history, key)
                if not np.isnan(values).all():
                    fill = "white" if dashes == ":" else color
                    style = {"color": color, "marker": "o", "ms": dot, "mfc": fill}
                    axes.plot(epochs, values, dashes, label=label, **style)
                    drawn += 1
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if not drawn:
                _note(axes, "n/a")
                continue
            if best is not None:
                label = f"best epoch: {best}"
                axes.axvline(best, color=MUTED, lw=1, ls="--", zorder=0, label=label)
            # Below the axes, where it overlaps no line.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        both[1].set_ylim(0, 1.02)
        if drawn and (over := _macro_over(history[-1])):
            both[1].get_legend().set_title(f"macro over {over}")
        return png()


def _macro_over(record: Mapping[str, Any]) -> str:
    """Genres that the macro means of an epoch's record are over, as a short text."""
    dev = dev_metrics(record)
    names = [_name(genre, 16) for genre in dev.get("genres_without_auc", ())]
    return macro_over(dev | {"genres_without_auc": names}, most=2)


def genre_bars(per_genre: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """ROC AUC and PR AUC of each genre, with the value of a random guess.

    `per_genre`: genre -> `roc_auc`, `pr_auc`, `positives` (albums that have the genre) and
    `prevalence` (their share of all albums, which is the PR AUC of a blind guess). None or NaN
    is shown as n/a. Returns a PNG with at most the `MAX_BARS` most common genres.
    """
    if not per_genre:
        return _message("Scores by genre", "no genres")
    values = {
        genre: {key: _number(v) for key, v in row.items()} for genre, row in per_genre.items()
    }

    def of(genre: str, key: str) -> float:
        return values[genre].get(key, math.nan)

    def positives(genre: str) -> int:
        return 0 if math.isnan(of(genre, "positives")) else int(of(genre, "positives"))

    ranked = sorted(values, key=lambda genre: (-positives(genre), genre))
    shown = ranked[:MAX_BARS]
    with _figure(10.5, 1.6 + 0.25 * len(shown)) as (figure, png):
        title = "Scores by genre, most common first"
        if len(ranked) > len(shown):
            title += f": {len(shown)} of {plural(len(ranked), 'genre')}"
        _title(figure, title)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, color in zip(panels, ("roc_auc", "pr_auc"), (GREEN, BLUE), strict=True):
            scores = [of(genre, key) for genre in shown]
            names = [f"{_name(genre)}  ({positives(genre):,})" for genre in shown]
            _bars(axes, names, [0 if math.isnan(score) else score for score in scores], color)
            for row, score in enumerate(scores):
                text = "n/a" if math.isnan(score) else f"{score:.2f}"
                # In a separate column, to overlap no mark.
                _beside(axes, 1, row, text)
            axes.set_xlim(0, 1.1)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        panels[0].set_title("ROC AUC")
        panels[0].axvline(0.5, color=INK, lw=1.2, ls="--", label="chance: 0.5")
        panels[1].set_title("PR AUC")
        chance = [of(genre, "prevalence") for genre in shown]
        rows = np.arange(len(shown))
        label = "chance: share of albums with the genre"
        panels[1].vlines(chance, rows - 0.38, rows + 0.38, color=INK, lw=1.8, label=label)
        panels[1].tick_params(labelleft=False)
        figure.legend(loc="outside lower right", ncols=2)
        return png()


def curves(truth: NDArray[np.bool_], scores: NDArray[np.float32], genres: Sequence[str]) -> bytes:
    """Precision-recall and ROC curves: micro-averaged in bold, single genres thin.

    `truth` and `scores`: [albums, genres], in the order of `genres`. Micro-averaged means that
    every pair of album and genre is one decision. The PR AUC in the legend is the average
    precision. Returns a PNG with at most the `MAX_CURVES` most common genres, and of these only
    those of some but not all albums. Raises ValueError for wrong shapes and NaN scores.
    """
    if truth.shape != scores.shape or truth.shape[1:] != (len(genres),):
        raise ValueError(
            f"truth {truth.shape} and scores {scores.shape} must both be [albums, {len(genres)}]"
        )
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    if truth.all() or not truth.any():
        return _message("Curves", "needs albums with and without a genre")
    from matplotlib import colormaps

    positives = truth.sum(axis=0)
    ranked = sorted(range(len(genres)), key=lambda column: (-positives[column], genres[column]))
    usable = [column for column in ranked if 0 < positives[column] < len(truth)]
    shown = usable[:MAX_CURVES]
    palette = colormaps["tab20"]
    with _figure(13, 5.2) as (figure, png):
        pr, roc = figure.subplots(1, 2)
        chance = {"color": MUTED, "lw": 1, "ls": "--"}
        share = float(truth.mean())
        pr.axhline(share, **chance, label="chance")
        roc.plot([0, 1], [0, 1], **chance)
        _curve(
            pr, roc, truth.ravel(), scores.ravel(), "all genres, micro", color=INK, lw=3, zorder=3
        )
        for rank, column in enumerate(shown):
            # tab20 has pairs of a dark and a light shade: use the dark ones first.
            color = palette(2 * rank % 20 + (rank >= 10))
            name = _name(genres[column])
            _curve(pr, roc, truth[:, column], scores[:, column], name, color=color, lw=1.1)
        for axes, title, across, up in (
            (pr, "Precision and recall", "recall", "precision"),
            (roc, "ROC", "false positive rate", "true positive rate"),
        ):
            axes.set_title(title)
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            axes.set_xlim(-0.01, 1.01)
            axes.set_ylim(-0.01, 1.02)
            axes.set_box_aspect(1)
        of = "" if len(shown) == len(genres) else f": {len(shown)} of {len(genres):,} genres"
        legend = figure.legend(
            *pr.get_legend_handles_labels(),
            loc="outside right upper",
            title=f"PR AUC / ROC AUC{of}",
            alignment="left",
            fontsize=8,
        )
        legend.get_title().set_fontsize(8.5)
        return png()


def contact_sheet(
    covers: Sequence[NDArray[np.uint8]],
    truths: Sequence[Sequence[str]],
    scores: Sequence[Mapping[str, float]],
    threshold: float = 0.5,
) -> bytes:
    """Grid of covers, with the true genres and the highest scores under each.

    `covers`: RGB, each [height, width, 3]; `truths`: the genres of each; `scores`: genre ->
    score, 0 to 1, of each. A score's bar is green where the album has the genre, red where not;
    below `threshold`, where the model does not give the genre, it is faint. Returns a PNG.
    Raises ValueError where the three lengths differ.
    """
    if not len(covers) == len(truths) == len(scores):
        raise ValueError(
            f"{len(covers)} covers, {len(truths)} truths, {len(scores)} scores: numbers differ"
        )
    if not covers:
        return _message("Covers", "no cover to show")
    columns = min(6, len(covers))
    rows = math.ceil(len(covers) / columns)
    side, gap, top, words = 2.2, 0.25, 0.45, 1.55  # inches
    cell_width, cell_height = side + gap, side + words
    # A narrow figure needs room for the legend.
    width = max(columns * cell_width + gap, 5)
    height = top + rows * cell_height + 0.1
    with _figure(width, height) as (figure, png):
        # One Axes for everything, in inches from the top left corner.
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for i, (cover, truth, score) in enumerate(zip(covers, truths, scores, strict=True)):
            x = gap + (i % columns) * cell_width
            y = top + (i // columns) * cell_height
            _cover(axes, x, y, side, cover)
            _genres_under_cover(axes, x, y + side, side, truth, score, threshold)
        _legend(axes, gap, top / 2, threshold)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        return png()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Callable[[], bytes]]]:
    """A figure of this size in inches, and a function that returns it as PNG bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; matplotlib warns of each.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")

        def png() -> bytes:
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            return file.getvalue()

        yield figure, png


def _message(title: str, text: str) -> bytes:
    """A figure with a text only, where there is no data: empty results are not an error."""
    with _figure(6, 2) as (figure, png):
        _title(figure, title)
        axes = figure.add_subplot()
        axes.set_axis_off()
        _note(axes, text)
        return png()


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left")


def _note(axes: Axes, text: str) -> None:
    """Write `text` in the center of the axes."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _name(genre: str, longest: int = MAX_NAME_LENGTH) -> str:
    """A genre's name on one line, truncated to `longest` characters."""
    line = " ".join(genre.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def _number(value: float | None) -> float:
    """`value`, or NaN if it is None or infinite: matplotlib omits NaN."""
    return value if value is not None and math.isfinite(value) else math.nan


def _series(history: Sequence[Mapping[str, float | None]], key: str) -> NDArray[np.float64]:
    """The values of `key` by epoch, float64 [epochs]; NaN where it is missing."""
    return np.array([_number(row.get(key)) for row in history], dtype=np.float64)


def _bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], color: str | Sequence[str]
) -> None:
    """Horizontal bars, the first one on top."""
    rows = range(len(names))
    axes.barh(rows, values, height=0.72, color=color)
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _beside(axes: Axes, value: float, row: int, text: str) -> None:
    """`text` to the right of the end of a bar."""
    label = axes.annotate(
        text,
        (value, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=MUTED,
    )
    label.set_in_layout(False)  # measuring dozens of them is slow, and they are inside the axes


def _curve(
    pr: Axes,
    roc: Axes,
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    name: str,
    **style: Any,
) -> None:
    """One line on each of the axes, from [decisions] of truth and score."""
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_curve,
        roc_auc_score,
        roc_curve,
    )

    precision, recall, _ = precision_recall_curve(truth, scores, drop_intermediate=True)
    wrong, right, _ = roc_curve(truth, scores)
    pr_auc, roc_auc = average_precision_score(truth, scores), roc_auc_score(truth, scores)
    label = f"{pr_auc:.2f} / {roc_auc:.2f}  {name}"
    points = _sampled_indices(len(recall))
    pr.plot(recall[points], precision[points], drawstyle="steps-post", label=label, **style)
    points = _sampled_indices(len(wrong))
    roc.plot(wrong[points], right[points], **style)


def _sampled_indices(length: int) -> NDArray[np.intp]:
    """At most `MAX_POINTS` evenly spaced indices, including the first and the last."""
    return np.linspace(0, length - 1, min(length, MAX_POINTS)).astype(np.intp)


def _cover(axes: Axes, x: float, y: float, side: float, cover: NDArray[np.uint8]) -> None:
    """Draw the cover in a square at (x, y), with its aspect ratio."""
    height, width = cover.shape[:2]
    scale = side / max(height, width)
    left, top = x + (side - width * scale) / 2, y + (side - height * scale) / 2
    extent = (left, left + width * scale, top + height * scale, top)
    axes.imshow(cover, extent=extent, aspect="auto", interpolation="antialiased")


def _genres_under_cover(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    truth: Sequence[str],
    score: Mapping[str, float],
    threshold: float,
) -> None:
    """Write the true genres and the highest scores below a cover that ends at y."""
    from matplotlib.patches import Rectangle

    def write(top: float, text: str, room: float, **style: Any) -> None:
        drawn = axes.text(x, top, text, va="center", fontsize=7.5, clip_on=True, **style)
        # Clipped: wide letters must not overlap the next column.
        drawn.set_clip_path(Rectangle((x, y), room, 10, transform=axes.transData))

    lines = [_name(genre) for genre in truth] or ["no genre"]
    if len(lines) > 3:
        lines[2:] = [f"and {len(truth) - 2} more"]
    for i, line in enumerate(lines):
        write(y + 0.13 + 0.155 * i, line, width, weight="bold", color=INK if truth else MUTED)

    ranked = sorted(score, key=lambda genre: (-_number(score[genre]), genre))
    for i, genre in enumerate(ranked[:TOP_GENRES]):
        value = _number(score[genre])
        top = y + 0.66 + 0.25 * i
        given = value >= threshold
        color = GREEN if genre in truth else RED
        shade = color if given else MUTED
        write(top, _name(genre), width - 0.28, color=shade)
        text = "n/a" if math.isnan(value) else f"{value:.2f}"
        axes.text(x + width, top, text, va="center", ha="right", fontsize=7.5, color=shade)
        bar = top + 0.085
        axes.add_patch(Rectangle((x, bar), width, 0.035, color=FAINT, lw=0))
        if not math.isnan(value):
            length = width * min(1.0, max(0.0, value))
            alpha = 1.0 if given else 0.4
            axes.add_patch(Rectangle((x, bar), length, 0.035, color=color, alpha=alpha, lw=0))
        mark = x + width * threshold
        axes.plot([mark, mark], [bar - 0.015, bar + 0.05], color=INK, lw=0.8)


def _legend(axes: Axes, x: float, y: float, threshold: float) -> None:
    """Explain the colors under the covers."""
    from matplotlib.patches import Rectangle

    for offset, color, text in (
        (0.0, GREEN, "true genre"),
        (1.45, RED, "not a true genre"),
        (3.0, GREY, f"faint: score below {threshold:.2f}"),
    ):
        axes.add_patch(Rectangle((x + offset, y - 0.06), 0.12, 0.12, color=color, lw=0))
        axes.text(x + offset + 0.18, y, text, va="center", fontsize=8.5)
