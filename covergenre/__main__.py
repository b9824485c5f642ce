"""python -m covergenre, and jobs/*.py: the command line, after a look at what it needs.

Avoids new syntax, as environment.py does.
"""

import os
import sys

# Python puts the current directory first: a token.py or torch.py beside a catalog would hide the
# module of that name. Moved to the end where packages that are not installed may be in it.
if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd()):
    first = sys.path.pop(0)
    if os.path.samefile(first or ".", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        sys.path.append(first)

from covergenre.dependencies import check_environment


def main(args: "list[str] | None" = None) -> None:
    """Run the command line; where a package is missing, end with one line that says so."""
    check_environment()
    from covergenre.cli import main as run

    run(args)


if __name__ == "__main__":
    main()
