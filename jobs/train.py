"""Entry point for jobs: `ray job submit -- python jobs/train.py ARGUMENTS`."""

import sys

from covergenre.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
