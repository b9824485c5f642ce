"""Speed as ratios in one run, memory, and the floors that a model has to beat. Not part of the
package."""

import sys
from collections.abc import Callable

from covergenre.errors import CovergenreError
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
