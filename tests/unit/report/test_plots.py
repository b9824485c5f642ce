"""Plots: their texts and marks, no overlapping texts, and unusual inputs."""

import ast
import inspect
import io
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from covergenre.report import plots

NAN = math.nan
LONG = [f"Contemporary Folk & Country {i:02d}" for i in range(40)]  # 30 characters each
RNG = np.random.default_rng(0)


def pixels(png: bytes) -> NDArray[np.uint8]:
    """The pixels of a PNG, [height, width, 3]."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(png: bytes, color: str) -> int:
    """Number of pixels with exactly this colour."""
    wanted = np.round(255 * np.array(to_rgb(color))).astype(np.uint8)
    return int((pixels(png) == wanted).all(axis=2).sum())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved as PNGs, for checks of their texts."""
    seen: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: object, **named: object) -> None:
        seen.append(figure)
        save(figure, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every visible text, and the part of its box that is not clipped."""
    found = []
    # matplotlib keeps ticks beyond the ends of an axis, but does not draw them.
    hidden = set()
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in figure.axes):
        low, high = sorted(axis.get_view_interval())
        hidden |= {
            tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high
        }
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text in hidden or not text.get_visible() or not text.get_text().strip():
            continue
        box = text.get_window_extent()
        cut = text.get_clip_box()
        whole = box if cut is None or not text.get_clip_on() else Bbox.intersection(box, cut)
        if whole is not None and whole.width > 0:
            found.append((text.get_text(), whole))
    return found


def words(figure: Figure) -> list[str]:
    return [text for text, _ in texts(figure)]


def check_layout(figure: Figure) -> None:
    """No text overlaps another or exceeds the edge of the picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        found = texts(figure)
    assert found
    names = [text for text, _ in found]
    boxes = np.array([box.extents for _, box in found])  # [texts, (x0, y0, x1, y1)]
    low, high = boxes[:, :2], boxes[:, 2:]
    outside = ((low < -1) | (high > np.array(figure.bbox.max) + 1)).any(axis=1)
    assert not outside.any(), f"beyond the edge: {[names[i] for i in np.flatnonzero(outside)]}"
    # Width and height of the overlap of each two boxes, which have a small margin.
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    clash = np.argwhere(np.triu((shared > 2).all(axis=2), k=1))
    assert not len(clash), [(names[i], names[j]) for i, j in clash]


def epochs(number: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i,
            "train_loss": 0.5 / i,
            "dev_loss": 0.4 + 0.01 * i,
            "dev_pr_auc_micro": 0.6 - 0.01 * (i - 3) ** 2,
            "dev_pr_auc_macro": 0.4,
            "dev_roc_auc_micro": 0.8,
            "dev_roc_auc_macro": NAN,
        }
        for i in range(1, number + 1)
    ]


def genre_rows(names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            "roc_auc": 0.5 + 0.4 / (i + 1),
            "pr_auc": 0.9 / (i + 1),
            "positives": 2000 // (i + 1),
            "prevalence": 0.5 / (i + 1),
        }
        for i, name in enumerate(names)
    }


