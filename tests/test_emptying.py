"""What is emptied on Google Drive before it is removed, and what never is; the room that is surely there."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from fastsd_helpers import drive
from fastsd_helpers.dreambooth.results import finishing
from fastsd_helpers.dreambooth.resume import CheckpointStore, Snapshot, mount, room, store
from fastsd_helpers.dreambooth.resume.generation import list_generations, read_generation
from fastsd_helpers.dreambooth.resume.room import Room
from fastsd_helpers.drive import has_arrived, keeps_trash, remove_emptied
from fastsd_helpers.errors import DiskFull
from fastsd_helpers.sessions import Session, delete_checkpoint, delete_session

torch = pytest.importorskip("torch")

MB = 10**6


class Account:
    """A Drive's trash and free space as this process sees them: what was emptied counts nothing, the rest stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *, quota: int = 2**40) -> None:
        self.root, self.quota, self.trash, self.emptied = root, quota, 0, []
        self.gives_back = True
        self.moves = True
        truncate, unlink, usage = os.ftruncate, Path.unlink, shutil.disk_usage

        def empty(handle: int, length: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            size = path.stat().st_size
            truncate(handle, length)
            if path.is_relative_to(root):
                self.emptied.append(path.relative_to(root).as_posix())
                self.trash += 0 if self.gives_back else size

        def remove(path: Path, missing_ok: bool = False) -> None:
            if path.is_relative_to(root) and path.is_file() and not path.name.endswith(".part"):
                self.trash += path.lstat().st_size
            unlink(path, missing_ok=missing_ok)

        def look(path: object) -> object:
            return shutil._ntuple_diskusage(quota, 0, self.free) if Path(path).is_relative_to(root) else usage(path)

        monkeypatch.setattr(os, "ftruncate", empty)
        monkeypatch.setattr(Path, "unlink", remove)
        monkeypatch.setattr(shutil, "disk_usage", look)
        monkeypatch.setattr(drive, "mount_kind", lambda folder: "drive" if Path(folder).is_relative_to(root) else "")

    @property
    def used(self) -> int:
        return self.trash + sum(path.lstat().st_size for path in self.root.rglob("*") if path.is_file())

    @property
    def free(self) -> int:
        return self.quota - (self.used if self.moves else 0)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Account:
    return Account(monkeypatch, tmp_path / "drive")


def snapshot(step: int, *, size: int = 25_000, carried: tuple[str, ...] = (), keep: bool = False, spare: int = 0):
    source = torch.Generator().manual_seed(step)
    tensors = {"unet": {"w": torch.randn(size, generator=source)}}
    if not carried and step == 1:
        tensors["text_encoder"] = {"w": torch.randn(size, generator=source)}
    return Snapshot("unet", step, tensors, {"step": step}, carried=carried, keep=keep, spare_bytes=spare)


def open_store(tmp_path: Path, said: list[str] | None = None, **options) -> CheckpointStore:
    report = (said if said is not None else []).append
    options = {"settle_s": 0, "keep_last": 1, **options}
    return CheckpointStore(tmp_path / "drive" / "checkpoints", scratch=tmp_path / "scratch", report=report, **options)


def save(opened: CheckpointStore, *snapshots: Snapshot) -> list[str]:
    names = []
    for each in snapshots:
        names.append(opened.save(each))
        opened.flush()
    return names


# ------------------------------------------------------------------------------------------------- one file


def test_a_file_of_its_own_is_emptied_and_removed(account, tmp_path):
    path = tmp_path / "drive" / "a"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    assert remove_emptied(path) == 1000
    assert (account.emptied, account.trash, path.exists()) == (["a"], 0, False)


@pytest.mark.parametrize("how", ["hard link", "link to a file", "empty", "dangling link"])
def test_what_has_another_name_is_removed_and_never_emptied(account, tmp_path, how):
    folder = tmp_path / "drive"
    folder.mkdir()
    (folder / "photo").write_bytes(bytes(1000))
    path = folder / "a"
    if how == "hard link":
        os.link(folder / "photo", path)
    elif how == "empty":
        path.touch()
    else:
        path.symlink_to(folder / ("photo" if how == "link to a file" else "nowhere"))
    assert remove_emptied(path) == 0
    assert account.emptied == []
    assert not os.path.lexists(path)
    assert (folder / "photo").stat().st_size == 1000


def test_a_file_that_cannot_be_emptied_stays(account, tmp_path, monkeypatch):
    path = tmp_path / "drive" / "a"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))

    def refuse(*_words: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="quota"):
        remove_emptied(path)
    assert path.stat().st_size == 1000


