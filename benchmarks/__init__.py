"""Speed as ratios in one run, and the floors that a model has to beat. Not part of the package."""

import sys
from collections.abc import Callable

from covergenre.errors import CovergenreError


def told(main: Callable[[], None]) -> None:
    """Run `main`; a mistake is one line, as with the commands."""
    try:
        main()
    except CovergenreError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
