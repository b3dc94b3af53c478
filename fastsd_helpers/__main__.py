"""`python -m fastsd_helpers ...` is `fastsd ...`, for places where the command is not on the PATH."""

import sys

from fastsd_helpers.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
