"""Build the Python environment of a Colab image, add only what `fastsd install` adds, and use everything in it.

    python scripts/colab_image.py 2026.08-gpu                  # `make colab IMAGE=2026.08-gpu`
    python scripts/colab_image.py 2025.07-cpu --into DIR       # environments and pictures go there
    python scripts/colab_image.py 2026.08-gpu --keep --only trocr   # one set's paths, in the environment that is there

What our packages and the image's own notebook need is installed at the image's versions, from the package index,
without letting a resolver choose: a package's needs that the image has are added at the image's version, the others are
not. So is what transformers, diffusers, accelerate and peft look for when they are imported. What cannot be had is
listed. Then this project's wheel is installed as a user does it, `fastsd install` adds each set, and
scripts/main_paths.py and the notebooks run in that environment. The report goes to benchmarks/results/colab_images.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from colab_lists import ROOT, SETS, Image, read_image
from try_images import use_everything

from fastsd_helpers.wheels import find_uv
from fastsd_helpers.wheels.difference import matches
from fastsd_helpers.wheels.lockfile import canonical

REPORT = ROOT / "benchmarks" / "results" / "colab_images.md"
# The platform's own, which no set names: what a notebook runs on.
PLATFORM = ("pip", "setuptools", "wheel", "torch", "torchvision", "numpy", "ipykernel", "ipython", "ipywidgets")
NOTEBOOK = ("nbclient", "nbformat", "jupyter-client", "requests", "psutil")
# Looked for by transformers, diffusers, accelerate, peft and gradio, which behave otherwise where one of them is there.
LOOKED_FOR = (
    *("torchaudio", "torchao", "jax", "jaxlib", "flax", "tensorflow", "keras", "scipy", "scikit-learn", "pandas"),
    *("datasets", "wandb", "timm", "sentence-transformers", "onnx", "librosa", "numba", "ftfy", "opencv-python"),
    *("opencv-contrib-python", "soundfile", "pydantic", "orjson", "cryptography", "rich", "typer", "pyarrow", "polars"),
)
# The CUDA libraries: a build of torch brings its own, and the rest of the image's are for GPUs alone.
CUDA = ("nvidia-*", "*-cu1[0-9]*", "*cuda*", "triton")
_BATCH_S = 1800


def find_python(version: str) -> str:
    """An interpreter of this minor version that can make environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return candidate
    sys.exit(f"No Python {version} with ensurepip was found: install it, for example with pyenv.")


