"""What holds for every test: home, sessions and current directory are temporary, and nothing leaves this machine."""

import contextlib
import functools
import gc
import ipaddress
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PLACES = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]
sys.path[:0] = [path for path in PLACES if path not in sys.path]

# Where this is set, as in many containers, each process that a test starts compiles all our modules anew, for a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Looking for cycles is a fifth of the time that importing PyTorch and its kin takes, and then each test has its share.
gc.set_threshold(50_000, 20, 20)

from fastsd_helpers.runtime import make_cpu_sums_repeatable  # noqa: E402

# MKL reads this at its first multiplication, which may be in a test that trains nothing.
make_cpu_sums_repeatable()

# OpenVINO's oneDNN reads this too, while its other kernels ask the processor itself: what the two then compute together
# crashes or is empty. PyTorch's keeps what it reads at its first convolution; the second name is for xdist's workers.
_isa = os.environ.setdefault("FASTSD_ONEDNN_ISA", os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
if _isa:
    import torch

    os.environ["ONEDNN_MAX_CPU_ISA"] = _isa
    torch.nn.functional.conv2d(torch.zeros(4, 64, 64, 64), torch.zeros(64, 64, 3, 3))
    del os.environ["ONEDNN_MAX_CPU_ISA"]

# The client reads its settings when it is first imported: done here, before a test that sets them for a while.
with contextlib.suppress(ImportError):
    import huggingface_hub.constants  # noqa: F401

# A shell that starts something in the background lets it ignore Ctrl-C, and so would every process that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_OURS = ("FASTSD_FAULT", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE")


_FOLDER = pytest.StashKey[Path]()
_FAILED = pytest.StashKey[bool]()
_numbers = itertools.count()
_untouched: list[Path] = []  # folders that tests wrote nothing into


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder with an empty home, as most of 12,000 tests leave it: the next test has it then, renamed.

    Making and deleting folders takes milliseconds each on some disks. pytest's own fixture also looks through all
    folders for the next number, and replaces a link to the newest.
    """
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}-{next(_numbers)}"
    if _untouched:
        return _untouched.pop().rename(folder)
    folder.mkdir(mode=0o700)
    (folder / "home").mkdir(mode=0o700)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if (folder := getattr(item, "funcargs", {}).get("tmp_path")) is not None:
        item.stash[_FOLDER] = folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """What a test that passed has written is deleted when all its fixtures are done: all tests' files fill a disk.

    Its folder stays, empty: no other test gets one of that name, and nothing takes its files for these.
    """
    result = yield
    folder = item.stash.get(_FOLDER, None)
    if folder is None or not folder.is_dir() or item.stash.get(_FAILED, False):
        return result
    home, found = folder / "home", [*folder.glob("*"), *folder.glob("home/*")]
    if found == [home] and {stat.S_IMODE(path.lstat().st_mode) for path in (folder, home)} == {0o700}:
        _untouched.append(folder)
    else:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    return result


def pytest_configure(config: pytest.Config) -> None:
    """What tests and their processes put into the temporary folder goes with the run; tests' own folders are kept."""
    if hasattr(config, "workerinput"):
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="fastsd-tests-")
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take files in this order: those with slow tests first, so that none is begun last and runs on alone.

    They come from both ends of the list in turns, which keeps the browsers, its first, from being all open at once.
    """
    if not hasattr(config, "workerinput"):
        return
    slow = sorted({item.path for item in items if item.get_closest_marker("slow")})
    turns = (path for pair in zip(slow, reversed(slow), strict=True) for path in pair)
    place = {path: number for number, path in enumerate(dict.fromkeys(turns))}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Modules stay to the end: no search for cycles need pass through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks() -> Iterator[Callable[..., Any]]:
    """`forks("torch").run(words)`: run Python in a process of a server that has imported these modules already."""
    from forked import ForkServer

    with contextlib.ExitStack() as servers:
        yield functools.cache(lambda *modules: servers.enter_context(ForkServer(modules)))


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    for name in _OURS:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Commands that tests start run in another directory than the repository.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """What a test does to our log, as a notebook's first cell does, is undone: the next one may look into it."""
    logger = logging.getLogger("fastsd_helpers")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1], before[2]


@pytest.fixture(autouse=True)
def _own_desk() -> Iterator[None]:
    """What a notebook remembers of its forms and its session is of one test alone."""
    yield
    if (desk := sys.modules.get("fastsd_helpers.forms.desk")) is not None:
        desk.clear()


@pytest.fixture(autouse=True)
def _no_fsync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests kill processes, not machines: what a process has written outlives it, and a busy disk is slow.

    That bytes reach the disk before their name appears is tested in these two files, with the real calls.
    """
    if request.path.name not in ("test_drive.py", "test_files.py"):
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder: the test's own has a home in it."""
    made = tmp_path / "place"
    made.mkdir()
    return made


@pytest.fixture(scope="session")
def merge_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What `merge_models.make_model` makes of a family, once; not to be changed."""
    from merge_models import make_model

    return functools.cache(lambda family: make_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD 1.5 model with random weights, for runs of the training engine; not to be changed."""
    from dreambooth_runs import build_base

    return build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def small_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session with a few prepared images, whose runs draw no more than they must."""
    from dreambooth_runs import draw_quickly, make_session

    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch)
    return make_session(tmp_path)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_this_machine(str(address[0])):
            raise ConnectionRefusedError(f"tests do not use the network, and this one asked for {address!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
