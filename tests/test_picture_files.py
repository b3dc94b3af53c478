"""One opener for all images: which formats pass, by content and never by name, and that nothing else opens any."""

import ast
import contextlib
import io
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")

from fastsd_helpers.captions import prompts  # noqa: E402
from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage  # noqa: E402
from fastsd_helpers.dreambooth.photos.decoding import decode_photo  # noqa: E402
from fastsd_helpers.dreambooth.training import cache  # noqa: E402
from fastsd_helpers.errors import DatasetError  # noqa: E402
from fastsd_helpers.forms.trocr import reading_view  # noqa: E402
from fastsd_helpers.forms.widgets import view  # noqa: E402
from fastsd_helpers.images import files  # noqa: E402
from fastsd_helpers.images.files import FORMATS, PictureProblem, is_animated, open_picture, read_rgb  # noqa: E402
from fastsd_helpers.trocr.pages import inputs  # noqa: E402

PACKAGE = Path(files.__file__).parents[1]


def drawing(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


def saved(kind: str, image: Image.Image | None = None, **more: object) -> bytes:
    data = io.BytesIO()
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").from_pillow(image or drawing()).save(data)
    else:
        (image or drawing()).save(data, kind, **more)
    return data.getvalue()


def psd() -> bytes:
    """A Photoshop file that Pillow decodes: 16 x 16 px, three channels, not compressed."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 16, 16, 8, 3)
    return head + struct.pack(">III", 0, 0, 0) + b"\0\0" + bytes(range(256)) * 3


REFUSED = {
    "psd": (psd, r"Photoshop file \(PSD\): save it as PNG"),
    "eps": (lambda: saved("EPS"), "PostScript"),
    "eps with a preview": (lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, 9, 0, 0, 0, 0, 0), "PostScript"),
    "pdf": (lambda: saved("PDF"), "a PDF document: give its name the ending .pdf"),
    "pdf behind some bytes": (lambda: b"\xff\xfe junk" + saved("PDF"), "PDF"),
    "fli": (lambda: struct.pack("<IHHHHH", 200, 0xAF11, 1, 8, 8, 8) + bytes(180), "FLI"),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
    "jpeg 2000 stream": (lambda: b"\xff\x4f\xff\x51" + bytes(40), "JPEG 2000"),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(40), "JPEG XL"),
    "ico": (lambda: saved("ICO"), "icon"),
    "icns": (lambda: b"icns" + bytes(40), "icon"),
    "dds": (lambda: saved("DDS"), "texture"),
    "fits": (lambda: b"SIMPLE  =                    T", "FITS"),
    "sgi": (lambda: saved("SGI"), "SGI"),
    "pcx": (lambda: saved("PCX"), "PCX"),
    "sun": (lambda: b"\x59\xa6\x6a\x95" + bytes(40), "Sun raster"),
    "wmf": (lambda: b"\xd7\xcd\xc6\x9a" + bytes(40), "metafile"),
    "emf": (lambda: b"\1\0\0\0" + bytes(36) + b" EMF", "metafile"),
    "flashpix": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "FlashPix"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg behind a comment": (lambda: b"<!-- hello -->\n<svg width='9'></svg>", "SVG"),
    "xml with entities": (lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "XML"),
    "html": (lambda: b"<!DOCTYPE html><html><svg></svg></html>", "web page"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "zip archive"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(60), "compressed"),
    "mp4": (lambda: b"\0\0\0\x20ftypisom" + bytes(60), "video"),
    "wav": (lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(60), "video or sound"),
    "tga": (lambda: saved("TGA"), "not an image that can be read"),
    "xbm": (lambda: saved("XBM", drawing().convert("1")), "text file"),
    "xpm": (lambda: b"/* XPM */ static char *a[] = {", "XPM"),
    "empty": (lambda: b"", "empty"),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF"])
def test_every_format_of_the_list_is_opened_whatever_its_name(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF":
        from PIL import features

        if not features.check("avif"):
            pytest.skip("this build of Pillow cannot read AVIF; pip's wheels from 11.3 on can")
    more = {"save_all": True, "append_images": [drawing()]} if kind == "MPO" else {}
    path = tmp_path / "picture.psd"
    path.write_bytes(saved(kind, **more))
    assert kind in FORMATS
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with open_picture(source) as picture:
            assert picture.format == kind
        read = read_rgb(source)
        assert read.size == (64, 48)
        assert abs(read.getpixel((32, 24))[0] - drawing().getpixel((32, 24))[0]) < 12


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_another_kind_of_file_is_refused_by_name_and_no_decoder_sees_it(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = REFUSED[kind]
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(make())
    opened = []
    monkeypatch.setattr(Image, "open", lambda *_args, **_more: opened.append(1))
    with pytest.raises(PictureProblem, match=words) as told:
        read_rgb(path)
    assert told.value.why == "kind"
    assert not opened


def test_whatever_else_this_pillow_knows_is_not_opened(tmp_path: Path) -> None:
    """Its own writers make what they can; every file that is not of the list is refused."""
    Image.init()
    tried = []
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN) - {*FORMATS}):
        for mode in ("RGB", "L", "1", "P", "RGBA"):
            try:
                data = saved(kind, drawing().convert(mode))
            except (OSError, ValueError, KeyError, AttributeError, ImportError):
                continue
            if kind == "DIB" or data[:3] == b"\xff\xd8\xff":  # a bare header; IM can hold a JPEG, which is one
                continue
            tried.append(kind)
            with pytest.raises(PictureProblem):
                read_rgb(data)
            break
    assert len(tried) >= 5, tried


@pytest.mark.parametrize("name", ["PSD", "EPS", "FLI", "JPEG2000"])
def test_a_decoder_gets_only_files_of_its_own_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG's first bytes before anything else: the decoder of PNG alone is asked, and it finds no image."""
    Image.init()
    asked = []
    monkeypatch.setitem(Image.OPEN, name, (lambda *_: asked.append(name), lambda _prefix: True))
    with pytest.raises(PictureProblem, match="damaged"):
        read_rgb(b"\x89PNG\r\n\x1a\n" + psd())
    assert not asked


DOORS = {
    "photos": lambda path: decode_photo(path.read_bytes()),
    "handwriting": inputs.open_picture,
    "latents": lambda path: cache._read_pixels(PreparedImage(path, "", ""), (64, 64), None),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_a_photoshop_file_with_a_sentence(door: str, tmp_path: Path) -> None:
    if door == "latents":
        pytest.importorskip("torch")
    path = tmp_path / "photo.jpg"
    path.write_bytes(psd())
    with pytest.raises(DatasetError, match=r"Photoshop file \(PSD\)"):
        DOORS[door](path)


def test_captions_refuse_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "a.jpg").write_bytes(psd())
    monkeypatch.setattr(prompts, "_open_captioner", lambda _model: (torch.nn.Identity(), None, None))
    with pytest.raises(DatasetError, match="Photoshop"):
        list(prompts.describe_pictures([tmp_path / "a.jpg"]))


def test_what_only_shows_pictures_leaves_an_unusable_one_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(psd())
    assert view.read_as_data(tmp_path / "a.png", 64) == ""
    assert reading_view.picture_tag(tmp_path / "a.png") == ""
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    assert view.read_as_data(tmp_path / "a.png", 64)
    assert reading_view.picture_tag(tmp_path / "a.png")


# ------------------------------------------------------------------------------------------------------ bounds


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks: bytes, width: int = 32, height: int = 32) -> bytes:
    rows = zlib.compress(b"".join(b"\0" + bytes(range(3 * width)) for _ in range(height)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_of_too_many_pixels_is_refused_by_its_header_even_without_pillows_own_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = png(width=32)
    huge = data.replace(struct.pack(">II", 32, 32), struct.pack(">II", 20_000, 20_000))
    huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    with pytest.raises(PictureProblem, match="more than 178 megapixels"):
        read_rgb(huge)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(PictureProblem, match="is 20000 x 20000: more than 178 megapixels"):
        read_rgb(huge)
    with pytest.raises(PictureProblem, match="is 32 x 32") as told, open_picture(data, most_pixels=1000):
        pass
    assert told.value.why == "size"


def test_text_that_unpacks_to_much_more_is_refused() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    assert len(bomb) < 100_000
    with pytest.raises(PictureProblem, match="damaged"):
        read_rgb(png(bomb))
    assert read_rgb(png(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a photo")))).size == (32, 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_file_that_was_cut_anywhere_is_damaged_and_never_anything_else(kind: str) -> None:
    data = saved(kind, drawing((200, 150)))
    damaged = 0
    for end in range(16, len(data), max(1, len(data) // 40)):
        try:
            read_rgb(data[:end])
        except PictureProblem as err:
            damaged += err.why == "damage"
    assert damaged > 20


def test_frames_are_not_counted() -> None:
    frame = saved("GIF", save_all=True, append_images=[drawing().rotate(9)])
    with open_picture(frame) as picture:
        assert is_animated(picture)
    with open_picture(saved("GIF")) as picture:
        assert not is_animated(picture)
    # 200,000 empty frames behind the first: to count them takes seconds, to find a second one nothing.
    empty = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    with open_picture(frame[:-1] + empty * 200_000 + b";") as picture:
        before = picture.fp.tell()
        assert is_animated(picture)
        assert picture.fp.tell() - before < 100_000


def test_pillows_warnings_reach_nobody_and_the_filters_stay_as_they_were() -> None:
    kept = list(warnings.filters)
    data = saved("PNG", Image.new("L", (9500, 9500)))  # 90 megapixels: Pillow warns

    def work() -> None:
        for _ in range(20):
            with open_picture(data):
                pass

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not [item for item in said if "Decompression" in str(item.category)]
    assert warnings.filters == kept


def test_heic_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved("HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureProblem, match="pillow-heif is not installed"):
        read_rgb(data)


# --------------------------------------------------------------------------------------------------- pages


class Payload:
    def __init__(self, path: Path | None) -> None:
        self.path, self.url, self.orig_name = str(path) if path else None, None, "photo.png"


def test_the_pages_open_what_visitors_upload_with_this_opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks():
        field = files.picture_field(gradio, "Picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "good").write_bytes(saved("JPEG", exif=exif))
    assert field.preprocess(Payload(tmp_path / "good")).size == (48, 64)
    assert field.preprocess(None) is None
    (tmp_path / "bad").write_bytes(psd())
    monkeypatch.setattr(Image, "open", lambda *_args, **_more: pytest.fail("a decoder was asked"))
    with pytest.raises(gradio.Error, match="Photoshop"):
        field.preprocess(Payload(tmp_path / "bad"))
    with pytest.raises(gradio.Error, match="Upload"):
        field.preprocess(Payload(None))


@pytest.mark.parametrize("page", ["playground", "reader"])
def test_a_page_refuses_an_uploaded_photoshop_file(page: str, tmp_path: Path) -> None:
    """Through the page's own server, as a program sends it: the file goes up, the answer is our sentence."""
    pytest.importorskip("gradio")
    client_module = pytest.importorskip("gradio_client")
    (tmp_path / "photo.png").write_bytes(psd())
    upload = client_module.handle_file(tmp_path / "photo.png")
    if page == "playground":
        from fastsd_helpers.playground import Artist, open_playground
        from fastsd_helpers.registry import find_model

        opened = open_playground(artist=Artist("a painter", find_model("demo"), object(), None))
        url, close, name = opened.url, opened.close, "/draw"
        words = ["a fish", "", 7, 2, 128, 7.5, upload, 0.6, None, 1, False]
    else:
        from fastsd_helpers.trocr.reading.serve import ServeConfig, serve

        reader = type("Reader", (), {"checkpoint": type("Checkpoint", (), {"folder": tmp_path})})()
        served = serve(reader, ServeConfig(port=0, login=False))
        url, close, name, words = served.url, served.app.close, "/read", [upload, False]
    try:
        client = client_module.Client(url, verbose=False)
        with pytest.raises(Exception, match="Photoshop"):
            client.predict(*words, api_name=name)
    finally:
        close()


# ------------------------------------------------------------------------------------------------ one opener

# What decodes pictures, and what it is called with: by its last name, or its last two where that is a common word.
_DECODERS = {
    *("imread", "imreadmulti", "imreadanimation", "imdecode", "imdecodemulti", "imdecodeanimation", "mimread"),
    *("load_image", "read_image", "decode_image", "decode_jpeg", "decode_png", "decode_webp", "decode_gif"),
    *("open_heif", "read_heif", "load_img", "frombytes_lazy", "Parser"),
}
_PAIRS = {
    "Image.open",
    "ImageFile.Parser",
    "PILImage.open",
    "pyplot.imread",
    "gradio.Image",
    "gr.Image",
    "gradio.ImageEditor",
}
_PAIRS |= {"gradio.Sketchpad", "gradio.ImageSlider", "gradio.Paint", "gradio.ImageMask", "gradio.MultimodalTextbox"}
_PLUGINS = ("ImagePlugin", "PdfParser", "EpsImage", "PsdImage")


def opened_elsewhere(source: str) -> list[str]:
    """Every way in which a source text opens an image by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            pair = ".".join(name.split(".")[-2:])
            if node.attr in _DECODERS or pair in _PAIRS or node.attr.endswith(_PLUGINS):
                found.append(name)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").startswith("PIL.Image") and "open" in names:
                found.append(f"from {node.module} import open")
            found += sorted(names & _DECODERS) + sorted(name for name in names if name.endswith(_PLUGINS))
            if (node.module or "").endswith(_PLUGINS):
                found.append(node.module)
    return found


def test_nothing_else_in_the_package_opens_pictures() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path != Path(files.__file__):
            assert opened_elsewhere(path.read_text(encoding="utf-8")) == [], path
    tree = ast.parse(Path(files.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"]
    assert len(calls) == 1
    assert [word.arg for word in calls[0].keywords] == ["formats"]


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open('a')",
        "import PIL.Image\nPIL.Image.open('a')",
        "from PIL.Image import open as o",
        "cv2.imread('a')",
        "cv2.imdecode(b, 1)",
        "from cv2 import imdecode",
        "from PIL.ImageFile import Parser",
        "diffusers.utils.load_image('a')",
        "from transformers.image_utils import load_image",
        "torchvision.io.read_image('a')",
        "matplotlib.pyplot.imread('a')",
        "from PIL import PsdImagePlugin",
        "gradio.Image(type='pil')",
        "opener = Image.open\nopener('a')",
    ],
)
def test_the_rule_notices_every_other_way(source: str) -> None:
    assert opened_elsewhere(source)


# ----------------------------------------------------------------------------------------------------- headers


def tags(entries: list[tuple[int, int, int, int]], size: int = 0, order: str = "<") -> bytes:
    """A table of tags (tag, type, count, value) as a TIFF file begins, filled up to `size` bytes."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    table = struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", len(entries))
    table += b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries) + bytes(4)
    return (head + table).ljust(size, b"\0")


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_whose_tags_claim_the_same_bytes_again_and_again_is_refused(order: str) -> None:
    claims = [(40_000 + place, 7, 3_000_000, 0) for place in range(500)]
    needed = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 16)]
    if order == ">":
        needed = [(tag, kind, count, value << 16 if kind == 3 else value) for tag, kind, count, value in needed]
    data = tags(needed + claims, 3_100_000, order)
    with pytest.raises(PictureProblem, match="claim more than the file holds"):
        read_rgb(data)
    assert read_rgb(tags(needed + claims[:1], 3_100_000, order)).size == (4, 4)


def test_exif_data_that_claim_too_much_or_do_not_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saved("JPEG")

    def with_segments(*segments: bytes) -> bytes:
        return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + plain[2:]

    claims = tags([(40_000 + place, 7, 60_000, 0) for place in range(3000)], 60_000)
    with pytest.raises(PictureProblem, match="claim more"):
        read_rgb(with_segments(b"Exif\0\0" + claims))
    below = tags([(0x8769, 4, 1, 40)], 40) + struct.pack("<H", 3000)
    below += b"".join(struct.pack("<HHII", 40_000 + place, 7, 60_000, 0) for place in range(3000))
    with pytest.raises(PictureProblem, match="claim more"):
        read_rgb(with_segments(b"Exif\0\0" + below))
    with pytest.raises(PictureProblem, match="do not end"):
        read_rgb(with_segments(*[b"Exif\0\0" * 9000] * 40))
    assert read_rgb(with_segments(b"Exif\0\0" + tags([(0x0112, 3, 1, 6)]))).size == (64, 48)
    assert read_rgb(with_segments(b"Exif\0\0Exif\0\0" + tags([(0x0112, 3, 1, 6)]))).size == (64, 48)
    # In a PNG they are read when the picture is turned, and the pixels are fine without.
    with open_picture(saved("PNG", exif=b"Exif\0\0" * 100_000)) as picture:
        assert files.upright(files.load_picture(picture)) is None
    with open_picture(saved("PNG", exif=b"Exif\0\0" + claims)) as picture:
        assert files.upright(files.load_picture(picture)) is None


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_exif_data_of_avif_and_heic_are_checked_before_the_file_is_opened(kind: str) -> None:
    if kind == "AVIF":
        from PIL import features

        if not features.check("avif"):
            pytest.skip("this build of Pillow cannot read AVIF; pip's wheels from 11.3 on can")
    data = bytearray(saved(kind))
    claims = tags([(40_000 + place, 7, 900_000, 0) for place in range(50)], 1_000_000)
    with pytest.raises(PictureProblem, match="claim more"):
        read_rgb(bytes(data) + claims)
    with pytest.raises(PictureProblem, match="too many tables"):
        read_rgb(bytes(data) + tags([(0x0112, 3, 1, 6)]) * 100)
    assert read_rgb(bytes(data) + tags([(0x0112, 3, 1, 6)])).size == (64, 48)


def test_a_gif_with_comments_without_end_is_refused() -> None:
    plain = saved("GIF", save_all=True, append_images=[drawing().rotate(9)])
    place = 13 + (3 << ((plain[10] & 7) + 1) if plain[10] & 0x80 else 0)
    several = (b"!\xfe" + b"\xff" + b"c" * 255 + b"\0") * 5000
    one = b"!\xfe" + (b"\xff" + b"c" * 255) * 5000 + b"\0"
    for comments in (several, one, b"\0" * 99 + several):
        with pytest.raises(PictureProblem, match="comments do not end"):
            read_rgb(plain[:place] + comments + plain[place:])
    with pytest.raises(PictureProblem, match="no end"):
        read_rgb(plain[:place] + bytes(100_000) + plain[place:])
    assert read_rgb(plain[:place] + several[: 259 * 100] + plain[place:]).size == (64, 48)


def test_a_jpeg_has_one_size_for_pillow_and_for_its_decoder() -> None:
    plain = saved("JPEG")
    place = plain.index(b"\xff\xc0")
    size = plain[place : place + 2 + int.from_bytes(plain[place + 2 : place + 4], "big")]
    small = size[:5] + struct.pack(">HH", 8, 8) + size[9:]
    for forged in (
        plain[:place] + small + plain[place:],
        plain[: place + len(size)] + small + plain[place + len(size) :],
    ):
        with pytest.raises(PictureProblem, match="is a damaged image"):
            read_rgb(forged)
    # What stands between segments is passed over by both; where they differ, the picture is refused.
    for between in (b"\xff\xff\xff", b"junk", b"\xff\x00"):
        read = plain[:place] + between + plain[place:]
        with contextlib.suppress(PictureProblem):
            assert read_rgb(read).size == (64, 48)
    with pytest.raises(PictureProblem, match="no end"):
        read_rgb(plain[:2] + b"\xff\xfe\0\2" * 200_000 + plain[2:])
    with pytest.raises(PictureProblem, match="no end"):
        read_rgb(plain[:place] + b"x" * 10_000_000 + plain[place:])


def test_a_jpeg_that_is_drawn_over_and_over_is_refused() -> None:
    plain = saved("JPEG", progressive=True)
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    with pytest.raises(PictureProblem, match="drawn over and over"):
        read_rgb(plain[:-2] + scan * 300 + plain[-2:])
    assert read_rgb(plain[:-2] + scan * 20 + plain[-2:]).size == (64, 48)
    # Without being progressive: one scan for each layer, again and again.
    slow = saved("JPEG", drawing(), subsampling=0)
    place = slow.index(b"\xff\xda")
    single = slow[:place] + (b"\xff\xda" + bytes([0, 8, 1, 1, 0, 0, 63, 0]) + b"\x55" * 9) * 300 + b"\xff\xd9"
    with pytest.raises(PictureProblem, match="drawn over and over"):
        read_rgb(single)
    # Phones append a film to a photo: what looks like scans there is none.
    assert read_rgb(plain + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\4" * 5000).size == (64, 48)


def test_a_tiff_in_ycbcr_is_opened_only_as_jpeg() -> None:
    image = drawing().convert("YCbCr")
    with pytest.raises(PictureProblem, match="YCbCr"):
        read_rgb(saved("TIFF", image))
    assert read_rgb(saved("TIFF", drawing(), compression="jpeg")).size == (64, 48)


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw", "packbits", "group4", "jpeg"])
def test_scans_of_every_usual_kind_are_opened(compression: str | None) -> None:
    image = drawing((300, 200)).convert("1" if compression == "group4" else "RGB")
    data = saved("TIFF", image, compression=compression) if compression else saved("TIFF", image)
    assert read_rgb(data).size == (300, 200)
    many = saved("TIFF", image, save_all=True, append_images=[image] * 3)
    with open_picture(many) as picture:
        assert is_animated(picture)


# --------------------------------------------------------------------------------------------------------- XML

# Makers of elements read nothing.
_XML_MAKERS = ("xml.etree.ElementTree.Element", "xml.etree.ElementTree.TreeBuilder")
_XML = ("lxml", "xml.etree", "xml.dom", "xml.sax", "xmlrpc", "html5lib", "bs4", "defusedxml", "xmltodict", "untangle")


def xml_readers(source: str) -> list[str]:
    """Every import of something that reads XML with its defaults: entities, other files, no bounds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [
            name
            for name in names
            if name not in _XML_MAKERS and any(name == bad or name.startswith(f"{bad}.") for bad in _XML)
        ]
    return found


def test_nothing_in_the_package_reads_xml_with_a_readers_defaults() -> None:
    writers = PACKAGE / "trocr" / "exports"
    for path in PACKAGE.rglob("*.py"):
        allowed = ["lxml.etree"] if path == writers / "xml.py" else []
        assert xml_readers(path.read_text(encoding="utf-8")) == allowed, path
    # What writes XML is given lxml, and never reads with it.
    for path in writers.glob("*.py"):
        used = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert not used & {"parse", "iterparse", "iterwalk", "fromstring", "XML", "XMLParser", "HTML", "HTMLParser"}, (
            path
        )
    for source in (
        "import lxml.etree",
        "from xml.etree import ElementTree",
        "from xml import dom",
        "from lxml import html",
    ):
        assert xml_readers(source)
