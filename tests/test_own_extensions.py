"""What people install stays: extensions and their settings are kept in the store and come back on the next machine."""

import json
import logging
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import DiskFull, SettingsError, WebUIError
from fastsd_helpers.webui import InstallConfig, find_places, find_ui
from fastsd_helpers.webui.extensions import installation
from fastsd_helpers.webui.extensions.kept import is_shared, keep_settings, read_kept
from fastsd_helpers.webui.extensions.packages import prepare_extension

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed (apt install git)")


def commit_in(folder: Path, **files: str) -> str:
    """Write files of a repository (as "name__py") and commit them; returns the commit."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)

    def git(*words: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout

    if not (folder / ".git").exists():
        git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "change")
    return git("rev-parse", "HEAD").strip()


class Machines:
    """One store, and as many machines as are asked for; packages are installed into an empty environment."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
        import dataclasses

        self.folder, self.store, self.count = folder, folder / "drive" / "sd", 0
        self.code = folder / "upstream"
        commit = commit_in(self.code, launch__py="print('here')", main__py="print('here')")
        ui = find_ui(key)
        code = dataclasses.replace(ui.repositories[0], urls=(str(self.code),), revision=commit)
        self.ui = dataclasses.replace(ui, repositories=(code,))
        module = sys.modules["fastsd_helpers.webui.extensions.installation"]

        def make_environment(folder: Path, *, python: str) -> Path:
            if not folder.exists():
                venv.create(folder, symlinks=True, with_pip=False)
            return folder / "bin" / "python"

        monkeypatch.setattr(module, "find_ui", lambda key: self.ui)
        monkeypatch.setattr(module, "make_environment", make_environment)
        monkeypatch.setattr(module, "install", lambda name, **more: type("Report", (), {"changes": ()}))
        monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda path: 10**12)
        self.new()

    def new(self) -> None:
        """Another machine with the same Drive."""
        self.count += 1
        self.root = self.folder / f"machine-{self.count}"
        self.places = find_places(self.ui, folder=self.root, store=self.store)

    def install(self, **settings: Any) -> Any:
        return installation.install_webui(
            InstallConfig(**{"ui": self.ui.key, "folder": str(self.root), "store": str(self.store), **settings})
        )


@pytest.fixture(params=["a1111", "comfyui"])
def machines(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path, monkeypatch, request.param)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path, monkeypatch, "a1111")


def test_an_extension_comes_back_on_the_next_machine_with_its_settings(machines: Machines) -> None:
    source = machines.folder / "sources" / "sd-wildcards"
    commit = commit_in(source, script__py="x = 1", tags__json="{}", **{"__gitignore": "mine.json\n"})
    result = machines.install(extensions=str(source))
    assert result.extensions == ["sd-wildcards"]
    here = machines.places.extensions / "sd-wildcards"
    (here / "mine.json").write_text('{"mine": 1}')  # ignored by git, as settings are
    (here / "wildcards").mkdir()
    (here / "wildcards" / "hair.txt").write_text("red\nblue\n")
    (here / "tags.json").write_text('{"tag": "changed"}')  # a file of its own that the owner changed
    (here / "script.py").write_text("x = 2")  # code is no setting
    (here / "weights.pt").write_bytes(b"no setting either")
    assert keep_settings(machines.places)
    commit_in(source, script__py="x = 3")  # its author goes on meanwhile
    machines.new()
    result = machines.install()
    there = machines.places.extensions / "sd-wildcards"
    assert result.extensions == ["sd-wildcards"]
    assert result.commits["sd-wildcards"] == commit, "the version that the owner had"
    assert (there / "mine.json").read_text() == '{"mine": 1}'
    assert (there / "wildcards" / "hair.txt").read_text() == "red\nblue\n"
    assert (there / "tags.json").read_text() == '{"tag": "changed"}'
    assert (there / "script.py").read_text() == "x = 1"
    assert not (there / "weights.pt").exists()
    assert machines.install().extensions == ["sd-wildcards"], "and again on the same machine"


