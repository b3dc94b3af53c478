"""The package lists of Colab's images (tests/data/colab), and what the lock's sets add to one of them."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fastsd_helpers.wheels import Environment, Plan, make_plan, read_lock  # noqa: E402
from fastsd_helpers.wheels.lockfile import canonical  # noqa: E402

__all__ = ["LISTS", "ROOT", "SETS", "Image", "image_names", "read_image"]

LISTS = ROOT / "tests" / "data" / "colab"
# In the order in which somebody who opens all three notebooks installs them.
SETS = ("dreambooth", "trocr", "trocr-int8", "webui")


@dataclass(frozen=True)
class Image:
    """One Colab image: its packages under their canonical names, and its Python."""

    name: str  # 2026.08-gpu
    python: str  # "3.13"
    packages: dict[str, str]

    def plan(self, name: str, also: dict[str, str] | None = None) -> Plan:
        """What `fastsd install NAME` changes in this image, with what other sets have added already."""
        here = Path("/")
        installed = self.packages | (also or {})
        environment = Environment(here, f"{self.python}.0", here, here, "linux x86_64", False, installed, False)
        return make_plan(read_lock().find(name, self.python), environment)

    def added(self, sets: tuple[str, ...] = SETS) -> dict[str, str]:
        """Everything that these sets add, one after the other."""
        found: dict[str, str] = {}
        for name in sets:
            found |= {change.name: change.after for change in self.plan(name, found).changes}
        return found


def image_names() -> list[str]:
    """Every image whose list is here, the oldest first."""
    return sorted(path.stem for path in LISTS.glob("*.txt"))


def read_image(name: str) -> Image:
    """One image's list; an unknown name ends the program with those that are there."""
    path = LISTS / f"{name}.txt"
    if not path.is_file():
        sys.exit(f"There is no list of the image {name!r}. There are: {', '.join(image_names())}.")
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    python = re.search(r"Python (\d+\.\d+)", first)
    pins = (line.partition("==") for line in lines if line and line[0] != "#")
    return Image(name, python[1], {canonical(package): version for package, _, version in pins})
