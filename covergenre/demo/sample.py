"""A made-up catalog with drawn covers: something to try every stage on, free of anyone's rights.

An album is drawn from its seed and number alone, so a larger sample extends a smaller one. A
genre shows in a palette and in a motif. Albums of two genres take one from each, and some albums
look like another genre altogether, so the genres can be learnt, but not to the last album.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from random import Random

from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.demo.synthetic_covers import Album, draw_cover, film_grain
from covergenre.errors import ConfigError, StorageError

COLUMNS = ("album_id", "cover", "genres", "title", "artist")
JPEG_QUALITY = 85
SMALLEST_SIDE = 32
ATYPICAL = 0.12
"""Share of albums that are drawn in the style of a genre picked blindly."""

# Albums come in blocks with artists of their own, so an artist does not depend on how many albums
# are asked for. One entry here is one artist of a block: the shares of the main genres.
ALBUMS_PER_BLOCK = 100
MAIN_GENRES = (
    *["Pop"] * 8,
    *["Electronic"] * 4,
    *["Country"] * 3,
    *["Jazz"] * 3,
    *["Metal"] * 2,
    *["Classical"] * 2,
    *["Blues"] * 2,
    *["Ambient"] * 1,
)
GENRES = tuple(sorted(set(MAIN_GENRES)))

# main genre -> how likely an album is of this other genre too
ALSO: dict[str, dict[str, float]] = {
    "Ambient": {"Electronic": 0.55, "Classical": 0.25},
    "Blues": {"Jazz": 0.30, "Country": 0.25, "Pop": 0.10},
    "Classical": {"Ambient": 0.25, "Jazz": 0.10, "Pop": 0.05},
    "Country": {"Pop": 0.30, "Blues": 0.20},
    "Electronic": {"Pop": 0.35, "Ambient": 0.30, "Jazz": 0.05},
    "Jazz": {"Blues": 0.30, "Pop": 0.15, "Electronic": 0.10, "Classical": 0.05},
    "Metal": {"Electronic": 0.12, "Pop": 0.08, "Blues": 0.04},
    "Pop": {"Electronic": 0.25, "Country": 0.12, "Jazz": 0.05},
}

TITLE_ADJECTIVES = (
    *("Amber", "Borrowed", "Crooked", "Distant", "Electric", "Empty", "Fallen", "Gentle"),
    *("Hollow", "Invisible", "Little", "Midnight", "Northern", "Open", "Paper", "Quiet"),
    *("Restless", "Silver", "Second", "Tender", "Unfinished", "Velvet", "Wandering", "Winter"),
)
TITLE_NOUNS = (
    *("Avenue", "Bridges", "Compass", "Daylight", "Echoes", "Ferris Wheel", "Gardens", "Harbour"),
    *("Islands", "January", "Kites", "Lanterns", "Machines", "Mirrors", "Orchard", "Parade"),
    *("Rivers", "Signals", "Staircase", "Telegram", "Thunder", "Umbrella", "Voyage", "Windows"),
)
BAND_ADJECTIVES = (
    *("Brass", "Cobalt", "Copper", "Drowsy", "Elder", "Faded", "Gilded", "Humming", "Ivory"),
    *("Juniper", "Lonesome", "Marble", "Mossy", "Nimble", "Opal", "Pale", "Rusted", "Saffron"),
    *("Tidal", "Vermilion", "Wayward"),
)
BAND_NOUNS = (
    *("Almanacs", "Antlers", "Beacons", "Cartographers", "Comets", "Dovetails", "Engines"),
    *("Foxgloves", "Herons", "Kettles", "Ledgers", "Magpies", "Oarsmen", "Parasols", "Quarries"),
    *("Ramblers", "Sextants", "Thimbles", "Turnstiles", "Weathervanes"),
)
FIRST_NAMES = (
    *("Adria", "Bram", "Calla", "Dorin", "Elka", "Fenno", "Greer", "Hollis", "Ines", "Jory"),
    *(
        "Kestra",
        "Lorne",
        "Maive",
        "Nilo",
        "Orla",
        "Pim",
        "Quilla",
        "Rufin",
        "Sanne",
        "Tovi",
        "Wren",
    ),
)
LAST_NAMES = tuple(
    start + end
    for start in ("Ashel", "Bren", "Corv", "Dunm", "Eld", "Farr", "Hesk", "Lund", "Morv", "Vesp")
    for end in ("ane", "ingham", "otter", "wick")
)

README = """\
# Drawn album covers

{albums:,} covers in `covers/`, described in `catalog.csv` (columns {columns}; genres separated
by `|`).

These covers are **drawn by a program**. They are not real albums: no picture, title or artist
is real, and the names are put together from word lists, so a likeness to a real one is chance.
Use them to try covergenre and to test it. A score on them says nothing about real music.

