"""What an installation says, and the commands it gives to uv and pip: the programs themselves are not started here.

That real uv and pip do what these commands ask is tested in test_wheels.py.
"""

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import DependencyMissing, DiskFull, InstallError
from fastsd_helpers.wheels import InstallReport, installer, tools
from fastsd_helpers.wheels.difference import Change
from fastsd_helpers.wheels.environment import Environment
from fastsd_helpers.wheels.lockfile import Lock, LockedFile, LockedRow, LockSet
from fastsd_helpers.wheels.unproved import Unproved, read_unproved, write_unproved

PLATFORM = "linux x86_64"


def row(name: str, version: str, *needs: str, url: str | None = None) -> LockedRow:
    files = (LockedFile(f"{name}-{version}-py3-none-any.whl", 1_500_000, "0" * 64),)
    line = f"{name} @ {url} --hash=sha256:{'0' * 64}" if url else f"{name}=={version} --hash=sha256:{'0' * 64}"
    return LockedRow(name, version, files, line, url=url, needs=needs)


def lock_set(**changes: Any) -> LockSet:
    rows = (row("alpha", "1.0"), row("beta", "2.5"))
    build = "setuptools==80 --hash=sha256:1 --hash=sha256:2\nwheel==1 --hash=sha256:3"
    return replace(LockSet("little", "3.13", False, PLATFORM, ("alpha>=1", "beta>=2"), rows, build, ""), **changes)


