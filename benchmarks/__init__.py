"""Speed as ratios in one run, memory, and the floors that a model has to beat. Not part of the
package."""

import sys
from collections.abc import Callable
from pathlib import Path

from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import CovergenreError
from covergenre.models.bundle import write_bundle
from covergenre.progress import log_to_stderr, reporting


def told(main: Callable[[], None]) -> None:
    """Run `main` with log lines and progress on stderr; a mistake is one line, as with the
    commands."""
    try:
        with log_to_stderr(), reporting(True):
            main()
    except CovergenreError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def untrained_model(out: Path | str) -> str:
    """Write a small MODEL of random weights, for where what it says does not matter; its place."""
    from safetensors.torch import save

    from covergenre.models.networks import build_model

    genres = Genres(("Ambient", "Jazz", "Rock"))
    bundle = write_bundle(
        str(out),
        weights=save(build_model("tiny", len(genres), seed=0).state_dict()),
        model="tiny",
        genres=genres,
        preprocessing=Preprocessing(),
        precision="fp32",
        config={},
        thresholds=dict.fromkeys(genres.names, 0.5),
        others={},
    )
    return bundle.uri
