"""Tests of wheels.lock and of installing from it: real wheels made here, real environments made by uv, no network."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from fakes import read_only, small_disk

from fastsd_helpers import wheels
from fastsd_helpers.errors import DependencyMissing, DiskFull, InstallError
from fastsd_helpers.runtime import install_command
from fastsd_helpers.wheels import difference, installer, tools, unproved
from fastsd_helpers.wheels.cache import WheelCache
from fastsd_helpers.wheels.lockfile import canonical, digest_of
from fastsd_helpers.wheels.proof import prove

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ("dreambooth", "webui", "trocr", "trocr-int8")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"

needs_uv = pytest.mark.skipif(wheels.find_uv() is None, reason="uv is not installed (pip install uv)")


def make_wheel(folder: Path, name: str, version: str, code: str = "", requires: tuple[str, ...] = ()) -> Path:
    """A real wheel with one module."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {item}\n" for item in requires)
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


def make_lock(
    path: Path,
    rows: dict[Path, list[str]],
    wanted: list[str] = (),
    *,
    own: bool = False,
    addresses: dict[Path, str] | None = None,
) -> Path:
    """A lock with one set, `little`, of these wheels (wheel -> what it needs), some with an address of their own."""
    lines, files, needs, archives = [], [], [], []
    asked: list[str] = []
    for wheel, needed in rows.items():
        name, version = wheel.name.split("-")[:2]
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        address = (addresses or {}).get(wheel)
        lines.append(f"{canonical(name)}{f' @ {address}' if address else f'=={version}'} --hash=sha256:{sha256}")
        archives += [f'{canonical(name)} = "{version}"'] if address else []
        files.append(f'{sha256} = "{wheel.stat().st_size} {wheel.name}"')
        needs.append(f'"{canonical(name)}=={version}" = [{", ".join(repr(item) for item in needed)}]')
        asked += [] if own else needed
    text = [
        "schema = 1",
        'made = "2026-11-23"',
        '[build]\nrequirements = ""',
        f'[sets."little-{HERE}"]\nname = "little"\npython = "{HERE}"\nown_environment = {str(own).lower()}',
        f'platform = "{sys.platform} x86_64"',
        f'sha256 = "{digest_of(HERE, wanted, chr(10).join(lines), asked)}"',
        f"wanted = [{', '.join(repr(item) for item in wanted)}]",
        "requirements = '''\n" + "\n".join(lines) + "\n'''",
        "[archives]",
        *archives,
        f'[needs."{HERE}"]',
        *needs,
        "[files]",
        *files,
    ]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.fixture
def shelf(tmp_path):
    """A folder of three wheels and the lock that names them."""
    folder = tmp_path / "wheels"
    alpha = make_wheel(folder, "alpha-one", "1.0", requires=("beta>=2",))
    beta = make_wheel(folder, "beta", "2.5")
    gamma = make_wheel(folder, "gamma", "0.3")
    rows = {alpha: ["beta>=2"], beta: [], gamma: []}
    lock = make_lock(tmp_path / "little.lock", rows, ["alpha-one>=1", "gamma>=0.1"])
    return folder, lock, rows


@pytest.fixture
def python(tmp_path):
    """The interpreter of a fresh environment."""
    return wheels.make_environment(tmp_path / "environment", python=sys.executable)


def site_folder(python: Path) -> Path:
    """Where its packages are, without starting it."""
    return python.parent.parent / "lib" / f"python{HERE}" / "site-packages"


def site_of(python: Path) -> dict[str, bytes]:
    """Everything that is installed in an environment, byte by byte."""
    found = site_folder(python)
    return {path.relative_to(found).as_posix(): path.read_bytes() for path in found.rglob("*") if path.is_file()}


def install(shelf, python: Path, **more):
    folder, lock, _rows = shelf
    more.setdefault("check_imports", False)  # an interpreter less to start; two tests look at the proof
    return wheels.install("little", python=python, lock=lock, wheel_folder=folder, **more)


# -------------------------------------------------------------------------------------------------- the lock


def test_the_lock_has_a_set_for_every_workflow_and_python_and_one_for_each_locked_web_ui():
    lock = wheels.read_lock()
    assert lock.names() == [*WORKFLOWS, "a1111", "comfyui", "forge-neo"]
    for name in WORKFLOWS:
        assert [item.python for item in lock.sets if item.name == name] == ["3.11", "3.12", "3.13"]
    own = [(item.name, item.python) for item in lock.sets if item.own_environment]
    assert own == [("a1111", "3.11"), ("comfyui", "3.12"), ("forge-neo", "3.13")]
    assert all(file.bytes > 0 and file.name for item in lock.sets for row in item.rows for file in row.files)


def test_no_set_for_the_platforms_python_touches_what_is_the_platforms():
    for item in wheels.read_lock().sets:
        if not item.own_environment:
            assert [row.name for row in item.rows if difference.is_protected(row.name)] == []


def test_the_lock_names_no_package_index():
    text = (ROOT / "wheels.lock").read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://([^/\s]+)", text))
    assert hosts <= {"github.com"}


def test_what_a_set_needs_is_in_it_or_the_platforms():
    from packaging.requirements import Requirement

    for item in wheels.read_lock().sets:
        names = {row.name for row in item.rows}
        for row in item.rows:
            for need in row.needs:
                asked = Requirement(need)
                name = canonical(asked.name)
                if not difference.is_protected(name):
                    assert name in names, f"{item.name} {item.python}: {row.name} needs {need}"
                    assert asked.specifier.contains(item.row(name).version, prereleases=True)


