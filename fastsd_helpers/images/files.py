"""The one place where image files are opened: by their content, only in formats of a list, within bounds.

Pillow reads some forty formats; most of its known holes are in those nobody sends photos or scans in, and one (EPS)
starts another program. Here the first bytes decide which of a few decoders may see the file, whatever its name says and
whatever version of Pillow is installed; everything else is refused with its name and what to do.
"""

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images.headers import JpegHeader, check_embedded_tags, check_gif, check_tags, check_tiff, read_jpeg

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "FORMATS",
    "MOST_PIXELS",
    "PICTURE_SUFFIXES",
    "PictureProblem",
    "is_animated",
    "is_picture_head",
    "load_picture",
    "open_picture",
    "picture_field",
    "png_bytes",
    "read_rgb",
    "upright",
]

# How files with images are called, in lower case; what one is its content decides.
PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".avif"))
PICTURE_SUFFIXES |= {".bmp", ".gif", ".tif", ".tiff", ".mpo", ".ppm"}

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF")
MOST_PIXELS = 178_956_970  # where Pillow itself ends, unless somebody has switched that off
_HEAD_BYTES = 512

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
# The first bytes of what is let through, and the one decoder that gets it. MPO is found by the decoder of JPEG.
_KNOWN = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"P[1-6]\s"), "PPM"),
)
# What people and attackers name ".jpg": its first bytes, and what it is.
_SAVE = "save it as PNG or JPEG"
_REFUSED_BEGINNINGS = (
    (rb"8BPS", "a Photoshop file (PSD)", _SAVE),
    (rb"%!|\xc5\xd0\xd3\xc6", "a PostScript file (EPS)", _SAVE),
    (rb"%PDF|.{1,64}%PDF-", "a PDF document", "give its name the ending .pdf, or save its pages as PNG"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image", _SAVE),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image", _SAVE),
    (rb"AT&TFORM", "a DjVu document", "save it as PDF, or its pages as PNG"),
    (rb"\0\0[\x01\x02]\0[^\0]", "an icon (ICO)", _SAVE),
    (rb"icns", "an icon (ICNS)", _SAVE),
    (rb"DDS ", "a texture (DDS)", _SAVE),
    (rb"SIMPLE  =", "a FITS image", _SAVE),
    (rb"....[\x11\x12]\xaf", "an animation (FLI)", _SAVE),
    (rb"\x01\xda[\0\x01][\x01\x02]", "an SGI image", _SAVE),
    (rb"\x59\xa6\x6a\x95", "a Sun raster image", _SAVE),
    (rb"\x0a[\0-\x05][\0\x01][\x01-\x08]", "a PCX image", _SAVE),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office or FlashPix file", _SAVE),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile (WMF, EMF)", _SAVE),
    (rb"qoif", "a QOI image", _SAVE),
    (rb"/\* XPM", "an XPM image", _SAVE),
    (rb"PK\x03\x04|PK\x05\x06|PK\x07\x08", "a zip archive, or a document that is one", "unpack it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "a compressed archive", "unpack it"),
    (rb"....ftyp|RIFF|\x1a\x45\xdf\xa3|OggS", "a video or sound", "save a single image of it"),
    (rb"\s*<!doctype html|\s*<html", "a web page, not an image", "download the image itself"),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|svg|!doctype svg)|.{0,400}<svg[\s>]", "a drawing or document in XML (SVG)", _SAVE),
    (rb"version https://git-lfs", "a Git LFS pointer, not the image itself", "fetch it with `git lfs pull`"),
)
_REFUSED = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), f"is {what}: {todo}") for start, what, todo in _REFUSED_BEGINNINGS
)
# Filters of warnings belong to the whole process: two threads that change them at once would leave them changed.
_QUIET = threading.Lock()


class PictureProblem(DatasetError):
    """An image file that is not opened; `problem` completes "photo.jpg ...".

    Attributes:
        why: kind (another kind of file), size (too many pixels) or damage.
        detail: what the decoder said, in one line.
    """

    def __init__(self, problem: str, why: Literal["kind", "size", "damage"], detail: str = "") -> None:
        super().__init__(problem)
        self.why, self.detail = why, detail


@contextlib.contextmanager
def open_picture(source: Path | bytes | BinaryIO, *, most_pixels: int = MOST_PIXELS) -> "Iterator[Image.Image]":
    """Open an image file; its size is checked by its header, and no pixel is decoded yet.

    Args:
        source: a file, its bytes, or an open file that can be read from its beginning again.
        most_pixels: a larger image is refused.

    Raises:
        PictureProblem: it is empty, of a kind that is not opened here, too large or damaged.
        OSError: the file itself cannot be read.
    """
    with contextlib.ExitStack() as opened:
        if isinstance(source, bytes):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, Path):
            file = opened.enter_context(source.open("rb"))
        else:
            file = source
            file.seek(0)
        name = _format_of(file.read(_HEAD_BYTES))
        header = _checked_header(name, file)
        picture = opened.enter_context(_open_as(name, file, most_pixels))
        if header is not None and picture.size != (header.width, header.height):
            raise _damaged("its header gives two sizes")
        if picture.width * picture.height > most_pixels:
            raise PictureProblem(
                f"is {picture.width} x {picture.height}: more than {most_pixels // 1_000_000} megapixels", "size"
            )
        _check_colours(picture)
        yield picture


def is_picture_head(head: bytes) -> bool:
    """Whether a file that begins with these bytes is of a kind that is opened here."""
    try:
        return bool(_format_of(head))
    except PictureProblem:
        return False


def _damaged(reason: str) -> PictureProblem:
    return PictureProblem(f"is a damaged image: {reason}", "damage", reason)