class Builder:
    """One environment that becomes an image's, package by package."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.python = folder / "bin" / "python"
        self.lacking: dict[str, str] = {}  # package -> why it could not be downloaded
        self.other: dict[str, str] = {}  # package -> the version that is there instead

    def build(self) -> None:
        """Install round after round until nothing that is there asks for a package of the image that is not."""
        if not self.python.exists():
            subprocess.run([find_python(self.image.python), "-m", "venv", str(self.folder)], check=True)
        had = self.image.packages.keys() - {name for name in self.image.packages if matches(name, CUDA)}
        waiting, tried = self._roots() & had, set()
        while waiting:
            print(f"  {len(waiting)} packages of the image", flush=True)
            self._install(sorted(waiting))
            tried |= waiting
            waiting = (self._asked_for() & had) - tried
        # A torch built for CUDA loads its libraries on a CPU too.
        if any(matches(name, CUDA) for name in self._asked_for()):
            self._resolve_for_torch()
        rest = sorted(had - tried)
        print(f"  {len(rest)} packages of the image that nothing of ours asks for", flush=True)
        self._install(rest, rest=True)
        # What one of these asks for is built from its source where there is no wheel (omegaconf's antlr4).
        asked = self._asked_for() & self.lacking.keys()
        for name in asked:
            del self.lacking[name]
        if asked:
            self._install(sorted(asked))

    def _roots(self) -> set[str]:
        wanted = set(PLATFORM) | set(NOTEBOOK) | set(LOOKED_FOR)
        for name in SETS:
            wanted |= {canonical(re.match(r"[\w.-]+", text)[0]) for text in self.image.plan(name).lock_set.wanted}
        return wanted

    def installed(self) -> dict[str, str]:
        """What is there now."""
        code = (
            "import importlib.metadata, json\n"
            "print(json.dumps([(d.metadata['Name'], d.version) for d in importlib.metadata.distributions()]))"
        )
        done = subprocess.run([str(self.python), "-I", "-c", code], capture_output=True, text=True, check=True)
        return {canonical(name): version for name, version in json.loads(done.stdout)}

    def _asked_for(self) -> set[str]:
        code = (
            "import importlib.metadata, json\n"
            "from pip._vendor.packaging.requirements import Requirement\n"
            "there, asked = set(), set()\n"
            "for dist in importlib.metadata.distributions():\n"
            "    there.add(dist.metadata['Name'])\n"
            "    for text in dist.requires or ():\n"
            "        need = Requirement(text)\n"
            "        if need.marker is None or need.marker.evaluate({'extra': ''}):\n"
            "            asked.add(need.name)\n"
            "print(json.dumps([sorted(there), sorted(asked)]))"
        )
        done = subprocess.run([str(self.python), "-I", "-c", code], capture_output=True, text=True, check=True)
        there, asked = ({canonical(name) for name in names} for names in json.loads(done.stdout))
        return asked - there

    def _install(self, names: list[str], *, rest: bool = False) -> None:
        """These at the image's versions, in halves where one cannot be had; of the rest only what comes as a wheel."""
        pins = [f"{name}=={self.image.packages[name].partition('+')[0]}" for name in names]
        reason = self._uv([*pins, *(("--only-binary", ":all:") if rest else ())])
        if reason is None:
            return
        half = len(names) // 2
        if half:
            self._install(names[:half], rest=rest)
            self._install(names[half:], rest=rest)
        elif not rest and self._uv(names) is None:
            self.other[names[0]] = self.installed().get(names[0], "?")
        else:
            self.lacking[names[0]] = reason

    def _resolve_for_torch(self) -> None:
        """The CUDA libraries of exactly this build of torch: their versions are its own, not the image's."""
        torch = self.image.packages["torch"].partition("+")[0]
        held = [f"{name}=={version}" for name, version in self.installed().items() if not matches(name, CUDA)]
        reason = self._uv([f"torch=={torch}", *held], needs=True)
        if reason:
            self.lacking["torch's CUDA libraries"] = reason

    def _uv(self, words: list[str], *, needs: bool = False) -> str | None:
        """Install; None, or why it failed."""
        command = [str(find_uv()), "pip", "install", "--quiet", "--no-config", "--python", str(self.python)]
        command += [] if needs else ["--no-deps"]
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, check=False, timeout=_BATCH_S, cwd=self.folder
        )
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None if done.returncode == 0 else " ".join(said)[:300] or "no reason given"


