"""Give hostile models to every door, with the libraries of this environment and with those of older Colab images.

python scripts/hostile_models.py [--images now,2025.07,2026.01,2026.04] [--overlays FOLDER] [--write]

The models and doors are those of tests/hostile_models.py and tests/hostile_doors.py; each model is given as the user's
own and, where a door fetches, from a Hub on this machine. The libraries of an image are installed into a folder of
their own under FOLDER, once, and nothing of this environment is changed. Last, and to know what the look is for, each
model is given to the libraries themselves. Ends with 1 when anything ran, stayed, was touched, or asked somebody.
`--write` keeps the table in benchmarks/results/hostile_models.md.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

IMAGES = {
    "now": (),
    "2025.07": ("diffusers==0.34.0", "transformers==4.53.2", "huggingface_hub==0.33.4", "tokenizers==0.21.2",
                "peft==0.16.0", "accelerate==1.8.1", "safetensors==0.5.3", "hf-xet==1.1.5"),
    "2026.01": ("diffusers==0.36.0", "transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.2",
                "peft==0.18.1", "accelerate==1.12.0", "safetensors==0.7.0", "hf-xet==1.2.0"),
    "2026.04": ("diffusers==0.37.1", "transformers==5.0.0", "huggingface_hub==1.8.0", "tokenizers==0.22.2",
                "peft==0.18.1", "accelerate==1.13.0", "safetensors==0.7.0", "hf-xet==1.4.2"),
}  # fmt: skip
RESULT = ROOT / "benchmarks" / "results" / "hostile_models.md"


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", default=",".join(IMAGES), help="which libraries, separated by commas")
    parser.add_argument("--overlays", default=str(Path(tempfile.gettempdir()) / "fastsd-overlays"))
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULT.name}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        Path(chosen.child).write_text(json.dumps(try_all()))
        return 0
    found = {image: run(image, Path(chosen.overlays)) for image in chosen.images.split(",")}
    text = report(found)
    print(text)
    if chosen.write:
        RESULT.write_text(text)
    return int(any(row["bad"] for one in found.values() for row in one["rows"]))


def run(image: str, overlays: Path) -> dict[str, Any]:
    """The table with the libraries of one image, in a process of its own."""
    folder = overlays / f"overlay-{image}"
    if IMAGES[image] and not folder.is_dir():
        fresh = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(fresh), *IMAGES[image]]
        subprocess.run(command, check=True)
        fresh.rename(folder)
    paths = [*([str(folder)] if IMAGES[image] else []), str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "rows.json"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HOME": place, "HF_HOME": f"{place}/hf"}
        environment |= {
            "XDG_CACHE_HOME": f"{place}/cache",
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        subprocess.run(
            [sys.executable, __file__, "--child", str(out)], env=environment, cwd=place, check=True, timeout=1800,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(out.read_text())


# ---------------------------------------------------------------------------------------------------- one process


def try_all() -> dict[str, Any]:
    """Every kind through every door, then without the look; with the libraries of this process."""
    import builtins
    import logging

    import diffusers.utils.logging
    import huggingface_hub.constants
    from hostile_doors import DOORS, LOCAL
    from hostile_models import FOREIGN, KINDS, contents, write
    from hub_server import HubServer

    from fastsd_helpers.runtime import versions

    logging.disable(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    asked: list[str] = []
    builtins.input = lambda *words: asked.append(str(words)) or "n"  # type: ignore[assignment]
    place = Path.cwd() / "work"
    marks = {name: place / "marks" / name.replace(" ", "-") for name in KINDS}
    (place / "marks").mkdir(parents=True)
    made = {name: write(name, place / "made" / name.replace(" ", "-"), marks[name]) for name in KINDS}
    sys.path.insert(0, str(made["part of a foreign library"].parent))
    sys.modules.pop(FOREIGN, None)
    rows = []
    for name, kind in KINDS.items():
        for door, call in DOORS[kind.model].items():
            own = made[name]
            before = contents(own.parent)
            spot = place / "doors" / f"{name}-{door}".replace(" ", "-")
            bad = trial(call, str(own), spot / "own", marks[name], asked)
            bad += ["touched"] if contents(own.parent) != before else []
            rows.append({"kind": name, "door": door, "from": "own", "bad": bad})
            if door in LOCAL or kind.model == "described checkpoint":
                continue
            cache = spot / "cache"
            huggingface_hub.constants.HF_HUB_CACHE = str(cache)
            with HubServer({"evil/model": own if own.is_dir() else own.parent}) as hub:
                os.environ["HF_ENDPOINT"] = hub.url
                ref = "evil/model" if own.is_dir() else f"{hub.url}/evil/model/resolve/main/{own.name}"
                bad = trial(call, ref, spot / "hub", marks[name], asked)
                bad += [f"fetched {file}" for file in hub.downloaded() if file.endswith(".py")]
            bad += [f"stays: {path}" for path in kept(cache) + kept(spot / "hub")]
            rows.append({"kind": name, "door": door, "from": "hub", "bad": bad})
    without = {}
    for name, kind in KINDS.items():
        asked.clear()
        bare(kind.model, made[name])
        without[name] = "runs" if marks[name].exists() else "asks" if asked else "-"
    known = versions()
    shown = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers", "diffusers", "huggingface_hub"))
    return {
        "rows": rows,
        "without": without,
        "versions": shown,
    }


def trial(call: Callable[[str, Path], object], ref: str, place: Path, mark: Path, asked: list[str]) -> list[str]:
    """What is wrong with how a door treats a hostile model; nothing when it is refused in a sentence."""
    from fastsd_helpers.errors import FastSDError

    place.mkdir(parents=True)
    bad = []
    try:
        call(ref, place)
        bad.append("opened")
    except FastSDError as err:
        bad += [] if err.hint and "\n" not in err.problem else ["no sentence"]
    except Exception:
        bad.append(traceback.format_exc().strip().splitlines()[-1])
    bad += ["it ran"] if mark.exists() else []
    bad += ["somebody is asked"] if asked else []
    mark.unlink(missing_ok=True)
    asked.clear()
    return bad


def kept(place: Path) -> list[str]:
    """Files that anything of a model could be in."""
    found = [path for path in place.rglob("*") if not path.is_dir()]
    return [
        path.name for path in found if path.suffix not in (".lock", ".TAG", ".log") and "Microsoft" not in path.parts
    ]


def bare(model: str, path: Path) -> None:
    """Open a model as the libraries' own manuals say, without anything of ours."""
    import contextlib
    import pickle

    import diffusers
    import torch
    import transformers

    steps: list[Callable[[], object]] = []
    if model == "pipeline":
        steps = [lambda: diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)]
    elif model == "controlnet":
        steps = [lambda: diffusers.ControlNetModel.from_pretrained(path)]
    elif model in ("reader", "captioner"):
        whole = "VisionEncoderDecoderModel" if model == "reader" else "BlipForConditionalGeneration"
        steps = [
            lambda: getattr(transformers, whole).from_pretrained(path, local_files_only=True),
            lambda: transformers.AutoTokenizer.from_pretrained(path, local_files_only=True),
        ]
    elif path.suffix == ".safetensors" and model == "described checkpoint":
        import importlib

        from omegaconf import OmegaConf

        def build() -> object:  # as ldm.util.instantiate_from_config does
            found = OmegaConf.load(path.with_suffix(".yaml")).model
            module, name = found.target.rsplit(".", 1)
            return getattr(importlib.import_module(module), name)(*dict(found.params).values())

        steps = [build]
    else:  # the way of programs that do not ask torch for its restricted reader
        steps = [lambda: torch.load(path, weights_only=False), lambda: pickle.loads(path.read_bytes())]
    for step in steps:
        with contextlib.suppress(Exception):
            step()


