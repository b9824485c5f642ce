"""python -m covergenre, and jobs/*.py: the command line, after a look at what it needs.

Avoids new syntax, as environment.py does.
"""

from covergenre.environment import check_environment


def main(args: "list[str] | None" = None) -> None:
    """Run the command line; where a package is missing, end with one line that says so."""
    check_environment()
    from covergenre.cli import main as run

    run(args)


if __name__ == "__main__":
    main()
