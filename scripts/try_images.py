"""Use everything in every Colab image, cheaply: in a Python where only what an image and the sets bring exists.

    python scripts/try_images.py                          # every image whose list is here
    python scripts/try_images.py 2025.07-cpu --only trocr # one image, one set's paths and notebook
    python scripts/try_images.py --without trocr-int8     # as if this set had not been installed
    python scripts/try_images.py --notebooks --write      # the notebooks alone; recorded in benchmarks/results

See image_farm.py for what that Python is, main_paths.py for the paths; then the notebooks run from their first cell to
the last, with pictures from outside the package.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from colab_lists import ROOT, SETS, image_names, read_image
from image_farm import make_farm

__all__ = ["NOTEBOOKS", "use_everything", "values_for"]

REPORT = ROOT / "benchmarks" / "results" / "colab_lists.md"
_HEAD = (
    "# Every Colab image's list, where nothing else can be imported",
    "",
    "`python scripts/try_images.py --notebooks --write`: each notebook from its first cell to its last, with pictures",
    "from outside the package, in a Python that finds only what the image's list and our sets bring (image_farm.py),",
    "at the versions of this environment. Not here: what a set adds and this environment has not.",
    "",
    "| image | packages | not here | what ran |",
    "| --- | ---: | --- | --- |",
)
# Notebook -> the set whose paths make its pictures, and which its first cell installs.
NOTEBOOKS = {"dreambooth": "dreambooth", "trocr": "trocr", "a1111": "webui"}


def values_for(notebook: str, work: Path) -> dict[str, dict]:
    """What is typed into a notebook's forms: pictures from outside, and as little work as touches everything."""
    if notebook == "dreambooth":
        return {
            "SessionConfig": {"session_name": "mug"},
            "show_photos_form": {"images": str(work / "photos"), "size": 64},
            "DreamBoothConfig": {
                "base_model": "demo", "method": "lora", "unet_steps": 2, "text_encoder_steps": 1, "sample_every": 0,
                "resolution": 64, "batch_size": 1,
            },
            "ExportConfig": {"format": "lora"},
        }  # fmt: skip
    if notebook == "trocr":
        return {
            "ReadingSessionConfig": {"session_name": "letters"},
            "show_lines_form": {"images": str(work / "lines"), "reader": "demo-reader"},
            "show_teach_form": {"data": str(work / "lines"), "epochs": 1, "augment": False, "held_out": 0.25},
        }
    return {}


def use_everything(
    python: Path,
    work: Path,
    sets: tuple[str, ...] = SETS,
    *,
    paths: tuple[str, ...] = (),
    notebooks: tuple[str, ...] = tuple(NOTEBOOKS),
) -> list[dict]:
    """Run the sets' paths (or these alone) and their notebooks with a Python; returns a row for each."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environ |= {"HOME": str(work), "HF_HOME": str(work / "hf")}
    command = [str(python), str(ROOT / "scripts" / "main_paths.py"), str(work), "--only", *sets]
    command += ["--paths", "pictures", *paths] if paths else []
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    *lines, last = done.stdout.rstrip().splitlines() or [""]
    print("\n".join(lines), flush=True)
    rows = json.loads(last) if last.startswith("[") else [_row("", "main_paths.py", done.returncode, 0, done.stdout)]
    for notebook, set_name in NOTEBOOKS.items():
        if set_name not in sets or notebook not in notebooks:
            continue
        started = time.monotonic()
        command = [str(python), str(ROOT / "scripts" / "run_notebook.py"), f"{ROOT}/notebooks/{notebook}.ipynb"]
        command += [str(work / f"notebook-{notebook}"), "--values", json.dumps(values_for(notebook, work))]
        done = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        row = _row(set_name, f"notebooks/{notebook}.ipynb", done.returncode, time.monotonic() - started, done.stdout)
        print(f"  {'ok  ' if row['ok'] else 'FAIL'} {row['path']} ({row['seconds']:.0f} s)\n{row['said']}", flush=True)
        rows.append(row)
    return rows


def _row(set_name: str, path: str, code: int, seconds: float, said: str) -> dict:
    lines = [line for line in said.splitlines() if line.strip() and "WARNING" not in line]
    return {
        "set": set_name, "path": path, "ok": code == 0, "seconds": seconds,
        "said": "" if code == 0 else "\n".join(lines[-8:]),
    }  # fmt: skip


def main() -> int:
    """Try one image after the other; 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="default: every image whose list is here")
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=SETS, help="these sets' paths and notebooks")
    parser.add_argument("--without", nargs="+", default=[], choices=SETS, help="do not install these sets")
    parser.add_argument("--notebooks", action="store_true", help="the notebooks alone")
    parser.add_argument("--write", action="store_true", help=f"record the table in {REPORT.relative_to(ROOT)}")
    chosen = parser.parse_args()
    failed, lines = 0, []
    for name in chosen.images or image_names():
        with tempfile.TemporaryDirectory(prefix="fastsd-image-") as folder:
            work = Path(folder)
            installed = tuple(item for item in SETS if item not in chosen.without)
            farm = make_farm(read_image(name), work / "python", sets=installed)
            print(f"{name}: {len(farm.brought)} packages; not here: {', '.join(sorted(farm.lacking)) or 'none'}")
            alone = ("pictures",) if chosen.notebooks else ()
            rows = use_everything(farm.python, work / "work", tuple(chosen.only), paths=alone)
            failed += sum(not row["ok"] for row in rows)
            said = ", ".join(f"{row['path']} {'ok' if row['ok'] else '**failed**'}" for row in rows)
            lines.append(f"| {name} | {len(farm.brought)} | {', '.join(sorted(farm.lacking)) or '-'} | {said} |")
            if chosen.write:
                REPORT.write_text("\n".join([*_HEAD, *lines, ""]), encoding="utf-8")
    print(f"{failed} failed" if failed else "Everything ran.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