The drawing depends on the seed ({seed}) and the number of the album only, so a larger sample
with this seed begins with these albums. Split by `artist`: an artist's covers resemble each other.
"""


def write_sample(out: Path, albums: int, seed: int = 0, side: int = 240) -> Path:
    """Write a catalog of `albums` synthetic albums with covers; return the catalog's path.

    Writes `out`/catalog.csv, `out`/covers/synthetic_000001.jpg and so on (square JPEGs of `side`
    pixels a side), and `out`/README.md. The same `seed` gives the same bytes with the same version
    of Pillow, and no album depends on `albums`. Existing files of these names are overwritten: the
    caller checks that `out` is free.

    Raises ConfigError if `albums` or `side` is too small, StorageError if `out` cannot be written.
    """
    if albums < 1:
        raise ConfigError(f"albums: {albums} is too few; a sample has at least 1")
    if side < SMALLEST_SIDE:
        raise ConfigError(f"side: {side} is too small; a cover has at least {SMALLEST_SIDE} pixels")
    catalog = out / "catalog.csv"
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    grain = film_grain(side)
    try:
        (out / "covers").mkdir(parents=True, exist_ok=True)
        for number in range(albums):
            album = _album(number, seed)
            cover = f"covers/{album.album_id}.jpg"
            rows.writerow(
                (album.album_id, cover, "|".join(album.genres), album.title, album.artist)
            )
            picture = draw_cover(album, Random(f"{seed}/cover/{number}"), side, grain)
            picture.save(out / cover, "JPEG", quality=JPEG_QUALITY)
        readme = README.format(albums=albums, seed=seed, columns=", ".join(COLUMNS))
        (out / "README.md").write_text(readme, encoding="utf-8")
        # Last, so that a sample with a catalog is a whole one.
        catalog.write_text(table.getvalue(), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the sample to {out}: {error}") from error
    return catalog


def write_untrained_model(out: str, genres: Sequence[str] = GENRES) -> str:
    """Write a model directory of the smallest network with random weights; return its URI.

    For trying `score` where the scores themselves do not matter: nothing has to be trained first.
    """
    from safetensors.torch import save

    from covergenre.models.bundle import write_bundle
    from covergenre.models.networks import build_model

    bundle = write_bundle(
        out,
        weights=save(build_model("tiny", len(genres), seed=0).state_dict()),
        model="tiny",
        genres=Genres(tuple(genres)),
        preprocessing=Preprocessing(),
        precision="fp32",
        config={},
        thresholds=dict.fromkeys(genres, 0.5),
        others={},
    )
    return bundle.uri


def _album(number: int, seed: int) -> Album:
    """What album `number` (from 0) is: its genres, its names and its look."""
    rnd = Random(f"{seed}/album/{number}")
    block = number // ALBUMS_PER_BLOCK
    place = rnd.randrange(len(MAIN_GENRES))
    deck = list(MAIN_GENRES)
    Random(f"{seed}/block/{block}").shuffle(deck)
    artist = block * len(MAIN_GENRES) + place
    taste = Random(f"{seed}/artist/{artist}")  # the same for all albums of the artist

    main = deck[place] if rnd.random() < 0.9 else rnd.choice(MAIN_GENRES)
    others = [genre for genre, share in ALSO[main].items() if rnd.random() < share]
    genres = (main, *others[:2])

    look = (rnd.choice(GENRES), rnd.choice(GENRES)) if rnd.random() < ATYPICAL else genres
    # Of three genres only two can be seen, and which of them is colour and which shape is open.
    palette, motif = rnd.sample(look, 2) if len(look) > 1 else (look[0], look[0])
    favourite = taste.randrange(3)
    return Album(
        album_id=f"synthetic_{number + 1:06d}",
        genres=genres,
        title=_title(rnd),
        artist=_artist(artist, seed),
        palette=palette,
        motif=motif,
        variant=favourite if rnd.random() < 0.4 else rnd.randrange(3),
        hue=taste.gauss(0, 0.02),
    )


def _title(rnd: Random) -> str:
    adjective, noun, other = (
        rnd.choice(TITLE_ADJECTIVES),
        rnd.choice(TITLE_NOUNS),
        rnd.choice(TITLE_NOUNS),
    )
    return rnd.choice(
        (
            f"{adjective} {noun}",
            f"The {adjective} {noun}",
            f"{noun} & {other}" if noun != other else noun,
            f"Songs for {noun}",
            f"{noun}, Part {rnd.choice(('One', 'Two', 'Three'))}",
            noun,
        )
    )


def _artist(artist: int, seed: int) -> str:
    """A name for artist number `artist`, never given to another artist of the same seed."""
    form, index = artist % 2, artist // 2
    firsts, lasts = ((BAND_ADJECTIVES, BAND_NOUNS), (FIRST_NAMES, LAST_NAMES))[form]
    names = len(firsts) * len(lasts)
    # A step prime to both list lengths visits every pair of words once before any repeats.
    again, pair = divmod(index, names)
    pair = (pair * 209_357 + Random(f"{seed}/names").randrange(names)) % names
    name = f"{firsts[pair % len(firsts)]} {lasts[pair // len(firsts)]}"
    name = f"The {name}" if form == 0 else name
    return name if again == 0 else f"{name} {again + 1}"
