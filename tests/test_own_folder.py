"""Each test has a folder of its own: empty but for a home, with a name that no other test of its process had."""

import os
from pathlib import Path

import pytest

_seen: list[Path] = []


@pytest.mark.parametrize("left", ["file", "home/.cache/file", "mode", ""])
def test_whatever_the_test_before_has_left_a_folder_is_new(tmp_path: Path, left: str) -> None:
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]
    assert {os.stat(path).st_mode & 0o777 for path in (tmp_path, tmp_path / "home")} == {0o700}
    assert (Path.home(), Path.cwd()) == (tmp_path / "home", tmp_path)
    assert tmp_path not in _seen
    assert all(not list(path.rglob("*")) for path in _seen if path.exists())
    _seen.append(tmp_path)
    if left == "mode":
        (tmp_path / "home").chmod(0o755)
    elif left:
        (tmp_path / left).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / left).write_text("left")


def test_a_folder_that_nothing_was_written_into_is_the_next_tests_under_its_name(tmp_path: Path) -> None:
    assert tmp_path.name.startswith("test_a_folder_that_nothing_was")
    assert not _seen or not _seen[-1].exists(), "the last test wrote nothing, and this is its folder"
