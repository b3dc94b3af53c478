"""What is built, what it asks for, and that the commands of the README exist."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import fastsd_helpers
from fastsd_helpers.runtime import REPOSITORY, install_command
from fastsd_helpers.wheels import read_lock

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# These belong to Colab, Kaggle or the user: asking for one of them could replace it.
PLATFORM = {"torch", "torchvision", "torchaudio", "numpy", "triton"}


def names_in(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~;@ ]", line, maxsplit=1)[0].lower().replace("-", "_") for line in requirements}


def test_the_version_is_said_the_same_everywhere() -> None:
    assert fastsd_helpers.__version__ == PROJECT["project"]["version"]


def test_the_core_asks_for_nothing_and_no_extra_for_what_belongs_to_the_platform() -> None:
    assert PROJECT["project"]["dependencies"] == []
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items():
        assert not names_in(requirements) & PLATFORM, extra


def test_what_hosted_notebooks_install_brings_no_second_opencv() -> None:
    assert not any(
        name.startswith("opencv") for name in names_in(PROJECT["project"]["optional-dependencies"]["hosted"])
    )


def test_the_pinned_versions_leave_torch_alone_and_are_exact() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert not {"torch", "torchvision", "triton"} & names_in(pins)
    assert not [line for line in pins if "nvidia" in line.lower()]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []


def test_the_pinned_versions_are_within_what_the_extras_allow() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    asked = [Requirement(line) for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]
    wrong = [
        str(item)
        for item in asked
        if (pin := pins.get(item.name.lower().replace("_", "-"))) and not item.specifier.contains(pin)
    ]
    assert wrong == []


def test_the_pinned_versions_are_within_what_fastsd_install_asks_for() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    asked = [Requirement(text) for item in read_lock().sets if not item.own_environment for text in item.wanted]
    wrong = {str(item) for item in asked if item.name in pins and not item.specifier.contains(pins[item.name])}
    assert wrong == set(), "a notebook's first cell would replace what `make setup` has installed"


@pytest.mark.parametrize("name", ["dreambooth", "webui", "trocr", "trocr-int8"])
def test_a_locked_set_asks_for_all_that_the_extra_of_its_name_asks_for(name: str) -> None:
    extra = names_in(PROJECT["project"]["optional-dependencies"][name])
    for item in read_lock().sets:
        if item.name == name:
            assert extra <= names_in(list(item.wanted)), item.python


def test_the_pinned_versions_take_the_oldest_python_that_is_promised() -> None:
    from packaging.specifiers import SpecifierSet

    oldest = PROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    too_new = []
    for line in lines:
        name, _, version = line.partition("==")
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about = importlib.metadata.metadata(name) if version and name[0] != "#" else {}
            asked = about.get("Requires-Python") if about.get("Version") == version else None
            if asked and not SpecifierSet(asked).contains(oldest):
                too_new.append(f"{line} asks for Python {asked}")
    assert too_new == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not imported: that fails in a process where somebody has imported Python's own distutils.
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed (pip install setuptools)")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    # A copy, because setuptools writes build folders beside what it builds.
    shutil.copytree(ROOT / "fastsd_helpers", source / "fastsd_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("fastsd_helpers/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fastsd_helpers").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == files
    assert "fastsd_helpers/models.toml" in packed


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = next(name for name in inside if name.endswith(".dist-info/METADATA"))
        said = HeaderParser().parsestr(archive.read(metadata).decode())
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        licence = next(name for name in inside if name.endswith("LICENSE"))
        assert b"Apache License" in archive.read(licence)
    assert said["Version"] == fastsd_helpers.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert not [line for line in said.get_all("Requires-Dist") if "extra ==" not in line]
    assert "fastsd = fastsd_helpers.cli:main" in entry_points


def test_the_wheel_works_without_any_other_package(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from fastsd_helpers.cli import main\n"
        "sys.exit(main(['models', 'list']))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "sd15" in done.stdout


def test_the_makes_of_the_readme_exist_and_ci_runs_every_test() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets
    assert {"setup", "test-all", "style"} <= targets
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "make test-all" in ci.read_text(encoding="utf-8")


def test_no_large_file_is_kept_in_the_package() -> None:
    large = [
        path.name for path in (ROOT / "fastsd_helpers").rglob("*") if path.is_file() and path.stat().st_size > 10e6
    ]
    assert large == []


def test_the_readme_lists_the_package_as_it_is() -> None:
    listed = set(re.findall(r"^  ([\w]+)(?:\.py|/) ", README.split("fastsd_helpers/\n", 1)[1], flags=re.MULTILINE))
    there = {path.stem for path in (ROOT / "fastsd_helpers").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert listed == there - {"__init__", "__pycache__"}


# ------------------------------------------------------------------------------------------- how it is installed


def test_the_command_that_installs_the_project_names_its_own_address() -> None:
    from packaging.requirements import Requirement

    assert PROJECT["tool"]["fastsd"]["repository"] == PROJECT["project"]["urls"]["Repository"] == REPOSITORY
    *command, asked = shlex.split(install_command("trocr", again=True))
    assert command == ["pip", "install", "--force-reinstall"]
    assert (Requirement(asked).name, Requirement(asked).extras) == ("fastsd_helpers", {"trocr"})
    assert Requirement(asked).url == f"git+{REPOSITORY}"
    assert shlex.split(install_command()) == ["pip", "install", f"fastsd_helpers @ git+{REPOSITORY}"]


def texts_for_users() -> dict[str, str]:
    files = [*(ROOT / "fastsd_helpers").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("notebooks/*.ipynb")]
    files += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "requirements-colab.txt")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_nobody_is_sent_to_a_package_index_for_this_project() -> None:
    found = [
        f"{name}: {line.strip()}"
        for name, text in texts_for_users().items()
        for line in text.splitlines()
        if re.search(r"\binstall\b.*\bfastsd_helpers\b(?!/)", line) and "@ git+" not in line
    ]
    assert found == []
    extras = [name for name, text in texts_for_users().items() if "fastsd_helpers[" in text]
    assert extras == ["fastsd_helpers/runtime.py", "README.md"], "the command is made in one place"


def test_every_hint_that_names_fastsd_install_names_a_set_that_is_locked() -> None:
    named = {word for text in texts_for_users().values() for word in re.findall(r"fastsd install ([a-z][\w-]*)", text)}
    assert {"dreambooth", "trocr", "trocr-int8"} <= named <= set(read_lock().names())


def test_the_readme_starts_with_commands_that_work() -> None:
    assert f"git clone {REPOSITORY}\n" in README
    assert install_command("dreambooth") in README