def test_the_sections_of_the_requirements_are_the_sets_and_their_ranges():
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines()
    assert [line.strip("# []") for line in lines if re.fullmatch(r"# \[[\w-]+\]", line)] == list(WORKFLOWS)
    asked = {str(Requirement(line.partition(";")[0])) for line in lines if line and line[0] != "#"}
    locked = {text for item in wheels.read_lock().sets for text in item.wanted}
    assert asked == locked, "run `make lock`"


@pytest.mark.parametrize(("name", "python"), [("a1111", "3.11"), ("comfyui", "3.12")])
def test_a_web_uis_set_has_what_the_list_beside_its_code_asks_for(name, python):
    from packaging.requirements import Requirement

    found = wheels.read_lock().find(name, python)
    lines = (ROOT / "fastsd_helpers" / "webui" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    asked = [Requirement(line.partition(" # ")[0].partition(" --hash")[0]) for line in lines if line and line[0] != "#"]
    assert len(asked) > 25
    for item in asked:
        row = found.row(item.name)
        assert row is not None, f"run `make lock`: {item.name}"
        assert item.url == row.url
        assert item.specifier.contains(row.version, prereleases=True), f"run `make lock`: {item}, {row.version}"


def test_resolving_one_set_anew_leaves_the_others_as_they_are(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_lock_under_test", ROOT / "scripts" / "make_lock.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = wheels.read_lock()

    def resolved(lines, python, work, **more):
        rows = before.find("comfyui", python).rows
        return [
            {
                "name": row.name,
                "version": row.version,
                "wheels": [{"name": f.name, "size": f.bytes, "hashes": {"sha256": f.sha256}} for f in row.files],
            }
            for row in rows
        ]

    monkeypatch.setattr(script, "resolve", resolved)
    assert script.make_lock("comfyui") == (ROOT / "wheels.lock").read_text(encoding="utf-8")
    assert script.changes(before, before) == ["Nothing changed: every version is the same as before."]


def test_the_a1111_set_holds_its_repairs():
    found = wheels.read_lock().find("a1111", "3.11")
    versions = {row.name: row.version for row in found.rows}
    assert (versions["setuptools"], versions["mediapipe"], versions["torch"]) == ("69.5.1", "0.10.9", "2.10.0")
    # Against what gradio, blendmodes and OpenCV ask for.
    assert (versions["pillow"], versions["numpy"], versions["gradio"]) == ("12.3.0", "1.26.2", "3.41.2")
    assert found.row("clip").url.startswith("https://github.com/openai/CLIP/archive/")
    sources = {row.name for row in found.rows if not row.files[0].name.endswith(".whl")}
    assert sources >= {"clip", "antlr4-python3-runtime", "fvcore"}


def test_an_altered_line_is_noticed_before_anything_else(tmp_path, shelf):
    _folder, lock, _rows = shelf
    text = lock.read_text()
    for old, new in (("gamma==0.3", "gamma==0.4"), ("alpha-one>=1", "alpha-one>=0"), ("beta>=2", "beta>=3")):
        lock.write_text(text.replace(old, new))
        with pytest.raises(InstallError, match=r"altered after it was made|damaged"):
            wheels.read_lock(lock)
    lock.write_text(text.replace("beta==2.5 --hash=sha256:", "beta==2.5 --hash=sha256:0000"))
    with pytest.raises(InstallError, match="damaged"):
        wheels.read_lock(lock)
    lock.write_text("not toml")
    with pytest.raises(InstallError, match=r"wheels\.lock is damaged") as caught:
        wheels.read_lock(lock)
    assert "make lock" in caught.value.hint
    with pytest.raises(InstallError, match="cannot be read"):
        wheels.read_lock(tmp_path / "none.lock")


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_a_python_without_a_set_is_told_which_have_one(version):
    with pytest.raises(
        InstallError, match=rf"locked for Python 3\.11, 3\.12, 3\.13, and this is Python {version}"
    ) as caught:
        wheels.read_lock().find("dreambooth", version)
    assert "Use Python 3.11, 3.12, 3.13" in caught.value.hint
    # Of an older Python pip would say that there is no such package for it.
    assert (install_command("dreambooth") in caught.value.hint) is (version == "3.14")
    with pytest.raises(InstallError, match="no set 'paint'"):
        wheels.read_lock().find("paint", "3.11")


# -------------------------------------------------------------------------------------------------- the plan


def environment(installed: dict[str, str], python: str = "3.13") -> wheels.Environment:
    nowhere = Path("/nowhere")
    return wheels.Environment(nowhere, f"{python}.1", nowhere, nowhere, "linux x86_64", False, installed, False)


def planned(name: str, installed: dict[str, str], python: str = "3.13") -> dict[str, str]:
    plan = wheels.make_plan(wheels.read_lock().find(name, python), environment(installed, python))
    return {change.name: change.reason for change in plan.changes}


PLATFORM = {"torch": "2.11.0+cu128", "numpy": "2.1.3"}


def all_of(name: str) -> dict[str, str]:
    return PLATFORM | {row.name: row.version for row in wheels.read_lock().find(name, "3.13").rows}


def test_what_fits_stays_and_what_is_absent_comes_with_its_own_needs():
    full = all_of("dreambooth")
    assert planned("dreambooth", full) == {}
    older = full | {"transformers": "4.53.2", "huggingface-hub": "0.33.4"}
    assert planned("dreambooth", older) == {}
    del full["tensorboard"], full["werkzeug"], full["pillow-heif"]
    assert set(planned("dreambooth", full)) == {"tensorboard", "werkzeug", "pillow-heif"}
    assert planned("dreambooth", full)["werkzeug"].startswith("tensorboard needs werkzeug")


def test_a_package_that_is_too_old_is_not_replaced_and_it_is_told_how_to_raise_it():
    with pytest.raises(InstallError, match=r"transformers 4\.40\.0 \(fastsd needs >=4\.53\)") as caught:
        planned("dreambooth", all_of("dreambooth") | {"transformers": "4.40.0"})
    assert "pip install --upgrade 'transformers>=4.53'" in caught.value.hint


def test_what_somebody_has_newer_than_is_locked_stays_in_every_set():
    for name in WORKFLOWS:
        full = all_of(name) | {"nncf": "99", "openvino": "2099.1", "pyngrok": "9.1.0", "gradio": "99.0"}
        assert planned(name, full) == {}


def test_any_build_of_opencv_will_do():
    full = all_of("dreambooth")
    del full["opencv-python-headless"]
    assert set(planned("dreambooth", full)) == {"opencv-python-headless"}
    assert planned("dreambooth", full | {"opencv-contrib-python": "4.11.0.86"}) == {}


def test_without_torch_or_numpy_nothing_is_installed():
    full = {name: version for name, version in all_of("dreambooth").items() if name not in PLATFORM}
    assert planned("dreambooth", full) == {}  # what is there is the platform's own business
    del full["accelerate"]
    with pytest.raises(InstallError, match="only its platform can provide: numpy, torch") as caught:
        planned("dreambooth", full)
    assert "run: pip install numpy; fastsd never installs or replaces what belongs" in caught.value.hint


@pytest.mark.parametrize(("python", "platform"), [("3.14", "linux x86_64"), ("3.13", "darwin arm64")])
def test_where_no_set_fits_what_was_installed_by_hand_is_enough(monkeypatch, python, platform):
    wanted = {name: version for name, version in all_of("dreambooth").items() if name != "certifi"}
    here = wheels.Environment(**{**vars(environment(wanted, python)), "platform": platform})
    monkeypatch.setattr(installer, "read_environment", lambda *args: here)
    report = wheels.install("dreambooth")
    assert (report.changes, report.tool) == ((), "none")
    here.installed["diffusers"] = "0.30.0"
    with pytest.raises(InstallError, match=r"is locked for Python|wheels\.lock was made for") as caught:
        wheels.install("dreambooth")
    assert install_command("dreambooth") in caught.value.hint
    del here.installed["bitsandbytes"], here.installed["diffusers"]
    assert wheels.install("dreambooth", skip=("bitsandbytes", "diffusers")).changes == ()


def test_an_environment_of_its_own_gets_exactly_what_is_locked():
    found = wheels.read_lock().find("a1111", "3.11")
    exact = {row.name: row.version for row in found.rows}
    plan = wheels.make_plan(found, environment(exact | {"torch": "2.10.0+cpu"}, "3.11"))
    assert plan.changes == ()
    plan = wheels.make_plan(found, environment(exact | {"gradio": "3.41.3"}, "3.11"))
    assert [(change.name, change.before, change.after) for change in plan.changes] == [("gradio", "3.41.3", "3.41.2")]
    plan = wheels.make_plan(found, environment({}, "3.11"), skip=("torch", "torchvision", "triton", "nvidia-*"))
    assert not [change for change in plan.changes if change.name.startswith(("torch-", "nvidia", "triton"))]
    assert {change.name for change in plan.changes} >= {"torchsde", "gradio", "clip"}


IMAGES = sorted((ROOT / "tests" / "data" / "colab").glob("*.txt"))


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_colab_images_get_little_and_keep_all_they_have(path):
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    python = re.search(r"Python (3\.\d+)", first)[1]
    installed = dict(line.split("==") for line in lines)
    assert len(installed) > 600
    for name in WORKFLOWS:
        plan = wheels.make_plan(wheels.read_lock().find(name, python), environment(installed, python))
        assert [change.name for change in plan.changes if change.before] == [], "nothing is replaced"
        assert len(plan.changes) <= 12
        assert plan.bytes < 150e6


# --------------------------------------------------------------------------------------------- installing it


@needs_uv
def test_only_the_difference_is_installed_and_a_second_run_changes_nothing(shelf, python):
    install(shelf, python)
    beta = site_folder(python) / "beta"
    shutil.rmtree(beta)
    shutil.rmtree(beta.with_name("beta-2.5.dist-info"))
    report = install(shelf, python)
    assert [(change.name, change.after) for change in report.changes] == []  # alpha fits, and its needs are its own
    shutil.rmtree(beta.with_name("alpha_one"))
    shutil.rmtree(beta.with_name("alpha_one-1.0.dist-info"))
    report = install(shelf, python, check_imports=True)
    assert {change.name for change in report.changes} == {"alpha-one", "beta"}
    assert report.modules == ("alpha_one", "beta")
    assert "Installed 2 of 3 packages" in report.lines()[0]
    before = site_of(python)
    again = install(shelf, python)
    assert (again.changes, again.tool, site_of(python)) == ((), "none", before)
    assert "is here already" in again.lines()[0]


@needs_uv
def test_a_dry_run_changes_nothing(shelf, python):
    before = site_of(python)
    report = install(shelf, python, dry_run=True)
    assert {change.name for change in report.changes} == {"alpha-one", "beta", "gamma"}
    assert "Would install 3" in report.lines()[0]
    assert site_of(python) == before


@needs_uv
@pytest.mark.parametrize(("at", "said"), [(11, "SHA-256 differs"), (60, "a broken file instead of a package")])
def test_a_wheel_altered_by_one_byte_is_refused_and_nothing_is_changed(shelf, python, at, said):
    folder, _lock, _rows = shelf
    wheel = folder / "gamma-0.3-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[at] ^= 1
    wheel.write_bytes(content)
    before = site_of(python)
    with pytest.raises(InstallError, match=rf"gamma 0\.3 was not installed.*{said}"):
        install(shelf, python)
    assert site_of(python) == before


@needs_uv
def test_a_version_that_is_gone_is_named_and_nothing_is_changed(shelf, python):
    folder, _lock, _rows = shelf
    (folder / "beta-2.5-py3-none-any.whl").unlink()
    before = site_of(python)
    with pytest.raises(InstallError, match=r"beta 2\.5 was not installed.*not where it is looked for"):
        install(shelf, python)
    assert site_of(python) == before


def test_what_reports_its_users_to_a_maker_is_proved_and_told_of_nobody(tmp_path, monkeypatch):
    told = tmp_path / "told"
    reporter = f"def report():\n    open({str(told)!r}, 'w').close()\n"
    user = "try:\n    import openvino_telemetry\n    openvino_telemetry.report()\nexcept ImportError:\n    pass\n"
    for name, code in (("early", user), ("openvino-telemetry", reporter), ("zealous", user)):
        with zipfile.ZipFile(make_wheel(tmp_path / "wheels", name, "1.0", code)) as wheel:
            wheel.extractall(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    names = ["early", "openvino-telemetry", "zealous"]
    assert prove(wheels.read_environment(), names) == (["early", "openvino_telemetry", "zealous"], [])
    assert not told.exists()


@needs_uv
def test_a_package_that_does_not_import_is_named_with_its_line(tmp_path, python):
    folder = tmp_path / "wheels"
    broken = make_wheel(folder, "broken", "1.0", code="import nothing_like_it\n")
    lock = make_lock(tmp_path / "little.lock", {broken: []}, ["broken"])
    with pytest.raises(InstallError, match=r"import broken: ModuleNotFoundError.*__init__\.py:2"):
        install((folder, lock, {}), python, check_imports=True)


@needs_uv
def test_a_failed_proof_is_remembered_and_repeated(tmp_path, python):
    folder, flag = tmp_path / "wheels", tmp_path / "driver"
    picky = make_wheel(folder, "picky", "1.0", code=f"import os\nassert os.path.exists({str(flag)!r}), 'no driver'\n")
    good = make_wheel(folder, "good", "1.0")
    lock = make_lock(tmp_path / "little.lock", {picky: [], good: []}, ["picky", "good"])
    shelf = folder, lock, {}
    for _again in range(2):
        with pytest.raises(InstallError, match=r"one does not work: picky: import picky.*no driver") as caught:
            install(shelf, python, check_imports=True)
        assert "run this again" in caught.value.hint
    told = install(shelf, python, dry_run=True, check_imports=True)
    assert (told.changes, told.unproved) == ((), ("picky",))
    assert told.lines()[-1] == "Import check not passed yet: picky. `fastsd install little` tries again."
    assert install(shelf, python, check_imports=True, skip=("pick*",)).modules == ()
    flag.touch()
    report = install(shelf, python, check_imports=True)
    assert (report.changes, report.tool, report.modules, report.unproved) == ((), "none", ("picky",), ())
    assert "Import check passed now: picky" in report.lines()[-1]
    again = install(shelf, python, check_imports=True)
    assert (again.modules, len(again.lines())) == ((), 1)
    assert not list(site_folder(python).glob("*unproved*"))


@needs_uv
@pytest.mark.parametrize(
    ("tool", "lost"),
    [
        ("uv", "gamma/__init__.py"),
        ("uv", "gamma-0.3.dist-info/RECORD"),
        pytest.param("pip", "gamma/__init__.py", marks=pytest.mark.slow),
    ],
)
def test_what_an_installation_was_cut_short_with_is_installed_anew(shelf, python, monkeypatch, tool, lost):
    call = tools._call

    def stopped(*args):
        call(*args)
        (site_folder(python) / lost).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "_call", stopped)
    with pytest.raises(KeyboardInterrupt):
        install(shelf, python)
    monkeypatch.setattr(tools, "_call", call)
    if tool == "pip":
        monkeypatch.setattr(tools, "find_uv", lambda: None)
    report = install(shelf, python, check_imports=True)
    assert {change.name for change in report.changes} >= {"gamma"}
    assert (report.tool, "gamma" in report.modules) == (tool, True)
    assert (site_folder(python) / lost).is_file()
    assert not list(site_folder(python).glob("*unproved*"))
    assert install(shelf, python, check_imports=True).changes == ()


def test_notes_that_cannot_be_read_or_written_stop_nothing(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    note = unproved.Unproved("1.0", whole=True)
    unproved.write_unproved(site, {"a": note})
    assert unproved.read_unproved(site) == {"a": note}
    before = [path.read_bytes() for path in site.iterdir()]
    with read_only(site):
        unproved.write_unproved(site, {})
    assert [path.read_bytes() for path in site.iterdir()] == before
    for text in ("", "[]", '{"a": {}}', '{"a": 1}', "\x00"):
        (site / "fastsd-unproved.json").write_text(text)
        assert unproved.read_unproved(site) == {}
    unproved.write_unproved(site, {})
    assert list(site.iterdir()) == []


@needs_uv
def test_a_package_upgraded_by_hand_is_put_back_where_versions_are_exact(tmp_path, shelf, python):
    folder, _lock, rows = shelf
    exact = make_lock(tmp_path / "exact.lock", rows, own=True)
    install((folder, exact, rows), python)
    newer = make_wheel(tmp_path / "newer", "gamma", "9.9")
    newer_lock = make_lock(tmp_path / "newer.lock", {newer: []}, own=True)
    wheels.install("little", python=python, lock=newer_lock, wheel_folder=newer.parent)
    assert install(shelf, python).changes == ()  # 9.9 is within >=0.1
    report = install((folder, exact, rows), python)
    assert [(change.name, change.before, change.after) for change in report.changes] == [("gamma", "9.9", "0.3")]
    wheels.install("little", python=python, lock=newer_lock, wheel_folder=newer.parent)
    narrow = make_lock(tmp_path / "narrow.lock", rows, ["gamma>=0.1,<1"])
    report = install((folder, narrow, rows), python)  # in the platform's Python nothing that is there is moved
    assert (report.changes, report.left) == ((), ("gamma 9.9 (fastsd asks for <1,>=0.1)",))
    assert report.lines()[-1].endswith("and not changed: gamma 9.9 (fastsd asks for <1,>=0.1).")


@needs_uv
def test_an_own_environments_set_is_never_installed_into_this_python(tmp_path, shelf):
    _folder, _lock, rows = shelf
    exact = make_lock(tmp_path / "exact.lock", rows, own=True)
    with pytest.raises(InstallError, match="needs an environment of its own"):
        wheels.install("little", lock=exact, wheel_folder=tmp_path)


@needs_uv
def test_an_environment_that_is_there_is_kept_and_a_foreign_folder_is_not_touched(tmp_path, python):
    assert wheels.make_environment(tmp_path / "environment", python=HERE) == python
    with pytest.raises(InstallError, match=rf"is an environment of Python {HERE}, and Python 3\.9 is required"):
        wheels.make_environment(tmp_path / "environment", python="3.9")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InstallError, match="is not empty"):
        wheels.make_environment(tmp_path / "mine", python=HERE)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(InstallError, match=r"could not be made with Python 2\.5"):
        wheels.make_environment(tmp_path / "old", python="2.5")


def test_what_the_platform_set_for_its_own_python_does_not_reach_ours(monkeypatch):
    for name in ("UV_CONSTRAINT", "UV_SYSTEM_PYTHON", "PYTHONPATH", "PIP_CONSTRAINT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mirror.example/simple")
    found = wheels.own_environ()
    assert not {"UV_CONSTRAINT", "UV_SYSTEM_PYTHON", "PYTHONPATH", "PIP_CONSTRAINT"} & set(found)
    assert found["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"


# --------------------------------------------------------------------------------------------- what goes wrong


@needs_uv
def test_a_place_that_cannot_be_written_is_told_before_anything_is_downloaded(shelf, python):
    site = site_folder(python)
    with read_only(site), pytest.raises(InstallError, match=r"cannot be written to .*site-packages") as caught:
        install(shelf, python)
    assert "venv" in caught.value.hint


@needs_uv
def test_too_little_room_and_a_managed_python_are_told(shelf, python, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10)
    with pytest.raises(DiskFull, match="needed for 'little'"):
        install(shelf, python)
    found = wheels.read_environment(python, ["alpha-one", "beta", "gamma"])
    managed = wheels.Environment(**{**vars(found), "managed": True})
    monkeypatch.setattr(installer, "read_environment", lambda *args: managed)
    with pytest.raises(InstallError, match="belongs to the operating system"):
        install(shelf, python)


@needs_uv
def test_a_real_disk_that_fills_up_halfway_is_told_and_the_next_run_makes_it_whole(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    large = make_wheel(folder, "large", "1.0", code=f"x = '{'y' * 900_000}'\n")
    lock = make_lock(tmp_path / "little.lock", {large: []}, ["large"])
    with small_disk(tmp_path / "disk", "3m") as disk:
        python = wheels.make_environment(disk / "environment", python=sys.executable)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 500_000))
        with pytest.raises(DiskFull, match="needed for 'little'"):
            install((folder, lock, {}), python)
        monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10**12)
        with pytest.raises(InstallError, match=r"large 1\.0 was not installed from .*: the disk is full"):
            install((folder, lock, {}), python)
        ballast.unlink()
        report = install((folder, lock, {}), python, check_imports=True)
        assert (len(report.changes), report.modules) == (1, ("large",))
        assert not list(site_folder(python).glob("*unproved*"))


@needs_uv
def test_two_installations_into_one_python_wait_for_each_other(shelf, python, monkeypatch):
    prefix = python.parent.parent
    monkeypatch.setattr(installer, "_WAIT_S", 0.3)
    with installer.one_at_a_time(prefix), pytest.raises(InstallError, match="Another installation into"):
        install(shelf, python)
    monkeypatch.setattr(installer, "_WAIT_S", 60.0)
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(install(shelf, python))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(report.changes) for report in reports) == [0, 3]


