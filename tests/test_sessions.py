"""Sessions: names, a record that survives cuts and clocks, one run at a time, and deletion that was asked for."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import full_disk, read_only
from PIL import Image

from fastsd_helpers import sessions
from fastsd_helpers.errors import DiskFull, DriveReadOnly, SessionBusy, SessionError, SessionExists, SessionNotFound
from fastsd_helpers.processes import LocalProcess, machine_id
from fastsd_helpers.sessions import Session, SessionLock, check_name, clean_name
from fastsd_helpers.sessions import lock as lock_module
from fastsd_helpers.sessions import record as record_module


@pytest.fixture
def root(tmp_path):
    return tmp_path / "Sessions"


@pytest.fixture
def dog(root):
    return Session.create("dog", root=root)


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("dog", "dog"),
        ("my old dog", "my_old_dog"),
        ("  Zoé\t2 ", "Zoé_2"),
        ("狗", "狗"),
        ("cafe\u0301", "café"),
        ("a.b-c_d", "a.b-c_d"),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_good_names_become_folders_with_blanks_turned_into_underscores(name, folder):
    assert check_name(name) == folder


@pytest.mark.parametrize(
    ("name", "problem", "better"),
    [
        ("", "is empty", "my_subject"),
        ("   ", "is empty", "my_subject"),
        ("../dog", "cannot have", "dog"),
        ("a/b", "cannot have", "a_b"),
        ("a\\b", "cannot have", "a_b"),
        ("..", "begins with", "my_subject"),
        (".hidden", "begins with '.'", "hidden"),
        ("-rf", "begins with '-'", "rf"),
        ("dog.", "ends with a dot", "dog"),
        ("CON", "reserved by Windows", "my_CON"),
        ("nul.txt", "reserved by Windows", "my_nul.txt"),
        ("my 🐶", "cannot have", "my"),
        ("❤️", "cannot have", "my_subject"),
        ("a\0b", "cannot have", "a_b"),
        ("what?*", "cannot have", "what"),
        ("x" * 300, "has 300 characters; 80 are allowed", "x" * 80),
        ("狗" * 70, "needs 210 bytes", "狗" * 60),
        ("\u202edog", "cannot have", "dog"),
    ],
)
def test_bad_names_are_refused_with_one_that_would_do(root, name, problem, better):
    with pytest.raises(SessionError, match=problem) as caught:
        Session.create(name, root=root)
    assert repr(better) in caught.value.hint
    assert not root.exists()


def test_a_suggested_name_is_always_allowed():
    chars = 'aZ9éß狗 ._-/\\:*?"<>|\0\n\t🐶❤\ufe0f\u202e~$%'
    chooser = random.Random(1)
    for _ in range(3000):
        text = "".join(chooser.choice(chars) for _ in range(chooser.randint(0, 120)))
        assert check_name(clean_name(text)) == clean_name(text)
    for reserved in ("con", "COM1", "lpt9.tar.gz", "Aux"):
        assert check_name(clean_name(reserved))


# ---------------------------------------------------------------------------------------- create and open


def test_a_new_session_has_its_folders_and_a_record(root, dog):
    for folder in (
        dog.instance_images,
        dog.captions,
        dog.held_out_images,
        dog.class_images,
        dog.checkpoints,
        dog.samples,
        dog.logs,
        dog.exports,
    ):
        assert folder.is_dir()
        assert folder.parent == root / "dog"
    on_disk = json.loads((root / "dog" / "session.json").read_bytes())
    assert on_disk["schema"] == 1
    assert on_disk["progress"] == {"stage": None, "step": 0, "steps": 0}
    assert set(on_disk) >= {
        "name",
        "created",
        "base_model",
        "settings",
        "prompts",
        "seed",
        "dataset",
        "checkpoints",
        "versions",
    }


def test_what_was_saved_is_there_when_it_is_opened_again(root, dog):
    dog.save(seed=7, settings={"unet_steps": 10})
    dog.save(progress={"stage": "unet", "step": 3, "steps": 10})
    again = Session.open("dog", root=root)
    assert (again.record["seed"], again.record["settings"], again.record["progress"]["step"]) == (
        7,
        {"unet_steps": 10},
        3,
    )
    assert again.record == dog.record
    assert again.notices == []


def test_changes_made_in_the_record_itself_are_saved_too(root, dog):
    dog.record["prompts"]["instance_prompt"] = "photo of sks dog"
    dog.save()
    assert Session.open("dog", root=root).record["prompts"] == {"instance_prompt": "photo of sks dog"}


def test_two_who_have_it_open_do_not_undo_each_other(root, dog):
    notebook, training = Session.open("dog", root=root), Session.open("dog", root=root)
    training.save(progress={"stage": "unet", "step": 5, "steps": 10})
    notebook.save(settings={"seed": 1})
    training.save(seed=3)
    final = Session.open("dog", root=root).record
    assert (final["progress"]["step"], final["settings"], final["seed"]) == (5, {"seed": 1}, 3)


def test_an_existing_session_is_not_created_twice(root, dog):
    for name in ("dog", " dog "):
        with pytest.raises(SessionExists, match="already a session named 'dog'"):
            Session.create(name, root=root)


def test_a_creation_that_was_cut_before_its_record_can_be_repeated(root):
    (root / "cat" / "captions").mkdir(parents=True)
    assert Session.create("cat", root=root).record["name"] == "cat"


def test_a_missing_session_names_those_that_are_there(root, dog):
    with pytest.raises(SessionNotFound, match="No session named 'dgo'") as caught:
        Session.open("dgo", root=root)
    assert "dog" in caught.value.hint
    with pytest.raises(SessionNotFound) as caught:
        Session.open("dog", root=root / "nowhere")
    assert "none here yet" in caught.value.hint


@pytest.mark.parametrize("name", ["../Sessions/dog", "dog/../dog", "/", ".", "", "dog/captions", ".record"])
def test_opening_cannot_leave_the_sessions_folder(root, dog, name):
    with pytest.raises(SessionNotFound):
        Session.open(name, root=root)
    with pytest.raises(SessionNotFound):
        sessions.delete_session(name, root=root)
    assert dog.folder.is_dir()


def test_a_folder_of_the_old_notebook_opens_under_its_odd_name(root):
    (root / "My dog (2)!").mkdir(parents=True)
    assert Session.open("My dog (2)!", root=root).folder == root / "My dog (2)!"


def test_fixed_keys_and_what_json_cannot_hold_are_refused(root, dog):
    with pytest.raises(SessionError, match="name of a session cannot be changed"):
        dog.save(name="cat")
    for value in (Path("x"), float("nan"), {1, 2}):
        with pytest.raises(SessionError, match="JSON cannot"):
            dog.save(settings={"value": value})
    assert Session.open("dog", root=root).record["settings"] == {}


WRITER = (
    "import sys; from fastsd_helpers.sessions import Session\n"
    "session = Session.open('dog', root=sys.argv[1])\n"
    "for count in range(6): session.save(**{f'{sys.argv[2]}{count}': count})"
)


def test_two_processes_that_save_at_the_same_time_lose_nothing(root, dog):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(root), name]) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    record = Session.open("dog", root=root).record
    assert {key: record.get(key) for key in [f"{name}{n}" for name in "ab" for n in range(6)]} == {
        f"{name}{n}": n for name in "ab" for n in range(6)
    }


# ------------------------------------------------------------------------------------------------ damage


SPOIL = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(b"\0" * 500),
    "another value": lambda path: path.write_text(path.read_text().replace('"seed": 7', '"seed": 8')),
    "no object": lambda path: path.write_text("[1, 2]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "binary": lambda path: path.write_bytes(os.urandom(300)),
    "NaN": lambda path: path.write_text(path.read_text().replace('"seed": 7', '"seed": NaN')),
    "no schema": lambda path: path.write_text('{"name": "dog"}'),
}


@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_record_is_repaired_from_its_twin_and_kept_aside(root, dog, how, caplog):
    dog.save(seed=7)
    path = root / "dog" / "session.json"
    SPOIL[how](path)
    damaged = path.read_bytes() if path.exists() else None
    opened = Session.open("dog", root=root)
    assert opened.record["seed"] == 7
    (notice,) = opened.notices
    assert "it was repaired from the copy of save 2" in notice
    assert notice in caplog.text
    aside = list((root / "dog").glob("session.damaged-*.json"))
    assert [file.read_bytes() for file in aside] == (
        [damaged] if (damaged and damaged.strip(b"\0")) or how == "zeros" else ([b""] if how == "empty" else [])
    )
    again = Session.open("dog", root=root)
    assert (again.notices, again.record["seed"]) == ([], 7)


def test_every_cut_of_the_record_is_noticed(root, dog):
    dog.save(seed=7, settings={"note": "ä" * 20})
    path = root / "dog" / "session.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert record_module.read_record(root / "dog").damaged, length
        assert record_module.read_record(root / "dog").record["seed"] == 7


def test_every_flipped_bit_of_the_record_is_noticed_or_harmless(root, dog):
    dog.save(seed=7, settings={"text": "abc"})
    path = root / "dog" / "session.json"
    whole = path.read_bytes()
    expected = record_module.read_record(root / "dog").record
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 7)
        path.write_bytes(flipped)
        if b'"schema": 1' in flipped:  # a flipped schema reads as a newer version, which is refused
            assert record_module.read_record(root / "dog").record == expected


def test_a_mount_that_delivered_an_older_record_is_brought_up_to_date_by_the_newest_twin(root, dog):
    path = root / "dog" / "session.json"
    older = path.read_bytes()
    dog.save(seed=7)
    path.write_bytes(older)
    opened = Session.open("dog", root=root)
    assert (opened.record["seed"], opened.notices) == (7, [])


def test_without_any_readable_copy_the_folder_itself_is_read(root, dog):
    Image.new("RGB", (8, 8), "red").save(dog.instance_images / "one.png")
    Image.new("RGB", (8, 8), "blue").save(dog.held_out_images / "two.PNG")
    whole = (dog.instance_images / "one.png").read_bytes()
    (dog.instance_images / "cut.png").write_bytes(whole[:-5])
    (dog.instance_images / "empty.png").write_bytes(b"")
    for step in (10, 20):
        folder = dog.checkpoints / f"00000{step // 10}-unet-0000{step}-0123abcd"
        folder.mkdir()
        said = {"settings": {"unet_steps": 30}, "seed": 5, "steps": 30}
        (folder / "manifest.json").write_text(json.dumps({"seq": step, "stage": "unet", "step": step, "record": said}))
    for path in [root / "dog" / "session.json", *(root / "dog" / ".record").iterdir()]:
        path.write_bytes(b"{")
    opened = Session.open("dog", root=root)
    assert opened.record["dataset"]["images"] == [
        {"file": "instance_images/one.png", "sha256": hashlib.sha256(whole).hexdigest(), "held_out": False},
        {
            "file": "held_out_images/two.PNG",
            "sha256": hashlib.sha256((dog.held_out_images / "two.PNG").read_bytes()).hexdigest(),
            "held_out": True,
        },
    ]
    assert opened.record["progress"] == {"stage": "unet", "step": 20, "steps": 30}
    assert opened.record["settings"] == {"unet_steps": 30}
    assert [row["step"] for row in opened.record["checkpoints"]] == [10, 20]
    assert "rebuilt from 2 images and 2 checkpoints" in opened.notices[0]
    assert opened.record["sequence"] > 1  # numbers go on from what the twins' names say
    assert Session.open("dog", root=root).notices == []


def test_old_copies_go_once_three_newer_ones_must_have_been_delivered(root, dog):
    twins = root / "dog" / ".record"
    for seed in range(6):
        dog.save(seed=seed)
    assert len(list(twins.iterdir())) == 7  # a mount may have delivered none of the last minutes' copies
    for path in twins.iterdir():
        os.utime(path, (1_000, 1_000))
    dog.save(seed=6)
    kept = sorted(json.loads(path.read_bytes())["sequence"] for path in twins.iterdir())
    assert kept == [5, 6, 7, 8]  # three old ones, and the one just written


def test_a_record_of_schema_0_is_migrated(root):
    folder = root / "rex"
    folder.mkdir(parents=True)
    old = {
        "version": 0,
        "session": "rex",
        "model": "sd15",
        "prompt": "photo of rex",
        "settings": {"unet_lr": 2e-6},
        "seed": 4,
        "stage": "unet",
        "step": 12,
        "steps": 20,
    }
    (folder / "session.json").write_text(json.dumps(old))
    opened = Session.open("rex", root=root)
    assert opened.record["schema"] == 1
    assert opened.record["base_model"] == {"ref": "sd15", "sha256": None}
    assert opened.record["progress"] == {"stage": "unet", "step": 12, "steps": 20}
    assert opened.record["prompts"] == {"instance_prompt": "photo of rex"}
    assert (opened.record["seed"], opened.record["settings"], opened.notices) == (4, {"unet_lr": 2e-6}, [])
    opened.save(seed=5)
    assert json.loads((folder / "session.json").read_bytes())["schema"] == 1


def test_a_record_of_a_newer_version_is_refused_and_left_alone(root, dog):
    path = root / "dog" / "session.json"
    newer = json.dumps({"schema": 7, "everything": "else"}).encode()
    path.write_bytes(newer)
    with pytest.raises(SessionError, match="schema 7; this one knows 1") as caught:
        Session.open("dog", root=root)
    assert "Update fastsd_helpers" in caught.value.hint
    with pytest.raises(SessionError, match="newer"):
        dog.save(seed=1)
    assert path.read_bytes() == newer
    assert sessions.list_sessions(root)[0].problem.count("newer fastsd_helpers")


def test_a_clock_that_jumps_back_changes_nothing(root, dog, monkeypatch):
    dog.save(seed=1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    os.utime(root / "dog" / "session.json", (0, 0))
    dog.save(seed=2)
    for twin in (root / "dog" / ".record").iterdir():
        os.utime(twin, (random.Random(twin.name).randrange(10**9),) * 2)
    (root / "dog" / "session.json").unlink()
    assert Session.open("dog", root=root).record["seed"] == 2


@pytest.mark.parametrize(
    ("trouble", "error"), [(full_disk, DiskFull), (read_only, DriveReadOnly)], ids=["full", "read-only"]
)
def test_a_save_that_fails_leaves_the_old_record_and_can_be_handed_back_as_a_sentence(root, dog, trouble, error):
    dog.save(seed=1)
    with trouble(root):
        with pytest.raises(error):
            dog.save(seed=2)
        assert "session.json was not written" in dog.save_if_possible(seed=3)
    assert Session.open("dog", root=root).record["seed"] == 1
    assert dog.save_if_possible() is None
    assert Session.open("dog", root=root).record["seed"] == 3


def test_a_damaged_record_on_a_read_only_drive_can_still_be_read(root, dog):
    dog.save(seed=7)
    os.truncate(root / "dog" / "session.json", 50)
    with read_only(root):
        opened = Session.open("dog", root=root)
    assert opened.record["seed"] == 7
    assert "was not written" in opened.notices[-1]


SAVER = "import sys; from fastsd_helpers.sessions import Session; Session.open('dog', root=sys.argv[1]).save(seed=2)"


@pytest.mark.parametrize(("point", "seed"), [("session.write", 2), ("session.after_rename", 2)])
def test_kill_9_inside_a_save_leaves_a_readable_record(root, dog, point, seed):
    dog.save(seed=1)
    environment = {**os.environ, "FASTSD_FAULT": f"{point}:1"}
    died = subprocess.run([sys.executable, "-c", SAVER, str(root)], env=environment, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    opened = Session.open("dog", root=root)
    assert opened.record["seed"] == seed  # the twin was written first
    assert opened.notices == []
    opened.save(seed=3)
    assert Session.open("dog", root=root).record["seed"] == 3


# -------------------------------------------------------------------------------------------------- lock


def another_machine(dog: Session, *, age_s: float, mtime_age_s: float | None = None, **changes) -> Path:
    """Leave a lock as a run elsewhere would have."""
    path = dog.folder / ".lock"
    holder = {
        "token": "theirs",
        "machine": "b00t/pid:[1]",
        "pid": 17,
        "start": "5",
        "host": "colab",
        "heartbeat": 9,
        "time": time.time() - age_s,
    }
    path.write_text(json.dumps(holder | changes))
    changed = time.time() - (age_s if mtime_age_s is None else mtime_age_s)
    os.utime(path, (changed, changed))
    return path


def test_a_second_run_is_refused_and_the_lock_is_given_back(dog, root):
    with dog.lock() as lock:
        assert not lock.lost
        with pytest.raises(SessionBusy, match=f"in use by process {os.getpid()} on this machine") as caught:
            Session.open("dog", root=root).lock().acquire()
        assert "--take-over" in caught.value.hint
    with dog.lock():
        pass
    assert not (dog.folder / ".lock").exists()


def test_the_lock_is_given_back_when_the_run_fails(dog):
    with pytest.raises(RuntimeError), dog.lock():
        raise RuntimeError("out of memory")
    assert not (dog.folder / ".lock").exists()


HOLDER = (
    "import sys, time; from fastsd_helpers.sessions import Session\n"
    "with Session.open('dog', root=sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
)


def test_a_killed_run_on_this_machine_is_replaced_at_once(dog, root):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SessionBusy, match=f"process {holder.pid} on this machine"):
            dog.lock().acquire()
        holder.kill()
        holder.wait(timeout=30)
        started = time.monotonic()
        with dog.lock():
            assert time.monotonic() - started < 5


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_holder(dog):
    another_machine(dog, age_s=0, machine=machine_id(), pid=os.getpid(), start="1")
    with dog.lock():
        pass
    another_machine(dog, age_s=10**6, machine=machine_id(), pid=os.getpid(), start=LocalProcess.me().start)
    with pytest.raises(SessionBusy):  # alive, whatever the clock says about its heartbeat
        dog.lock().acquire()


def test_a_zombie_does_not_hold_a_session(dog):
    child = os.fork()
    if child == 0:
        os._exit(0)
    start = None
    for _ in range(200):
        with open(f"/proc/{child}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        start = fields[19]
        if fields[0] == "Z":
            break
        time.sleep(0.01)
    another_machine(dog, age_s=0, machine=machine_id(), pid=child, start=start)
    with dog.lock() as held:
        assert not held.lost
        assert sessions.local_holder(dog.folder) == LocalProcess.me()
    os.waitpid(child, 0)


def test_who_holds_a_session_on_this_machine_is_found_while_it_lives(root, dog):
    assert sessions.local_holder(dog.folder) is None
    with dog.lock():
        assert sessions.local_holder(dog.folder) == LocalProcess.of(os.getpid())
    assert sessions.local_holder(dog.folder) is None
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            found = sessions.local_holder(dog.folder)
            assert found.pid == other.pid
            assert found == LocalProcess.of(other.pid)
            assert found.is_alive()
        finally:
            other.kill()
    assert (dog.folder / ".lock").exists(), "it had no time to give it back"
    assert not found.is_alive()
    assert sessions.local_holder(dog.folder) is None


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another"},
        {"start": "1"},  # the number was given out again
        {"pid": 2**22 - 1},
        {"pid": "many"},
        {"pid": None},
        {"token": "changed, so that the sum is wrong", "sum": 1},
        None,
    ],
    ids=["another machine", "number in use again", "dead", "no number", "no process", "changed", "cut"],
)
def test_whoever_is_not_a_living_process_of_this_machine_holds_nothing_here(dog, change):
    with dog.lock():
        holder = json.loads((dog.folder / ".lock").read_bytes())
        assert sessions.local_holder(dog.folder) is not None
    del holder["sum"]
    (dog.folder / ".lock").write_text(json.dumps(holder))
    assert sessions.local_holder(dog.folder) is not None, "as locks of an earlier version are, without a sum"
    text = json.dumps(holder)[:-9] if change is None else json.dumps({**holder, **change})
    (dog.folder / ".lock").write_text(text)
    assert sessions.local_holder(dog.folder) is None


def test_another_machine_holds_it_until_its_heartbeat_is_two_minutes_old(dog):
    another_machine(dog, age_s=100)
    with pytest.raises(SessionBusy, match="process 17 on machine colab"):
        dog.lock().acquire()
    another_machine(dog, age_s=125)
    with dog.lock():
        assert json.loads((dog.folder / ".lock").read_bytes())["pid"] == os.getpid()


def test_take_over_replaces_a_live_holder(dog):
    another_machine(dog, age_s=1)
    with dog.lock(take_over=True) as lock:
        assert json.loads((dog.folder / ".lock").read_bytes())["replaces"] == "theirs"
        assert not lock.lost


@pytest.mark.parametrize(
    ("age_s", "mtime_age_s"), [(-3600, 0), (3600, 0), (-3600, -3600)], ids=["ahead", "contradiction", "both ahead"]
)
def test_where_clocks_contradict_each_other_the_counter_is_watched(dog, age_s, mtime_age_s):
    another_machine(dog, age_s=age_s, mtime_age_s=mtime_age_s)
    with SessionLock(dog.folder, watch_s=0.3):
        pass
    another_machine(dog, age_s=age_s, mtime_age_s=mtime_age_s)
    beating = threading.Timer(0.1, lambda: another_machine(dog, age_s=age_s, mtime_age_s=mtime_age_s, heartbeat=10))
    beating.start()
    with pytest.raises(SessionBusy):
        SessionLock(dog.folder, watch_s=5).acquire()
    beating.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"time": "yesterday"}'])
def test_an_unreadable_lock_is_watched_and_then_replaced(dog, content):
    (dog.folder / ".lock").write_bytes(content)
    with SessionLock(dog.folder, watch_s=0.2):
        assert json.loads((dog.folder / ".lock").read_bytes())["pid"] == os.getpid()


def test_a_lock_with_a_changed_bit_is_not_believed(dog):
    path = dog.folder / ".lock"
    with dog.lock():
        whole = path.read_bytes()
    data = bytearray(whole)
    data[whole.index(b'"machine": "') + 14] ^= 1  # now it names another machine, and a heartbeat of just now
    path.write_bytes(data)
    with SessionLock(dog.folder, watch_s=0.2):
        pass
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        read = lock_module._parse(bytes(data))
        assert {name: read.get(name) for name in ("machine", "pid", "start", "time")} in (
            {name: json.loads(whole)[name] for name in ("machine", "pid", "start", "time")},
            dict.fromkeys(("machine", "pid", "start", "time")),
        )


def test_a_run_notices_that_it_was_taken_over_and_leaves_the_lock_to_the_other(dog, caplog):
    with SessionLock(dog.folder, beat_s=0.05) as first:
        with SessionLock(dog.folder, beat_s=0.05, take_over=True) as second:
            wait_for(lambda: first.lost)
            time.sleep(0.2)
            assert not second.lost
            first.release()
            assert (dog.folder / ".lock").exists()
        assert "took over session 'dog'" in caplog.text


def test_the_heartbeat_counts_up_and_repairs_a_lock_that_vanished(dog):
    path = dog.folder / ".lock"
    with SessionLock(dog.folder, beat_s=0.05) as lock:
        wait_for(lambda: json.loads(path.read_bytes())["heartbeat"] >= 2)
        path.unlink()
        wait_for(path.exists)
        path.write_bytes(b"")
        wait_for(lambda: path.read_bytes() != b"")
        assert not lock.lost


def test_a_heartbeat_that_cannot_be_written_is_a_warning_not_the_end(dog, caplog):
    with SessionLock(dog.folder, beat_s=0.05) as lock:
        with read_only(dog.folder, code=errno.EIO):
            wait_for(lambda: "could not be renewed" in caplog.text)
        wait_for(lambda: json.loads((dog.folder / ".lock").read_bytes())["heartbeat"] > 0)
        assert not lock.lost


def test_a_drive_without_hard_links_locks_as_well(dog, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with dog.lock(), pytest.raises(SessionBusy):
        dog.lock().acquire()
    assert sorted(path.name for path in dog.folder.glob(".lock*")) == [".lock.guard"]


RACER = """
import os, sys, time
from pathlib import Path
from fastsd_helpers.errors import SessionBusy
from fastsd_helpers.sessions import Session
session = Session.open("dog", root=sys.argv[1])
print("ready", flush=True)
while not Path(sys.argv[2]).exists(): pass
try:
    with session.lock():
        print("won", flush=True)
        sys.stdin.readline()
