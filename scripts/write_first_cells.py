"""Write the first code cell of every notebook: the one that finds fastsd_helpers before any of it can be imported.

The text is one for all notebooks but for the word that names the workflow; version and address are pyproject.toml's.
`make release` runs it first. With `--check` nothing is written, and the exit code says whether a cell is stale.
"""

import argparse
import json
import tomllib
from pathlib import Path

__all__ = ["NOTEBOOKS", "TITLE", "first_cell", "is_fresh", "write_first_cell"]

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {"a1111.ipynb": "webui", "dreambooth.ipynb": "dreambooth", "trocr.ipynb": "trocr"}
TITLE = "# @title 1 · Set up\n"

# Neither pip nor git: what is found goes on the path of this kernel. So a file that is here needs no network and no
# tool that builds it, and a wheel may have whatever name a browser has given it.
# `ways` has what is installed; a checkout around the notebook; wheels, zips and unpacked copies beside it, on a Drive
# that is mounted already, and among Kaggle's inputs. The address is asked only when none of them serves. The notebook's
# own version wins, else the newest; of one version the first. A zip is unpacked once: its last file comes last.
CELL = (
    TITLE
    + r"""import glob, importlib.util, io, os, re, sys, urllib.request, zipfile, zlib
VERSION, ARCHIVE, PART, here = "@version@", "@archive@", "fastsd_helpers/__init__.py", os.getcwd()
installed = getattr(importlib.util.find_spec("fastsd_helpers"), "origin", None) or ""
Stopped = type("Stopped", (Exception,), {"_render_traceback_": lambda self: [f"✗ {self}"]})
found, ways = {}, [installed, *(os.path.normpath(here + "/.." * up + "/" + PART) for up in range(9))]
for spot in glob.escape(here), "/content/drive/MyDrive/fastsd", *("/kaggle/input" + "/*" * depth for depth in range(5)):
    ways += [way for name in ("*fastsd*.whl", "*fastsd*.zip", "*/" + PART) for way in glob.glob(f"{spot}/{name}")]
for way in (way for way in [*ways, ARCHIVE] if os.path.isfile(way) or way == ARCHIVE and not found):
    try:
        file = open(way, "rb") if way != ARCHIVE else io.BytesIO(urllib.request.urlopen(way, timeout=60).read())
        box = None if way.endswith(".py") else zipfile.ZipFile(file)
        name = min((name for name in box.namelist() if f"/{name}".endswith("/" + PART)), key=len) if box else way
        text = (box.testzip() or box.read(name)) if box else file.read()
        found.setdefault(re.search(rb'__version__ = "(.+?)"', text)[1].decode(), (way, name, box))
    except Exception:
        way == ARCHIVE or print(f"✗ {way} is skipped: it is damaged, or holds no fastsd_helpers (a zip in a zip?).")
if not found: raise Stopped(f"@none@")
way, name, box = found[max(found, key=lambda text: (text == VERSION, [int(word) for word in re.findall(r"\d+", text)]))]
mark = zlib.crc32(repr([(item.filename, item.CRC) for item in box.infolist()]).encode()) if box else 0
home = os.path.expanduser(f"~/.cache/fastsd/code/{mark:08x}") if box else ""
if box and not os.path.exists(f"{home}/{box.namelist()[-1]}"): box.extractall(home)
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.join(home, name)))] if way != installed else []
[sys.modules.pop(name) for name in [*sys.modules] if way != installed and name.split(".")[0] == "fastsd_helpers"]
importlib.import_module("fastsd_helpers").set_up("@workflow@", VERSION)
"""
)
NONE = (
    "fastsd_helpers is not on this machine, and {ARCHIVE} does not give it. Put its wheel or zip beside this notebook, "
    "in {here}; or where your files are kept (Colab: the folder fastsd of your Google Drive, with Drive connected; "
    "Kaggle: a data set of this notebook); or open the notebook in an unpacked copy of the project. Then run this cell "
    "again."
)


def first_cell(notebook: str, root: Path = ROOT) -> str:
    """The text of a notebook's first code cell, by the notebook's file name; `root` has the pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    place = project["tool"]["fastsd"]
    values = {
        "version": project["project"]["version"],
        "archive": f"{place['repository']}/archive/{place['revision']}.zip",
        "none": NONE,
        "workflow": NOTEBOOKS[notebook],
    }
    text = CELL
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text.rstrip("\n")


def is_fresh(path: Path) -> bool:
    """Whether a notebook's first code cell is up to date."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code") == first_cell(path.name)


def write_first_cell(path: Path, root: Path = ROOT) -> None:
    """Bring a notebook's first code cell up to date, and nothing else of it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["source"] = first_cell(path.name, root).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a cell is not up to date")
    check = parser.parse_args().check
    stale = [path for path in (ROOT / "notebooks" / name for name in NOTEBOOKS) if not is_fresh(path)]
    for path in stale:
        if not check:
            write_first_cell(path)
        print(f"{path.name}: {'not up to date' if check else 'brought up to date'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
