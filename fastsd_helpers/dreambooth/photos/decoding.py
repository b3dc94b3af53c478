"""Any photo a user may bring, as upright 8-bit sRGB."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images.files import PictureProblem, is_animated, load_picture, open_picture, upright
from fastsd_helpers.runtime import logger

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_MEGAPIXELS", "Photo", "decode_photo"]

MAX_MEGAPIXELS = 128
_SMALLEST_PX = 16
_LONGEST_ASPECT = 8.0


@dataclass(frozen=True)
class Photo:
    """A decoded photo: upright, RGB, 8 bits; `warnings` say what had to be changed for that."""

    image: "Image.Image"
    warnings: tuple[str, ...] = ()


def decode_photo(data: bytes) -> Photo:
    """Decode one image to upright sRGB; its size is checked by its header before any pixel is decoded.

    Alpha is put on white; 16-bit and float images are scaled to 8 bits, not clipped; CMYK and wide-gamut images go
    through their colour profile; of an animation the first frame is taken.

    Raises:
        DatasetError: the problem is the reason to skip the file for (it completes "photo.jpg ...").
    """
    if not data:
        raise DatasetError("is empty")
    warnings: list[str] = []
    try:
        with open_picture(data, most_pixels=MAX_MEGAPIXELS * 1_000_000) as opened:
            _check_size(*opened.size)
            if opened.format not in ("MPO", "HEIF") and is_animated(opened):
                warnings.append("only its first frame is used")
            load_picture(opened)
            turned = upright(opened)
            if turned is None:
                warnings.append("its rotation tag is damaged and was ignored")
            return Photo(_to_rgb(turned or opened, warnings), tuple(warnings))
    except PictureProblem as err:
        raise DatasetError(err.problem) from err
    except (OSError, ValueError, MemoryError) as err:
        raise DatasetError(f"cannot be turned into RGB: {_one_line(err)}") from err


def _check_size(width: int, height: int) -> None:
    if min(width, height) < _SMALLEST_PX:
        raise DatasetError(f"is only {width} x {height} pixels")
    if max(width, height) / min(width, height) > _LONGEST_ASPECT:
        raise DatasetError(f"is {width} x {height}: more than {_LONGEST_ASPECT:.0f} times as long as wide")


def _to_rgb(image: "Image.Image", warnings: list[str]) -> "Image.Image":
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_to_8_bits(image, warnings)
    if image.mode == "CMYK":
        warnings.append("CMYK colours were converted to RGB")
        return _apply_profile(image, profile, warnings) or image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _put_on_white(image.convert("RGBA"), warnings)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    managed = _apply_profile(rgb, profile, warnings) if image.mode == "RGB" else None
    result = managed or rgb
    # A plain copy: no EXIF data, profile or file handle goes further than here.
    plain = Image.new("RGB", result.size)
    plain.paste(result)
    return plain


def _put_on_white(image: "Image.Image", warnings: list[str]) -> "Image.Image":
    from PIL import Image

    extremes: Any = image.getchannel("A").getextrema()  # of its one band
    lowest, highest = extremes
    if highest == 0:
        raise DatasetError("is fully transparent")
    if lowest < 255:
        warnings.append("transparent parts were filled with white")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _scale_to_8_bits(image: "Image.Image", warnings: list[str]) -> "Image.Image":
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise DatasetError("contains NaN")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        scale, low = 255.0, 0.0
    elif low >= 0 and high <= 65535 and image.mode != "F":
        scale, low = 1 / 257, 0.0
    else:  # no agreed range: what is there becomes black to white
        scale = 255 / max(high - low, 1e-12)
    warnings.append("scaled to 8 bits")
    return Image.fromarray(np.rint((values - low) * scale).clip(0, 255).astype(np.uint8)).convert("RGB")


def _apply_profile(image: "Image.Image", profile: bytes | None, warnings: list[str]) -> "Image.Image | None":
    """Convert to sRGB by the embedded profile; None when there is none, it is sRGB, or it cannot be used."""
    from PIL import ImageCms

    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as err:
        logger.debug("A colour profile could not be used: %s", err)
        warnings.append("its colour profile is damaged and was ignored")
        return None


def _one_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:160]
