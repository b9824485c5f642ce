"""Entry point for jobs: `ray job submit -- python jobs/evaluate.py ARGUMENTS`."""

import sys

from covergenre.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