def decisions(
    albums: int, genres: int, signal: float = 2
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    truth = RNG.random((albums, genres)) < 0.3
    scores = 1 / (1 + np.exp(1 - signal * truth - RNG.normal(size=truth.shape)))
    return truth, scores.astype(np.float32)


def cover(height: int = 60, width: int = 60) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_label_distribution_has_the_numbers_of_shown_and_selected_genres(
    figures: list[Figure],
) -> None:
    counts = {f"Genre {i}": 1000 - i for i in range(446)}
    png = plots.label_distribution(counts, 2000, ["Genre 0", "Genre 1"])
    labels = words(figures[0])
    assert (
        "Genres of 2,000 albums before filtering: the 40 most common (406 more not shown)" in labels
    )
    assert "50.0 %  (1,000)" in labels
    assert {"selected (2)", "not selected (444)"} <= set(labels)
    assert "Genre 39" in labels
    assert "Genre 40" not in labels
    none = plots.label_distribution(counts, 2000, [])
    assert count(png, plots.BLUE) > 3 * count(none, plots.BLUE)  # the legend also has the colour


def test_label_distribution_has_the_longest_bar_on_top(figures: list[Figure]) -> None:
    plots.label_distribution({"rare": 1, "common": 9, "middle": 5}, 10, ["rare"])
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["common", "middle", "rare"]
    assert axes.yaxis_inverted()
    assert max(axes.get_xticks()) <= 100


def test_genres_by_split_marks_missing_and_rare_genres(figures: list[Figure]) -> None:
    by_split = {
        "Rock": {"train": 800, "dev": 100, "test": 0},
        "Jazz": {"train": 90, "dev": 0, "test": 0},
        "Folk": {"train": 50, "dev": 4, "test": 0},
    }
    plots.genres_by_split(by_split, {"train": 1000, "dev": 120, "test": 0})
    check_layout(figures[0])
    labels = words(figures[0])
    assert {"none", "4", "800", "train (1,000 albums)", "dev (120 albums)"} <= set(labels)
    assert not any("test" in text for text in labels)
    marked = [text.get_text() for text in figures[0].findobj(Text) if text.get_color() == plots.RED]
    assert marked == ["none", "4"]
    many = {f"Genre {n}": {"train": 900 - n, "dev": 50, "test": 50} for n in range(60)}
    plots.genres_by_split(many, dict.fromkeys(("train", "dev", "test"), 1000))
    check_layout(figures[1])
    assert "Genres by split: the 40 least common of 60" in words(figures[1])
    assert not [text for text in figures[1].findobj(Text) if text.get_color() == plots.RED]
    assert pixels(plots.genres_by_split({}, {"train": 1})).shape[2] == 3


def test_loss_curve_marks_the_best_epoch(figures: list[Figure]) -> None:
    plots.loss_curve(epochs(5))
    loss, scores = figures[0].axes
    for axes in (loss, scores):
        (mark,) = [line for line in axes.lines if "best epoch" in str(line.get_label())]
        assert list(np.asarray(mark.get_xdata())) == [3, 3]
    drawn = {str(line.get_label()) for line in scores.lines}
    assert "PR AUC, micro" in drawn
    assert "ROC AUC, macro" not in drawn  # NaN in every epoch
    np.testing.assert_allclose(
        np.asarray(loss.lines[0].get_ydata()), [0.5 / i for i in range(1, 6)]
    )


def test_loss_curve_of_one_epoch_shows_its_dots() -> None:
    png = plots.loss_curve(epochs(1))
    without = plots.loss_curve([{**epochs(1)[0], "dev_loss": None}])
    assert count(png, plots.ORANGE) > count(without, plots.ORANGE) + 20


def test_loss_curve_without_dev_scores(figures: list[Figure]) -> None:
    plots.loss_curve([{"epoch": 1, "train_loss": 0.3}, {"epoch": 2, "train_loss": math.inf}])
    assert "n/a" in words(figures[0])
    assert not any("best" in text for text in words(figures[0]))


@pytest.mark.parametrize(
    ("without", "legend"),
    [
        ([], "macro over 5 genres"),
        (["Country"], "macro over 5 of 6 genres, without Country"),
        (LONG, "macro over 5 of 45 genres, without Contemporary Fo…, Contemporary Fo… and 38 more"),
    ],
)
def test_loss_curve_has_the_genres_of_the_macro_average(
    figures: list[Figure], without: list[str], legend: str
) -> None:
    kept = {"dev_macro_genres": 5, "dev_genres_without_auc": without}
    plots.loss_curve([record | kept for record in epochs(3)])
    assert legend in words(figures[0])
    check_layout(figures[0])


def test_genre_bars_show_scores_chance_and_missing_values(figures: list[Figure]) -> None:
    rows = genre_rows(["Pop", "Jazz", "Metal"])
    rows["Jazz"].update(roc_auc=NAN, pr_auc=None)
    plots.genre_bars(rows)
    labels = words(figures[0])
    assert labels.count("n/a") == 2
    assert {"Pop (2,000)", "0.90", "chance: 0.5"} <= {" ".join(text.split()) for text in labels}
    roc, pr = figures[0].axes
    assert [bar.get_width() for bar in roc.patches][:2] == [0.9, 0]  # type: ignore[attr-defined]
    chance = pr.collections[0].get_segments()  # type: ignore[attr-defined]
    assert [round(line[0][0], 3) for line in chance] == [0.5, 0.25, 0.167]


def test_genre_bars_show_the_most_common_of_many_genres(figures: list[Figure]) -> None:
    plots.genre_bars(genre_rows([f"Genre {i}" for i in range(446)]))
    assert "Scores by genre, most common first: 40 of 446 genres" in words(figures[0])
    assert len(figures[0].axes[0].patches) == 40


def test_areas_of_curves_equal_those_computed_by_hand(figures: list[Figure]) -> None:
    truth = np.array([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=bool)
    scores = np.array([[0.9, 0.1], [0.3, 0.2], [0.4, 0.3], [0.2, 0.8]], dtype=np.float32)
    plots.curves(truth, scores, ["Pop", "Jazz"])
    labels = words(figures[0])
    # Pop ranks 1 0 1 0: average precision (1 + 2/3) / 2, and 3 of 4 pairs in order.
    assert "0.83 / 0.75  Pop" in labels
    assert "1.00 / 1.00  Jazz" in labels
    # All eight: 1 1 0 (1 0 tied) 0 0 0: (1 + 1 + 3/5) / 3, and 13.5 of 15 pairs.
    assert "0.87 / 0.90  all genres, micro" in labels


def test_curves_omit_genres_of_no_or_all_albums(figures: list[Figure]) -> None:
    truth, scores = decisions(60, 30)
    truth[:, 3], truth[:, 4] = False, True
    plots.curves(truth, scores, [f"Genre {i:02d}" for i in range(30)])
    named = [text for text in words(figures[0]) if "Genre" in text]
    assert len(named) == plots.MAX_CURVES
    assert not any(name in text for text in named for name in ("Genre 03", "Genre 04"))
    assert "PR AUC / ROC AUC: 20 of 30 genres" in words(figures[0])


def test_curves_raise_for_wrong_shapes_and_nan() -> None:
    truth, scores = decisions(10, 3)
    with pytest.raises(ValueError, match=r"\[albums, 2\]"):
        plots.curves(truth, scores, ["a", "b"])
    scores[2, 1] = NAN
    with pytest.raises(ValueError, match="1 of 30"):
        plots.curves(truth, scores, ["a", "b", "c"])


def test_contact_sheet_colours_right_and_wrong() -> None:
    black = [np.zeros((60, 60, 3), np.uint8)] * 4
    scores = [{"Pop": 0.9, "Jazz": 0.2}] * 4
    right = plots.contact_sheet(black, [["Pop"]] * 4, scores)
    wrong = plots.contact_sheet(black, [["Metal"]] * 4, scores)
    assert count(right, plots.GREEN) > 5 * count(wrong, plots.GREEN)
    assert count(wrong, plots.RED) > 5 * count(right, plots.RED)
    unsure = plots.contact_sheet(black, [["Pop"]] * 4, scores, threshold=0.95)
    assert count(unsure, plots.GREEN) < count(right, plots.GREEN) / 5


def test_contact_sheet_has_the_highest_scores_and_the_true_genres(figures: list[Figure]) -> None:
    score = {"Pop": 0.2, "Jazz": 0.91, "Metal": NAN, "Blues": 0.44, "Folk": 0.1}
    truth = ["Opera", "Soul", "Disco", "Ska"]
    plots.contact_sheet([cover(), cover(30, 60)], [truth, []], [score, {"Funk": 1.0}])
    labels = words(figures[0])
    assert [text for text in labels if text in score] == ["Jazz", "Blues", "Pop"]
    assert {"0.91", "0.44", "0.20", "Opera", "Soul", "and 2 more", "no genre", "Funk"} <= set(
        labels
    )
    assert "Disco" not in labels


def test_contact_sheet_keeps_the_aspect_ratio_of_covers() -> None:
    red = np.zeros((50, 100, 3), np.uint8)
    red[..., 0] = 255
    sheet = pixels(plots.contact_sheet([red], [["Pop"]], [{"Pop": 0.5}]))
    ys, xs = np.nonzero((sheet == [255, 0, 0]).all(axis=2))
    across, down = np.ptp(xs) + 1, np.ptp(ys) + 1
    assert across == pytest.approx(2.2 * plots.DPI, abs=3)
    assert across / down == pytest.approx(2, abs=0.05)


def test_contact_sheet_raises_for_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 covers"):
        plots.contact_sheet([cover(), cover()], [["Pop"]], [{}, {}])


@pytest.mark.parametrize("genres", [["Pop"], LONG], ids=["one genre", "40 long names"])
def test_texts_do_not_overlap(figures: list[Figure], genres: list[str]) -> None:
    many = len(genres)
    plots.label_distribution({g: 900 - 20 * i for i, g in enumerate(genres)}, 900, genres[:9])
    plots.genre_bars(genre_rows(genres))
    plots.curves(*decisions(80, many), genres)
    covers = [cover() for _ in range(min(many, 4))]
    scores = [{genre: float(RNG.random()) for genre in genres} for _ in covers]
    plots.contact_sheet(covers, [genres[: i + 1] for i in range(len(covers))], scores)
    plots.loss_curve(epochs(1 if many == 1 else 10))
    assert len(figures) == 5
    for figure in figures:
        check_layout(figure)


def test_long_and_unusual_names_are_drawn_literally(figures: list[Figure]) -> None:
    """No formula for dollars, one line per name, and no warning about glyphs the font lacks."""
    names = [r"$\frac$ Rap", "two\nlines", "日本のロック", "W" * 200]
    plots.genre_bars(genre_rows(names))
    plots.contact_sheet([cover(), cover()], [names, names], [dict.fromkeys(names, 0.7)] * 2)
    for figure in figures:
        check_layout(figure)
        labels = " ".join(words(figure))
        assert r"$\frac$ Rap" in labels
        assert "two lines" in labels
        assert "W" * 29 + "…" in labels or "and 2 more" in labels


def test_plots_without_data_have_a_message(figures: list[Figure]) -> None:
    truth = np.zeros((4, 2), dtype=bool)
    for png in (
        plots.label_distribution({}, 0, []),
        plots.loss_curve([]),
        plots.genre_bars({}),
        plots.curves(truth, np.zeros((4, 2), np.float32), ["a", "b"]),
        plots.contact_sheet([], [], []),
    ):
        assert len(np.unique(pixels(png))) > 2
    assert [len(words(figure)) for figure in figures] == [2] * 5


def test_style_of_the_user_has_no_effect() -> None:
    import matplotlib

    plain = plots.loss_curve(epochs(2))
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):
        assert plots.loss_curve(epochs(2)) == plain
    assert matplotlib.rcParams["text.parse_math"]  # nor is it changed


def test_importing_report_does_not_import_matplotlib() -> None:
    code = "import sys, covergenre.report.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pyplot_is_never_imported() -> None:
    tree = ast.parse(inspect.getsource(plots))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any("matplotlib" in ast.unparse(node) for node in imports)
    assert not any("pyplot" in ast.unparse(node) for node in imports)