def test_without_uv_and_pip_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tools, "_has_pip", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DependencyMissing, match="Neither uv nor pip") as caught:
        tools.pip_command(environment({}))
    assert caught.value.hint == "Run: pip install uv"
    monkeypatch.setattr(shutil, "which", lambda name: "/elsewhere/pip")
    assert tools.pip_command(environment({})) == ["/elsewhere/pip", "--python", "/nowhere"]


@needs_uv
def test_a_uv_that_cannot_be_started_is_told_and_nothing_is_changed(shelf, python, tmp_path, monkeypatch):
    (tmp_path / "uv").write_bytes(b"\x7fELF, cut short")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setattr(tools, "find_uv", lambda: tmp_path / "uv")
    before = site_of(python)
    with pytest.raises(DependencyMissing, match="uv cannot be started: Exec format error") as caught:
        install(shelf, python)
    assert "pip install --force-reinstall uv" in caught.value.hint
    assert site_of(python) == before


@needs_uv
def test_the_command_line_without_uv_and_pip_ends_with_2(python, tmp_path):
    """In a real Python that has neither, with nothing but a shell on the path."""
    import packaging

    shutil.copytree(Path(packaging.__file__).parent, site_folder(python) / "packaging")
    numpy = site_folder(python) / "numpy-2.1.3.dist-info"  # the platform's own, or so it says
    numpy.mkdir()
    (numpy / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.3\n")
    code = "import sys; from fastsd_helpers.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [python, "-c", code, "install", "webui", "--json"]
    environ = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, cwd=tmp_path, check=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, said["exit_code"]) == (2, 2), done.stderr
    assert said["error"] == "Neither uv nor pip is installed, so nothing can be installed."
    assert said["hint"] == "Run: pip install uv"
    assert "Traceback" not in done.stderr


