"""A Python in which only that exists which a Colab image and the installed sets bring: the cheap form of an image.

    from image_farm import make_farm
    python = make_farm(read_image("2025.07-cpu"), Path("/tmp/farm")).python

It is an environment of its own whose packages are links to those of the Python that runs this. What neither the image's
list nor `fastsd install` brings is not linked: it can be neither imported nor found, by child processes no more than
here. Versions are those of this Python (`make colab` takes the image's), so what a package needs at this version comes
too, though the image's version may not ask for it; those are listed, and no module of ours may import one.
"""

import csv
import importlib.metadata
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from colab_lists import ROOT, SETS, Image

from fastsd_helpers.wheels.difference import requirements_module
from fastsd_helpers.wheels.lockfile import canonical

__all__ = ["Farm", "make_farm"]

# Not in a list, and in every Python of Colab.
_ALWAYS = ("pip",)


@dataclass(frozen=True)
class Farm:
    """The environment, and what is in it and why."""

    folder: Path
    python: Path
    brought: frozenset[str]  # by the image or a set, and in this Python
    lent: frozenset[str]  # only asked for by the version of something brought that is here
    lacking: frozenset[str]  # the sets add it, and this Python has it not


def make_farm(image: Image, folder: Path, *, sets: tuple[str, ...] = SETS) -> Farm:
    """Make the environment of an image after `fastsd install` of these sets; the folder has to be new."""
    here = {canonical(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
    added = set(image.added(sets))
    brought = (image.packages.keys() | added | set(_ALWAYS)) & here.keys()
    lent = _needed_by(brought, here) - brought
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    _link((here[name] for name in sorted(brought | lent)), folder / "lib" / version / "site-packages", folder / "bin")
    (folder / "lib" / version / "site-packages" / "fastsd_helpers").symlink_to(ROOT / "fastsd_helpers")
    return Farm(folder, folder / "bin" / "python", frozenset(brought), frozenset(lent), frozenset(added - here.keys()))


def _needed_by(names: Iterable[str], here: dict[str, importlib.metadata.Distribution]) -> set[str]:
    requirement_of = requirements_module().Requirement
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in here:
            continue
        found.add(name)
        needs = map(requirement_of, here[name].requires or ())
        waiting += [
            canonical(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def _link(dists: Iterable[importlib.metadata.Distribution], site: Path, programs: Path) -> None:
    """Link what they installed: a folder that is one distribution's as a whole, one of several file by file."""
    owners: Counter[str] = Counter()
    for dist in importlib.metadata.distributions():
        owners.update({file.parts[0] for file in _files(dist)})
    for dist in dists:
        for file in _files(dist):
            first = file.parts[0]
            if first == "..":
                # A program: uv is one. Those in Python start with the other environment's interpreter.
                path = Path(dist.locate_file(file)).resolve()
                if path.parent.name == "bin" and path.is_file() and path.read_bytes()[:2] != b"#!":
                    _link_one(programs / path.name, path)
            elif owners[first] == 1:
                _link_one(site / first, Path(dist.locate_file(first)))
            elif "__pycache__" not in file.parts:
                _link_one(site / file, Path(dist.locate_file(file)))


def _files(dist: importlib.metadata.Distribution) -> list[PurePosixPath]:
    # `dist.files` looks for every file on the disk, and a few packages have ten thousand.
    rows = csv.reader((dist.read_text("RECORD") or "").splitlines())
    return [PurePosixPath(row[0]) for row in rows if row]


def _link_one(place: Path, path: Path) -> None:
    if not os.path.lexists(place) and path.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
