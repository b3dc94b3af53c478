"""Where a training image was cut from its photo: what some models are told about every image, besides the text."""

from dataclasses import dataclass

__all__ = ["Framing", "cover"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Framing:
    """A part of a photo.

    photo: width and height of the upright photo in pixels.
    box: left, top, right, bottom of the part, in the photo's pixels.
    """

    photo: tuple[int, int]
    box: Box

    @classmethod
    def whole(cls, width: int, height: int) -> "Framing":
        """A picture that nothing was cut off."""
        return cls((width, height), (0, 0, width, height))

    def part(self, box: Box, width: int, height: int) -> "Framing":
        """A part of this part; `box` is in the pixels of this part as an image of `width` x `height`."""
        left, top, right, bottom = self.box
        x, y = (right - left) / width, (bottom - top) / height
        return Framing(self.photo, (left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y))

    def numbers(self, width: int, height: int, *, mirrored: bool = False) -> tuple[int, ...]:
        """Original height and width, crop top and left, target height and width, as Stable Diffusion XL counts them.

        The crop is in pixels after the photo was resized so that its part is `width` x `height`. Of a mirrored image it
        is what was cut off on the photo's right side.

        Source: Podell et al. 2023, "SDXL", section 2.2 and appendix I.
        """
        left, top, right, bottom = self.box
        x, y = width / (right - left), height / (bottom - top)
        cut_left, cut_top = round(left * x), round(top * y)
        if mirrored:
            cut_left = max(0, round(self.photo[0] * x) - width - cut_left)
        return (self.photo[1], self.photo[0], cut_top, cut_left, height, width)


def cover(width: int, height: int, target: tuple[int, int], focus: tuple[float, float] = (0.5, 0.5)) -> Box:
    """The largest part of a `width` x `height` picture that has the shape of `target` (width, height).

    What is cut off is a whole number of pixels of the picture once it is resized to cover the target.

    Args:
        focus: the place that is kept in the middle as far as it goes, as shares of width and height.
    """
    scale = max(target[0] / width, target[1] / height)
    spans = []
    for side, kept, aim in zip((width, height), target, focus, strict=True):
        resized = max(kept, round(side * scale))
        start = min(max(round(aim * resized - kept / 2), 0), resized - kept)
        spans.append((start * side / resized, (start + kept) * side / resized))
    (left, right), (top, bottom) = spans
    return (left, top, right, bottom)
