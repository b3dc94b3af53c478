"""`python -m fastsd_helpers ...` is `fastsd ...`, for places where the command is not on the PATH."""

import sys

from fastsd_helpers.cli import main
from fastsd_helpers.processes import take_place

__all__: list[str] = []

if __name__ == "__main__":
    take_place()
    sys.exit(main())
