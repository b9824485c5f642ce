"""Speed as ratios in one run, memory, and the floors that a model has to beat. Not part of the
package."""

import sys
from collections.abc import Callable
from pathlib import Path

from covergenre.data.genres import Genres
from covergenre.data.image_decoding import Preprocessing
from covergenre.errors import CovergenreError
from covergenre.models.bundle import write_bundle


def told(main: Callable[[], None]) -> None:
    """Run `main`; a mistake is one line, as with the commands."""
    try:
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