@pytest.mark.parametrize(
    ("kind", "trash"),
    [("drive", True), ("fuse.drive", True), ("fuse.google-drive-ocamlfuse", True), ("fuse.rclone", False),
     ("fuse.gcsfuse", False), ("fuse", False), ("ext4", False), ("fuse.sshfs", False), ("", False)],
)  # fmt: skip
def test_only_google_drives_have_a_trash(monkeypatch, kind, trash):
    monkeypatch.setattr(drive, "mount_kind", lambda _folder: kind)
    assert keeps_trash("/anywhere") is trash
    assert drive.delivers_late("/anywhere") is (kind == "drive" or kind.startswith("fuse"))


@pytest.mark.parametrize(("value", "arrived"), [(b"local-123", False), (b"1AbC", True), (None, None)])
def test_a_mount_that_names_its_files_says_which_have_arrived(monkeypatch, tmp_path, value, arrived):
    def ask(_path: object, name: str) -> bytes:
        assert name == "user.drive.id"
        if value is None:
            raise OSError(errno.ENODATA, "No data available")
        return value

    monkeypatch.setattr(os, "getxattr", ask)
    assert has_arrived(tmp_path) is arrived


# ------------------------------------------------------------------------------------------- generations


def test_on_drive_an_old_checkpoint_leaves_nothing_in_the_trash(account, tmp_path):
    with open_store(tmp_path) as opened:
        first, second = save(opened, snapshot(1), snapshot(2))
        assert list_generations(opened.folder) == [second]
    assert account.emptied == [
        f"checkpoints/{first}/unet.safetensors",
        f"checkpoints/{first}/text_encoder.safetensors",
    ][::1] or sorted(account.emptied) == [
        f"checkpoints/{first}/text_encoder.safetensors",
        f"checkpoints/{first}/unet.safetensors",
    ]
    assert account.trash < 5000, "the manifest"


def test_elsewhere_nothing_is_emptied(account, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "mount_kind", lambda _folder: "fuse.rclone")
    with open_store(tmp_path) as opened:
        save(opened, snapshot(1), snapshot(2))
        assert len(list_generations(opened.folder)) == 1
    assert account.emptied == []


def test_what_a_kept_one_carries_and_what_is_kept_for_good_is_not_touched(account, tmp_path):
    with open_store(tmp_path) as opened:
        first, kept = save(opened, snapshot(1), snapshot(2, carried=("text_encoder",), keep=True))
        later = save(opened, *(snapshot(step, carried=("text_encoder",)) for step in (3, 4, 5)))
        rows = {row["name"]: row["state"] for row in opened.generations(verify=True)}
    assert rows == {kept: "whole", later[-1]: "whole"}
    assert sorted(account.emptied) == sorted(f"checkpoints/{name}/unet.safetensors" for name in (first, *later[:2]))
    assert (tmp_path / "drive" / "checkpoints" / first / "text_encoder.safetensors").stat().st_size > 90_000


def test_another_runs_checkpoints_are_removed_and_not_emptied(account, tmp_path):
    with open_store(tmp_path, timeline="1", keep_last=2) as opened:
        save(opened, snapshot(1), snapshot(2, carried=("text_encoder",)), snapshot(3, carried=("text_encoder",)))
    before = list(account.emptied)
    with open_store(tmp_path, timeline="2") as opened:
        opened.newest()
        new = save(opened, snapshot(10))
        assert list_generations(opened.folder) == new
    assert account.emptied == before
    assert account.trash > 250_000, "they can be brought back from the trash"


@pytest.mark.parametrize("damage", ["cut", "newer", "unreadable"])
def test_what_a_manifest_that_cannot_be_read_may_name_is_not_emptied(account, tmp_path, damage, monkeypatch):
    with open_store(tmp_path, timeline="1", keep_last=2) as opened:
        first, second = save(opened, snapshot(1), snapshot(2, carried=("text_encoder",)))
    folder = tmp_path / "drive" / "checkpoints"
    manifest = folder / second / "manifest.json"
    (folder / first / "manifest.json").unlink()  # as after pruning: its text encoder is carried
    if damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:50])
    elif damage == "newer":
        manifest.write_bytes(manifest.read_bytes().replace(b'"schema": 1', b'"schema": 9'))
    else:
        read = Path.read_bytes

        def fail(path: Path) -> bytes:
            if path == manifest:
                raise OSError(errno.EIO, "Input/output error")
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", fail)
    with open_store(tmp_path, timeline="1") as opened:
        new = opened.save(snapshot(10))
        opened.flush()
        assert account.emptied == []
        assert (folder / first / "text_encoder.safetensors").is_file()
        assert new in list_generations(folder)


