"""Build what a release hands out: wheel, zip of the project, the notebooks and their checksums; `make release`.

Nothing is fetched, and nothing but tracked files gets in, of the tests none. The same commit gives the same bytes with
the same setuptools. Wheel and zip are then installed in empty environments of their own, which have to answer, and the
notebooks have to find the wheel in an empty folder.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import set_version
import write_first_cells

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BYTES = 30 * 10**6
# Where there is no Git, as in an unpacked zip, everything counts as tracked but these.
LEFT_OUT = {".git", "__pycache__", "build", "dist", "demo-output", "Fast-Dreambooth", "Fast-TrOCR", "sd"}


def tracked_files() -> list[str]:
    """Every file of the project, as paths from its root."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if not LEFT_OUT & set(name.parts) and not name.parts[0].startswith((".venv", ".pytest", ".ruff"))
    )


def commit_time() -> int:
    """When the commit was made, in seconds; a fixed day where Git does not say."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "log", "-1", "--format=%ct"]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return 1_767_225_600  # 2026-01-01


def check_tag(revision: str) -> None:
    """Refuse a release whose notebooks name a tag that is not this commit: it is what they would fetch."""
    if revision == "main" or not (ROOT / ".git").exists():
        return
    command = ["git", "rev-parse", "--quiet", "--verify"]
    here, tagged = (
        subprocess.run([*command, name], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        for name in ("HEAD", f"refs/tags/{revision}^{{commit}}")
    )
    if here != tagged:
        raise SystemExit(f"The notebooks take the tag {revision}, which is not this commit: git tag {revision}")


def write_zip(target: Path, names: list[str], *, inside: str, epoch: int) -> None:
    """Write the files under one folder, sorted and dated alike, so that the bytes depend on nothing else."""
    date = time.gmtime(epoch)[:6]
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(f"{inside}/{name}", date)
            info.external_attr = (0o755 if os.access(ROOT / name, os.X_OK) else 0o644) << 16
            archive.writestr(info, (ROOT / name).read_bytes(), zipfile.ZIP_DEFLATED, 9)


def build_wheel(folder: Path, names: list[str], *, epoch: int) -> Path:
    """Build the wheel from a copy of the files, because setuptools writes beside what it builds."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
            (source / name).chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
        words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
        _pip(Path(sys.executable), words, {"SOURCE_DATE_EPOCH": str(epoch)})
    return next(folder.glob("*.whl"))


def check_installs(what: Path, version: str) -> None:
    """Install a wheel or zip in an empty environment, without a network, and ask it for its version and models."""
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place) / "bin" / "python"
        # An empty environment has no setuptools, which a zip is built with: this one's is lent.
        lent = {"PYTHONPATH": sysconfig.get_path("purelib")} if what.suffix == ".zip" else {}
        _pip(python, ["install", "--no-deps", "--no-index", "--no-build-isolation", str(what)], lent)
        for words in (["--version"], ["models", "list"]):
            command = [str(python), "-I", "-m", "fastsd_helpers", *words]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode or (words == ["--version"] and version not in done.stdout):
                raise SystemExit(f"{what.name} is installed but does not work:\n{done.stdout}{done.stderr}")
    print(f"{what.name} installs in an empty environment, and answers.")


def check_notebooks(out: Path, wheel: Path, version: str) -> None:
    """Run each first cell's search in an empty folder that holds the wheel; it has to find that one."""
    for name in write_first_cells.NOTEBOOKS:
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(wheel, place)
            cells = json.loads((out / name).read_text(encoding="utf-8"))["cells"]
            cell = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
            search, found, _ = cell.rpartition(".set_up(")
            code = f"{search}\nhere = sys.modules['fastsd_helpers']\nprint(here.__version__, here.__file__)"
            # Neither this environment's packages nor this user's cache: a Python as it comes.
            command = [getattr(sys, "_base_executable", sys.executable), "-I", "-c", code]
            clean = os.environ | {"HOME": place}
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, env=clean)
            if not found or not done.stdout.startswith(f"{version} {place}"):
                raise SystemExit(f"{name} does not find the wheel beside it:\n{done.stdout}{done.stderr}")
    print("The notebooks find the wheel beside them, in an empty folder.")


def _pip(python: Path, words: list[str], more: dict[str, str]) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean | more)
    if done.returncode:
        raise SystemExit(f"pip {words[0]} failed:\n{done.stderr[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for what is built")
    out = parser.parse_args().out
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version, place = project["project"]["version"], project["tool"]["fastsd"]
    stale = [name for name in write_first_cells.NOTEBOOKS if not write_first_cells.is_fresh(ROOT / "notebooks" / name)]
    if stale:
        raise SystemExit(f"Not up to date: {', '.join(stale)}. Run scripts/write_first_cells.py.")
    if wrong := set_version.differing():
        raise SystemExit(f"{', '.join(wrong)} differ from pyproject.toml. Run scripts/set_version.py.")
    check_tag(place["revision"])
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("fastsd_helpers-*"), *out.glob("*.ipynb"), *out.glob("SHA256SUMS")]:
        old.unlink()
    names, epoch = tracked_files(), commit_time()
    archive = out / f"fastsd_helpers-{version}.zip"
    kept = [name for name in names if not name.startswith("tests/")]
    write_zip(archive, kept, inside=f"fastsd_helpers-{version}", epoch=epoch)
    wheel = build_wheel(out, names, epoch=epoch)
    for name in write_first_cells.NOTEBOOKS:
        shutil.copyfile(ROOT / "notebooks" / name, out / name)
    made = sorted(path for path in out.iterdir() if path.suffix in (".whl", ".zip", ".ipynb"))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made}
    (out / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")
    for path in (wheel, archive):
        if path.stat().st_size > LARGEST_BYTES:
            raise SystemExit(
                f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; {LARGEST_BYTES / 1e6:.0f} are allowed."
            )
        check_installs(path, version)
    check_notebooks(out, wheel, version)
    for path in made:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    print(f"With neither of these the notebooks ask {place['repository']} for '{place['revision']}'.")
    if place["revision"] == "main":
        print(f"For a tag: python scripts/set_version.py {version} --revision v{version}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
