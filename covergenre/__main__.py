"""python -m covergenre: the command line, where the package lies but is not installed."""

import os
import sys

# Python puts the current directory first: a token.py or torch.py beside a catalog would hide the
# module of that name. Moved to the end where packages that are not installed may be in it.
if sys.path and sys.path[0] in ("", os.getcwd()):
    first = sys.path.pop(0)
    if os.path.samefile(first or ".", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        sys.path.append(first)

from covergenre.cli import main

main()
