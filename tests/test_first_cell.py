"""The first cell of the notebooks: one text, and every way in it takes, with small packages of the library's name."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("write_first_cells", ROOT / "scripts" / "write_first_cells.py")
cells = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cells)

CELL = cells.first_cell("dreambooth.ipynb")
VERSION = next(line for line in CELL.splitlines() if line.startswith("VERSION")).split('"')[1]
ARCHIVE = next(line for line in CELL.splitlines() if line.startswith("VERSION")).split('"')[3]
OLDER, NEWER = "0.0.9", "0.10.0"
# What the cell does without the library is under test here; what it then calls says where it came from.
CODE = """__version__ = "{version}"
def set_up(workflow, notebook):
    import os, sys
    print("SET UP", workflow, notebook, __version__, os.path.dirname(os.path.dirname(__file__)))
"""


def write_package(folder: Path, version: str = VERSION) -> Path:
    """A folder with a package of the library's name."""
    package = folder / "fastsd_helpers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(CODE.format(version=version))
    return folder


def write_archive(path: Path, version: str = VERSION, *, inside: str = "") -> Path:
    """A wheel, or with `inside` a zip as `git archive` makes it, with a file after the package's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{inside}fastsd_helpers/__init__.py", CODE.format(version=version))
        archive.writestr(f"{inside}fastsd_helpers/more.py", "x = 1\n" * 5000)
        archive.writestr(f"{inside}tests/data/fastsd_helpers/__init__.py", CODE.format(version="99.0"))
        archive.writestr(f"{inside}last.txt", "the last one")
    return path


class Place:
    """A notebook's working folder, a Drive, Kaggle's inputs and an address, all under one folder."""

    def __init__(self, folder: Path) -> None:
        self.work, self.drive, self.inputs = folder / "work [1]", folder / "drive", folder / "input"
        self.home, self.address = folder / "home", "http://127.0.0.1:9/main.zip"
        for made in (self.work, self.home):
            made.mkdir(parents=True)

    def cell(self) -> str:
        text = CELL.replace("/content/drive/MyDrive/fastsd", str(self.drive)).replace("/kaggle/input", str(self.inputs))
        return text.replace(ARCHIVE, self.address)

    def run(self, *, cwd: Path | None = None, path: tuple[Path, ...] = (), first: str = "", last: str = "") -> str:
        """What the cell prints in a Python that has no package but IPython's, and no program on its PATH."""
        code = f"""
import sys
sys.path += {[*map(str, path), sysconfig.get_path("purelib")]!r}
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor", history_length=0)
for text in {[first, self.cell(), last]!r}:
    done = shell.run_cell(text)
    if not done.success:
        print("STOPPED")
        break
"""
        command = [sys.executable, "-I", "-S", "-c", code]
        environment = {"HOME": str(self.home), "PATH": "/nowhere", "IPYTHONDIR": str(self.home / "ipython")}
        done = subprocess.run(
            command, cwd=cwd or self.work, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Place:
    pytest.importorskip("IPython")
    return Place(tmp_path / "place")


def came_from(said: str) -> tuple[str, str]:
    """(version, folder) that the last set-up named."""
    line = [line for line in said.splitlines() if line.startswith("SET UP")][-1]
    _set, _up, workflow, notebook, version, *folder = line.split(" ")
    assert (workflow, notebook) == ("dreambooth", VERSION)
    return version, " ".join(folder)


def first_cells() -> dict[str, str]:
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return found


def test_every_notebook_has_the_one_first_cell_up_to_date() -> None:
    found = first_cells()
    assert set(found) == set(cells.NOTEBOOKS)
    assert {name: text == cells.first_cell(name) for name, text in found.items()} == dict.fromkeys(found, True), (
        "run: python scripts/write_first_cells.py"
    )
    same = {text.replace(f'"{cells.NOTEBOOKS[name]}"', "") for name, text in found.items()}
    assert len(same) == 1, "the workflow's name is the only difference"


def test_the_first_cell_is_at_most_25_lines_and_runs_no_program() -> None:
    assert len(CELL.splitlines()) <= 25
    assert not {"subprocess", "os.system", "pip", "git "} & set(CELL.replace('"', " ").split())


def test_what_is_installed_is_taken_before_everything_else(place: Place, tmp_path: Path) -> None:
    site = write_package(tmp_path / "site")
    write_archive(place.work / "fastsd_helpers-0.1.0-py3-none-any.whl")
    assert came_from(place.run(path=(site,))) == (VERSION, str(site))


@pytest.mark.parametrize("below", ["", "notebooks", "notebooks/of/mine"])
def test_a_checkout_that_the_notebook_lies_in_is_used_without_being_installed(place: Place, below: str) -> None:
    checkout = write_package(place.work / "project")
    (checkout / below).mkdir(parents=True, exist_ok=True)
    assert came_from(place.run(cwd=checkout / below)) == (VERSION, str(checkout))


def test_a_clone_beside_the_notebook_that_has_the_packages_own_name_is_used(place: Place) -> None:
    # Python takes the clone's own folder for a package without a file, which has none of its names.
    clone = write_package(place.work / "fastsd_helpers")
    said = place.run(first=f"import sys; sys.path.insert(0, {str(place.work)!r}); import fastsd_helpers")
    assert came_from(said) == (VERSION, str(clone))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("fastsd_helpers-0.1.0-py3-none-any.whl", ""),
        ("fastsd_helpers-0.1.0-py3-none-any (1).whl", ""),
        ("fastsd_helpers-0.1.0.zip", "fastsd_helpers-0.1.0/"),
        ("fastsd_helpers-main.zip", "fastsd_helpers-main/"),
        ("my fastsd.zip", "fastsd_helpers/"),
    ],
)
def test_a_wheel_or_zip_is_unpacked_and_used_under_any_name(place: Place, name: str, inside: str) -> None:
    write_archive((place.drive if "(1)" in name else place.work) / name, inside=inside)
    version, folder = came_from(place.run())
    assert version == VERSION
    assert (Path(folder) / "fastsd_helpers" / "more.py").is_file()
    assert Path(folder).is_relative_to(place.home), "nothing is written beside the notebook or on Drive"


