"""The genre vocabulary: selection, order, thresholds, warnings."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
import pytest

from covergenre.data.genres import (
    Genres,
    Selection,
    name_warnings,
    over_threshold,
    select,
    split_table,
    split_warnings,
    unselected_reason,
)
from covergenre.errors import ConfigError, DatasetError
from covergenre.schema import REASONS

# Rock on 4 albums, Jazz and Pop on 3, Folk on 1; one album has no genre.
ALBUMS = [
    ["Rock"],
    ["Rock", "Pop"],
    ["Rock", "Jazz", "Pop"],
    ["Rock", "Pop", "Jazz"],
    ["Jazz", "Folk"],
    [],
]


def selected(
    albums: Iterable[Collection[str]] = ALBUMS,
    top: int = 20,
    min_share: float = 0.0,
    explicit: tuple[str, ...] = (),
) -> Selection:
    albums = list(albums)
    counts = Counter(genre for genres in albums for genre in genres)
    labelled = sum(bool(genres) for genres in albums)
    return select(counts, labelled, top=top, min_share=min_share, explicit=explicit)


# Genres


def test_names_are_sorted_unique_and_not_empty() -> None:
    assert len(Genres(("Jazz", "Rock"))) == 2
    for names in (("Rock", "Jazz"), ("Jazz", "Jazz"), ("", "Jazz")):
        with pytest.raises(DatasetError):
            Genres(names)


def test_digest_depends_on_the_names_only() -> None:
    every = [
        Genres(tuple(names))
        for n in range(4)
        for names in itertools.combinations(("A", "AB", "B", "C"), n)
    ]
    assert len({genres.digest for genres in every}) == len(every)
    assert Genres(("A", "B")).digest == Genres(("A", "B")).digest
    # sha256 of b"A\0B": saved in datasets and models, so it must not change
    assert Genres(("A", "B")).digest.startswith("76fe3925c7167317")


def test_multi_hot_for_every_subset() -> None:
    names = ("Folk", "Jazz", "Rock")
    for n in range(4):
        for subset in itertools.permutations(names, n):
            (row,) = Genres(names).multi_hot([subset])
            assert row.tolist() == [float(name in subset) for name in names]
    many = Genres(names).multi_hot([["Rock"], [], ["Folk", "Rock"]])
    assert many.dtype == np.float32
    assert many.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert Genres(names).multi_hot([]).shape == (0, 3)


def test_multi_hot_raises_for_unknown_genres() -> None:
    with pytest.raises(KeyError, match="Polka"):
        Genres(("Jazz",)).multi_hot([["Jazz"], ["Polka"]])


# Selection


@pytest.mark.parametrize(
    ("top", "selected_names"),
    [
        (1, ("Rock",)),
        (2, ("Jazz", "Rock")),  # Jazz and Pop tie; Jazz sorts first
        (3, ("Jazz", "Pop", "Rock")),
        (4, ("Folk", "Jazz", "Pop", "Rock")),
        (99, ("Folk", "Jazz", "Pop", "Rock")),
    ],
)
def test_most_common_genres_are_selected(top: int, selected_names: tuple[str, ...]) -> None:
    assert selected(top=top).genres.names == selected_names


def test_ties_are_ordered_by_name() -> None:
    for albums in itertools.permutations([["C"], ["BB"], ["AAA"], ["Z"], ["Z"]]):
        selection = selected(albums, top=2, min_share=0.0)
        assert selection.genres.names == ("AAA", "Z")
        assert list(selection.counts) == ["Z", "AAA", "BB", "C"]
    for albums in itertools.permutations([["A"], ["BB"], ["CCC"]]):
        assert selected(albums, top=1, min_share=0.0).genres.names == ("A",)


def test_counts_are_of_all_genres() -> None:
    selection = selected(top=1)
    assert list(selection.counts.items()) == [("Rock", 4), ("Jazz", 3), ("Pop", 3), ("Folk", 1)]
    assert selection.labelled == 5  # albums without genres do not count


@pytest.mark.parametrize(
    ("min_share", "selected_names"),
    [
        (0.2, ("Folk", "Jazz", "Pop", "Rock")),  # exactly 1 of 5
        (0.21, ("Jazz", "Pop", "Rock")),
        (0.6, ("Jazz", "Pop", "Rock")),
        (0.61, ("Rock",)),
        (0.8, ("Rock",)),
    ],
)
def test_min_share_is_relative_to_labelled_albums(
    min_share: float, selected_names: tuple[str, ...]
) -> None:
    assert selected(min_share=min_share).genres.names == selected_names


@pytest.mark.parametrize("percent", range(1, 101))
def test_genre_with_exactly_min_share_is_selected(percent: int) -> None:
    """In floating point 0.07 * 100 is above 7."""
    albums = [["Rock", "Rare"]] * percent + [["Rock"]] * (100 - percent)
    share = float(f"{percent / 100:.2f}")
    assert selected(albums, top=9, min_share=share).genres.names == ("Rare", "Rock")
    if percent < 100:
        above = float(f"{percent / 100:.2f}1")
        assert selected(albums, top=9, min_share=above).genres.names == ("Rock",)


def test_selection_does_not_depend_on_order() -> None:
    expected = selected(top=2)
    for albums in itertools.permutations(ALBUMS):
        assert selected([album[::-1] for album in albums], top=2, min_share=0.0) == expected


def test_explicit_genres_override_top_and_min_share() -> None:
    selection = selected(ALBUMS, 1, 0.9, ("Pop", "Folk", "Pop"))
    assert selection.genres.names == ("Folk", "Pop")
    assert selection.counts["Rock"] == 4


def test_errors_of_select() -> None:
    with pytest.raises(ConfigError) as caught:
        selected(explicit=("Jazz", "Rokc"))
    assert caught.value.code == "unknown_genre"
    assert "--genres" in str(caught.value) and "did you mean 'Rock'?" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        selected(min_share=0.9)
    assert caught.value.code == "min_share_too_high"
    for fact in ("--min-share 0.9", "'Rock'", "80.00%"):
        assert fact in str(caught.value)
    nothing: list[list[list[str]]] = [[], [[], []]]
    for albums in nothing:
        with pytest.raises(ConfigError, match="--genres-column") as caught:
            selected(albums, top=1, min_share=0.0)
        assert caught.value.code == "no_genres"


# Unselected albums


def test_reasons_of_unselected_albums() -> None:
    vocabulary = Genres(("Jazz", "Rock"))
    expected = {  # genres -> (any, all)
        (): ("unlabelled", "unlabelled"),
        ("Jazz",): (None, None),
        ("Jazz", "Rock"): (None, None),
        ("Pop",): ("no_selected_genre", "no_selected_genre"),
        ("Pop", "Folk"): ("no_selected_genre", "no_selected_genre"),
        ("Pop", "Rock"): (None, "genre_not_selected"),
        ("Rock", "Jazz", "Pop"): (None, "genre_not_selected"),
    }
    for column, require_all in enumerate((False, True)):
        reasons = [
            unselected_reason(genres, vocabulary.names, require_all=require_all)
            for genres in expected
        ]
        assert reasons == [pair[column] for pair in expected.values()]
        assert {reason for reason in reasons if reason} <= set(REASONS)


# Predicted genres


def test_predicted_genres_reach_their_threshold() -> None:
    genres = Genres(("Folk", "Jazz", "Rock"))
    thresholds = {"Rock": 0.9, "Folk": 0.5, "Jazz": 0.1}  # by name, not by position
    scores = np.array([[0.5, 0.05, 0.95], [0.49, 0.1, 0.89], [0, 0, 0], [1, 1, 1]], np.float32)
    labels = over_threshold(scores, genres, thresholds)
    assert labels == [["Folk", "Rock"], ["Jazz"], [], ["Folk", "Jazz", "Rock"]]
    assert over_threshold(scores[:0], genres, thresholds) == []


def test_thresholds_compare_as_float32() -> None:
    """A stored score equal to the threshold is a label, whichever way float32 rounds it."""
    for threshold in np.arange(0.0, 1.0, 0.01).tolist():
        stored = np.float32(threshold)
        below = np.nextafter(stored, np.float32(-1))
        scores = np.array([[stored], [below]], np.float32)
        assert over_threshold(scores, Genres(("A",)), {"A": threshold}) == [["A"], []]


def test_missing_threshold_is_an_error() -> None:
    with pytest.raises(KeyError, match="B"):
        over_threshold(np.zeros((1, 2), np.float32), Genres(("A", "B")), {"A": 0.5})


# Warnings


def test_warnings_about_genre_names() -> None:
    assert name_warnings({"Rock": 3, "Pop": 1, "R&B": 1, "Folk (US)": 1, "&c": 1}) == []
    case, entities, separators = name_warnings(
        {"Rock": 3, "rock": 1, "ROCK": 1, "R&amp;B": 2, "Ol&#233;": 1, "Jazz; Funk": 1, "A,B": 1}
    )
    assert "'Rock' (3) / 'rock' (1) / 'ROCK' (1)" in case and "--genre-map" in case
    assert "'R&amp;B' (R&B), 'Ol&#233;' (Olé)" in entities
    assert "'Jazz; Funk', 'A,B'" in separators and "--genres-separator" in separators
    (many,) = name_warnings({f"{word}{n}": 1 for n in range(8) for word in ("a", "A")})
    assert "and 3 more" in many


BY_SPLIT = {
    "Country": {"train": 179, "dev": 0, "test": 12},
    "Reggae": {"train": 45, "dev": 9, "test": 10},
    "Rock": {"train": 1500, "dev": 200, "test": 190},
}


def test_warnings_about_missing_and_rare_genres() -> None:
    albums = {"train": 2000, "dev": 250, "test": 250}
    missing, rare = split_warnings(BY_SPLIT, albums)
    assert missing.startswith("no album in dev has Country: ") and "--split-seed" in missing
    assert rare.startswith("fewer than 10 albums in dev have Reggae (9): ")
    # a split that was not asked for lacks nothing
    assert (
        split_warnings({"Rock": {"train": 20, "dev": 0, "test": 0}}, {"train": 20, "dev": 0}) == []
    )
    (never,) = split_warnings({"Rock": {"train": 0, "dev": 20}}, {"train": 5, "dev": 20})
    assert "no album in train has Rock" in never


def test_table_of_genres_by_split() -> None:
    albums = {"train": 2000, "dev": 250, "test": 250}
    lines = split_table(BY_SPLIT, albums)
    assert [line.split()[0] for line in lines] == ["albums", "Rock", "Country", "Reggae"]
    assert lines[1].split()[1:] == ["1,500", "200", "190"]
    assert len({len(line) for line in lines}) == 1
    many = {f"{n:02d}": {"train": 100 - n, "dev": 1, "test": 1} for n in range(60)}
    lines = split_table(many, albums)
    assert len(lines) == 42 and "20 more common genres" in lines[1] and lines[-1].startswith("59")
