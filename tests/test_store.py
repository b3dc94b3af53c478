"""What the store of checkpoints leaves, frees and says, step by step; the rest of it is in test_resume.py."""

import errno
import threading
from pathlib import Path

import pytest
from fakes import full_disk

from fastsd_helpers.dreambooth.resume import CheckpointStore, Snapshot, mount
from fastsd_helpers.errors import CheckpointError

torch = pytest.importorskip("torch")


def snapshot(step: int, *, size: int = 2000, keep: bool = False) -> Snapshot:
    source = torch.Generator().manual_seed(step)
    return Snapshot("unet", step, {"unet": {"w": torch.randn(size, generator=source)}}, {"step": step}, keep=keep)


def open_store(tmp_path: Path, said: list[str] | None = None, **options) -> CheckpointStore:
    report = (said if said is not None else []).append
    return CheckpointStore(tmp_path / "checkpoints", scratch=tmp_path / "scratch", report=report, **options)


def test_what_was_copied_of_a_superseded_checkpoint_makes_room_for_the_next(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    with open_store(tmp_path, retry_s=600) as store:
        tensors = {"a": {"w": torch.randn(2000)}, "b": {"w": torch.randn(2000)}}
        with full_disk(folder, after_bytes=9000):
            first = store.save(Snapshot("unet", 1, tensors, {}))
            assert store.flush()
        assert (folder / first / "a.safetensors").is_file(), "half of it has arrived"
        seen, copy = [], mount.copy_verified

        def look(*words, **named):
            seen.append((folder / first).exists())
            return copy(*words, **named)

        monkeypatch.setattr(mount, "copy_verified", look)
        second = store.save(snapshot(2))
        assert store.flush() == []
        assert seen == [False]
        assert [row["name"] for row in store.generations()] == [second]


def test_a_checkpoint_to_keep_is_not_superseded(tmp_path):
    folder = tmp_path / "checkpoints"
    with open_store(tmp_path, retry_s=600) as store:
        with full_disk(folder):
            kept = store.save(snapshot(1, keep=True))
            store.flush()
        last = store.save(snapshot(2))
        assert store.flush() == []
        assert [row["name"] for row in store.generations(verify=True)] == [kept, last]
        assert [row["keep"] for row in store.generations()] == [True, False]


@pytest.mark.parametrize("last", [0, -1])
def test_at_least_one_is_kept(tmp_path, last):
    with pytest.raises(CheckpointError, match=f"keep_last is {last}"):
        open_store(tmp_path, keep_last=last)
    with open_store(tmp_path) as store, pytest.raises(CheckpointError, match=f"keep_last is {last}"):
        store.keep(last)


def test_how_many_are_kept_can_be_changed_on_the_way(tmp_path):
    with open_store(tmp_path, keep_last=1) as store:
        for step in range(3):
            store.save(snapshot(step))
            store.flush()
        assert [row["step"] for row in store.generations()] == [2]
        store.keep(3)
        for step in range(3, 7):
            store.save(snapshot(step))
            store.flush()
        assert [row["step"] for row in store.generations()] == [4, 5, 6]
        store.keep(1)
        store.save(snapshot(7))
        store.flush()
        assert [row["step"] for row in store.generations()] == [7]


def test_two_are_kept_when_nothing_is_said(tmp_path):
    with open_store(tmp_path) as store:
        for step in range(4):
            store.save(snapshot(step))
            store.flush()
        assert [row["step"] for row in store.generations()] == [2, 3]


def test_each_kind_of_trouble_is_told_once_until_it_is_over(tmp_path):
    said: list[str] = []
    folder = tmp_path / "checkpoints"
    with open_store(tmp_path, said, retry_s=600) as store:
        for _ in range(2):
            with full_disk(folder):
                store.save(snapshot(len(said) + 10))
                store.flush()
                store.flush()
            assert len(said) == 1
            with full_disk(folder, code=errno.EIO):
                store.flush()
                store.flush()
            assert len(said) == 2
            assert store.flush() == []
            assert len(said) == 3
            assert said[-1].endswith("copying works again.")
            said.clear()
        store.save(snapshot(50))
        assert store.flush() == []
        assert said == [], "nothing was wrong"


def test_what_cannot_be_removed_is_told_and_stops_nothing(tmp_path, monkeypatch):
    said: list[str] = []
    with open_store(tmp_path, said, keep_last=1) as store:
        store.save(snapshot(1))
        store.flush()
        unlink = Path.unlink

        def refuse(path, *words, **named):
            if path.is_relative_to(tmp_path / "checkpoints") and not path.name.endswith(".part"):
                raise OSError(errno.EACCES, "Permission denied", str(path))
            unlink(path, *words, **named)

        monkeypatch.setattr(Path, "unlink", refuse)
        for step in (2, 3):
            store.save(snapshot(step))
            assert store.flush() == []
        told = [sentence for sentence in said if "Old checkpoints could not be removed" in sentence]
        assert len(told) >= 1
        assert not any("copying works again" in sentence for sentence in said)
        monkeypatch.undo()
        store.save(snapshot(4))
        store.flush()
        assert [row["step"] for row in store.generations()] == [4]


def test_a_disk_of_this_machine_that_is_full_costs_one_checkpoint_and_is_said(tmp_path, monkeypatch):
    import shutil

    said: list[str] = []
    with open_store(tmp_path, said) as store:
        store.save(snapshot(1))
        store.flush()
        free = [7999]
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**40, 0, free[0]))
        assert store.save(snapshot(2)) is None
        assert "was not saved" in said[-1]
        assert "The training continues" in said[-1]
        assert "was not saved" in store.flush()[-1]
        assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
        free[0] = 8000
        assert store.save(snapshot(3)) is not None
        assert store.flush() == []
        assert [row["step"] for row in store.generations()] == [1, 3]