def test_a_new_kernel_takes_the_unpacked_copy_and_an_interrupted_one_is_made_whole(place: Place) -> None:
    write_archive(place.work / "fastsd_helpers-0.1.0-py3-none-any.whl")
    _version, folder = came_from(place.run())
    module = Path(folder) / "fastsd_helpers" / "more.py"
    written = module.stat().st_mtime_ns
    assert came_from(place.run()) == (VERSION, folder)
    assert module.stat().st_mtime_ns == written
    module.unlink()
    (Path(folder) / "last.txt").unlink()  # what is written last, so it was cut short before
    place.run()
    assert module.is_file()


def test_another_file_of_the_same_name_and_version_is_unpacked_anew(place: Place) -> None:
    wheel = write_archive(place.work / "fastsd_helpers-0.1.0-py3-none-any.whl")
    _version, first = came_from(place.run())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("fastsd_helpers/mended.py", "")
    _version, second = came_from(place.run())
    assert first != second
    assert (Path(second) / "fastsd_helpers" / "mended.py").is_file()


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_kaggles_inputs_are_looked_through(place: Place, depth: int) -> None:
    folder = place.inputs.joinpath(*["datasets", "somebody", "fastsd"][:depth])
    write_archive(folder / "fastsd_helpers-0.1.0-py3-none-any.whl")
    assert came_from(place.run())[0] == VERSION


def test_a_zip_that_kaggle_has_unpacked_is_used_from_a_folder_that_cannot_be_written(place: Place) -> None:
    folder = write_package(place.inputs / "datasets" / "somebody" / "mine" / "fastsd_helpers-0.1.0")
    for made in (folder / "fastsd_helpers", folder):
        made.chmod(0o500)
    try:
        assert came_from(place.run()) == (VERSION, str(folder))
    finally:
        for made in (folder, folder / "fastsd_helpers"):
            made.chmod(0o700)