# --------------------------------------------------------------------------------------------------------- report


def report(found: dict[str, dict[str, Any]]) -> str:
    """The record in Markdown."""
    images = list(found)
    lines = ["# Hostile models through every door", ""]
    lines += [f"`python scripts/hostile_models.py --write`, {datetime.date.today()}.", ""]
    lines += [f"- {image}: {found[image]['versions']}" for image in images]
    lines += [
        "",
        "| libraries | doors tried | ran | stayed, touched or asked | no sentence |",
        "| --- | --- | --- | --- | --- |",
    ]
    for image in images:
        rows = found[image]["rows"]
        ran = sum("it ran" in row["bad"] for row in rows)
        stayed = sum(
            any(what.startswith(("stays", "touched", "somebody", "fetched")) for what in row["bad"]) for row in rows
        )
        other = sum(bool(row["bad"]) for row in rows)
        lines.append(f"| {image} | {len(rows)} | {ran} | {stayed} | {other} |")
    lines += ["", "Each kind, the doors it was given to, and what the libraries do with it without the look", ""]
    lines += ["(runs: its code ran; asks: somebody is asked whether it may; -: neither).", ""]
    lines += [f"| kind | doors | {' | '.join(images)} |", "| --- | --- |" + " --- |" * len(images)]
    first = found[images[0]]["rows"]
    for kind in found[images[0]]["without"]:
        doors = list(dict.fromkeys(row["door"] for row in first if row["kind"] == kind))
        lines.append(
            f"| {kind} | {', '.join(doors)} | {' | '.join(found[image]['without'][kind] for image in images)} |"
        )
    wrong = [(image, row) for image in images for row in found[image]["rows"] if row["bad"]]
    lines += ["", *(f"- {image}: {row['kind']}, {row['door']}, {row['from']}: {row['bad']}" for image, row in wrong)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