def test_what_is_on_the_mount_does_not_stay_on_this_machine(tmp_path):
    with open_store(tmp_path) as store:
        store.save(snapshot(1))
        store.flush()
        assert [path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
        assert store.can_carry("unet")
        assert not store.can_carry("vae")
        for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
            file.unlink()
        assert not store.can_carry("unet"), "its file has gone"


def test_numbers_and_names_go_on_and_a_list_can_be_checked(tmp_path):
    with open_store(tmp_path) as store:
        first = store.save(snapshot(1))
    with open_store(tmp_path) as store:
        assert store.newest()[0].name == first
        second = store.save(snapshot(2))
        store.flush()
        assert [row["seq"] for row in store.generations()] == [1, 2]
        file = tmp_path / "checkpoints" / first / "unet.safetensors"
        changed = bytearray(file.read_bytes())
        changed[-1] ^= 1
        file.write_bytes(changed)
        assert [row["whole"] for row in store.generations()] == [True, True]
        rows = store.generations(verify=True)
        assert [row["whole"] for row in rows] == [False, True]
        assert "a different SHA-256" in rows[0]["state"]
        assert (rows[0]["bytes"], rows[0]["sha256s"]) == (0, {})
        assert rows[1]["bytes"] == (tmp_path / "checkpoints" / second / "unet.safetensors").stat().st_size


def test_a_closed_store_is_closed_once(tmp_path):
    said: list[str] = []
    store = open_store(tmp_path, said, retry_s=600)
    with full_disk(tmp_path / "checkpoints"):
        store.save(snapshot(1))
        store.flush()
        count = len(said)
        store.close()
        store.close()
    assert len(said) == count + 1
    assert "was not written" in said[-1]
    assert list((tmp_path / "scratch").rglob("unet.safetensors")), "it stays where a new process finds it"
    with pytest.raises(CheckpointError, match="store is closed"):
        store.save(snapshot(2))


def test_the_one_that_is_being_copied_is_never_given_up_nor_one_to_keep(tmp_path, monkeypatch):
    said: list[str] = []
    go, copy = threading.Event(), mount.copy_verified
    monkeypatch.setattr(mount, "copy_verified", lambda *words, **named: (go.wait(20), copy(*words, **named)))
    with open_store(tmp_path, said, keep_last=9, patience_s=0.05) as store:
        store.save(snapshot(1))
        store.save(snapshot(2, keep=True))
        threading.Timer(0.5, go.set).start()
        store.save(snapshot(3))
        assert store.flush() == []
        assert [row["step"] for row in store.generations(verify=True)] == [1, 2, 3]
        assert len(said) == 1
        assert "The training waits: 2 checkpoints are still being copied" in said[0]


def test_what_is_on_the_mount_already_is_not_copied_from_here_again(tmp_path, monkeypatch):
    """A process was killed after it had delivered its checkpoint and before it had cleared its own disk."""
    import shutil

    with open_store(tmp_path) as store:
        name = store.save(snapshot(1))
    shutil.copytree(tmp_path / "checkpoints" / name, tmp_path / "scratch" / name)
    said: list[str] = []
    copied = []
    monkeypatch.setattr(mount, "copy_verified", lambda *words, **named: copied.append(words))
    with open_store(tmp_path, said) as store:
        assert store.newest()[0].name == name
        assert store.flush() == []
        assert [row["name"] for row in store.generations()] == [name]
    assert (said, copied) == ([], [])
    assert not (tmp_path / "scratch" / name).exists()
