"""The class images of prior preservation: drawn once by the base model, kept in class_images/, the same for a seed.

    class_images/3f2a91c0d5e6/00007-9b1c55e0a7d2.png     number and the first digits of its own SHA-256

The folder's name stands for everything the images depend on, and a file only counts when its bytes have the hash in
its name: one that a mount cut short is drawn again, a user's own files beside them are never touched and never counted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.cache import encode_prompts
from fastsd_helpers.dreambooth.training.sampling import draw_pictures
from fastsd_helpers.errors import Interrupted
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.images.files import png_bytes
from fastsd_helpers.processes import Ranks

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from PIL import Image

__all__ = ["ClassDrawing", "find_class_images", "size_drawn", "write_class_image"]

_NAME = re.compile(r"^(\d{5})-([0-9a-f]{12})\.png$")
# Drawn in fixed groups: on some devices a picture's last bits depend on the others in its batch.
_GROUP = 4
_STEPS = 25


def find_class_images(folder: Path) -> dict[int, Path]:
    """Number -> file of every whole class image in one drawing's folder."""
    found = {}
    with file_errors(folder, "read"):
        for path in sorted(folder.glob("*.png")):
            match = _NAME.match(path.name)
            if match and hashlib.sha256(path.read_bytes()).hexdigest().startswith(match[2]):
                found[int(match[1])] = path
    return found


def size_drawn(sizes: Sequence[tuple[int, int]], number: int) -> tuple[int, int]:
    """Width and height of a class image that is drawn, by its number: each different size in turn, for a group."""
    different = list(dict.fromkeys(sizes))
    return different[number // _GROUP % len(different)]


def write_class_image(folder: Path, number: int, picture: "Image.Image") -> Path:
    """Write one class image of a folder, named as `find_class_images` finds it."""
    data = png_bytes(picture)
    path = folder / f"{number:05d}-{hashlib.sha256(data).hexdigest()[:12]}.png"
    write_atomic(path, data)
    return path


class ClassDrawing:
    """Which class images a run needs, and how the missing ones are drawn.

    Args:
        root: the session's class_images folder.
        base: the model that draws them, untouched by training.
        prompts: the classes; image i is of prompt i modulo their number.
        count: images in all.
        sizes: width and height of the first four of them, of the next four, and so on, over and over.
        seed: image i starts from noise of (seed, i).
        guidance: classifier-free guidance. At 1 the images are the model's own, and training on them leaves it where
            it is; guided ones are those of a sharper model, and training on them moves it there (measured:
            benchmarks/results/prior_drift.md).
    """

    def __init__(
        self,
        root: Path,
        base: BaseModel,
        prompts: tuple[str, ...],
        *,
        count: int,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        guidance: float = 1.0,
    ) -> None:
        self.base, self.prompts, self.count, self.seed = base, prompts, count, seed
        # Each of the different ones in turn, in the order in which they come: so few images have many of them.
        self.sizes = list(dict.fromkeys(sizes))
        self.guidance = guidance
        # One square's side as versions wrote it that drew nothing else, so that what they drew is found again.
        size = self.sizes[0][0] if len(self.sizes) == 1 and len(set(self.sizes[0])) == 1 else self.sizes
        key = [base.sha256(), base.spec.prediction_type, list(prompts), size, seed, _STEPS, guidance]
        self.folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]

    def fill(
        self,
        *,
        device: Any,
        autocast: "Callable[[], AbstractContextManager]",
        prepare: Callable[[Any], Any],
        say: Callable[[str], None],
        stopped: Callable[[], bool],
        dtype: Any = None,
        ranks: Ranks | None = None,
    ) -> tuple[PreparedImage, ...]:
        """Draw what is missing; returns all images in order.

        Args:
            device: where to draw.
            autocast: in which dtype to draw.
            prepare: what is done to a network before it is used, such as moving it to the device.
            say: gets a sentence for the user.
            stopped: asked between denoising steps; true ends the drawing, and what is drawn stays.
            dtype: torch dtype of the denoiser's weights; None for float32.
            ranks: the processes that draw together, each its groups; the first one writes.

        Raises:
            Interrupted: `stopped` said so.
            DriveError: an image cannot be read or written.
            DiskFull: an image cannot be read or written.
        """
        ranks = ranks or Ranks()
        found = ranks.share(lambda: find_class_images(self.folder))
        missing = [number for number in range(self.count) if number not in found]
        if missing:
            say(f"Generating {len(missing)} of {self.count} class images ({' | '.join(self.prompts)}) ...")
            if ranks.is_first:
                with file_errors(self.folder, "create"):
                    self.folder.mkdir(parents=True, exist_ok=True)
            with ranks.in_turn():
                networks = self._load(device, prepare, dtype)
            groups = sorted({number - number % _GROUP for number in missing})
            for begin in range(0, len(groups), ranks.size):
                own = groups[begin : begin + ranks.size][ranks.rank : ranks.rank + 1]
                with autocast():
                    mine = self._draw_groups(own, networks, device, stopped)
                shares = ranks.gather(mine)
                drawn = {number: picture for share in shares for number, picture in (share or {}).items()}
                found |= ranks.share(lambda: self._write(drawn, missing))  # noqa: B023 - called at once
                if None in shares:
                    raise Interrupted(
                        f"Stopped after {len(found)} of {self.count} class images; they are kept.",
                        "Train again with the same session to resume.",
                    )
        return tuple(
            PreparedImage(found[number], "", self.prompts[number % len(self.prompts)]) for number in range(self.count)
        )

    def _write(self, drawn: dict[int, Any], missing: list[int]) -> dict[int, Path]:
        numbers = sorted(drawn.keys() & set(missing))
        return {number: write_class_image(self.folder, number, drawn[number]) for number in numbers}

    def _load(self, device: Any, prepare: Callable[[Any], Any], dtype: Any) -> tuple[Any, Any, Any]:
        base = self.base
        encoders = {part: encoder.to(device) for part, encoder in base.load_encoders().items()}
        text = encode_prompts(base.family, encoders, base.load_tokenizers(), [*self.prompts, ""], device=device)
        del encoders
        return prepare(base.load(base.family.denoiser, dtype)), prepare(base.load("vae")), text

    def _draw_groups(
        self, groups: list[int], networks: tuple[Any, Any, Any], device: Any, stopped: Callable[[], bool]
    ) -> dict[int, Any] | None:
        """Number -> image of groups, by their first numbers; None when `stopped` ended it, which all processes hear."""
        drawn: dict[int, Any] = {}
        try:
            for first in groups:
                pictures = self._draw(range(first, first + _GROUP), networks, device, stopped)
                drawn |= {first + place: picture for place, picture in enumerate(pictures)}
        except Interrupted:
            return None
        return drawn

    def _draw(
        self, numbers: range, networks: tuple[Any, Any, Any], device: Any, stopped: Callable[[], bool]
    ) -> list[Any]:
        unet, vae, text = networks
        return draw_pictures(
            self.base,
            unet,
            vae,
            text[[number % len(self.prompts) for number in numbers]],
            text[-1:],
            size=size_drawn(self.sizes, numbers[0]),
            seeds=[self._seed_of(number) for number in numbers],
            steps=_STEPS,
            guidance=self.guidance,
            device=device,
            stopped=stopped,
        )

    def _seed_of(self, number: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/class/{number}".encode()).digest()
        return int.from_bytes(digest[:6], "little")