def _checked_header(name: str, file: BinaryIO) -> JpegHeader | None:
    try:
        if name == "JPEG":
            return read_jpeg(file)
        if name == "TIFF":
            check_tiff(file)
        if name == "GIF":
            check_gif(file)
        if name in ("AVIF", "HEIF"):
            check_embedded_tags(file)
    except ValueError as err:
        raise _damaged(str(err)) from err
    return None


def _check_colours(picture: "Image.Image") -> None:
    # Until 13.0 Pillow reads such images past the end of a buffer.
    tags: Any = getattr(picture, "tag_v2", {})
    if picture.format == "TIFF" and tags.get(0x106) == 6 and picture.info.get("compression") != "jpeg":
        raise PictureProblem(f"is a TIFF in YCbCr colours without JPEG: {_SAVE}", "kind")


def _format_of(head: bytes) -> str:
    """The decoder for a file that begins with these bytes.

    Raises:
        PictureProblem: there is none.
    """
    if not head:
        raise PictureProblem("is empty", "kind")
    for start, name in _KNOWN:
        if start.match(head):
            return name
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[place : place + 4] for place in range(16, 40, 4))}
        # The first brand is what the file is best used as; of the others the ones for single images count.
        if head[8:12] in _HEIF_BRANDS or brands & {*_HEIF_BRANDS[:4]}:
            return "AVIF" if head[8:12] in (b"mif1", b"msf1") and brands & {*_AVIF_BRANDS} else "HEIF"
        if brands & {*_AVIF_BRANDS}:
            return "AVIF"
    for start, problem in _REFUSED:
        if start.match(head):
            raise PictureProblem(problem, "kind")
    if not any(byte < 9 for byte in head):
        raise PictureProblem("is a text file, not an image", "kind")
    raise PictureProblem("is not an image that can be read", "kind")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Pillow warn nobody: it does of odd metadata, and from 89 megapixels, which are ordinary in phones now."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_as(name: str, file: BinaryIO, most_pixels: int) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    with _quiet():
        if name in ("AVIF", "HEIF"):
            _register(name)
        try:
            return Image.open(file, formats=(name,))
        except Image.DecompressionBombError as err:
            raise PictureProblem(f"has more than {most_pixels // 1_000_000} megapixels", "size") from err
        except UnidentifiedImageError as err:  # its text names an object, not a reason
            raise _damaged("its header cannot be read") from err
        except Exception as err:  # decoders raise nearly anything on bytes that are not theirs
            raise _damaged(_one_line(err)) from err


def _register(name: str) -> None:
    """Make Pillow know a format that it does not know by itself, or not yet.

    Raises:
        PictureProblem: nothing here can decode it.
    """
    from PIL import Image, __version__, features

    Image.init()
    if name == "AVIF" and name in Image.OPEN and features.check("avif"):
        return
    with contextlib.suppress(ImportError):
        import pillow_heif

        # Until 0.22 it had a decoder of AVIF too; Pillow has one of its own from 11.3 on.
        register = getattr(pillow_heif, f"register_{name.lower()}_opener", None)
        if register is not None:
            register()
            return
    if name == "HEIF":
        raise PictureProblem("is a HEIC photo, and the package pillow-heif is not installed", "kind")
    raise PictureProblem(f"is an AVIF image, which Pillow {__version__} cannot open: {_SAVE}", "kind")


def load_picture(picture: "Image.Image") -> "Image.Image":
    """Decode what `open_picture` opened: of an animation the first frame.

    Raises:
        PictureProblem: it is truncated or damaged.
    """
    try:
        picture.load()
    except Exception as err:  # as above: a cut or damaged file fails in many ways
        raise PictureProblem(f"is truncated or damaged: {_one_line(err)}", "damage", _one_line(err)) from err
    return picture


def is_animated(picture: "Image.Image") -> bool:
    """Whether there is more than one frame; they are not counted, because a file may claim any number of them."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception as err:  # looking for a second frame reads on in the file
        raise PictureProblem(f"is truncated or damaged: {_one_line(err)}", "damage", _one_line(err)) from err


def upright(picture: "Image.Image") -> "Image.Image | None":
    """Turn an image as its EXIF data say; None when those are damaged."""
    from PIL import ImageOps

    try:
        check_tags(picture.info.get("exif") or b"")
        with _quiet():
            return ImageOps.exif_transpose(picture)
    except Exception:  # malformed EXIF data fail in many ways; the pixels are fine
        return None


def png_bytes(picture: "Image.Image") -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def read_rgb(source: Path | bytes | BinaryIO) -> "Image.Image":
    """Read a whole image as RGB, as it lies in the file.

    Raises:
        PictureProblem: see `open_picture`.
        OSError: see `open_picture`.
    """
    with open_picture(source) as picture:
        return load_picture(picture).convert("RGB")


def picture_field(gradio: Any, label: str) -> Any:
    """A field of a Gradio page for an image: what visitors upload is opened here, never by Gradio.

    Args:
        gradio: the module. Its own field would give a file of any format to Pillow before our code is asked.

    Returns:
        a gradio.Image; functions get an upright PIL image in the file's own mode, or None.
    """
    field = gradio.Image(label=label, type="pil", image_mode=None)

    def preprocess(payload: Any) -> "Image.Image | None":
        if payload is None:
            return None
        if not payload.path:  # a data: address, which only a program can send
            raise gradio.Error("Upload the image as a file.", print_exception=False)
        try:
            with open_picture(Path(payload.path)) as picture:
                load_picture(picture)
                return upright(picture) or picture.copy()
        except OSError as err:
            raise gradio.Error(f"The image cannot be read: {err.strerror}.", print_exception=False) from err
        except DatasetError as err:
            raise gradio.Error(f"The image {err.problem}.", print_exception=False) from err

    field.preprocess = preprocess
    return field


def _one_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:160]
