"""Entry point for jobs: `ray job submit -- python jobs/score.py ARGUMENTS`."""

import sys

from covergenre.__main__ import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
