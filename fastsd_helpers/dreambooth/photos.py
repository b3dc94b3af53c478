"""Read a user's photos safely: from a folder, a zip or one file, in any usual format, one at a time, as upright RGB.

Nothing is unpacked to disk: a zip's members are read into memory one by one, after all of their names were checked.
"""

import contextlib
import io
import logging
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fastsd_helpers.captions import decode_caption, read_caption
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors, natural_order
from fastsd_helpers.picture_files import PictureProblem, is_animated, load_picture, open_picture, upright

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = [
    "MAX_MEGAPIXELS",
    "Photo",
    "Photos",
    "decode_photo",
    "measure_sharpness",
    "open_photos",
    "perceptual_hash",
]

logger = logging.getLogger("fastsd_helpers")

MAX_MEGAPIXELS = 128
_MAX_FILES = 2_000
_MAX_MEMBERS = 20_000
_MAX_FILE_BYTES = 256 * 2**20
_MAX_TOTAL_BYTES = 8 * 2**30
_SMALLEST_PX = 16
_LONGEST_ASPECT = 8.0

_PICTURE_SUFFIXES = re.compile(r"\.(?:jpe?g|jpe|jfif|png|webp|heic|heif|hif|avif|bmp|gif|tiff?|mpo|ppm)")
_ARCHIVE_SUFFIXES = frozenset({".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz"})
# Files that programs leave beside photos and that nobody means.
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx", "icon\r"})
_QUIET_SUFFIXES = frozenset({".txt", ".json", ".csv", ".md", ".ini", ".xmp", ".aae", ".zip", ".part", ".lock"})


@dataclass(frozen=True)
class Photo:
    """A decoded photo: upright, RGB, 8 bits; `warnings` say what had to be changed for that."""

    image: "Image.Image"
    warnings: tuple[str, ...] = ()


@dataclass
class Photos:
    """The photos of one folder or zip, by name in natural order; the files are only read when asked for.

    Attributes:
        names: of the files that look like pictures, with "/" between folders.
        skipped: name and reason of the files that do not.
    """

    names: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _files: dict[str, "Path | zipfile.ZipInfo"] = field(default_factory=dict)
    _captions: dict[str, "Path | zipfile.ZipInfo"] = field(default_factory=dict)
    _archive: zipfile.ZipFile | None = None

    def read(self, name: str) -> bytes:
        """Read the bytes of one photo.

        Raises:
            DatasetError: this file cannot be read; the problem is the reason to skip it for.
            DriveError: the folder itself has gone, as after a lost connection to Drive.
        """
        return self._read(self._files[name])

    def caption(self, name: str) -> str | None:
        """Read the words of the .txt beside a photo; None when there is none or it is empty.

        Raises:
            DatasetError: the .txt is no caption.
        """
        source = self._captions.get(_key(name))
        if source is None:
            return None
        return read_caption(source) if isinstance(source, Path) else decode_caption(self._read(source))

    def _read(self, source: "Path | zipfile.ZipInfo") -> bytes:
        if isinstance(source, zipfile.ZipInfo):
            try:
                return self._archive.read(source)
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, struct.error) as err:
                raise DatasetError(f"cannot be unpacked: {_one_line(err)}") from err
            except Exception as err:  # zlib.error and lzma.LZMAError, whose modules may be missing from a Python
                raise DatasetError(f"is damaged inside the zip: {_one_line(err)}") from err
        try:
            size = source.stat().st_size
            if size > _MAX_FILE_BYTES:
                raise DatasetError(f"has {size / 2**20:.0f} MiB; the most is {_MAX_FILE_BYTES // 2**20} MiB")
            return source.read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as err:
            raise DatasetError(f"cannot be read: {err.strerror}") from err
        except OSError as err:
            with file_errors(source, "read"):
                raise err


def _key(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")).casefold()


def _one_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:160]


# ------------------------------------------------------------------------------------------------ sources


