"""Processes: told apart by their start, kept apart by one lock, watched through a log, ended with all they started."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastsd_helpers.processes import (
    Child,
    ChildEnded,
    ChildMute,
    LocalProcess,
    LockHeld,
    LogTail,
    boot_id,
    end_group,
    file_lock,
    machine_id,
)

PYTHON = [sys.executable, "-c"]
SLEEP = [*PYTHON, "import time; time.sleep(600)"]


def soon() -> float:
    return time.monotonic() + 30


# ------------------------------------------------------------------------------------------------- who


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    me = LocalProcess.me()
    assert me == LocalProcess.of(os.getpid())
    assert me.is_alive()
    assert not me.was_replaced()
    later = LocalProcess(me.pid, str(int(me.start) + 1))
    assert not later.is_alive()
    assert later.was_replaced()
    assert LocalProcess.of(1).is_alive()  # another user's, when this is no root
    assert machine_id().startswith(boot_id() + "/")


@pytest.mark.parametrize("pid", [None, "12", -1, 0, 1.5, 2**22 + 7])
def test_what_is_no_process_is_not_alive(pid: object) -> None:
    for start in (None, "1", LocalProcess.me().start):
        assert not LocalProcess(pid, start).is_alive()


def test_a_process_that_ended_is_not_alive_even_before_it_is_waited_for() -> None:
    process = subprocess.Popen(SLEEP)
    known = LocalProcess.of(process.pid)
    assert known.is_alive()
    process.kill()
    ends = soon()
    while known.is_alive() and time.monotonic() < ends:
        time.sleep(0.01)
    assert not known.is_alive()
    assert not known.was_replaced()
    process.wait()
    assert not known.is_alive()


# ------------------------------------------------------------------------------------------------ lock

HOLD = """
import sys, time
from pathlib import Path
from fastsd_helpers.processes import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_held_by_one_and_goes_with_the_process_that_dies(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []
    holder = subprocess.Popen([*PYTHON, HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockHeld), file_lock(path, wait_s=0, waiting=lambda: told.append("at once")):
            pass
        with pytest.raises(LockHeld), file_lock(path, wait_s=0.1, waiting=lambda: told.append("a little")):
            pass
        threading.Timer(0.2, holder.kill).start()
        with file_lock(path, waiting=lambda: told.append("for ever")):
            assert told == ["a little", "for ever"]  # once each, and not where nothing is waited for
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with file_lock(path, wait_s=0):
        pass


def test_a_lock_that_cannot_be_had_says_why_and_a_disk_without_locks_lets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    with pytest.raises(FileNotFoundError), file_lock(tmp_path / "none" / "lock"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), file_lock(tmp_path / "link"):
        pass
    assert not (tmp_path / "elsewhere").exists()

    def answer(code: int) -> None:
        def flock(*_args: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    answer(errno.ENOSYS)
    with file_lock(tmp_path / "lock", wait_s=0):
        pass
    answer(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), file_lock(tmp_path / "lock", wait_s=0):
        pass


# ---------------------------------------------------------------------------------------------- children


@pytest.mark.parametrize("outlives", [True, False])
def test_a_childs_words_are_in_its_log_without_what_is_hidden(tmp_path: Path, outlives: bool) -> None:
    code = "import sys; print('one secret two', flush=True); print('last', end=''); sys.exit(3)"
    log = tmp_path / "log"
    child = Child([*PYTHON, code], log=log, hidden=["secret", ""], outlives=outlives)
    with pytest.raises(ChildEnded):
        child.wait_for(lambda line: None, soon())
    assert child.last_lines() == ["one ••• two", "last"]
    assert child.last_lines(1) == ["last"]
    assert log.read_text() == "one ••• two\nlast"
    assert log.stat().st_mode & 0o777 == 0o600
    assert child.returncode == 3
    assert child.wait() == 3
    child.close()


def test_standard_output_can_have_a_file_of_its_own(tmp_path: Path) -> None:
    code = "import sys; print('answer'); print('words', file=sys.stderr)"
    child = Child([*PYTHON, code], log=tmp_path / "log", out=tmp_path / "out", outlives=True)
    assert child.wait(30) == 0
    assert (tmp_path / "out").read_text() == "answer\n"
    assert (tmp_path / "log").read_text() == "words\n"


def test_every_line_is_looked_at_from_the_first_on_and_the_deadline_is_kept() -> None:
    child = Child([*PYTHON, "import time; print('a=1', flush=True); print('b=2', flush=True); time.sleep(600)"])
    try:
        for name in ("b", "a", "b"):
            assert child.wait_for(lambda line, name=name: line if line.startswith(name) else None, soon())
        with pytest.raises(ChildMute):
            child.wait_for(lambda line: None, time.monotonic() + 0.1)
        assert child.alive()
        assert child.returncode is None
        assert child.wait(0.01) is None
    finally:
        child.close(grace_s=2)
    assert not child.alive()


def test_a_program_that_is_not_there_is_an_error_where_it_outlives_and_words_where_not(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        Child(["no-such-program"], log=tmp_path / "log", outlives=True)
    child = Child(["no-such-program"])
    with pytest.raises(ChildEnded):
        child.wait_for(lambda line: None, soon())
    assert child.last_lines() == ["no-such-program cannot be started: No such file or directory"]
    child.close()


LEAVES_ONE = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
"""


def test_a_group_is_ended_with_what_its_dead_leader_left_behind(tmp_path: Path) -> None:
    child = Child([*PYTHON, LEAVES_ONE], log=tmp_path / "log", outlives=True)
    assert child.wait(30) == 0
    left = LocalProcess.of(int((tmp_path / "log").read_text()))
    assert left.is_alive()
    child.close(grace_s=0.2)
    ends = soon()
    while left.is_alive() and time.monotonic() < ends:
        time.sleep(0.01)
    assert not left.is_alive()


def test_a_stranger_that_was_given_a_dead_leaders_number_is_left_alone() -> None:
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        end_group(LocalProcess(stranger.pid, "1"), grace_s=0.1)
        time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


def test_one_that_does_not_end_when_asked_is_ended(tmp_path: Path) -> None:
    child = Child([*PYTHON, STUBBORN], log=tmp_path / "log", outlives=True)
    child.wait_for(lambda line: line, soon())
    child.close(grace_s=0.2)
    assert child.returncode == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------- logs


def test_a_tail_gives_each_line_once_and_the_last_one_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    assert tail.read() == []
    log.write_bytes(b"\x1b[31mred\x1b[0m\r\n10%\r50%\r100%\nhal")
    assert tail.read() == ["red", "100%"]
    assert tail.read() == []
    with log.open("ab") as file:
        file.write(b"f\n\xff\n\nrest")
    assert tail.read() == ["half", "\ufffd", ""]
    assert tail.read(ended=True) == ["rest"]
    assert list(tail.last) == ["red", "100%", "half", "\ufffd", "rest"]
    assert tail.read(ended=True) == []