def add_ours(builder: Builder, work: Path) -> list[str]:
    """This project's wheel, then every set, as a user adds them; returns lines about each."""
    wheels = work / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*command, str(ROOT)], check=True)
    wheel = next(wheels.glob("*.whl"))
    pip = [str(builder.python), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run(pip, check=True)
    said = []
    for name in SETS:
        before, started = builder.installed(), time.monotonic()
        done = subprocess.run(
            [str(builder.python), "-I", "-m", "fastsd_helpers", "install", name],
            capture_output=True, text=True, check=False, cwd=work,
        )  # fmt: skip
        after = builder.installed()
        added = [f"{package} {after[package]}" for package in sorted(after.keys() - before.keys())]
        moved = [f"{package} {before[package]} -> {after.get(package)}" for package in sorted(before)
                 if after.get(package) != before[package]]  # fmt: skip
        print(f"  install {name}: rc {done.returncode}, added {added}, changed {moved}", flush=True)
        verdict = "" if done.returncode == 0 else f"; **ended with {done.returncode}**: {done.stderr.strip()[-400:]}"
        said.append(
            f"| {name} | {', '.join(added) or 'nothing'} | {', '.join(moved) or 'nothing'} | "
            f"{time.monotonic() - started:.0f}{verdict} |"
        )
    return said


def main() -> int:
    """Build, add, run and report one image; 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="such as 2026.08-gpu: a list in tests/data/colab")
    parser.add_argument("--into", type=Path, default=Path("/tmp/fastsd-colab"), help="folder for the environment")
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=SETS, help="paths of these sets alone")
    parser.add_argument("--keep", action="store_true", help="go on with an environment that is there already")
    parser.add_argument("--report", type=Path, default=REPORT)
    chosen = parser.parse_args()
    image = read_image(chosen.image)
    work = chosen.into / f"{image.name}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if not chosen.keep:
        shutil.rmtree(chosen.into / image.name, ignore_errors=True)
    builder = Builder(image, chosen.into / image.name)
    started = time.monotonic()
    builder.build()
    there = builder.installed()
    built_s = time.monotonic() - started
    installs = add_ours(builder, work)
    rows = use_everything(builder.python, work, tuple(chosen.only))
    text = report(builder, there, built_s, installs, rows)
    keep_report(chosen.report, image.name, text)
    failed = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} ran; {chosen.report}")
    return 1 if failed or any("**" in line for line in installs) else 0


def report(builder: Builder, there: dict[str, str], built_s: float, installs: list[str], rows: list[dict]) -> str:
    """One image's part of the page."""
    image = builder.image
    exact = [name for name, version in image.packages.items() if there.get(name, "") == version.partition("+")[0]
             or there.get(name) == version]  # fmt: skip
    cuda = sorted(name for name in image.packages if matches(name, CUDA))
    lacking = sorted(builder.lacking.keys() | (image.packages.keys() - there.keys() - set(cuda)))
    torch = subprocess.run(
        [str(builder.python), "-c", "import platform, torch; print(platform.python_version(), torch.__version__)"],
        capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    lines = [
        f"## {image.name}",
        "",
        f"{time.strftime('%Y-%m-%d')}, `make colab IMAGE={image.name}`, Python {torch[0] if torch else '?'} "
        f"(the image has {image.python}), torch {torch[-1] if torch else '?'} (the image has "
        f"{image.packages.get('torch', 'none')}).",
        f"{len(exact)} of the image's {len(image.packages)} packages at the image's version, built in {built_s:.0f} s. "
        f"Not tried: {len(cuda)} CUDA packages of GPU images (torch brought its own). "
        f"Not to be had here: {', '.join(lacking) or 'none'}. "
        f"At another version: {', '.join(f'{name} {version}' for name, version in builder.other.items()) or 'none'}.",
        "",
        "| set | added | versions changed | s |",
        "| --- | --- | --- | --- |",
        *installs,
        "",
        "| set | what ran | result | s |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        said = "ok" if row["ok"] else "**failed**: " + row["said"].splitlines()[-1].replace("|", "/")[:200]
        lines.append(f"| {row['set']} | {row['path']} | {said} | {row['seconds']:.0f} |")
    return "\n".join([*lines, ""])


def keep_report(path: Path, name: str, text: str) -> None:
    """Put an image's part into the page, in place of its earlier one."""
    head = "# Colab's images, built here\n\nWhat `make colab` found. Nothing of Colab itself: no GPU, no Drive.\n"
    whole = path.read_text(encoding="utf-8") if path.is_file() else head
    first, *parts = re.split(r"(?m)^(?=## )", whole)
    parts = [part.rstrip() + "\n" for part in parts if not part.startswith(f"## {name}\n")]
    parts = sorted([*parts, text], reverse=True)
    path.write_text(first.rstrip() + "\n\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