@contextlib.contextmanager
def open_photos(path: Path, *, leave_out: Path | None = None) -> Iterator[Photos]:
    """List the photos of a folder (with its sub-folders), of a zip, or a single picture.

    Args:
        path: folder, zip or picture.
        leave_out: a folder inside `path` that is not looked into.

    Raises:
        DatasetError: nothing is there, the archive is damaged, unsafe or of another kind, or there are too many files.
    """
    with file_errors(path, "read"):
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        yield _list_folder(path, leave_out)
    elif not is_file:
        raise DatasetError(
            f"There is no folder or zip {path}.", "Check the path; in Colab, copy it from the file list."
        )
    elif path.suffix.lower() in _ARCHIVE_SUFFIXES:
        raise DatasetError(f"{path.name} is an archive that is not read here.", "Give a .zip or the unpacked folder.")
    elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        with _open_zip(path) as archive:
            yield _list_zip(archive, path)
    else:
        beside = path.with_suffix(".txt")
        captions = {_key(path.name): beside} if beside.is_file() else {}
        yield Photos([path.name], [], {path.name: path}, captions)


def _list_folder(folder: Path, leave_out: Path | None) -> Photos:
    files: dict[str, Path] = {}
    left_out = leave_out.resolve() if leave_out else None

    def stop(err: OSError) -> None:
        raise err

    with file_errors(folder, "read"):
        for parent, folders, names in os.walk(folder, onerror=stop):
            here = Path(parent)
            folders[:] = sorted(d for d in folders if not _is_ignored(d) and (here / d).resolve() != left_out)
            for name in names:
                if not _is_ignored(name):
                    files[(here / name).relative_to(folder).as_posix()] = here / name
            _check_count(sum(_looks_like_picture(name) for name in files), folder)
    return _sort_out(files)


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as err:
        raise DatasetError(
            f"{path.name} is damaged or no zip: {_one_line(err)}.", "Make the zip again, or give the folder of photos."
        ) from err
    except OSError as err:
        with file_errors(path, "read"):
            raise err
    with archive:
        yield archive


def _list_zip(archive: zipfile.ZipFile, path: Path) -> Photos:
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise DatasetError(f"{path.name} holds {len(members):,} files.", "Give a zip with the photos of one subject.")
    total = sum(member.file_size for member in members)
    if total > _MAX_TOTAL_BYTES:
        raise DatasetError(
            f"{path.name} would unpack to {total / 2**30:.1f} GiB; the most is {_MAX_TOTAL_BYTES // 2**30} GiB.",
            "Give a zip with the photos of one subject.",
        )
    files: dict[str, zipfile.ZipInfo] = {}
    skipped: list[tuple[str, str]] = []
    for member in members:
        _check_member(member, path)
        name = member.filename.replace("\\", "/")
        if member.is_dir() or any(_is_ignored(part) for part in name.split("/")):
            continue
        if member.flag_bits & 1:
            skipped.append((name, "is encrypted; unpack the zip with its password first"))
        elif member.file_size > _MAX_FILE_BYTES:
            skipped.append((name, f"has {member.file_size / 2**20:.0f} MiB; the most is {_MAX_FILE_BYTES // 2**20}"))
        else:
            files[name] = member
    _check_count(sum(_looks_like_picture(name) for name in files), path)
    photos = _sort_out(files)
    photos.skipped[:0] = skipped
    photos._archive = archive
    return photos


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    """Refuse the whole zip for one unsafe name: such a file was made to attack whoever unpacks it."""
    # `orig_filename` is what the zip says; ZipInfo cuts `filename` at a zero byte.
    name = member.orig_filename.replace("\\", "/")
    mode = member.external_attr >> 16
    problem = None
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        problem = "an absolute path"
    elif ".." in name.split("/"):
        problem = "a path that leaves the zip"
    elif "\0" in name:
        problem = "a zero byte in a name"
    elif mode and (stat.S_ISLNK(mode) or (stat.S_IFMT(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode))):
        problem = "a link or device"
    if problem:
        shown = name[:80].encode("unicode_escape").decode()
        raise DatasetError(f"{path.name} holds {problem}: {shown}.", "Make a new zip that holds only photos.")


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _IGNORED_NAMES