def test_a_deletion_that_was_cut_is_finished_and_emptied_the_next_time(account, tmp_path, monkeypatch):
    with open_store(tmp_path) as opened:
        (first,) = save(opened, snapshot(1))

        def die(path: Path) -> int:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

        said: list[str] = []
        opened._report = said.append
        monkeypatch.setattr(mount, "remove_emptied", die)
        (second,) = save(opened, snapshot(2))
        assert any("Old checkpoints could not be removed" in sentence for sentence in said)
        folder = opened.folder
        assert not (folder / first / "manifest.json").exists(), "nothing looks whole"
        assert read_generation(folder, second)
        monkeypatch.undo()
    account = Account(monkeypatch, tmp_path / "drive")
    with open_store(tmp_path) as opened:
        assert opened.newest()[0].name == second
        (third,) = save(opened, snapshot(3))
        assert list_generations(folder) == [third]
    assert f"checkpoints/{first}/unet.safetensors" in account.emptied


def test_a_file_that_somebody_linked_to_in_place_of_a_needed_one_stays(account, tmp_path):
    with open_store(tmp_path, keep_last=1) as opened:
        first, second = save(opened, snapshot(1), snapshot(2, keep=True))
        old = opened.folder / first
        old.mkdir(exist_ok=True)
        (opened.folder / second / "unet.safetensors").rename(old / "unet.safetensors")
        (opened.folder / second / "unet.safetensors").symlink_to(old / "unet.safetensors")
        account.emptied.clear()
        save(opened, snapshot(3), snapshot(4))
        assert (old / "unet.safetensors").stat().st_size > 90_000
        assert second in {row["name"] for row in opened.generations(verify=True) if row["state"] == "whole"}


def test_a_checkpoint_goes_only_once_the_mount_says_that_a_newer_one_arrived(account, tmp_path, monkeypatch):
    arrived = [False]
    monkeypatch.setattr(mount, "has_arrived", lambda _path: arrived[0])
    with open_store(tmp_path) as opened:
        names = save(opened, snapshot(1), snapshot(2), snapshot(3))
        assert sorted(list_generations(opened.folder)) == names
        assert account.emptied == []
        arrived[0] = True
        last = save(opened, snapshot(4))
        assert list_generations(opened.folder) == last


# ------------------------------------------------------------------------------------------- deleted by hand


def make_session(root: Path) -> Session:
    session = Session.create("rex", root=root)
    folder = session.checkpoints / "000001-unet-000001-0123abcd"
    folder.mkdir(parents=True)
    (folder / "unet.safetensors").write_bytes(bytes(MB))
    (folder / "manifest.json").write_text('{"files": []}')
    (session.instance_images / "a.png").write_bytes(bytes(2000))
    (session.exports / "rex.safetensors").write_bytes(bytes(3000))
    return session


def test_a_deleted_sessions_weights_leave_nothing_and_its_photos_and_files_lie_whole_in_the_trash(account, tmp_path):
    make_session(tmp_path / "drive")
    delete_session("rex", root=tmp_path / "drive")
    assert [path.rpartition("/")[2] for path in account.emptied] == ["unet.safetensors"]
    assert not (tmp_path / "drive" / "rex").exists()


def test_a_deleted_sessions_links_lead_to_what_stays_as_it_was(account, tmp_path):
    session = make_session(tmp_path / "drive")
    others = tmp_path / "drive" / "others" / "000001-unet-000001-0123abcd"
    others.mkdir(parents=True)
    (others / "unet.safetensors").write_bytes(bytes(MB))
    shutil.rmtree(session.checkpoints)
    session.checkpoints.symlink_to(others.parent)
    delete_session("rex", root=tmp_path / "drive")
    assert (others / "unet.safetensors").stat().st_size == MB
    assert account.emptied == []


def test_a_deleted_checkpoint_leaves_nothing_in_the_trash(account, tmp_path):
    session = make_session(tmp_path / "drive")
    assert delete_checkpoint(session, "000001-unet-000001-0123abcd") > MB
    assert [path.rpartition("/")[2] for path in account.emptied] == ["unet.safetensors"]


