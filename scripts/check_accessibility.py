"""Look at every form of the notebooks with axe-core in Chromium, in both themes, in a narrow and a wide cell.

    python scripts/check_accessibility.py [--shots FOLDER] [--only TITLE ...]

Prints what was found; ends with code 1 for a serious finding, an input without a label, or anything that a cell of
520 px does not show. axe-core comes from npm the first time and is kept in the environment.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.accessibility import CELLS, find_axe, look_at_everything, open_forms  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, help="folder for pictures of every form")
    parser.add_argument("--only", nargs="*", default=[], help="titles of the cells to look at; default: all")
    asked = parser.parse_args()
    if find_axe() is None:
        print("axe-core cannot be had: is npm there, and does its registry answer?")
        return 1
    cells = {title: code for title, code in CELLS.items() if not asked.only or title in ("set-up", *asked.only)}
    with tempfile.TemporaryDirectory() as folder, open_forms(Path(folder), cells) as page:
        told = look_at_everything(page, asked.shots)
    for kind, found in told.items():
        print(f"{kind}: {len(found)}")
        for text in found:
            print(f"   {text}")
    return 1 if told["serious"] or told["unnamed"] or told["out_of_sight"] else 0


if __name__ == "__main__":
    sys.exit(main())