except SessionBusy:
    print("busy", flush=True)
"""


@pytest.mark.parametrize("left_over", [False, True], ids=["no lock", "a dead run's lock"])
def test_of_eight_processes_at_the_same_moment_one_wins(dog, root, tmp_path, left_over):
    if left_over:
        another_machine(dog, age_s=0, machine=machine_id(), pid=2**22 - 1)
    command = [sys.executable, "-c", RACER, str(root), str(tmp_path / "go")]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        said = [racer.stdout.readline().strip() for racer in racers]
        assert sorted(said) == ["busy"] * 7 + ["won"]
    finally:
        for racer in racers:
            racer.communicate("\n", timeout=30)


# --------------------------------------------------------------------------------------- list and delete


def write_checkpoint(session: Session, seq: int, files: dict[str, int], *, shared: tuple[str, ...] = ()) -> str:
    name = f"{seq:06d}-unet-{seq * 10:06d}-0123abcd"
    folder = session.checkpoints / name
    folder.mkdir()
    for file, size in files.items():
        (folder / file).write_bytes(b"x" * size)
    paths = [f"{name}/{file}" for file in files] + list(shared)
    (folder / "manifest.json").write_text(json.dumps({"files": [{"path": path} for path in paths]}))
    return name


def test_sessions_are_listed_with_sizes_and_a_damaged_one_with_its_problem(root, dog):
    assert sessions.list_sessions(root / "none") == []
    Session.create("cat", root=root)
    os.truncate(root / "cat" / "session.json", 40)
    (dog.instance_images / "a.png").write_bytes(b"x" * 5000)
    write_checkpoint(dog, 1, {"unet.safetensors": 7000})
    dog.save(progress={"stage": "unet", "step": 3, "steps": 9})
    (root / "notes.txt").write_text("not a session")
    cat_line, dog_line = sessions.list_sessions(root)
    assert (cat_line.name, dog_line.name) == ("cat", "dog")
    assert "truncated" in cat_line.problem
    assert dog_line.problem is None
    assert (dog_line.images, dog_line.checkpoints, dog_line.stage, dog_line.step, dog_line.steps) == (
        1,
        1,
        "unet",
        3,
        9,
    )
    assert 12_000 < dog_line.bytes < 20_000
    assert os.truncate(root / "cat" / "session.json", 40) is None  # listing repaired nothing
    assert not list((root / "cat").glob("session.damaged*"))


def test_a_session_is_deleted_with_everything_in_it(root, dog):
    (dog.instance_images / "a.png").write_bytes(b"x" * 5000)
    Session.create("cat", root=root)
    assert sessions.delete_session("dog", root=root) > 5000
    assert os.listdir(root) == ["cat"]


def test_a_session_in_use_is_not_deleted(root, dog):
    with dog.lock(), pytest.raises(SessionBusy):
        sessions.delete_session("dog", root=root)
    assert (root / "dog" / "session.json").exists()


def test_a_deletion_that_was_cut_is_finished_by_the_next_one_and_never_listed(root, dog):
    (root / ".deleted-old-1234").mkdir()
    assert [line.name for line in sessions.list_sessions(root)] == ["dog"]
    sessions.delete_session("dog", root=root)
    assert os.listdir(root) == []


def test_deleting_a_shortcut_leaves_the_folder_it_points_to(root, dog, tmp_path):
    dog.folder.rename(tmp_path / "theirs")
    (root / "dog").symlink_to(tmp_path / "theirs")
    assert Session.open("dog", root=root).record["name"] == "dog"
    assert sessions.delete_session("dog", root=root) == 0
    assert (tmp_path / "theirs" / "session.json").exists()
    assert os.listdir(root) == []


def test_a_single_checkpoint_is_deleted_but_not_the_files_others_share(root, dog):
    first = write_checkpoint(dog, 1, {"text_encoder.safetensors": 100, "unet.safetensors": 1000})
    second = write_checkpoint(dog, 2, {"unet.safetensors": 1000}, shared=(f"{first}/text_encoder.safetensors",))
    dog.save(checkpoints=[{"name": first}, {"name": second}])
    freed = sessions.delete_checkpoint(dog, first)
    assert 1000 < freed < 2000
    assert os.listdir(dog.checkpoints / first) == ["text_encoder.safetensors"]
    assert Session.open("dog", root=root).record["checkpoints"] == [{"name": second}]
    sessions.delete_checkpoint(dog, second)
    assert sorted(os.listdir(dog.checkpoints)) == [first]


@pytest.mark.parametrize("name", ["000009-unet-000090-0123abcd", "../exports", "", "."])
def test_a_checkpoint_that_is_not_there_is_not_deleted(dog, name):
    there = write_checkpoint(dog, 1, {"unet.safetensors": 10})
    with pytest.raises(SessionError, match="has no checkpoint") as caught:
        sessions.delete_checkpoint(dog, name)
    assert there in caught.value.hint
    assert dog.exports.is_dir()


def wait_for(condition, *, timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (FileNotFoundError, ValueError):
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------- at the bounds, again


def test_only_what_is_a_session_and_its_files_is_counted(root, dog):
    (root / ".import-x").mkdir()
    (root / "file").write_text("x")
    for name in ("instance_images/a.png", "instance_images/.hidden", "exports/m.safetensors", "exports/n.ckpt"):
        (dog.folder / name).write_bytes(b"x")
    (dog.instance_images / "folder").mkdir()
    (dog.checkpoints / ".hidden").mkdir()
    (dog.checkpoints / "no manifest").mkdir()
    write_checkpoint(dog, 1, {"a": 1})
    write_checkpoint(dog, 2, {"a": 1})
    (line,) = sessions.list_sessions(root)
    assert (line.name, line.folder, line.images, line.checkpoints, line.exports) == ("dog", dog.folder, 1, 2, 2)
    assert (line.stage, line.step, line.steps) == (None, 0, 0)
    assert line.created == dog.record["created"]
    dog.save(progress=None)
    (line,) = sessions.list_sessions(root)
    assert (line.stage, line.step, line.steps) == (None, 0, 0)


def test_sessions_are_listed_by_name(root):
    for name in ("b", "a", "C"):
        Session.create(name, root=root)
    assert [line.name for line in sessions.list_sessions(root)] == ["C", "a", "b"]


@pytest.mark.parametrize("name", ["my_dog", "my dog", " my dog ", "my  dog"])
def test_a_session_is_found_under_the_name_it_was_given(root, name):
    Session.create("my dog", root=root)
    if name == "my  dog":
        Session.create("my  dog", root=root / "other")
    assert Session.open(name, root=root).name == "my_dog"


def test_the_nearest_names_are_offered_else_the_first_ten(root):
    for number in range(12):
        Session.create(f"dog{number:02}", root=root)
    (root / ".deleted-dog").mkdir()
    with pytest.raises(SessionNotFound) as caught:
        Session.open("dog1", root=root)
    assert caught.value.hint.count("dog") == 5
    with pytest.raises(SessionNotFound) as caught:
        Session.open("zzz", root=root)
    assert "dog09" in caught.value.hint
    assert "dog10" not in caught.value.hint
    assert ".deleted" not in caught.value.hint


def test_a_file_or_a_dangling_link_in_its_place_is_no_session_to_go_on_with(root):
    root.mkdir(parents=True, exist_ok=True)
    (root / "cat").write_text("x")
    (root / "bird").symlink_to(root / "nowhere")
    for name in ("cat", "bird"):
        with pytest.raises(SessionExists):
            Session.create(name, root=root)


def test_keys_saved_meanwhile_are_kept_unless_changed_here_too(root, dog):
    one, two = Session.open("dog", root=root), Session.open("dog", root=root)
    one.save(seed=1, settings={"a": 1}, extra="one")
    two.record["settings"] = {"b": 2}
    two.save(other=3)
    assert (two.record["seed"], two.record["settings"], two.record["extra"], two.record["other"]) == (
        1,
        {"b": 2},
        "one",
        3,
    )
    one.save()
    assert one.record["settings"] == {"b": 2}, "not changed here since it was last saved here"
    assert one.record["sequence"] == two.record["sequence"] + 1
    for key in ("schema", "sequence", "name", "id"):
        with pytest.raises(SessionError, match=f"{key} of a session cannot be changed"):
            one.save(**{key: 5, "seed": 9})
    assert Session.open("dog", root=root).record["seed"] == 1


def test_what_was_handed_in_can_be_changed_afterwards_without_changing_the_record(root, dog):
    settings = {"a": [1]}
    dog.save(settings=settings)
    settings["a"].append(2)
    assert dog.record["settings"] == {"a": [1]}
    dog.record["settings"]["a"].append(3)
    dog.save()
    assert Session.open("dog", root=root).record["settings"] == {"a": [1, 3]}


def test_a_checkpoint_whose_sharers_cannot_be_read_is_not_deleted(dog):
    first, second = (write_checkpoint(dog, number, {"unet.safetensors": 10}) for number in (1, 2))
    for content in (b"{", b"[]", b'{"files": [{}]}', b'{"files": 5}'):
        (dog.checkpoints / second / "manifest.json").write_bytes(content)
        with pytest.raises(SessionError, match="whose manifest is damaged"):
            sessions.delete_checkpoint(dog, first)
    assert (dog.checkpoints / first / "unet.safetensors").exists()
    (dog.checkpoints / second / "manifest.json").unlink()
    manifest = (dog.checkpoints / first / "manifest.json").stat().st_size
    assert sessions.delete_checkpoint(dog, first) == 10 + manifest
    assert not (dog.checkpoints / first).exists()
    with dog.lock(), pytest.raises(SessionBusy):
        sessions.delete_checkpoint(dog, second)


def test_the_manifest_goes_first(dog, monkeypatch):
    name = write_checkpoint(dog, 1, {"a.safetensors": 10, "z.safetensors": 10})
    gone, unlink = [], Path.unlink

    def note(path, *args, **named):
        gone.append(path.name)
        unlink(path, *args, **named)

    monkeypatch.setattr(Path, "unlink", note)
    sessions.delete_checkpoint(dog, name)
    of_it = [item for item in gone if item in ("manifest.json", "a.safetensors", "z.safetensors")]
    assert of_it == ["manifest.json", "a.safetensors", "z.safetensors"]


@pytest.mark.parametrize(
    ("age_s", "mtime_age_s", "verdict"),
    [
        (0, 0, "alive"),
        (119, 10**6, "alive"),
        (121, 121, "dead"),
        (121, 119, "watched"),
        (-1, 10**6, "watched"),
        (10**6, 10**6, "dead"),
    ],
)
def test_another_machines_heartbeat_is_judged_by_both_clocks(dog, age_s, mtime_age_s, verdict, monkeypatch):
    watched = []
    monkeypatch.setattr(lock_module.time, "sleep", watched.append)
    another_machine(dog, age_s=age_s, mtime_age_s=mtime_age_s)
    lock = SessionLock(dog.folder, watch_s=0.05)
    if verdict == "alive":
        with pytest.raises(SessionBusy):
            lock.acquire()
    else:
        with lock:
            pass
    assert bool(watched) is (verdict == "watched")


def test_a_counter_is_watched_often_enough_and_not_without_end(dog, monkeypatch):
    clock, naps = [0.0], []

    def sleep(seconds):
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    monkeypatch.setattr(lock_module.time, "monotonic", lambda: clock[0])
    another_machine(dog, age_s=-3600, mtime_age_s=0)
    with SessionLock(dog.folder):
        pass
    assert sum(naps) == pytest.approx(45, abs=1)
    assert set(naps) == {1.0}


def test_a_lock_that_goes_while_it_is_watched_was_given_back(dog):
    path = another_machine(dog, age_s=-3600, mtime_age_s=0)
    threading.Timer(0.1, path.unlink).start()
    with SessionLock(dog.folder, watch_s=20):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_a_lock_says_who_holds_it_and_what_it_replaced(dog):
    path = dog.folder / ".lock"
    with dog.lock():
        one = json.loads(path.read_bytes())
    assert "/" in one["machine"]
    assert one["pid"] == os.getpid()
    assert one["start"] == Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert (one["heartbeat"], one["replaces"]) == (0, None)
    assert abs(one["time"] - time.time()) < 60
    with dog.lock():
        assert json.loads(path.read_bytes())["token"] != one["token"]
    path.write_bytes(b"{")
    assert lock_module.describe_holder({}) == "another run (its lock cannot be read)"
    assert lock_module.describe_holder({"machine": "x", "pid": 4, "host": "h"}) == "process 4 on machine h"
    assert lock_module.describe_holder({"machine": "x"}) == "process ? on machine ?"
    assert lock_module.describe_holder({"machine": one["machine"], "pid": 4}) == "process 4 on this machine"


def test_a_lock_that_was_given_back_beats_no_more(dog):
    path = dog.folder / ".lock"
    lock = SessionLock(dog.folder, beat_s=0.02)
    with lock:
        wait_for(lambda: json.loads(path.read_bytes())["heartbeat"] >= 1)
    time.sleep(0.1)
    assert not path.exists()
    assert not any(thread.name == "session-lock" for thread in threading.enumerate())
    lock.release()  # twice is harmless
    with lock:
        assert path.exists()
        assert not lock.lost
    assert not path.exists()


def test_a_last_heartbeat_of_the_run_it_replaced_takes_nothing_away(dog):
    path = another_machine(dog, age_s=500)
    theirs = path.read_bytes()
    with SessionLock(dog.folder, beat_s=0.02) as lock:
        path.write_bytes(theirs)  # delivered late
        wait_for(lambda: json.loads(path.read_bytes())["pid"] == os.getpid())
        assert not lock.lost
        with lock_module.guarded(dog.folder):  # not between a heartbeat's reading and its writing
            another_machine(dog, age_s=0, token="a third")
        wait_for(lambda: lock.lost)
    assert json.loads(path.read_bytes())["token"] == "a third"


def test_whoever_cannot_have_the_guard_goes_on_after_five_seconds(dog, monkeypatch):
    import fcntl

    naps, tries, clock = [], [], [0.0]
    monkeypatch.setattr(lock_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        lock_module.time, "sleep", lambda seconds: (naps.append(seconds), clock.__setitem__(0, clock[0] + 0.5))
    )

    def busy(handle, how):
        tries.append(handle)
        assert len(tries) < 50, "it never waits"
        raise BlockingIOError(errno.EAGAIN, "busy")

    monkeypatch.setattr(fcntl, "flock", busy)
    with lock_module.guarded(dog.folder):
        pass
    assert len(naps) == 10

    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, "no locks")

    naps.clear()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock_module.guarded(dog.folder):
        pass
    assert naps == []

    def broken(handle, how):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"), lock_module.guarded(dog.folder):
        pass


def test_the_start_of_a_process_tells_it_from_a_later_one_of_its_number(dog):
    """As the kernel counts it: ticks since the machine's start, the 22nd field of its line in /proc."""
    with dog.lock():
        me = sessions.local_holder(dog.folder)
    started = []
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            started.append(type(me).of(process.pid).start)
            process.stdin.close()
        time.sleep(0.03)
    assert int(me.start) < int(started[0]) < int(started[1])
    up = float(Path("/proc/uptime").read_text().split()[0])
    assert up - 600 < int(started[1]) / os.sysconf("SC_CLK_TCK") < up