@needs_uv
def test_without_pip_the_wheels_are_installed_and_it_is_said_that_none_are_kept(cached, monkeypatch, caplog):
    run, archive = cached
    uv = wheels.find_uv()
    monkeypatch.setattr(tools, "find_uv", lambda: uv)
    monkeypatch.setattr(tools, "_has_pip", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert len(run().changes) == 3
    assert "pip is not installed, so the wheels cannot be kept" in caplog.text
    assert not archive.exists()


@needs_uv
@pytest.mark.slow
def test_pip_does_it_too_when_there_is_no_uv(shelf, python, monkeypatch):
    monkeypatch.setattr(tools, "find_uv", lambda: None)
    report = install(shelf, python)
    assert (report.tool, len(report.changes)) == ("pip", 3)
    folder, _lock, _rows = shelf
    shutil.rmtree(site_folder(python) / "gamma-0.3.dist-info")
    (folder / "gamma-0.3-py3-none-any.whl").write_bytes(b"PK other")
    with pytest.raises(InstallError, match=r"gamma 0\.3 was not installed"):
        install(shelf, python)


def test_a_package_in_memory_at_another_version_asks_for_a_restart(monkeypatch):
    there = {name: version for name, version in all_of("dreambooth").items() if name != "safetensors"}
    plan = wheels.make_plan(wheels.read_lock().find("dreambooth", "3.13"), environment(there))
    module = type(sys)("safetensors")
    module.__version__ = "0.4.0"
    monkeypatch.setitem(sys.modules, "safetensors", module)
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"safetensors": ["safetensors"]})
    assert installer.imported_versions(plan) == {"safetensors": "0.4.0"}
    report = installer._report(plan, 0.0, tool="uv", restart=("safetensors",))
    assert "Restart the runtime now: safetensors" in report.lines()[-1]


