"""Which sessions a store has, and which one a notebook goes on with after a restart."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from test_importing import old_session

from fastsd_helpers.errors import DriveError, SessionNotFound
from fastsd_helpers.forms import (
    ReadingSessionConfig,
    SessionConfig,
    desk,
    open_reading,
    open_session,
    recent,
    show_form,
)
from fastsd_helpers.forms.dreambooth import notebook
from fastsd_helpers.forms.trocr import reading
from fastsd_helpers.forms.widgets.known import OTHER, known_values
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")


def store() -> Path:
    return Path.cwd() / "Fast-Dreambooth" / "Sessions"


def used(name: str, hours_ago: float, root: Path | None = None) -> Path:
    """A session that was saved last some hours ago, by the command line."""
    folder = Session.create(name, root=root or store()).folder
    when = time.time() - 3600 * hours_ago
    os.utime(folder / "session.json", (when, when))
    return folder


def chosen_by_a_new_kernel(settings: Any = SessionConfig) -> str:
    """What cell 2a names untouched."""
    desk.clear()
    return show_form(settings).config().session_name


def values(key: str = "sessions") -> list[str]:
    return [value for _words, value in known_values(key)]


def words(name: str, key: str = "sessions") -> str:
    return next(label for label, value in known_values(key) if value == name)


# ------------------------------------------------------------------------------------------------- what is offered


def test_without_any_session_a_new_one_is_offered() -> None:
    assert values() == ["my-subject", OTHER]
    assert chosen_by_a_new_kernel() == "my-subject"


def test_the_session_opened_last_comes_first_and_a_new_one_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    for name in ("cat", "rex", "owl"):
        open_session(SessionConfig(session_name=name))
    open_session(SessionConfig(session_name="rex"))
    assert values() == ["rex", "owl", "cat", OTHER]
    assert chosen_by_a_new_kernel() == "rex"
    caplog.clear()
    session = open_session(show_form(SessionConfig).config())
    assert session.name == "rex"
    assert "Resuming rex, last used just now" in caplog.text
    assert sorted(path.name for path in store().iterdir() if path.is_dir()) == ["cat", "owl", "rex"]


def test_of_sessions_that_no_notebook_has_opened_the_newest_comes_first() -> None:
    used("cat", 1)
    used("rex", 50)
    assert values()[:2] == ["cat", "rex"]
    assert words("cat") == "cat · last used 1 hour ago"
    assert words("rex") == "rex · last used 2 days ago"


def test_a_copy_made_later_is_not_gone_on_with() -> None:
    rex = open_session(SessionConfig(session_name="rex"))
    shutil.copytree(rex.folder, store() / "rex_copy")
    (store() / "rex_copy" / "session.json").touch()
    assert chosen_by_a_new_kernel() == "rex"


def test_a_session_renamed_on_drive_is_found_by_its_identity() -> None:
    open_session(SessionConfig(session_name="cat"))
    rex = open_session(SessionConfig(session_name="rex"))
    rex.folder.rename(store() / "rex-the-dog")
    assert chosen_by_a_new_kernel() == "rex-the-dog"


def test_a_session_that_was_deleted_leaves_the_next_one() -> None:
    open_session(SessionConfig(session_name="cat"))
    rex = open_session(SessionConfig(session_name="rex"))
    shutil.rmtree(rex.folder)
    assert chosen_by_a_new_kernel() == "cat"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b'{"name": "../up", "time": 1}', b"\xff\xfe"])
def test_a_damaged_note_of_the_last_one_costs_nothing(content: bytes) -> None:
    used("cat", 5)
    used("rex", 9)
    (store() / ".last-session.json").write_bytes(content)
    assert chosen_by_a_new_kernel() == "cat"


def test_a_folder_copied_in_part_is_listed_and_never_gone_on_with_by_itself() -> None:
    used("cat", 40)
    (store() / "rex" / "checkpoints").mkdir(parents=True)
    (store() / "rex" / "instance_images").mkdir()
    (store() / "rex" / "instance_images" / "a.png").write_bytes(b"x")
    half = used("owl", 1)
    (half / "session.json").write_bytes(b"")
    assert chosen_by_a_new_kernel() == "cat"
    assert "missing: copied in part?" in words("rex")
    assert "empty: repaired when opened" in words("owl")
    assert values()[-1] == OTHER


def test_a_folder_copied_in_part_is_opened_when_asked_for_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    (store() / "rex" / "checkpoints").mkdir(parents=True)
    (store() / "rex" / "instance_images").mkdir()
    (store() / "rex" / "instance_images" / "a.png").write_bytes(b"x")
    session = open_session(SessionConfig(session_name="rex"))
    assert "If this folder is still being copied, wait" in caplog.text
    assert (session.instance_images / "a.png").read_bytes() == b"x"


def test_only_folders_copied_in_part_do_not_become_the_default() -> None:
    (store() / "my-subject" / "captions").mkdir(parents=True)
    assert values() == ["my-subject-2", "my-subject", OTHER]


def test_sessions_of_the_old_notebook_and_cut_imports_are_listed(tmp_path: Path) -> None:
    old_session(store() / "toby")
    (store() / ".import-rex" / "exports").mkdir(parents=True)
    assert "of the old notebook" in words("toby")
    assert "its import was not finished" in words("rex")
    assert chosen_by_a_new_kernel() == "my-subject"
    with pytest.raises(SessionNotFound, match="The import of rex was interrupted") as caught:
        open_session(SessionConfig(session_name="rex"))
    assert "'import from'" in caught.value.hint
    assert open_session(SessionConfig(session_name="toby")).record["imported"]["by"] == "fast-DreamBooth"
    assert chosen_by_a_new_kernel() == "toby"


def test_what_is_typed_wins_and_is_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    used("cat", 1)
    form = show_form(SessionConfig)
    form.update(session_name="a new one")
    assert open_session(form.config()).name == "a_new_one"
    assert "Created the session a_new_one" in caplog.text


def test_an_empty_name_is_the_last_one_and_a_new_one_only_where_there_is_none() -> None:
    assert open_session(SessionConfig()).name == "my-subject"
    open_session(SessionConfig(session_name="rex"))
    assert open_session(SessionConfig()).name == "rex"


def test_a_store_that_can_only_be_read_still_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    used("rex", 2)

    def refuse(*_args: Any, **_more: Any) -> None:
        raise DriveError("read-only", "")

    monkeypatch.setattr(recent, "write_atomic", refuse)
    assert open_session(SessionConfig(session_name="rex")).name == "rex"


def test_a_session_that_was_in_the_list_and_is_gone_is_never_made_anew() -> None:
    rex = open_session(SessionConfig(session_name="rex"))
    form = show_form(SessionConfig)
    rex.folder.rename(Path.cwd() / "elsewhere")
    with pytest.raises(SessionNotFound, match=r"was in .* when cell 2a was shown, and it is not there now"):
        open_session(form.config())
    assert not rex.folder.exists()


# ------------------------------------------------------------------------------------------------- handwriting


def test_reading_sessions_are_chosen_in_the_same_way(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    assert chosen_by_a_new_kernel(ReadingSessionConfig) == "my-handwriting"
    for name in ("letters", "diary"):
        open_reading(ReadingSessionConfig(session_name=name))
    assert values("reading_sessions") == ["diary", "letters", OTHER]
    assert chosen_by_a_new_kernel(ReadingSessionConfig) == "diary"
    assert open_reading(ReadingSessionConfig()).name == "diary"
    assert "Resuming diary, last used just now" in caplog.text
    assert values() == ["my-subject", OTHER], "the other workflow's sessions are not among them"


def test_a_reading_session_of_the_version_before_is_gone_on_with() -> None:
    folder = Path.cwd() / "Fast-TrOCR" / "Sessions" / "old letters".replace(" ", "_")
    (folder / "lines").mkdir(parents=True)  # that version wrote session.json only when something was read
    assert chosen_by_a_new_kernel(ReadingSessionConfig) == "old_letters"


# ------------------------------------------------------------------------------------------------- Colab


class Colab:
    """A Colab whose Drive is mounted by the first `mount_drive`, unless it fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drive = folder / "drive" / "MyDrive"
        self.local = Path.cwd() / "Fast-Dreambooth" / "Sessions"
        self.mounted, self.error = False, None
        for module in (notebook, reading, recent):
            monkeypatch.setattr(module, "where", lambda: "colab", raising=False)
            monkeypatch.setattr(module, "in_notebook", lambda: True, raising=False)
            monkeypatch.setattr(module, "sessions_root", self.root, raising=False)
            monkeypatch.setattr(module, "mount_drive", self.mount, raising=False)

    @property
    def store(self) -> Path:
        return self.drive / "Fast-Dreambooth" / "Sessions"

    def root(self, root: Any = None, *, shared_drive: str | None = None) -> Path:
        return Path(root) if root else self.store if self.mounted else self.local

    def mount(self, *, shared_drive: str | None = None) -> Path:
        if self.error is not None:
            raise self.error
        self.mounted = True
        return self.drive


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Colab:
    return Colab(tmp_path, monkeypatch)