@pytest.mark.parametrize(("answer", "held"), [(None, True), (ProcessLookupError, False), (PermissionError, True)])
def test_where_the_system_has_no_proc_a_process_is_asked_for_by_its_number(dog, answer, held, monkeypatch):
    with dog.lock():
        machine = json.loads((dog.folder / ".lock").read_bytes())["machine"]
    is_dir, asked = os.path.isdir, []

    def kill(pid, signal_number):
        asked.append((pid, signal_number))
        if answer:
            raise answer

    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/proc/self" and is_dir(path))
    monkeypatch.setattr(os, "kill", kill)
    another_machine(dog, age_s=0, machine=machine, pid=4711)
    if held:
        with pytest.raises(SessionBusy):
            dog.lock().acquire()
    else:
        with dog.lock():
            pass
    assert asked == [(4711, 0)]
    assert (sessions.local_holder(dog.folder) is not None) is held


def test_a_mount_that_shows_an_older_record_takes_nothing_back(root, dog):
    """Neither the newest session.json nor its twin has arrived where it is read: what is known here is newer."""
    path = dog.folder / "session.json"
    twins = {twin.name: twin.read_bytes() for twin in (dog.folder / ".record").iterdir()}
    older = path.read_bytes()
    dog.save(seed=7, settings={"a": 1})
    path.write_bytes(older)
    for twin in (dog.folder / ".record").iterdir():
        if twin.name not in twins:
            twin.unlink()
    dog.save(extra=2)
    assert (dog.record["seed"], dog.record["settings"], dog.record["extra"]) == (7, {"a": 1}, 2)
    again = Session.open("dog", root=root).record
    assert (again["seed"], again["settings"], again["sequence"]) == (7, {"a": 1}, 3)


