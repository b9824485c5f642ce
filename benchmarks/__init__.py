"""Benchmarks of speed and memory, and a baseline of the metrics. Not part of the package."""

import sys
from collections.abc import Callable

from covergenre.errors import CovergenreError
from covergenre.progress import log_to_stderr, reporting


def run_benchmark(main: Callable[[], None]) -> None:
    """Run `main` with logs and progress on stderr. A user error is one line, as in the CLI."""
    try:
        with log_to_stderr(), reporting(True):
            main()
    except CovergenreError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