def test_the_notebooks_own_version_wins_over_a_newer_one_and_over_what_is_installed(
    place: Place, tmp_path: Path
) -> None:
    site = write_package(tmp_path / "site", OLDER)
    write_archive(place.work / "fastsd_helpers-0.10.0-py3-none-any.whl", NEWER)
    write_archive(place.drive / "fastsd_helpers-0.1.0-py3-none-any.whl")
    assert came_from(place.run(path=(site,)))[0] == VERSION


def test_without_the_notebooks_own_version_the_newest_is_taken_by_number_and_the_library_told(place: Place) -> None:
    for version in ("0.9.0", NEWER, OLDER):
        write_archive(place.work / f"fastsd_helpers-{version}-py3-none-any.whl", version)
    assert came_from(place.run())[0] == NEWER


def test_a_better_copy_that_arrives_while_another_is_in_memory_is_the_one_that_is_used(
    place: Place, tmp_path: Path
) -> None:
    site = write_package(tmp_path / "site", OLDER)
    write_archive(place.work / "fastsd_helpers-0.1.0-py3-none-any.whl")
    said = place.run(path=(site,), first="import fastsd_helpers; print(fastsd_helpers.__version__)")
    assert said.startswith(OLDER)
    assert came_from(said)[0] == VERSION


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "page":
        path.write_text("<!DOCTYPE html><title>Sign in</title>")
    elif how == "bits":
        place = data.index(b"more.py") + 30
        data[place : place + 8] = bytes(byte ^ 0xFF for byte in data[place : place + 8])
        path.write_bytes(data)
    elif how == "nested":
        inner = path.rename(path.with_name("inner.bin"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "fastsd_helpers-0.1.0-py3-none-any.whl")
        inner.unlink()
    elif how == "other":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photos/1.jpg", "x")


@pytest.mark.parametrize("how", ["cut", "empty", "page", "bits", "nested", "other"])
def test_a_file_that_is_damaged_is_named_and_the_next_way_taken(place: Place, how: str) -> None:
    damage(write_archive(place.work / "fastsd_helpers-0.1.0.zip", inside="fastsd_helpers-0.1.0/"), how)
    write_archive(place.drive / "fastsd_helpers-0.1.0-py3-none-any.whl")
    said = place.run()
    assert f"✗ {place.work}/fastsd_helpers-0.1.0.zip is skipped: it is damaged, or holds no fastsd_helpers" in said
    assert came_from(said)[0] == VERSION
    assert "Traceback" not in said


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_words: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *words: _Quiet(*words, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_projects_address_is_asked_when_nothing_is_here_and_needs_neither_git_nor_pip(
    place: Place, served: tuple[Path, str]
) -> None:
    folder, url = served
    write_archive(folder / "main.zip", NEWER, inside="fastsd_helpers-main/")
    place.address = f"{url}/main.zip"
    assert came_from(place.run())[0] == NEWER
    write_archive(place.work / "fastsd_helpers-0.0.9-py3-none-any.whl", OLDER)
    assert came_from(place.run())[0] == OLDER, "what is here is enough; no network is asked"


@pytest.mark.parametrize("how", ["refused", "missing", "page"])
def test_without_any_way_in_one_sentence_names_three_and_the_cell_stops(
    place: Place, served: tuple[Path, str], how: str
) -> None:
    folder, url = served
    (folder / "page.zip").write_text("<!DOCTYPE html>")
    place.address = {"refused": place.address, "missing": f"{url}/main.zip", "page": f"{url}/page.zip"}[how]
    said = place.run(last="print('THE NEXT CELL')")
    assert "STOPPED" in said
    assert "THE NEXT CELL" not in said
    text = said.replace("STOPPED", "").strip()
    assert text.startswith(f"✗ fastsd_helpers is not on this machine, and {place.address} does not give it.")
    assert len(text.splitlines()) == 1, text
    for way in (str(place.work), "Google Drive", "Kaggle", "unpacked copy", "run this cell again"):
        assert way in text


def test_the_cell_leaves_a_copy_that_is_installed_where_it_is(place: Place, tmp_path: Path) -> None:
    site = write_package(tmp_path / "site")
    said = place.run(path=(site,), last="import sys; print('FIRST ON THE PATH', sys.path[0])")
    assert f"FIRST ON THE PATH {site}" not in said, "its neighbours would hide Python's own modules"


def test_the_addresses_of_cell_and_command_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.runtime import REPOSITORY, REVISION, install_command

    assert f"{REPOSITORY}/archive/{REVISION}.zip" == ARCHIVE
    monkeypatch.setenv("PATH", "/nowhere")
    assert install_command("trocr") == f'pip install "fastsd_helpers[trocr] @ {ARCHIVE}"', "pip needs no Git for it"


# ----------------------------------------------------------------------------------------- what it calls


def test_a_notebook_of_another_version_is_told_so_and_children_find_this_copy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastsd_helpers.forms import readiness

    report = type("Report", (), {"changes": (), "restart": ()})()
    monkeypatch.setattr(readiness, "install", lambda *_words, **_more: report)
    monkeypatch.setattr(readiness, "start_log", lambda: None)
    monkeypatch.setattr(readiness, "quieten_libraries", lambda: None)
    monkeypatch.setattr(
        readiness, "examine", lambda **_more: type("Doctor", (), {"summary": lambda self, _w: ["ready"]})()
    )
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # as it was, after the test
    caplog.set_level("INFO", logger="fastsd_helpers")
    readiness.set_up("trocr", VERSION)
    readiness.set_up("trocr")
    assert "This notebook is of version" not in caplog.text
    readiness.set_up("trocr", NEWER)
    assert f"This notebook is of version {NEWER}, and fastsd_helpers in {ROOT} is {VERSION}" in caplog.text
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/somewhere/else", "once, and before what was there"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "fastsd_helpers", "--version"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert VERSION in done.stdout


@pytest.mark.parametrize("place", ["colab", "kaggle", "jupyter"])
def test_an_unpacked_copy_has_its_command_and_on_a_lent_machine_the_next_kernel_finds_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.forms import readiness

    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(readiness.sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(readiness, "where", lambda: place)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "")
    readiness.tell_children(ROOT)
    done = subprocess.run(["fastsd", "--version"], cwd="/", capture_output=True, text=True, check=False)
    assert VERSION in done.stdout, done.stderr
    command = [sys.executable, "-I", "-S", "-c", f"import site; site.addsitedir({str(site)!r}); import fastsd_helpers"]
    found = subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 0
    assert found == (place != "jupyter"), "a Python of the user's own gets nothing unasked"
    site.chmod(0o500)
    readiness.tell_children(tmp_path / "another")  # what cannot be written costs nobody the notebook
    site.chmod(0o700)


@pytest.mark.parametrize(
    ("workflow", "said"),
    [
        ("dreambooth", "free where sessions are kept ({here}/Fast-Dreambooth/Sessions)"),
        ("trocr", "free where sessions are kept ({here}/Fast-TrOCR/Sessions)"),
        ("webui", "free where models and images are kept ({here}/sd/stable-diffusion-webui)"),
    ],
)
def test_each_notebook_names_the_folder_that_it_will_use(
    workflow: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from fastsd_helpers.forms import readiness

    report = type("Report", (), {"changes": (), "restart": ()})()
    monkeypatch.setattr(readiness, "install", lambda *_words, **_more: report)
    monkeypatch.setattr(readiness, "start_log", lambda: None)
    monkeypatch.setattr(readiness, "quieten_libraries", lambda: None)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="fastsd_helpers")
    readiness.set_up(workflow)
    assert said.format(here=tmp_path) in caplog.text
    assert caplog.text.count(" are kept (") == 1


# ------------------------------------------------------------------------------------ what a release hands out


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release, built and installed in empty environments as `make release` does."""
    for package in ("setuptools", "nbclient", "ipykernel"):
        # Looked for, not imported: setuptools refuses where something has imported the old distutils before it.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install {package})")
    folder = tmp_path_factory.mktemp("release")
    command = [sys.executable, str(ROOT / "scripts" / "make_release.py"), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("installs in an empty environment, and answers.") == 2
    return folder


class Kernels:
    """Kernels of a Python that has the packages but not the library, as on a machine that a notebook comes to."""

    def __init__(self, folder: Path) -> None:
        import venv

        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        site = next((folder / "env" / "lib").glob("python*/site-packages"))
        # A folder named there is on the path; the files in it that put a checkout there are not read.
        (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        spec = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        words = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": words, "display_name": "x", "language": "python"}))
        empty = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JUPYTER_PATH")}
        home = folder / "home"
        home.mkdir()
        self.environment = empty | {"JUPYTER_PATH": str(folder / "jupyter"), "HOME": str(home), "PATH": "/nowhere"}

    def run(self, work: Path, *sources: str, monkeypatch: pytest.MonkeyPatch, **more: str) -> list[str]:
        """What each cell of a new kernel shows, an error's lines included."""
        import nbformat
        from nbclient import NotebookClient

        monkeypatch.setenv("JUPYTER_PATH", self.environment["JUPYTER_PATH"])
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        client = NotebookClient(
            notebook, timeout=180, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(work)}}
        )
        client.execute(env=self.environment | more)
        return [
            "".join(item.get("text", "") + "\n".join(item.get("traceback", [])) for item in cell.outputs)
            for cell in notebook.cells
        ]