class World:
    """A Python with packages, and uv or pip in it: what they are asked is kept, and what they would install appears."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site"
        self.site.mkdir()
        self.here = Environment(folder / "python", "3.13.1", folder, self.site, PLATFORM, False, {}, False)
        self.sets = [lock_set()]
        self.commands: list[list[str]] = []
        self.files: dict[str, str] = {}
        self.environ: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        self.code, self.output, self.installs = 0, "", {"alpha": "1.0", "beta": "2.5"}
        self.fails: Exception | None = None
        self.free = 2**40

    def read(self, _python: Any, names: Any = ()) -> Environment:
        return replace(self.here, installed=dict(self.here.installed))

    def run(self, command: list[str], **options: Any) -> Any:
        self.commands.append(command)
        self.environ, self.options = options["env"], options
        for name in ("requirements.txt", "build.txt"):
            path = Path(options["cwd"]) / name
            self.files[name] = path.read_text() if path.exists() else ""
        if self.fails:
            raise self.fails
        if "install" in command:
            self.here.installed.update(self.installs)
        return subprocess.CompletedProcess(command, self.code, self.output)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(installer, "read_lock", lambda _path: Lock("2026-11-23", tuple(made.sets)))
    monkeypatch.setattr(installer, "read_environment", made.read)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(2**40, 2**40 - made.free, made.free)
    )
    monkeypatch.setattr(tools, "find_uv", lambda: Path("/opt/uv"))
    monkeypatch.setattr(tools, "run_told", made.run)
    return made


def install(**more: Any) -> InstallReport:
    return installer.install("little", **{"check_imports": False, **more})


# --------------------------------------------------------------------------------------------------- what is said


ALPHA = Change("alpha", None, "1.0", 1_500_000, "fastsd needs alpha>=1")
BETA = Change("beta", "1.9", "2.5", 20_000, "fastsd needs beta>=2, 1.9 is here")


def report(**changes: Any) -> InstallReport:
    plain = InstallReport("little", "3.13.1", Path("/p"), (ALPHA, BETA), 7, 1_520_000, 2.34, "uv", (), ("a", "b", "c"))
    return replace(plain, **changes)


def test_a_report_lists_what_was_installed_and_why() -> None:
    assert report().lines() == [
        "Installed 2 of 9 packages (1.5 MB) for 'little':",
        "  alpha 1.0  (1.5 MB; fastsd needs alpha>=1)",
        "  beta 1.9 -> 2.5  (0.0 MB; fastsd needs beta>=2, 1.9 is here)",
        "Done in 2.3 s with uv; 3 modules pass the import check in a fresh Python.",
    ]
    lines = report(dry_run=True).lines()
    assert lines[0].startswith("Would install 2 of 9 packages")
    assert len(lines) == 3
    lines = report(restart=("beta", "numpy")).lines()
    assert len(lines) == 5
    assert lines[-1].startswith("Restart the runtime now: beta, numpy was imported here before")


def test_a_report_of_nothing_says_so_and_what_is_still_open() -> None:
    nothing = report(changes=(), kept=9, modules=())
    assert nothing.lines() == ["Everything 'little' needs is here already: 9 packages checked in 2.3 s."]
    assert replace(nothing, modules=("a", "b")).lines()[1:] == ["Import check passed now: a, b."]
    assert replace(nothing, unproved=("x", "y")).lines()[1:] == [
        "Import check not passed yet: x, y. `fastsd install little` tries again."
    ]


def test_the_reports_figures_are_those_of_the_plan(world: World) -> None:
    world.here.installed["beta"] = "2.0"
    found = install()
    assert (found.name, found.python, found.path) == ("little", "3.13.1", world.here.python)
    assert [change.name for change in found.changes] == ["alpha"]
    assert (found.kept, found.bytes, found.tool, found.restart, found.modules) == (1, 1_500_000, "uv", (), ())
    assert (found.dry_run, found.unproved) == (False, ())
    assert 0 <= found.seconds < 30
    again = install()
    assert (again.changes, again.kept, again.tool, len(world.commands)) == ((), 2, "none", 1)


# ------------------------------------------------------------------------------------------------- the commands


def test_uv_is_asked_for_exactly_the_rows_that_are_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_CONSTRAINT", "/etc/colab")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    world.here.installed["beta"] = "2.0"
    install(timeout_s=77)
    (command,) = world.commands
    assert command[:3] == ["/opt/uv", "pip", "install"]
    assert command[command.index("--python") + 1] == str(world.here.python)
    assert {"--no-config", "--no-deps", "--require-hashes"} <= set(command)
    assert not {"--offline", "--no-index", "--find-links", "--reinstall-package"} & set(command)
    assert world.files["requirements.txt"] == f"alpha==1.0 --hash=sha256:{'0' * 64}\n"
    assert world.files["build.txt"] == "setuptools==80\nwheel==1\n"
    assert Path(command[command.index("-r") + 1]).name == "requirements.txt"
    assert Path(command[command.index("--build-constraints") + 1]).name == "build.txt"
    assert world.environ.get("HTTPS_PROXY") == "http://proxy"
    assert "UV_CONSTRAINT" not in world.environ, "another Python does not follow the platform's constraints"
    assert world.options["timeout_s"] == 77
    assert Path(world.options["cwd"]) != Path.cwd(), "uv would read a project's settings there"


def test_in_this_python_the_platforms_constraints_are_followed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_CONSTRAINT", "/etc/colab")
    world.here = replace(world.here, is_this=True)
    install()
    assert world.environ["UV_CONSTRAINT"] == "/etc/colab"


@pytest.mark.parametrize(
    ("with_folder", "offline", "network"), [(True, None, False), (True, False, True), (True, True, False),
                                            (False, None, True), (False, True, False), (False, False, True)],
)  # fmt: skip
@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_the_network_is_asked_unless_there_is_a_folder_or_it_was_forbidden(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    with_folder: bool,
    offline: Any,
    network: bool,
) -> None:
    if tool == "pip":
        monkeypatch.setattr(tools, "find_uv", lambda: None)
    (tmp_path / "wheels").mkdir()
    found = install(wheel_folder=tmp_path / "wheels" if with_folder else None, offline=offline)
    (command,) = world.commands
    assert ("--no-index" not in command) is network
    assert ("--offline" in command) is (tool == "uv" and not network)
    assert ("--find-links" in command) is with_folder
    if with_folder:
        assert command[command.index("--find-links") + 1] == str(tmp_path / "wheels")
    assert found.tool == tool


def test_pip_is_asked_the_same_with_its_own_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find_uv", lambda: None)
    install()
    command = world.commands[-1]
    assert command[:6] == [sys.executable, "-m", "pip", "--python", str(world.here.python), "install"]
    assert {"--no-input", "--no-deps", "--require-hashes"} <= set(command)
    assert "--force-reinstall" not in command
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert Path(world.environ[name]).name == "build.txt"
    world.here = replace(world.here, is_this=True, installed={})
    install()
    assert world.commands[-1][:4] == [sys.executable, "-m", "pip", "install"]


def test_a_pip_on_the_path_serves_when_this_python_has_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find_uv", lambda: None)
    monkeypatch.setattr(tools, "_has_pip", lambda: False)
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    world.here = replace(world.here, is_this=True)
    install()
    assert world.commands[-1][:3] == ["/usr/bin/pip", "--python", str(world.here.python)]
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    world.here = replace(world.here, installed={})
    with pytest.raises(DependencyMissing, match="Neither uv nor pip"):
        install()


def test_an_archive_in_the_folder_is_taken_from_there(world: World, tmp_path: Path) -> None:
    url = "https://github.example/gamma.tar.gz"
    gamma = row("gamma", "0.3", url=url)
    world.sets = [lock_set(wanted=("gamma",), rows=(gamma,))]
    world.installs = {"gamma": "0.3"}
    folder = tmp_path / "wheels"
    folder.mkdir()
    install(wheel_folder=folder)
    assert url in world.files["requirements.txt"]
    (folder / gamma.files[0].name).write_bytes(b"x")
    world.here.installed.clear()
    install(wheel_folder=folder)
    assert (folder / gamma.files[0].name).as_uri() in world.files["requirements.txt"]
    assert url not in world.files["requirements.txt"]
    world.here.installed.clear()
    install()
    assert url in world.files["requirements.txt"]


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_what_was_cut_short_is_written_anew(world: World, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    if tool == "pip":
        monkeypatch.setattr(tools, "find_uv", lambda: None)
    world.here.installed.update(alpha="1.0", beta="2.5")
    notes = {
        "alpha": Unproved("1.0", whole=False),
        "beta": Unproved("2.5", whole=True),
        "zeta": Unproved("1", whole=False),
    }
    write_unproved(world.site, notes)
    found = install()
    assert [(change.name, change.before) for change in found.changes] == [("alpha", None)]
    (command,) = world.commands
    if tool == "uv":
        assert command[command.index("--reinstall-package") + 1] == "alpha"
        assert command.count("--reinstall-package") == 1
    else:
        assert "--force-reinstall" in command
    write_unproved(world.site, {"alpha": Unproved("0.9", whole=False)})
    assert install().changes == (), "it was replaced by hand since"


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_place_is_looked_at_before_anything_is_asked_for(world: World, tmp_path: Path) -> None:
    world.free = 4 * 3_000_000
    install()
    world.here.installed.clear()
    world.free -= 1
    with pytest.raises(DiskFull, match="'little'"):
        install()
    world.free += 1
    world.here = replace(world.here, managed=True)
    with pytest.raises(InstallError, match="belongs to the operating system"):
        install()
    world.here = replace(world.here, managed=False, site=tmp_path / "nowhere")
    with pytest.raises(InstallError, match=r"Packages cannot be written to .*nowhere: No such file"):
        install()
    assert len(world.commands) == 1


def test_sets_for_another_place_are_refused(world: World) -> None:
    world.sets = [lock_set(platform="darwin arm64")]
    with pytest.raises(InstallError, match="made for darwin arm64, and this is linux x86_64") as caught:
        install()
    assert 'pip install "fastsd_helpers[little]' in caught.value.hint
    world.sets = [lock_set(own_environment=True)]
    world.here = replace(world.here, is_this=True)
    with pytest.raises(InstallError, match="needs an environment of its own"):
        install()
    world.here = replace(world.here, is_this=False)
    assert len(install().changes) == 2
    world.here.installed.clear()
    with pytest.raises(InstallError, match="There is no folder of wheels"):
        install(wheel_folder=world.site / "gone")


def test_where_a_set_fits_it_is_used_though_another_would_do(world: World) -> None:
    """What was installed by hand is enough only where no set is for this Python."""
    other = lock_set(python="3.12", wanted=("alpha>=0.5",))
    world.sets = [other, lock_set()]
    world.here.installed["alpha"] = "0.7"
    with pytest.raises(InstallError, match=r"alpha 0\.7 \(fastsd needs >=1\)"):
        install(dry_run=True)
    world.sets = [other]
    found = install(dry_run=True)
    assert (found.changes, found.kept) == ((), 1)


def test_a_dry_run_starts_nothing(world: World) -> None:
    found = install(dry_run=True)
    assert (len(found.changes), found.dry_run, found.tool, world.commands) == (2, True, "none", [])
    assert read_unproved(world.site) == {}


def test_what_uv_does_not_finish_or_cannot_begin_is_said(world: World) -> None:
    for fails, error, said in [
        (subprocess.TimeoutExpired("uv", 1), InstallError, "uv did not finish within 2 minutes"),
        (PermissionError(13, "Permission denied"), DependencyMissing, "/opt/uv cannot be started: Permission denied"),
    ]:
        world.fails = fails
        with pytest.raises(error, match=said):
            install(timeout_s=120)
        assert read_unproved(world.site) == {}, "nothing was changed, so nothing is to be looked at"


def test_a_tool_that_says_it_is_done_and_is_not_is_not_believed(world: World) -> None:
    world.installs = {"alpha": "1.0+local", "beta": "2.4"}
    with pytest.raises(InstallError, match="uv reported success, but beta is not installed as locked"):
        install()
    assert read_unproved(world.site) == {"alpha": Unproved("1.0", False), "beta": Unproved("2.5", False)}
    world.here.installed.clear()
    world.installs = {"alpha": "1.0"}
    with pytest.raises(InstallError, match="but beta is not"):
        install()


def test_after_a_failure_only_what_was_changed_is_still_to_be_looked_at(world: World) -> None:
    write_unproved(world.site, {"older": Unproved("3", whole=True)})
    world.code, world.output, world.installs = 1, "error: something", {"alpha": "1.0"}
    with pytest.raises(InstallError):
        install()
    assert read_unproved(world.site) == {"older": Unproved("3", True), "alpha": Unproved("1.0", False)}


# -------------------------------------------------------------------------------------------------------- proof


def test_what_was_installed_is_imported_and_then_no_longer_noted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    problems: list[str] = []

    def prove(_environment: Environment, names: list[str]) -> tuple[list[str], list[str]]:
        asked.append(list(names))
        return ["alpha", "beta"], list(problems)

    monkeypatch.setattr(installer, "prove", prove)
    world.here.installed["beta"] = "2.5"
    notes = {"beta": Unproved("2.5", whole=True), "gone": Unproved("1", whole=True), "other": Unproved("1", whole=True)}
    write_unproved(world.site, notes)
    found = install(check_imports=True)
    assert asked == [["alpha", "beta"]], "what was installed, and what an earlier run did not see work"
    assert found.modules == ("alpha", "beta")
    assert set(read_unproved(world.site)) == {"gone", "other"}
    assert install(check_imports=True).modules == ()
    write_unproved(world.site, {"beta": Unproved("2.5", whole=True), "alpha": Unproved("0.1", whole=True)})
    assert install(check_imports=True, dry_run=True).unproved == ("beta",)
    assert install(check_imports=True, dry_run=True, skip=("bet*",)).unproved == ()
    assert len(asked) == 1
    problems[:] = ["alpha: import alpha: Oops", "gamma: x"]
    write_unproved(world.site, {"beta": Unproved("2.5", whole=True), "alpha": Unproved("1.0", whole=True)})
    with pytest.raises(InstallError, match=r"one does not work: alpha: import alpha: Oops \(1 more like it\)"):
        install(check_imports=True)
    assert set(read_unproved(world.site)) == {"alpha"}, "what works is no longer noted"
    problems[:] = ["alpha: import alpha: Oops"]
    with pytest.raises(InstallError) as caught:
        install(check_imports=True)
    assert caught.value.problem.endswith("alpha: import alpha: Oops")
    assert "Restart the runtime" in caught.value.hint


# -------------------------------------------------------------------------------------------------- with a cache


class Cache:
    """An archive of wheels, as far as an installation asks it."""

    def __init__(self, lacking: Any) -> None:
        self.lacking, self.kept, self.path = lacking, [], Path("/drive/little.tar")

    def unpack(self, rows: Any, folder: Path) -> list[LockedRow]:
        (folder / "wheel").write_bytes(b"x")
        return [item for item in rows if item.name in self.lacking]

    def keep(self, folder: Path) -> None:
        self.kept.append(sorted(path.name for path in folder.iterdir()))


@pytest.mark.parametrize("lacking", [(), ("beta",)])
def test_what_an_archive_lacks_is_downloaded_and_kept_and_the_rest_comes_from_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, lacking: Any
) -> None:
    cache = Cache(lacking)
    monkeypatch.setattr(installer, "WheelCache", lambda _folder, _set: cache)
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        install(cache=tmp_path / "cache")
    if lacking:
        download, command = world.commands
        assert "download" in download
        assert {"--no-deps", "--require-hashes"} <= set(download)
        assert "--no-index" not in download
        assert cache.kept == [["wheel"]]
    else:
        (command,) = world.commands
        assert cache.kept == []
    assert ("nothing is downloaded" in caplog.text) is (not lacking)
    assert "--no-index" in command
    assert "--find-links" in command
    world.here.installed.clear()
    world.commands.clear()
    install(cache=tmp_path / "cache", offline=True)
    assert all("--no-index" in command for command in world.commands)
    (tmp_path / "wheels").mkdir()
    world.here.installed.clear()
    world.commands.clear()
    install(cache=tmp_path / "cache", wheel_folder=tmp_path / "wheels")
    assert len(world.commands) == 1, "a folder of wheels comes before the archive"


def test_without_any_pip_nothing_is_kept_and_that_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    ways = [(False, None, ("beta",), True), (False, None, (), False), (True, None, ("beta",), False),
            (False, "/usr/bin/pip", ("beta",), False)]  # fmt: skip
    for module, program, lacking, said in ways:
        monkeypatch.setattr(tools, "_has_pip", lambda module=module: module)
        monkeypatch.setattr(tools.shutil, "which", lambda name, program=program: program)
        cache = Cache(lacking)
        monkeypatch.setattr(installer, "WheelCache", lambda _folder, _set, cache=cache: cache)
        world.here.installed.clear()
        world.commands.clear()
        caplog.clear()
        install(cache=tmp_path / "cache")
        assert ("pip is not installed, so the wheels cannot be kept" in caplog.text) is said
        downloaded = bool(lacking) and not said
        assert len(world.commands) == (2 if downloaded else 1)
        assert bool(cache.kept) is downloaded
        assert ("--no-index" in world.commands[-1]) is (not said)


# --------------------------------------------------------------------------------------------------- one at a time


def test_another_installation_into_the_same_python_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    busy, waited, real = [3], [], fcntl.flock

    def flock(handle: int, how: int) -> None:
        if busy[0]:
            busy[0] -= 1
            raise BlockingIOError(11, "busy")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(installer.time, "sleep", waited.append)
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        install()
    assert len(waited) == 3
    assert caplog.text.count("is running; waiting for it") == 1
    world.here.installed.clear()
    busy[0] = 10**9
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(installer.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(InstallError, match="has been running for 10 minutes"):
        install()
    assert len(waited) < 12


def test_a_file_system_without_locks_stops_no_installation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def flock(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(install().changes) == 2


def test_what_keeps_two_installations_apart_is_the_users_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer.tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        install()
        world.here.installed.clear()
    (lock,) = tmp_path.glob("fastsd-install-*.lock")
    assert lock.stat().st_mode & 0o7777 == 0o600
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InstallError):
        install()
    assert not (tmp_path / "elsewhere").exists(), "a link that somebody else laid there is not followed"


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("UV_CONSTRAINT", "error: File not found: `{path}`"),
        ("UV_OVERRIDE", "error: File not found: {path}"),
        ("PIP_CONSTRAINT", "ERROR: Could not open requirements file: [Errno 2] No such file or directory: '{path}'"),
    ],
)
def test_a_constraint_file_that_is_not_there_is_named_as_the_doctor_does(
    name: str, output: str, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastsd_helpers import doctor

    path = tmp_path / "gone.txt"
    for other in ("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_OVERRIDE", "PIP_CONSTRAINT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(path))
    world.here = replace(world.here, is_this=True)
    world.code, world.output, world.installs = 2, output.format(path=path), {}
    with pytest.raises(InstallError) as told:
        install()
    (finding,) = [item for item in doctor.examine(looks=["settings"]).findings if name in item.what]
    assert told.value.problem == f"'little' was not installed: {finding.what}"
    assert told.value.hint == finding.todo
    path.write_text("")
    with pytest.raises(InstallError) as told:
        install()
    assert name not in told.value.problem


@pytest.mark.parametrize(
    ("name", "value", "output"),
    [
        ("UV_HTTP_TIMEOUT", "abc", "error: Failed to parse environment variable `UV_HTTP_TIMEOUT` with invalid value"),
        ("UV_CONFIG_FILE", "/gone.toml", "error: failed to open file `/gone.toml`: No such file or directory"),
        ("UV_LINK_MODE", "none", "error: invalid value 'none' for '--link-mode <LINK_MODE>'"),
        ("UV_CACHE_DIR", "/proc/x", "error: Failed to initialize cache at `/proc/x`"),
    ],
)
def test_a_setting_that_the_tool_cannot_use_is_named(
    name: str, value: str, output: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    world.code, world.output, world.installs = 2, output, {}
    with pytest.raises(InstallError) as told:
        install()
    assert f"{name}, which the environment sets, cannot be used" in told.value.problem
    assert told.value.hint == f"Run: unset {name}"
    world.output = "error: Failed to fetch: `https://x/small.whl`: connection refused"
    with pytest.raises(InstallError, match="network or the package index"):
        install()