def _looks_like_picture(name: str) -> bool:
    # A name without ending may be a picture; its content decides.
    suffix = PurePosixPath(name).suffix.lower()
    return bool(_PICTURE_SUFFIXES.fullmatch(suffix)) or not re.fullmatch(r"\.[a-z0-9]{1,5}", suffix)


def _check_count(count: int, path: Path) -> None:
    if count > _MAX_FILES:
        raise DatasetError(
            f"{path} holds more than {_MAX_FILES:,} pictures.",
            "Give the folder or zip of one subject; 5 to 30 photos do.",
        )


def _sort_out(files: dict[str, "Path | zipfile.ZipInfo"]) -> Photos:
    names = sorted((name for name in files if _looks_like_picture(name)), key=natural_order)
    stems = {_key(name) for name in names}
    captions = {_key(n): f for n, f in files.items() if n.lower().endswith(".txt") and _key(n) in stems}
    skipped = [
        (name, f"is not a picture ({PurePosixPath(name).suffix})")
        for name in sorted(files, key=natural_order)
        if not _looks_like_picture(name) and PurePosixPath(name).suffix.lower() not in _QUIET_SUFFIXES
    ]
    return Photos(names, skipped, {name: files[name] for name in names}, captions)


# ----------------------------------------------------------------------------------------------- decoding


def decode_photo(data: bytes) -> Photo:
    """Decode one picture to upright sRGB; its size is checked by its header before any pixel is decoded.

    Alpha is put on white; 16-bit and float pictures are scaled to 8 bits, not clipped; CMYK and wide-gamut pictures go
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
        warnings.append("CMYK colours became RGB")
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

    lowest, highest = image.getchannel("A").getextrema()
    if highest == 0:
        raise DatasetError("is fully transparent")
    if lowest < 255:
        warnings.append("transparent parts became white")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _scale_to_8_bits(image: "Image.Image", warnings: list[str]) -> "Image.Image":
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise DatasetError("holds values that are not numbers")
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


# ------------------------------------------------------------------------------------------------ judging


def measure_sharpness(image: "Image.Image") -> float:
    """Measure how sharp the sharpest tenth of a picture is: variance of the Laplacian per block, at 256 px.

    A photo with a blurred background is as sharp as its subject; differences of light do not count.
    """
    import numpy as np

    values = _gray(image, 256)
    laplacian = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1] - 4 * values[1:-1, 1:-1]
    step = 16
    blocks = [
        laplacian[y : y + step, x : x + step].var()
        for y in range(0, laplacian.shape[0] - step + 1, step)
        for x in range(0, laplacian.shape[1] - step + 1, step)
    ]
    spread = float(np.percentile(values, 95) - np.percentile(values, 5))
    return float(np.percentile(blocks, 90)) / max(spread, 8.0) ** 2 * 1e4


def perceptual_hash(image: "Image.Image") -> int:
    """Hash what a picture looks like, 255 bits: two pictures are alike when few bits differ (int.bit_count of the xor).

    The signs, against their median, of the lowest 16 x 16 frequencies of the picture's greys at 32 x 32; unlike
    differences of neighbours they do not flip with the noise of an even wall. On 30 real photos a small recompressed
    copy differs in 8 bits at most, one that lost 1 % at two sides in 28, and different photos in 98 at least.

    Source: the DCT hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010).
    """
    import numpy as np
    from PIL import Image

    greys = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    places, waves = np.arange(32), np.arange(16)
    cosines = np.cos(np.pi * (2 * places[None] + 1) * waves[:, None] / 64)
    frequencies = (cosines @ greys @ cosines.T).ravel()[1:]
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _gray(image: "Image.Image", side_px: int) -> "np.ndarray":
    import numpy as np
    from PIL import Image

    scale = side_px / max(image.size)
    size = max(16, round(image.width * scale)), max(16, round(image.height * scale))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0), dtype=np.float64)
