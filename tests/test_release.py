"""One version and one revision, wherever they are said, and what a release and its reports name."""

import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import set_version  # noqa: E402
import write_first_cells  # noqa: E402

from fastsd_helpers.runtime import REPOSITORY, REVISION  # noqa: E402


def test_every_file_says_the_version_and_the_revision_of_the_project() -> None:
    assert set_version.differing() == []
    assert set_version.said()[1] == REVISION


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that say a version, in another place."""
    names = [
        *set_version.VERSIONS,
        *set_version.REVISIONS,
        *(f"notebooks/{name}" for name in write_first_cells.NOTEBOOKS),
    ]
    for name in set(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_new_version_and_its_tag_reach_every_file(copy: Path) -> None:
    changed = set_version.set_version(copy, "7.8.9", "v7.8.9")
    assert len(changed) == len(set(set_version.VERSIONS) | set(set_version.REVISIONS)) + len(
        write_first_cells.NOTEBOOKS
    )
    assert set_version.said(copy) == ("7.8.9", "v7.8.9")
    assert set_version.differing(copy) == []
    for name in write_first_cells.NOTEBOOKS:
        cell = (copy / "notebooks" / name).read_text(encoding="utf-8")
        assert f'VERSION, ARCHIVE, PART, here = \\"7.8.9\\", \\"{REPOSITORY}/archive/v7.8.9.zip\\"' in cell
    assert set_version.set_version(copy, "7.8.9", "v7.8.9") == []


@pytest.mark.parametrize("name", ["CITATION.cff", "fastsd_helpers/__init__.py", "fastsd_helpers/runtime.py"])
def test_a_file_that_was_forgotten_is_named(copy: Path, name: str) -> None:
    old = (copy / name).read_text(encoding="utf-8")
    set_version.set_version(copy, "7.8.9", "v7.8.9")
    (copy / name).write_text(old, encoding="utf-8")
    assert set_version.differing(copy) == [name]


def test_a_report_of_a_fault_brings_the_environment_with_it() -> None:
    for name in ("something-fails.md", "a-wish.md"):
        assert "fastsd doctor --json" in (ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8")


def test_the_citation_names_the_project_and_its_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for line in (f"license: {project['license']}", f'repository-code: "{REPOSITORY}"', "cff-version: 1.2.0"):
        assert f"\n{line}\n" in f"\n{text}"
    assert project["name"] in text
