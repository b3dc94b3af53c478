"""Aspect-ratio buckets: the sizes that images are trained at, each image's own, and the part of it that is kept.

The sides of a bucket are multiples of what the model needs, from half to twice the resolution, and its area is at most
that of the resolution's square. An image goes to the bucket whose shape is nearest to its own, is resized to cover it,
and what is over is cut off around its subject, or evenly where no subject is known.

Source: the method of NovelAI 2022, "Improvements on Stable Diffusion", section "Aspect Ratio Bucketing".
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage
from fastsd_helpers.dreambooth.families import cover
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images.files import PictureProblem, open_picture

__all__ = [
    "LONGEST",
    "Bucket",
    "Place",
    "bucket_info",
    "bucket_lines",
    "bucket_sizes",
    "choose_size",
    "class_lines",
    "size_of",
    "sort_into_buckets",
    "sort_sizes",
]

LONGEST = 4  # times the short side: a bucket's sides are from half to twice the resolution
_SAID_CUT = 0.005  # what is less is rounding


@dataclass(frozen=True)
class Place:
    """One image in a bucket: its index, its name, and left, top, right, bottom of what is kept, in its own pixels."""

    image: int
    name: str
    size: tuple[int, int]  # of the prepared image
    box: tuple[float, float, float, float]

    @property
    def cut(self) -> dict[str, float]:
        """Share of the image's width or height that is cut off, by side; sides that keep everything are not there."""
        (width, height), (left, top, right, bottom) = self.size, self.box
        shares = {"left": left / width, "right": 1 - right / width, "top": top / height, "bottom": 1 - bottom / height}
        return {side: share for side, share in shares.items() if share > _SAID_CUT}


@dataclass(frozen=True)
class Bucket:
    """Images that are trained at one size, in pixels."""

    width: int
    height: int
    places: tuple[Place, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def to_record(self, *, held_out: bool = False) -> dict[str, Any]:
        """As a dry run's JSON has it."""
        images = [{"image": place.name, "cut": {s: round(c, 3) for s, c in place.cut.items()}} for place in self.places]
        return {"width": self.width, "height": self.height, "held_out": held_out, "images": images}


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """The sizes (width, height) of a resolution's buckets, the square among them.

    Args:
        resolution: side of the square, a multiple of `multiple`.
        multiple: of which every side is one.
    """
    least, most = -(-resolution // 2 // multiple) * multiple, 2 * resolution
    found = {(resolution, resolution)}
    for width in range(max(least, multiple), most + 1, multiple):
        height = min(most, resolution**2 // width // multiple * multiple)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


def choose_size(width: int, height: int, resolution: int, multiple: int) -> tuple[int, int]:
    """The bucket of an image of this size: the one whose shape is nearest, and of several the largest."""
    shape = math.log(width / height)

    def distance(size: tuple[int, int]) -> tuple[float, int, int]:
        return round(abs(math.log(size[0] / size[1]) - shape), 9), -size[0] * size[1], size[0]

    return min(bucket_sizes(resolution, multiple), key=distance)


def sort_into_buckets(images: Sequence[PreparedImage], resolutions: Sequence[int], multiple: int) -> tuple[Bucket, ...]:
    """Sort images into the buckets of every resolution; each image is in one of each resolution.

    Raises:
        DatasetError: an image cannot be read.
    """
    named = [(image.path.name, size_of(image), image.focus) for image in images]
    return sort_sizes(named, resolutions, multiple)


def sort_sizes(
    images: Iterable[tuple[str, tuple[int, int], tuple[float, float]]],
    resolutions: Sequence[int],
    multiple: int,
) -> tuple[Bucket, ...]:
    """As `sort_into_buckets`, of images that are told by name, width and height, and where their subject is."""
    found: dict[tuple[int, int], dict[int, Place]] = {}
    for number, (name, (width, height), focus) in enumerate(images):
        for resolution in resolutions:
            size = choose_size(width, height, resolution, multiple)
            box = cover(width, height, size, focus)
            found.setdefault(size, {})[number] = Place(number, name, (width, height), box)
    return tuple(Bucket(*size, tuple(places.values())) for size, places in sorted(found.items()))


def size_of(image: PreparedImage) -> tuple[int, int]:
    """Width and height of a prepared image in pixels.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        with open_picture(image.path) as picture:
            return picture.size
    except PictureProblem as err:
        raise DatasetError(f"{image.path.name} {err.problem}.", "Prepare the images again.") from err


def bucket_info(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What a LoRA file of kohya's scripts says of buckets, as its `ss_bucket_info`; nothing of one square.

    `mean_img_ar_error` is how far the images' width / height is from their buckets', on average.
    """
    if len(buckets) == 1 and buckets[0].width == buckets[0].height:
        return {}
    shapes = [(bucket.size, place.size) for bucket in buckets for place in bucket.places]
    errors = [abs(own[0] / own[1] - image[0] / image[1]) for own, image in shapes]
    sizes = [{"resolution": list(bucket.size), "count": len(bucket.places)} for bucket in buckets]
    numbered = {str(number): size for number, size in enumerate(sizes)}
    return {"buckets": numbered, "mean_img_ar_error": sum(errors) / len(errors)}


def bucket_lines(train: Sequence[Bucket], held_out: Sequence[Bucket] = (), *, batch_size: int) -> list[str]:
    """Which image is trained or judged at which size, and what is cut off; nothing where all are one whole square."""
    if not any(_is_worth_saying(buckets) for buckets in (train, held_out)):
        return []
    lines = [f"Aspect-ratio buckets: {len(train)}, and each batch is of one of them."]
    for buckets, kind in ((train, "image"), (held_out, "held-out image")):
        for bucket in buckets:
            names = ", ".join(place.name + _cut_in_words(place) for place in bucket.places)
            count = len(bucket.places)
            lines.append(f"{bucket.width} x {bucket.height} px, {count} {kind}{'s' if count > 1 else ''}: {names}.")
    short = [bucket for bucket in train if len(bucket.places) < batch_size]
    if short:
        sizes = ", ".join(f"{bucket.width} x {bucket.height}" for bucket in short)
        lines.append(
            f"Fewer images than the batch size of {batch_size} are in {sizes}: there a batch has an image several "
            "times, each time with other noise. Over the run every image is seen equally often all the same."
        )
    return lines


def class_lines(buckets: Sequence[Bucket]) -> list[str]:
    """At which sizes class images are trained, and how much of one is cut off at most; nothing of whole squares."""
    lines = []
    for bucket in buckets if _is_worth_saying(buckets) else ():
        most, count = max((sum(place.cut.values()) for place in bucket.places), default=0.0), len(bucket.places)
        cut = f" (cut off: at most {most:.0%})" if most else ""
        lines.append(f"{bucket.width} x {bucket.height} px, {count} class image{'s' if count > 1 else ''}{cut}.")
    return lines


def _is_worth_saying(buckets: Sequence[Bucket]) -> bool:
    squares = all(bucket.width == bucket.height for bucket in buckets)
    return len(buckets) > 1 or not squares or any(place.cut for bucket in buckets for place in bucket.places)


def _cut_in_words(place: Place) -> str:
    cut = ", ".join(f"{share:.0%} {side}" for side, share in place.cut.items())
    return f" (cut off: {cut})" if cut else ""