IN_MEMORY = """
import json, sys
import beta, gamma                       # as a notebook has them when its first cell installs
from fastsd_helpers import wheels
report = wheels.install("little", lock=sys.argv[1], wheel_folder=sys.argv[2], check_imports=False)
print(json.dumps({"changes": [change.name for change in report.changes], "restart": report.restart,
                  "said": report.lines()[-1], "tool": report.tool}))
"""


@needs_uv
@pytest.mark.parametrize("old", ["beta", "gamma", "both", "none"])
def test_only_what_is_in_memory_at_another_version_asks_for_a_restart(shelf, python, tmp_path, old):
    """A package that is fixed at the version in memory, and one that nobody imported, ask for none."""
    folder, lock, _rows = shelf
    packaging = pytest.importorskip("packaging")  # every platform has it, in pip at least
    shutil.copytree(Path(packaging.__file__).parent, site_folder(python) / "packaging")
    for name, right in (("beta", "2.5"), ("gamma", "0.3")):
        version = "0.0.1" if old in (name, "both") else right
        (tmp_path / name).mkdir()
        wheel = make_wheel(tmp_path / name, name, version)
        # One of another version is uninstalled, as far as its record goes: what is recorded is never replaced.
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site_folder(python), [path for path in archive.namelist() if version == right or
                                                     ".dist-info/" not in path])  # fmt: skip
    # Noted as put in by an installation that was cut: these are installed anew whatever their version.
    notes = {name: unproved.Unproved({"beta": "2.5", "gamma": "0.3"}[name], whole=False) for name in ("beta", "gamma")}
    unproved.write_unproved(site_folder(python), notes)
    environ = {**os.environ, "PATH": os.pathsep.join([str(wheels.find_uv().parent), os.environ["PATH"]])}
    done = subprocess.run(
        [python, "-c", IN_MEMORY, str(lock), str(folder)], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tool"] == "uv"
    assert set(report["changes"]) == {"alpha-one", "beta", "gamma"}
    expected = [name for name in ("beta", "gamma") if old in (name, "both")]
    assert report["restart"] == expected
    assert ("Restart the runtime now: " + ", ".join(expected) in report["said"]) == bool(expected)


@needs_uv
@pytest.mark.parametrize("there", [True, False], ids=["in the folder", "not in the folder"])
def test_an_archive_with_an_address_is_taken_from_the_folder_else_asked_for_there(shelf, python, monkeypatch, there):
    """Where only the package index was brought along, an archive of GitHub still comes from GitHub."""
    folder, lock, rows = shelf
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    gamma = next(wheel for wheel in rows if wheel.name.startswith("gamma"))
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as github:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asked.append("once")
                    github.accept()[0].close()  # no TLS: it is enough to know that somebody came

        threading.Thread(target=answer, daemon=True).start()
        address = f"https://127.0.0.1:{github.getsockname()[1]}/archive/{gamma.name}"
        lock = make_lock(lock, rows, ["alpha-one>=1", "gamma>=0.1"], addresses={gamma: address})
        if there:
            report = install((folder, lock, rows), python, offline=False)
            assert {change.name for change in report.changes} == {"alpha-one", "beta", "gamma"}
            assert (site_folder(python) / "gamma-0.3.dist-info").is_dir()
        else:
            gamma.unlink()
            with pytest.raises(InstallError, match="gamma"):
                install((folder, lock, rows), python, offline=False)
            assert not list(site_folder(python).glob("gamma*"))
    assert (len(asked) > 1) == (not there), "the first is before anybody came"


class _Index(http.server.BaseHTTPRequestHandler):
    """A package index on this machine: a page of links, and wheels that are cut or replaced as `mode` says."""

    mode, folder = "good", Path()

    def log_message(self, *args):
        """Stay silent."""

    def do_GET(self):
        name, mode = self.path.strip("/").split("/")[-1], self.mode
        is_wheel = name.endswith(".whl")
        body = (self.folder / name).read_bytes() if is_wheel else self._links_to(name, yanked=mode == "yanked")
        if mode == "html" or (mode == "html wheels" and is_wheel):
            self._send(200, b"<!DOCTYPE html><title>Hotel: log in</title>", "text/html")
        elif mode in ("401", "407", "502"):
            self._send(int(mode), b"<html>", "text/html")
        elif mode == "gone":
            self._send(404, b"", "text/html")
        elif mode == "altered" and is_wheel:
            self._send(200, body[:11] + bytes([body[11] ^ 1]) + body[12:], "application/zip")
        elif mode == "cut" and is_wheel:
            self._send(200, body, "application/zip", upto=100)
        else:
            self._send(200, body, "application/octet-stream" if is_wheel else "text/html")

    def _links_to(self, name, *, yanked):
        found = [path.name for path in self.folder.iterdir() if canonical(path.name.split("-")[0]) == name]
        mark = ' data-yanked="it was broken"' if yanked else ""
        return "".join(f'<a href="/files/{item}"{mark}>{item}</a>' for item in found).encode()

    def _send(self, status, body, kind, upto=None):
        with contextlib.suppress(ConnectionError):  # a client that has read enough hangs up
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:upto])