WHERE = """
import subprocess, sys, fastsd_helpers
print(fastsd_helpers.__file__)
print(subprocess.run([sys.executable, "-m", "fastsd_helpers", "--version"], cwd="/", capture_output=True, text=True))
"""


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(600)
def test_what_a_release_hands_out_is_a_way_in_for_a_real_kernel(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels(tmp_path / "machine")
    notebook = json.loads((release / "dreambooth.ipynb").read_text(encoding="utf-8"))
    cell = next("".join(item["source"]) for item in notebook["cells"] if item["cell_type"] == "code")
    offline = cell.replace(ARCHIVE, "http://127.0.0.1:9/main.zip")
    empty = tmp_path / "empty"
    empty.mkdir()
    (said,) = kernels.run(empty, offline, monkeypatch=monkeypatch)
    assert said.startswith("✗ fastsd_helpers is not on this machine")
    assert "Traceback" not in said
    drive, inputs = tmp_path / "drive", tmp_path / "input" / "a data set"
    for name, folder, more in (
        ("fastsd_helpers-0.1.0-py3-none-any.whl", drive, {"COLAB_RELEASE_TAG": "release-colab"}),
        ("fastsd_helpers-0.1.0.zip", tmp_path / "beside", {}),
        ("fastsd_helpers-0.1.0-py3-none-any.whl", inputs, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}),
    ):
        folder.mkdir(parents=True)
        work = folder if folder.name == "beside" else empty
        (folder / name).write_bytes((release / name).read_bytes())
        there = offline.replace("/content/drive/MyDrive/fastsd", str(drive)).replace(
            "/kaggle/input", str(inputs.parent)
        )
        kernels = Kernels(tmp_path / f"machine of {folder.name}")
        said, where = kernels.run(work, there, WHERE, monkeypatch=monkeypatch, **more)
        assert "Python 3" in said, said
        assert "is skipped" not in said, said
        # A new kernel, in which on a lent machine not even the first cell has to come first.
        later = kernels.run(work, WHERE, monkeypatch=monkeypatch, **more) if folder == drive else []
        for found in (where, *later):
            assert str(tmp_path / f"machine of {folder.name}" / "home") in found
            assert f"returncode=0, stdout='fastsd {VERSION}" in found, found
        (folder / name).unlink()
