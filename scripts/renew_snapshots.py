"""Write what tests/test_snapshots.py compares with: public names, settings, help texts and other names people keep;
and the pages of docs/reference/ that say the same to readers.

    python scripts/renew_snapshots.py          # write, and print what was lost (-) and what came (+)
    python scripts/renew_snapshots.py --check  # only print; ends with 1 where something differs

Run it after a change that is meant, and look through what it prints: a line that is lost is a name that a notebook, a
script or a folder on somebody's disk may use.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]


def main() -> int:
    import make_colab_page
    import make_reference
    from snapshots import DATA, differences, renderers

    only_check = "--check" in sys.argv[1:]
    changed = False
    for name, render in renderers().items():
        path, found = DATA / name, render()
        recorded = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        differs = differences(recorded, found)
        changed |= bool(differs)
        print(f"{name}: {len(found)} lines, {len(differs)} changes", *differs, sep="\n")
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(found) + "\n", encoding="utf-8")
    if not only_check:
        written = [*make_reference.write(), *make_colab_page.write()]
        print(*(f"written: {path.relative_to(REPOSITORY)}" for path in written), sep="\n")
    return 1 if only_check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
