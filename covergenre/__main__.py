"""Entry point of `python -m covergenre` and of jobs/*.py: checks dependencies, then runs the CLI.

Uses old syntax only, like dependencies.py.
"""

import os
import sys

# Python puts the current directory first on sys.path, where a token.py or torch.py beside a catalog
# would hide the module of that name. It is removed, or moved to the end if covergenre is in it.
if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd()):
    first = sys.path.pop(0)
    if os.path.samefile(first or ".", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        sys.path.append(first)

from covergenre.dependencies import check_environment


def main(args: "list[str] | None" = None) -> None:
    """Run the command line. Missing packages are a one-line error with exit code 2."""
    check_environment()
    from covergenre.cli import main as run

    run(args)


if __name__ == "__main__":
    main()
