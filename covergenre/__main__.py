"""python -m covergenre: the command line, where the package lies but is not installed."""

from covergenre.cli import main

main()
