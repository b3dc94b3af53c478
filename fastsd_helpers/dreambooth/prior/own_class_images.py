"""A user's own class (regularization) images: read like photos, copied into the session, and only read there.

    class_images/own-3f2a91c0d5e6/00007-9b1c55e0a7d2.png     number and the first digits of its own SHA-256

The copies are what is trained on, so a run goes on where the folder they came from is not.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.captions.photo_names import name_photos
from fastsd_helpers.dreambooth.dataset.buckets import class_lines, sort_into_buckets, sort_sizes
from fastsd_helpers.dreambooth.dataset.originals import own_place
from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage, recorded_images
from fastsd_helpers.dreambooth.photos.decoding import decode_photo
from fastsd_helpers.dreambooth.photos.finding import Photos, open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable
from fastsd_helpers.dreambooth.prior.class_images import (
    ClassDrawing,
    find_class_images,
    size_drawn,
    write_class_image,
)
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import check_room, file_errors, write_atomic
from fastsd_helpers.images.files import PictureProblem, open_picture
from fastsd_helpers.sessions import Session

if TYPE_CHECKING:
    from fastsd_helpers.dreambooth.training.stages import TrainingContext

__all__ = ["ClassImages", "OwnClassPictures"]

_ORIENTATION = 0x0112  # of EXIF: above 4 the picture lies on its side
_HINT = "Give a folder or a zip with images of the class, such as other dogs; if it is empty, they are generated."


class OwnClassPictures:
    """The class images that a user gave.

    Args:
        session: where their copies go.
        place: folder or zip they are in.
        prompts: the classes. With several, an image's name or folder says of which it is.
        size: side of the copies in pixels.
        whole: they keep their shape, with the area of such a square.
    """

    def __init__(
        self, session: Session, place: str, prompts: tuple[str, ...], *, size: int, whole: bool = False
    ) -> None:
        self._session, self._prompts, self._size, self._whole = session, prompts, size, whole
        self._place = own_place(session, Path(place).expanduser())
        asked = [place, list(prompts), size, *(["whole"] if whole else [])]
        self.folder = session.class_images / f"own-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"

    def check(self) -> str:
        """Count them, before anything is loaded or written; returns a sentence.

        Raises:
            DatasetError: there are none, or with several classes it cannot be told of which one is.
        """
        copied = self._copied()
        if copied:
            return f"class images: your own, {len(copied)} copied before"
        with open_photos(self._place) as photos:
            self._classes_of(photos)
            return f"class images: your own, {len(photos.names)} in {self._place}"

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each, by its header alone; of squares nothing is read. What cannot be opened is left out.

        Raises:
            DatasetError: the folder is gone, and they are not copied.
        """
        if not self._whole:
            return []
        if self._copied():
            return [_upright_size(path) for path in find_class_images(self.folder).values()]
        found = []
        with open_photos(self._place) as photos:
            for name in photos.names:
                with contextlib.suppress(PictureProblem):  # said when it is copied
                    found.append(_upright_size(photos.read(name)))
        return found

    def fill(self) -> tuple[list[PreparedImage], list[str]]:
        """Copy what is not copied yet; returns the images with their class, and sentences on what was left out.

        Raises:
            DatasetError: none of them can be used. DriveError, DiskFull: a copy cannot be written.
        """
        copied = self._copied()
        said: list[str] = []
        if not copied:
            copied, said = self._copy()
        numbers = find_class_images(self.folder)
        return [PreparedImage(numbers[number], "", prompt) for number, prompt in enumerate(copied)], said

    def _copied(self) -> list[str]:
        """The class of each copy, in order; empty while they are not all there."""
        try:
            classes = json.loads((self.folder / "classes.json").read_bytes())
        except (OSError, ValueError):
            return []
        there = find_class_images(self.folder)
        whole = (
            isinstance(classes, list) and set(classes) <= set(self._prompts) and set(there) >= set(range(len(classes)))
        )
        return classes if whole else []

    def _classes_of(self, photos: Photos) -> list[str]:
        if not photos.names:
            reasons = "; ".join(f"{name} {reason}" for name, reason in photos.skipped[:3])
            raise DatasetError(f"There are no class images in {self._place}. {reasons}".strip(), _HINT)
        if len(self._prompts) == 1:
            return [self._prompts[0]] * len(photos.names)
        classes = []
        for name, named in zip(photos.names, name_photos([printable(name) for name in photos.names]), strict=True):
            folder = printable(name).rpartition("/")[0].casefold()
            words = {named.words.casefold(), folder.rpartition("/")[2].replace("_", " ")} - {""}
            found = [prompt for prompt in self._prompts if any(word in prompt.casefold() for word in words)]
            if len(found) != 1:
                raise DatasetError(
                    f"Which class does {printable(name)}? There are several: {' | '.join(self._prompts)}.",
                    "Put the images of each class into a folder with its name, such as dog/ and cat/.",
                )
            classes.append(found[0])
        return classes

    def _copy(self) -> tuple[list[str], list[str]]:
        own_photos = {item.get("source_sha256") for item in recorded_images(self._session)}
        classes: list[str] = []
        said: list[str] = []
        with open_photos(self._place) as photos:
            wanted = self._classes_of(photos)
            check_room(self._session.folder, 2 * self._size**2 * len(wanted), f"{len(wanted)} class images")
            with file_errors(self.folder, "create"):
                self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in find_class_images(self.folder).values():  # of a copying that was cut
                left_over.unlink(missing_ok=True)
            for name, prompt in zip(photos.names, wanted, strict=True):
                try:
                    data = photos.read(name)
                    if hashlib.sha256(data).hexdigest() in own_photos:
                        raise DatasetError("is one of the photos of the subject")
                    self._write(len(classes), data)
                except DatasetError as err:
                    said.append(f"Skipped the class image {printable(name)}: {err.problem.rstrip('.')}.")
                else:
                    classes.append(prompt)
        if not classes:
            raise DatasetError(f"None of the class images in {self._place} is usable. {' '.join(said[:3])}", _HINT)
        write_atomic(self.folder / "classes.json", json.dumps(classes).encode())
        return classes, said

    def _write(self, number: int, data: bytes) -> None:
        from PIL import Image, ImageOps

        picture = decode_photo(data).image
        size = (self._size, self._size)
        if self._whole:
            scale = self._size / math.sqrt(picture.width * picture.height)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        write_class_image(self.folder, number, ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def _upright_size(source: Path | bytes) -> tuple[int, int]:
    with open_picture(source) as picture:
        width, height = picture.size
        turned = picture.getexif().get(_ORIENTATION, 1) > 4
    return (height, width) if turned else (width, height)


class ClassImages:
    """The class images of a run: a user's own, or generated ones.

    They have the shapes of the photos: where those are squares, squares.

    Args:
        session: of the run.
        context: of the run.
        photos: that are trained on.
    """

    def __init__(self, session: Session, context: "TrainingContext", photos: tuple[PreparedImage, ...]) -> None:
        self._session, self._context, config = session, context, context.config
        buckets = sort_into_buckets(photos, (config.resolution,), context.base.spec.multiple)
        self._sizes = [bucket.size for bucket in buckets]
        self._own: OwnClassPictures | None = None
        if config.class_folder and config.class_prompts:
            whole = any(width != height for width, height in self._sizes)
            self._own = OwnClassPictures(
                session, config.class_folder, config.class_prompts, size=config.resolution, whole=whole
            )

    def check(self) -> list[str]:
        """What can be said before anything is loaded or written; raises as `OwnClassPictures.check`."""
        context = self._context
        if self._own:
            lines, sizes = [self._own.check()], self._own.sizes()
        else:
            count = context.config.class_images if context.config.class_prompts else 0
            lines, sizes = [], [size_drawn(self._sizes, number) for number in range(count)]
        unnamed, multiple = [("", size, (0.5, 0.5)) for size in sizes], context.base.spec.multiple
        return [*lines, *class_lines(sort_sizes(unnamed, context.resolutions(classes=True), multiple))]

    def fill(self, *, say: Callable[[str], None], stopped: Callable[[], bool]) -> tuple[PreparedImage, ...]:
        """Copy or generate those that are missing; returns all in order, nothing without prior preservation.

        Raises:
            DatasetError: as `OwnClassPictures.fill`.
            DriveError: as `OwnClassPictures.fill`.
            DiskFull: as `ClassDrawing.fill`.
            Interrupted: as `ClassDrawing.fill`.
        """
        context, config = self._context, self._context.config
        if not config.class_prompts:
            return ()
        if self._own is not None:
            pictures, said = context.ranks.share(self._own.fill)
            for line in [*said, f"{len(pictures)} of your own class images."]:
                say(line)
            return tuple(pictures)
        drawing = ClassDrawing(
            self._session.class_images,
            context.base,
            config.class_prompts,
            count=config.class_images,
            sizes=self._sizes,
            seed=config.seed,
            guidance=config.class_guidance,
        )
        return drawing.fill(
            device=context.device,
            autocast=context.autocast,
            prepare=context.prepare,
            say=say,
            stopped=stopped,
            dtype=context.base_dtype,
            ranks=context.ranks,
        )
