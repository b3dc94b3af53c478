"""Set the version, and the branch or tag that notebooks and hints name, in every file that says them.

    python scripts/set_version.py 0.2.0                        the version; notebooks go on taking the branch main
    python scripts/set_version.py 0.2.0 --revision v0.2.0      a release: notebooks take this tag

The one place to look them up is pyproject.toml; a test compares the others with it. Git is not touched.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import write_first_cells

ROOT = Path(__file__).resolve().parents[1]
# File -> what stands around the version, and around the revision, in it.
VERSIONS = {
    "pyproject.toml": r'(^version = ")[^"]+(")',
    "fastsd_helpers/__init__.py": r'(^__version__ = ")[^"]+(")',
    "CITATION.cff": r'(^version: ")[^"]+(")',
}
REVISIONS = {
    "pyproject.toml": r'(^revision = ")[^"]+(")',
    "fastsd_helpers/runtime.py": r'(^REVISION = ")[^"]+(")',
}


def set_version(root: Path, version: str, revision: str) -> list[str]:
    """Write both everywhere below `root`, first cells of the notebooks included; returns the files that changed."""
    before = {name: (root / name).read_text(encoding="utf-8") for name in VERSIONS | REVISIONS}
    after = dict(before)
    for patterns, value in ((VERSIONS, version), (REVISIONS, revision)):
        for name, pattern in patterns.items():
            after[name], count = re.subn(pattern, rf"\g<1>{value}\g<2>", after[name], flags=re.MULTILINE)
            if count != 1:
                raise SystemExit(f"{name} has {count} places for {value}, not one.")
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        (root / name).write_text(after[name], encoding="utf-8")
    for path in (root / "notebooks" / name for name in write_first_cells.NOTEBOOKS):
        text = path.read_text(encoding="utf-8")
        write_first_cells.write_first_cell(path, root)
        changed += [f"notebooks/{path.name}"] * (path.read_text(encoding="utf-8") != text)
    return changed


def said(root: Path = ROOT) -> tuple[str, str]:
    """Version and revision, as pyproject.toml has them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["version"], project["tool"]["fastsd"]["revision"]


def differing(root: Path = ROOT) -> list[str]:
    """Files that say another version or revision than pyproject.toml."""
    wrong = []
    for patterns, value in zip((VERSIONS, REVISIONS), said(root), strict=True):
        for name, pattern in patterns.items():
            found = re.search(pattern.replace("[^", "([^").replace("]+", "]+)"), (root / name).read_text("utf-8"), re.M)
            wrong += [name] * (found is None or found[2] != value)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--revision", default="main", help="branch or tag that notebooks take (default: main)")
    asked = parser.parse_args()
    if not re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", asked.version):
        parser.error(f"{asked.version} is not a version such as 0.2.0")
    for name in set_version(ROOT, asked.version, asked.revision):
        print(f"changed: {name}")
    if asked.revision != "main":
        print(f"Commit this, then: git tag {asked.revision}; make release")
    return 0


if __name__ == "__main__":
    sys.exit(main())