def test_it_comes_back_when_its_repository_is_gone_or_the_kept_code_is_damaged(machine: Machines) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit = commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    moved = source.rename(source.with_name("elsewhere"))
    machine.new()
    assert machine.install().commits["sd-a"] == commit
    bundle = machine.places.kept_extensions / "sd-a.bundle"
    bundle.write_bytes(b"a page")
    moved.rename(source)
    machine.new()
    assert machine.install().commits["sd-a"] == commit
    source.rename(moved)
    machine.new()
    result = machine.install()
    assert list(result.switched_off) == ["sd-a"]
    assert "could not be downloaded" in result.switched_off["sd-a"]
    bundle.unlink()
    moved.rename(source)
    assert machine.install().commits["sd-a"] == commit


def test_one_without_a_commit_here_is_no_version_to_keep(machine: Machines, caplog: pytest.LogCaptureFixture) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    shutil.rmtree(machine.places.extensions / "sd-a" / ".git")
    machine.install()
    assert "sd-a is at no commit here" in caplog.text
    assert "None" not in caplog.text


def test_one_whose_code_cannot_be_had_is_said_and_the_rest_is_installed(
    machine: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    source = machine.folder / "sources" / "sd-new"
    commit_in(source, script__py="x = 1")
    gone = "https://127.0.0.1:9/me/sd-gone"
    result = machine.install(extensions=f"{source}@1234567, {gone}")
    assert list(result.switched_off) == ["sd-new", "sd-gone"]
    assert "it has no 1234567. Check the commit, tag or branch" in caplog.text
    assert "Check the address and the connection" in caplog.text
    assert "The extension sd-gone is not added" in caplog.text
    assert "--remove-extensions" not in caplog.text, "there is nothing to take out"
    assert machine.places.installed.exists()


def test_another_address_of_the_same_name_is_another_extension_and_what_is_here_runs_until_it_comes(
    machine: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    first, fork = (machine.folder / owner / "sd-a" for owner in ("first", "fork"))
    commit_in(first, script__py="x = 1")
    commit = commit_in(fork, script__py="x = 'fork'")
    machine.install(extensions=str(first))
    result = machine.install(extensions="https://127.0.0.1:9/me/sd-a")
    assert result.extensions == ["sd-a"]
    assert "The extension sd-a stays as it is here" in caplog.text
    assert read_kept(machine.places)[0].address == str(first), "the list names what is here"
    assert machine.install(extensions=str(fork)).commits["sd-a"] == commit
    assert read_kept(machine.places)[0].address == str(fork)


def test_the_newest_is_asked_for_once_and_a_commit_whenever_it_is_named(machine: Machines) -> None:
    source = machine.folder / "sources" / "sd-a"
    first = commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    second = commit_in(source, script__py="x = 2")
    machine.new()
    assert machine.install(extensions=str(source)).commits["sd-a"] == first
    assert machine.install(extensions=f"{source}@{second}").commits["sd-a"] == second
    machine.new()
    assert machine.install().commits["sd-a"] == second


def test_one_is_taken_out_by_name_and_its_settings_stay(machine: Machines, caplog: pytest.LogCaptureFixture) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    (machine.places.extensions / "sd-a" / "mine.txt").write_text("mine")
    keep_settings(machine.places)
    with pytest.raises(SettingsError) as caught:
        machine.install(remove_extensions="sd-b")
    assert "Yours are sd-a." in caught.value.hint
    assert machine.install(remove_extensions="sd-a").extensions == []
    assert not (machine.places.extensions / "sd-a").exists()
    machine.new()
    assert machine.install().extensions == []
    machine.install(extensions=str(source))
    assert (machine.places.extensions / "sd-a" / "mine.txt").read_text() == "mine"


def test_only_what_its_owner_installed_is_kept(machine: Machines, caplog: pytest.LogCaptureFixture) -> None:
    machine.install()
    strange = machine.places.extensions / "sd-strange"
    commit_in(strange, script__py="import os")  # as somebody puts it there through the page
    (machine.places.extensions / "no-repository").mkdir()
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        machine.install()
    assert (
        f"sd-strange was not added here and is not kept. If it is yours: fastsd webui install --extension {strange}"
        in (caplog.text)
    )
    machine.new()
    assert machine.install().extensions == []
    assert not (machine.places.extensions / "sd-strange").exists()


def test_an_extension_that_an_earlier_version_installed_is_kept_from_then_on(machine: Machines) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit = commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    shutil.rmtree(machine.places.kept_extensions)  # which kept no list
    machine.install()
    machine.new()
    assert machine.install().commits["sd-a"] == commit


def test_a_store_that_others_can_write_to_brings_nothing_back_by_itself(
    machine: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit = commit_in(source, script__py="x = 1")
    machine.store = machine.folder / "drive" / "Shareddrives" / "Team" / "sd"
    machine.new()
    machine.install(extensions=str(source))
    machine.new()
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        assert machine.install().extensions == []
    assert f"fastsd webui install --extension {source}@{commit}" in caplog.text
    assert is_shared(Path("/content/drive/.shortcut-targets-by-id/1abc/sd"))
    assert not is_shared(Path("/content/drive/MyDrive/sd"))


def test_a_list_that_was_tampered_with_is_refused(machine: Machines) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    path = machine.places.kept_extensions / "list.json"
    for row, value in (
        ("name", "../../escape"),
        ("address", "ext::sh -c touch% /tmp/x"),
        ("address", "--upload-pack=x"),
        ("address", "http://example.org/a"),
        ("commit", "--x"),
        ("commit", "HEAD"),
        ("shallow", ["../x"]),
        ("extra", 1),
    ):
        found = json.loads(path.read_text())
        changed = {"extensions": [{**found["extensions"][0], row: value}]}
        path.write_text(json.dumps(changed))
        with pytest.raises(WebUIError, match="the list of your extensions, is damaged"):
            read_kept(machine.places)
        path.write_text(json.dumps(found))
    path.write_text("a page")
    with pytest.raises(WebUIError, match="the list of your extensions, is damaged"):
        machine.install()
    assert path.read_text() == "a page", "nothing was written over it"


def test_one_that_cannot_be_kept_runs_here_and_that_is_said(
    machine: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = machine.folder / "sources" / "sd-large"
    commit = commit_in(source, script__py="x = 1")
    kept = sys.modules["fastsd_helpers.webui.extensions.kept"]
    monkeypatch.setattr(kept, "_MOST_CODE_BYTES", 10)
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        assert machine.install(extensions=str(source)).extensions == ["sd-large"]
    assert "too much to keep" in caplog.text
    machine.new()
    assert machine.install().commits["sd-large"] == commit, "from its address"
    full = machine.folder / "sources" / "sd-late"
    commit_in(full, script__py="x = 1")

    def no_room(*_words: Any) -> None:
        raise DiskFull("Drive is full.", "Make room.")

    monkeypatch.setattr(kept, "write_kept", no_room)
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        result = machine.install(extensions=str(full))
    assert result.extensions == ["sd-large", "sd-late"]
    assert "sd-late is here, but could not be kept for the next machine: Drive is full. Make room." in caplog.text


def test_kept_settings_never_leave_the_folder_and_bring_no_code(machine: Machines) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    settings = machine.places.kept_extensions / "sd-a.settings"
    settings.mkdir(exist_ok=True)
    (settings / "evil.py").write_text("x")
    (settings / "__pycache__").mkdir()
    (settings / "__pycache__" / "a.json").write_text("x")
    (settings / ".git").mkdir()
    (settings / ".git" / "hook.txt").write_text("x")
    (settings / "link.json").symlink_to("/etc/hostname")
    machine.new()
    machine.install()
    there = machine.places.extensions / "sd-a"
    assert not [name for name in ("evil.py", "__pycache__", "link.json", ".git/hook.txt") if (there / name).exists()]


def test_deleting_the_program_keeps_the_settings_of_its_extensions(machine: Machines) -> None:
    from fastsd_helpers.webui.running.disk_usage import delete_kept, list_kept

    source = machine.folder / "sources" / "sd-a"
    commit_in(source, script__py="x = 1")
    machine.install(extensions=str(source))
    (machine.places.extensions / "sd-a" / "mine.txt").write_text("mine")
    program = next(item for item in list_kept(machine.places, machine.ui) if item.kind == "program")
    delete_kept(program, machine.places)
    assert not machine.places.root.exists()
    machine.install()
    assert (machine.places.extensions / "sd-a" / "mine.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------- what they ask for

INSTALLER = """
import os, pathlib, sys
assert sys.prefix.startswith({root!r}), sys.prefix
assert "HF_TOKEN" not in os.environ
pathlib.Path(__file__).with_name("done.txt").write_text(os.environ["PIP_CONSTRAINT"] + os.getcwd())
"""


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, with a small package and an empty one that is called pip."""
    import zipfile

    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("small_thing", "pip"):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            about = f"{name}-1.0.dist-info"
            wheel.writestr(f"{name}.py", "here = True")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_OFFLINE", "1")  # no index is asked
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    return folder


def test_requirements_and_installer_run_in_the_uis_environment_once(machine: Machines, wheels: Path) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, requirements__txt="small-thing\n", install__py=INSTALLER.format(root=str(machine.root)))
    result = machine.install(extensions=str(source))
    assert result.switched_off == {}
    assert "what sd-a asks for" in result.steps
    python = machine.places.python
    assert subprocess.run([python, "-c", "import small_thing"], check=False).returncode == 0
    done = machine.places.extensions / "sd-a" / "done.txt"
    assert done.read_text().endswith(str(machine.places.code))
    done.unlink()
    machine.install()
    assert not done.exists(), "what was done is not done again"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"requirements__txt": "no-such-thing-at-all\n"}, "its requirements failed"),
        ({"install__py": "import sys\nprint('my GPU is gone')\nsys.exit(3)"}, "its installer failed (exit 3): my GPU"),
    ],
)
def test_one_that_fails_is_switched_off_by_name_and_the_others_run(
    machine: Machines, wheels: Path, caplog: pytest.LogCaptureFixture, files: dict[str, str], said: str
) -> None:
    good, bad = (machine.folder / "sources" / name for name in ("sd-good", "sd-bad"))
    commit_in(good, script__py="x = 1")
    commit_in(bad, **files)
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        result = machine.install(extensions=f"{bad},{good}")
    assert result.extensions == ["sd-good"]
    assert said in result.switched_off["sd-bad"]
    assert "Using Python" not in result.switched_off["sd-bad"]
    assert "what sd-bad asks for" in result.steps, "it is timed all the same"
    assert "The extension sd-bad is switched off" in caplog.text
    assert "--remove-extensions sd-bad" in caplog.text
    assert not (machine.places.extensions / "sd-bad").exists()
    assert (machine.places.switched_off / "sd-bad").is_dir()
    commit = commit_in(bad, requirements__txt="small-thing\n", install__py="x = 1")
    assert machine.install(extensions=f"{bad}@{commit}").switched_off == {}, "mended, it runs again"
    assert (machine.places.extensions / "sd-bad").is_dir()


@pytest.mark.slow
def test_one_that_hangs_is_ended_with_all_it_started_and_switched_off(machine: Machines, wheels: Path) -> None:
    from tunnel_doubles import processes_of

    source = machine.folder / "sources" / "sd-slow"
    marker = f"marker-{os.getpid()}"
    code = "import subprocess, sys, time\nprint('waiting', flush=True)\nsubprocess.Popen([sys.executable, '-c', "
    commit_in(source, install__py=code + f"'import time; time.sleep(99)', '{marker}'])\ntime.sleep(99)")
    machine.install()
    shutil.copytree(source, machine.places.extensions / "sd-slow")
    with pytest.raises(WebUIError, match="its installer did not end in time; its last output: waiting"):
        prepare_extension(machine.ui, machine.places, "sd-slow", wait_s=8)
    assert processes_of(marker) == []


def test_no_extension_moves_a_package_of_the_lock(
    machine: Machines, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = machine.folder / "sources" / "sd-a"
    commit_in(source, requirements__txt="small-thing>=1.0\n")
    packages = sys.modules["fastsd_helpers.webui.extensions.packages"]
    monkeypatch.setattr(packages, "_locked", lambda ui, places: ["small-thing==0.9"])
    result = machine.install(extensions=str(source))
    assert "small-thing==0.9" in result.switched_off["sd-a"].replace(" ", "").replace("small_thing", "small-thing")
