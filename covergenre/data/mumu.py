"""MuMu's genre files: CSV with one row per song, read as one row per album.

An album is one amazon_id, in order of first appearance. Its genres are those of all its songs, in
order of first appearance; its artist is that of the first song that has one. Covers are not part of
MuMu: the user has them as files `<amazon_id>.jpg` in a directory.

Source: MuMu_dataset_*-label.csv of the MuMu dataset (Oramas et al. 2017).
"""

from collections.abc import Callable

import pyarrow as pa

from covergenre.data.genre_lists import GENRES
from covergenre.data.readers import read_delimited
from covergenre.errors import CatalogError, did_you_mean
from covergenre.genre_text import GenreTextError
from covergenre.io import storage

HEADER = ["amazon_id", "album_mbid", "MSD_track_id", "recording_mbid", "artist_mbid", "genres"]
SEPARATOR = ","  # between genres, inside one quoted value

_NEEDED = ["amazon_id", "artist_mbid", "genres"]


def read_songs(
    files: list[str], to_names: Callable[[str], list[str]], covers: str | None
) -> tuple[pa.Table, int]:
    """(albums with album_id, cover, genres and artist; number of songs in the files).

    to_names: the genres in the text of a cell; may raise GenreTextError.
    covers: directory of the covers; None: that of the first file with the album.
    A song without an amazon_id is a separate album without an id.
    """
    genres: dict[str | int, list[str]] = {}
    artists: dict[str | int, str | None] = {}
    paths: list[str | None] = []
    songs = 0
    for file in files:
        source = read_delimited(file, "csv", _NEEDED)
        if not source.columns:
            continue
        for name in _NEEDED:
            if name not in source.columns:
                hint = did_you_mean(name, source.columns)
                raise CatalogError(
                    f"no column {name!r} in {file}{hint} (--format)", code="no_column"
                )
        folder = storage.absolute(covers or storage.parent(file))
        rows = (song for part in source.parts for song in part.select(_NEEDED).to_pylist())
        for song in rows:
            amazon_id, artist, text = (song[name] for name in _NEEDED)
            key = amazon_id or songs
            if key not in genres:
                paths.append(amazon_id and storage.join(folder, f"{amazon_id}.jpg"))
            try:
                genres.setdefault(key, []).extend(to_names(text or ""))
            except GenreTextError as error:
                raise CatalogError(
                    f"{file}, amazon_id {amazon_id}: 'genres': {error}", code="genres"
                ) from error
            artists[key] = artists.get(key) or artist
            songs += 1
    albums = pa.table(
        {
            "album_id": pa.array([key if isinstance(key, str) else None for key in genres]),
            "cover": pa.array(paths, pa.string()),
            "genres": pa.array([list(dict.fromkeys(names)) for names in genres.values()], GENRES),
            "artist": pa.array(artists.values(), pa.string()),
        }
    )
    return albums, songs