@pytest.fixture
def index(shelf, monkeypatch):
    """An index over HTTP with the shelf's wheels; its class attribute `mode` breaks it."""
    handler = type("Index", (_Index,), {"folder": shelf[0], "mode": "good"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://user:indexpassword@127.0.0.1:{server.server_port}/simple/")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


@needs_uv
def test_from_an_index_it_installs(shelf, index, python):
    _folder, lock, _rows = shelf
    assert len(wheels.install("little", python=python, lock=lock).changes) == 3


_WRONG = {
    "cut": "the network or the package index did not answer",
    "html": "no index answers there but a login page",
    "html wheels": "a web page or a broken file instead of a package",
    "altered": "its SHA-256 differs",
    "gone": "withdrawn",
    "401": "requires a login or refuses access",
    "407": "requires a login or refuses access",
    "502": "the network or the package index did not answer",
    "nobody": "the network or the package index did not answer",
}
# pip says less: of an index without an answer only that it gave no version.
_WRONG_WITH_PIP = dict.fromkeys(
    ("html", "gone", "401", "407", "502", "nobody"), "the package index gave no version of it"
)
_WRONG_WITH_PIP |= dict.fromkeys(("cut", "altered", "html wheels"), "its SHA-256 differs")


@needs_uv
@pytest.mark.parametrize(
    ("tool", "mode", "said"),
    [
        *(("uv", mode, said) for mode, said in _WRONG.items()),
        *(pytest.param("pip", mode, said, marks=pytest.mark.slow) for mode, said in _WRONG_WITH_PIP.items()),
    ],
)
def test_an_index_that_answers_wrongly_changes_nothing_and_is_told_with_what_to_do(
    shelf, index, python, monkeypatch, caplog, tool, mode, said
):
    caplog.set_level("DEBUG", logger="fastsd_helpers")
    _folder, lock, _rows = shelf
    index.mode = mode
    if mode == "nobody":
        monkeypatch.setenv("UV_DEFAULT_INDEX", "http://user:indexpassword@127.0.0.1:9/simple/")
    if tool == "pip":
        monkeypatch.setattr(tools, "find_uv", lambda: None)
        monkeypatch.setenv("PIP_INDEX_URL", os.environ["UV_DEFAULT_INDEX"])
        monkeypatch.setenv("PIP_RETRIES", "0")
    before = site_of(python)
    with pytest.raises(InstallError, match=rf"was not installed: .*{re.escape(said)}.*\. {tool} said: ") as caught:
        wheels.install("little", python=python, lock=lock)
    assert "un this again" in caught.value.hint
    assert caught.value.exit_code == 2
    assert "indexpassword" not in str(caught.value) + caplog.text
    assert site_of(python) == before


@needs_uv
@pytest.mark.parametrize("tool", ["uv", pytest.param("pip", marks=pytest.mark.slow)])
def test_a_yanked_version_is_still_the_locked_one(shelf, index, python, monkeypatch, tool):
    _folder, lock, _rows = shelf
    index.mode = "yanked"
    if tool == "pip":
        monkeypatch.setattr(tools, "find_uv", lambda: None)
        monkeypatch.setenv("PIP_INDEX_URL", os.environ["UV_DEFAULT_INDEX"])
    report = wheels.install("little", python=python, lock=lock, check_imports=False)
    assert (report.tool, len(report.changes)) == (tool, 3)


def test_a_temporary_folder_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(installer.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(InstallError, match="the installation lock, cannot be opened") as caught:
        installer.one_at_a_time(tmp_path).__enter__()
    assert "TMPDIR" in caught.value.hint


# -------------------------------------------------------------------------------------------- the archive of wheels


@pytest.fixture
def cached(shelf, index, python, tmp_path, monkeypatch):
    """`install` with a cache on "Drive"; the index is reached by pip, which fetches, and by uv, which installs."""
    _folder, lock, _rows = shelf
    monkeypatch.setenv("PIP_INDEX_URL", os.environ["UV_DEFAULT_INDEX"])
    monkeypatch.setenv("PIP_RETRIES", "0")
    drive = tmp_path / "drive" / "wheels"

    def run(**more):
        remove_packages(python)
        return wheels.install("little", python=python, lock=lock, cache=drive, check_imports=False, **more)

    return run, drive / f"fastsd-wheels-little-py{HERE}.zip"


def remove_packages(python: Path) -> None:
    """What a new machine is: nothing installed."""
    for path in site_folder(python).glob("*"):
        if path.name.startswith(("alpha", "beta", "gamma")):
            shutil.rmtree(path)


@needs_uv
def test_wheels_are_kept_in_one_archive_and_used_without_the_network(cached, index, shelf, caplog):
    caplog.set_level("INFO", logger="fastsd_helpers")
    run, archive = cached
    assert len(run().changes) == 3
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    assert f"Saved the wheels for the next time in {archive}" in caplog.text
    with zipfile.ZipFile(archive) as packed:
        kept = {name: packed.read(name) for name in packed.namelist()}
    assert kept == {path.name: path.read_bytes() for path in shelf[0].iterdir()}
    before, index.mode = archive.read_bytes(), "html"
    assert len(run().changes) == 3
    assert len(run(offline=True).changes) == 3
    assert "Every wheel is in" in caplog.text
    assert archive.read_bytes() == before


@pytest.fixture
def archive(shelf, tmp_path):
    """A whole archive of the shelf's wheels, and the set it belongs to."""
    folder, lock, _rows = shelf
    lock_set = wheels.read_lock(lock).find("little", HERE)
    cache = WheelCache(tmp_path / "drive", lock_set)
    shutil.copytree(folder, tmp_path / "fetched")
    assert cache.pack(tmp_path / "fetched") == cache.path.stat().st_size
    return cache, lock_set.rows


@pytest.mark.parametrize(
    ("harm", "lacking", "said"),
    [
        ("none", 0, ""),
        ("no zip", 3, "is damaged"),
        ("cut", 3, "is damaged"),
        ("one byte", 1, "gamma-0.3-py3-none-any.whl in "),
        ("other wheel", 1, "its SHA-256 differs from the lock's"),
        ("one is lacking", 1, ""),
    ],
)
def test_a_damaged_archive_is_told_and_made_anew(archive, shelf, tmp_path, caplog, harm, lacking, said):
    cache, rows = archive
    whole, gamma = cache.path.read_bytes(), (shelf[0] / "gamma-0.3-py3-none-any.whl").read_bytes()
    at = whole.index(gamma) + 40
    if harm == "no zip":
        cache.path.write_bytes(b"<!DOCTYPE html>")
    elif harm == "cut":
        cache.path.write_bytes(whole[: len(whole) // 2])
    elif harm == "one byte":
        cache.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif harm != "none":
        with zipfile.ZipFile(cache.path, "w") as packed:
            packed.comment = b"fastsd-wheels 1"
            for path in shelf[0].iterdir():
                if harm == "other wheel" or "gamma" not in path.name:
                    packed.writestr(path.name, path.read_bytes() + b"x" * ("gamma" in path.name))
    (tmp_path / "unpacked").mkdir()
    assert len(cache.unpack(rows, tmp_path / "unpacked")) == lacking
    assert len(list((tmp_path / "unpacked").iterdir())) == 3 - lacking
    assert said in caplog.text
    assert bool(caplog.text) is bool(said)
    for path in (tmp_path / "unpacked").iterdir():
        assert path.read_bytes() == (shelf[0] / path.name).read_bytes()
    shutil.copytree(shelf[0], tmp_path / "unpacked", dirs_exist_ok=True)
    cache.pack(tmp_path / "unpacked")
    assert cache.path.read_bytes() == whole
    assert list(cache.path.parent.iterdir()) == [cache.path]


def test_what_the_archive_had_stays_in_it_and_what_the_lock_does_not_name_goes(archive, shelf, tmp_path):
    cache, rows = archive
    whole = cache.path.read_bytes()
    with zipfile.ZipFile(cache.path, "a") as packed:
        packed.writestr("../../escaped.txt", "x")
        packed.writestr("delta-1.0-py3-none-any.whl", "x")
    (tmp_path / "one").mkdir()
    assert cache.unpack(rows[:1], tmp_path / "one") == []
    assert len(list((tmp_path / "one").iterdir())) == 1
    cache.pack(tmp_path / "one")
    assert cache.path.read_bytes() == whole
    assert not list(tmp_path.rglob("escaped.txt"))


def test_what_cannot_be_kept_is_told_and_the_old_archive_stays(archive, tmp_path, caplog):
    cache, _rows = archive
    whole = cache.path.read_bytes()
    with read_only(cache.path.parent):
        assert cache.keep(tmp_path / "fetched") == 0
    assert "The wheels could not be saved: " in caplog.text
    assert cache.path.read_bytes() == whole
    assert list(cache.path.parent.iterdir()) == [cache.path]


@needs_uv
@pytest.mark.slow
def test_what_the_archive_lacks_is_fetched_and_an_altered_wheel_is_neither_installed_nor_kept(cached, shelf, python):
    run, archive = cached
    wheel = shelf[0] / "gamma-0.3-py3-none-any.whl"
    good = wheel.read_bytes()
    wheel.write_bytes(good[:-1] + b"x")
    with pytest.raises(InstallError, match=r"gamma 0\.3 was not installed.*SHA-256 differs"):
        run()
    assert not [path for path in site_folder(python).glob("*") if path.name.startswith("gamma")]
    assert not archive.exists()
    wheel.write_bytes(good)
    run()
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-200])
    assert len(run().changes) == 3
    assert archive.read_bytes() == whole