def test_heartbeats_that_fail_are_told_once(dog, caplog, monkeypatch):
    failed = []

    def refuse(*words, **named):
        failed.append(words)
        raise OSError(errno.EIO, "Input/output error")

    with SessionLock(dog.folder, beat_s=0.02) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(lock_module, "write_atomic", refuse)
            wait_for(lambda: len(failed) >= 4)
        assert caplog.text.count("could not be renewed") == 1
        assert not lock.lost


@pytest.mark.parametrize(("age_s", "mtime_age_s", "alive"), [(119, 10**6, True), (120, 120, False), (121, 120, False)])
def test_a_heartbeat_is_old_from_two_minutes_on(dog, age_s, mtime_age_s, alive, monkeypatch):
    now = 1_800_000_000
    monkeypatch.setattr(lock_module.time, "time", lambda: float(now))
    path = another_machine(dog, age_s=0, time=now - age_s)
    os.utime(path, (now - mtime_age_s, now - mtime_age_s))
    lock = SessionLock(dog.folder, watch_s=10**6)  # watching would never end
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: pytest.fail("it is watched"))
    if alive:
        with pytest.raises(SessionBusy):
            lock.acquire()
    else:
        with lock:
            pass


def test_of_two_who_come_at_once_to_a_drive_without_hard_links_the_second_is_refused(dog, monkeypatch):
    """Between looking and writing another run has come: on such a mount its file is simply there."""
    write_new = lock_module.write_new

    def refuse(*_words):
        raise OSError(errno.EPERM, "Operation not permitted")

    def late(path, data):
        if path.name == ".lock" and not path.exists():
            another_machine(dog, age_s=1)
        write_new(path, data)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(lock_module, "write_new", late)
    with pytest.raises(SessionBusy, match="process 17 on machine colab"):
        dog.lock().acquire()
    assert json.loads((dog.folder / ".lock").read_bytes())["token"] == "theirs"
