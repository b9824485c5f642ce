"""Entry point for jobs: `ray job submit -- python jobs/prepare.py ARGUMENTS`."""

import sys

from covergenre.__main__ import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