def test_in_colab_an_untouched_field_means_the_last_one_on_the_drive_that_2b_mounts(
    colab: Colab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    used("cat", 90, colab.store)
    used("rex", 3, colab.store)
    form = show_form(SessionConfig)
    assert form.config().session_name == ""
    assert "used last on your Google Drive" in words("")
    session = open_session(form.config())
    assert session.folder == colab.store / "rex"
    assert "Resuming rex, last used 3 hours ago" in caplog.text
    assert not colab.local.exists()
    assert form.config().session_name == "", "and it can be run again"
    assert show_form(SessionConfig).config().session_name == "rex", "drawn anew it names it"


def test_in_colab_a_typed_name_wins_over_the_last_one(colab: Colab) -> None:
    used("rex", 3, colab.store)
    form = show_form(SessionConfig)
    form.update(session_name="owl")
    assert open_session(form.config()).folder == colab.store / "owl"


def test_in_colab_with_an_empty_drive_the_default_is_made_there(colab: Colab) -> None:
    assert open_session(show_form(SessionConfig).config()).folder == colab.store / "my-subject"


def test_a_drive_that_is_not_there_is_a_sentence_and_no_local_session_is_made(colab: Colab) -> None:
    colab.mounted = True
    used("rex", 3, colab.store)
    form = show_form(SessionConfig)
    assert form.config().session_name == "rex"
    colab.mounted, colab.error = False, DriveError("Google Drive was not mounted: refused.", "Run the cell again.")
    with pytest.raises(DriveError, match="was not mounted"):
        open_session(form.config())
    assert not colab.local.exists()
    form.update(google_drive=False)
    with pytest.raises(SessionNotFound, match="The session rex is in") as caught:
        open_session(form.config())
    assert "google drive" in caught.value.hint
    assert not colab.local.exists()


def test_another_account_with_a_drive_of_its_own_gets_no_empty_session_of_that_name(colab: Colab) -> None:
    colab.mounted = True
    used("rex", 3, colab.store)
    form = show_form(SessionConfig)
    colab.drive = colab.drive.parent / "Other"
    with pytest.raises(SessionNotFound, match="The session rex is in"):
        open_session(form.config())
    assert not colab.store.exists()


def test_the_same_name_in_two_stores_opens_the_one_of_the_form_and_says_so(
    colab: Colab, caplog: pytest.LogCaptureFixture
) -> None:
    colab.mounted = True
    used("rex", 3, colab.store)
    local = used("rex", 1, colab.local)
    before = (local / "session.json").read_bytes()
    assert open_session(SessionConfig(session_name="rex")).folder == colab.store / "rex"
    assert f"There is another session rex, in {colab.local}" in caplog.text
    assert (local / "session.json").read_bytes() == before
    assert open_session(SessionConfig(session_name="rex", google_drive=False)).folder == local


def test_a_session_of_this_machine_is_offered_as_such_while_no_drive_is_mounted(colab: Colab) -> None:
    used("rex", 3, colab.local)
    assert words("rex").endswith("on this machine")
    form = show_form(SessionConfig)
    form.update(session_name="rex")
    with pytest.raises(SessionNotFound, match="asks for one in"):
        open_session(form.config())
    form.update(google_drive=False)
    assert open_session(form.config()).folder == colab.local / "rex"


def test_in_colab_reading_sessions_too(colab: Colab) -> None:
    folder = colab.drive / "Fast-TrOCR" / "Sessions" / "letters"
    folder.mkdir(parents=True)
    (folder / "session.json").write_text(json.dumps({"version": 1}))
    form = show_form(ReadingSessionConfig)
    assert form.config().session_name == ""
    assert open_reading(form.config()).folder == folder
