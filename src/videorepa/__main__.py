"""Runs the command line: `python -m videorepa`."""

import sys

from videorepa.cli import main

if __name__ == "__main__":
    sys.exit(main())