# ------------------------------------------------------------------------------------------------ room


class Report:
    """A Drive's report of its free space, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.now = free, 0.0
        monkeypatch.setattr(room, "free_bytes", lambda _folder: self.free)

    def open(self, **options) -> Room:
        return Room(Path("x"), lag_s=10, clock=lambda: self.now, **options)


def write(book: Room, count: int) -> None:
    with book.writing(count):
        pass


def test_what_was_written_is_taken_off_before_the_report_shows_it_and_not_twice(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    write(book, 30)
    assert book.left == 70
    report.free = 80
    book.look()
    assert book.left == 70, "part of it shows"
    report.free = 70
    book.look()
    assert book.left == 70


def test_what_failed_to_be_written_takes_no_room(monkeypatch):
    book = Report(monkeypatch, 100).open()
    with pytest.raises(OSError, match="x"), book.writing(30):
        raise OSError("x")
    assert book.left == 100


def test_only_room_that_was_seen_to_come_back_counts(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    write(book, 30)
    report.free = 70
    book.look()
    book.emptied(30)
    assert (book.left, book.gives_back) == (70, None)
    report.free = 100
    book.look()
    assert (book.left, book.gives_back) == (100, True)


def test_a_report_that_never_moves_says_nothing_and_everything_ever_written_counts(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    for _ in range(6):
        write(book, 10)
        book.saved()
        book.emptied(10)
        report.now += 20
        book.look()
    assert (book.left, book.gives_back) == (40, False)


def test_what_is_written_and_comes_back_between_two_reports_is_found_out_later(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    write(book, 30)
    book.emptied(20)
    report.now, report.free = 5, 90
    book.look()
    assert book.left == 70
    report.now = 16
    book.look()
    assert (book.left, book.gives_back) == (90, True)


def test_what_the_mount_has_not_uploaded_yet_is_in_no_report_however_old_that_is(monkeypatch):
    arrived = {Path("slow"): False, Path("silent"): None}
    monkeypatch.setattr(room, "has_arrived", arrived.get)
    report = Report(monkeypatch, 100)
    book = report.open()
    with book.writing(30, Path("slow")):
        pass
    book.emptied(20)
    report.now, report.free = 8, 120  # an emptied one came back meanwhile
    book.look()
    for report.now in (20, 100, 1000):
        book.look()
        assert book.left == 90
    arrived[Path("slow")] = True
    report.now = 1005
    book.look()
    assert book.left == 90, "the report may still be older than that"
    report.now, report.free = 1020, 90
    book.look()
    assert book.left == 90
    # A mount that does not tell: as before, by the time that a report may take.
    with book.writing(5, Path("silent")):
        pass
    report.now, report.free = 1030, 95
    book.look()
    report.now = 1050
    book.look()
    assert book.left == 95


def test_a_finished_file_without_sure_room_is_refused_with_the_way_on(account, tmp_path):
    account.quota = 300_000
    with open_store(tmp_path) as opened:
        save(opened, snapshot(2))
        finishing.require_room(opened, 150_000)
        with pytest.raises(DiskFull, match=r"are surely free on Drive; the finished file takes 250\.0 kB\.") as caught:
            finishing.require_room(opened, 250_000)
    assert "Empty Drive's trash" in caught.value.hint
    assert "train again with the same session: the steps are done, so only the file is written" in caught.value.hint


def test_elsewhere_the_disk_itself_says_whether_there_is_room(account, tmp_path, monkeypatch):
    account.quota = 300_000
    with open_store(tmp_path) as opened, pytest.raises(DiskFull):
        finishing.require_room(opened, 10**15)
    monkeypatch.setattr(drive, "mount_kind", lambda _folder: "ext4")
    with open_store(tmp_path) as opened:
        finishing.require_room(opened, 10**15)


def test_no_verdict_comes_before_three_saves_and_the_time_a_report_may_take(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    book.emptied(20)
    report.now = 100
    book.look()
    assert book.gives_back is None
    report.now = 1000
    for _ in range(2):
        book.saved()
        assert book.gives_back is None
    book.saved()
    assert book.gives_back is False


def test_a_mount_that_says_nothing_is_free_while_it_reconnects_changes_nothing(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    write(book, 30)
    for report.free in (0, 100):
        book.look()
        assert book.left == 70


def test_a_drive_that_is_used_from_elsewhere_has_less(monkeypatch):
    report = Report(monkeypatch, 100)
    book = report.open()
    report.free = 40
    book.look()
    assert book.left == 40
    with pytest.raises(DiskFull, match=r"40 B are surely free on Drive; it takes 30 B, and 20 B must stay free"):
        book.check(30, 20)
    book.check(30, 10)


# ------------------------------------------------------------------------------------- saving with little room


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(store, "_LOOK_S", 0.02)
    monkeypatch.setattr(room, "_LAG_S", 0.2)


@pytest.mark.parametrize("gives_back", [True, False])
@pytest.mark.parametrize("moves", [True, False])
def test_a_drive_is_never_asked_for_more_than_it_has(tmp_path, monkeypatch, quick, gives_back, moves):
    account = Account(monkeypatch, tmp_path / "drive", quota=350_000)
    account.gives_back, account.moves = gives_back, moves
    most, replace = [0], os.replace

    def note(*words: object) -> None:
        replace(*words)
        most[0] = max(most[0], account.used)

    monkeypatch.setattr(os, "replace", note)
    said: list[str] = []
    with open_store(tmp_path, said, retry_s=600) as opened:
        for step in range(2, 14):
            opened.save(snapshot(step, spare=1000))
            opened.flush()
            assert most[0] <= account.quota
        problems = opened.flush_for(1000)
        assert bool(problems) is not (gives_back and moves)
        known = opened.gives_back
    assert known is (True if gives_back and moves else known)
    if not (gives_back and moves):
        assert any("surely free on Drive" in sentence for sentence in said)
        assert any("Empty Drive's trash" in sentence for sentence in said)
    assert most[0] <= account.quota


def test_a_drive_that_gives_nothing_back_is_said_once_and_known_afterwards(tmp_path, monkeypatch, quick):
    account = Account(monkeypatch, tmp_path / "drive", quota=10 * MB)
    account.gives_back = False
    said: list[str] = []
    with open_store(tmp_path, said) as opened:
        for step in range(2, 12):
            save(opened, snapshot(step))
            if opened.gives_back is False:
                break
            import time

            time.sleep(0.05)
        assert opened.gives_back is False
    assert sum("Emptied checkpoints have not freed their space" in sentence for sentence in said) == 1


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.ENOTCONN, errno.EIO])
@pytest.mark.parametrize("call", ["ftruncate", "fsync", "unlink"])
def test_trouble_while_an_old_one_is_emptied_is_said_and_loses_nothing(account, tmp_path, monkeypatch, code, call):
    said: list[str] = []
    with open_store(tmp_path, said) as opened:
        save(opened, snapshot(1))
        broken = [True]
        real, unlink = getattr(os, call), Path.unlink

        def fail(*words: object, **named: object) -> object:
            path = words[0] if call == "unlink" else Path(os.readlink(f"/proc/self/fd/{words[0]}"))
            inside = Path(path).is_relative_to(opened.folder) and Path(path).suffix == ".safetensors"
            if broken[0] and inside:
                raise OSError(code, os.strerror(code))
            return (unlink if call == "unlink" else real)(*words, **named)

        monkeypatch.setattr(*((Path, "unlink", fail) if call == "unlink" else (os, call, fail)))
        (second,) = save(opened, snapshot(2))
        assert any("could not be removed" in sentence or "Old checkpoints" in sentence for sentence in said)
        whole = [row["name"] for row in opened.generations(verify=True) if row["state"] == "whole"]
        assert whole == [second]
        broken[0] = False
        (third,) = save(opened, snapshot(3))
        assert list_generations(opened.folder) == [third]


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EIO, errno.ENOTCONN])
def test_a_quota_that_is_only_noticed_when_a_file_is_closed_costs_that_copy_alone(account, tmp_path, monkeypatch, code):
    said: list[str] = []
    with open_store(tmp_path, said, retry_s=600) as opened:
        (first,) = save(opened, snapshot(1))
        close, broken = os.close, [True]

        def fail(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            close(handle)
            if broken[0] and path.startswith(str(opened.folder)) and path.endswith(".part"):
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "close", fail)
        second = opened.save(snapshot(2))
        assert len(opened.flush()) == 1
        assert [row["name"] for row in opened.generations(verify=True) if row["state"] == "whole"] == [first]
        broken[0] = False
        assert opened.flush() == []
        assert second in list_generations(opened.folder)
        assert not list(opened.folder.rglob("*.part"))
