"""Prepare: any photo a user may bring ends as a checked PNG with its prompt, or is skipped with a reason."""

import errno
import io
import json
import os
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFilter

from fastsd_helpers import files
from fastsd_helpers.captions.photo_names import name_photos
from fastsd_helpers.dreambooth.dataset.prepared import load_dataset, prompt_table
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.dreambooth.photos import finding as photos_module
from fastsd_helpers.dreambooth.photos.decoding import decode_photo
from fastsd_helpers.dreambooth.photos.finding import open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable, safe_stem, unique_stem
from fastsd_helpers.dreambooth.photos.likeness import measure_sharpness, perceptual_hash
from fastsd_helpers.errors import DatasetError, DiskFull, SessionBusy, SettingsError
from fastsd_helpers.sessions import Session

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth"


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.create("my_dog", root=tmp_path / "sessions")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def picture(seed: int = 0, size: tuple[int, int] = (300, 300)) -> Image.Image:
    """A sharp image unlike those of other seeds: random bars in random colours."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(60, 200, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = int(random.integers(0, size[0])), int(random.integers(0, size[1]))
        w, h = (int(v) for v in random.integers(10, 90, 2))
        draw.rectangle((x, y, x + w, y + h), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def as_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, count: int, name: str = "sks_dog ({}).jpg") -> None:
    for number in range(1, count + 1):
        picture(number).save(folder / name.format(number), quality=95)


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def run(session: Session, images: Path, **settings: object) -> PrepareResult:
    return prepare(PrepareConfig(images=str(images), **{"size": 64, **settings}), session)


# ------------------------------------------------------------------------------------------ what comes out


def test_a_folder_becomes_square_png_files_with_hashes_and_a_record(session: Session, folder: Path) -> None:
    picture(1, (400, 300)).save(folder / "sks_dog (1).jpg")
    picture(2, (300, 500)).save(folder / "sks_dog (2).webp")
    result = run(session, folder, size=128)
    assert (result.train, result.held_out, result.skipped) == (2, 0, ())
    dataset = load_dataset(session, instance_prompt=None)
    assert [image.path.name for image in dataset.train] == ["sks_dog (1).png", "sks_dog (2).png"]
    for image in dataset.train:
        with Image.open(image.path) as opened:
            assert (opened.format, opened.mode, opened.size, opened.info) == ("PNG", "RGB", (128, 128), {})
        assert files.sha256_of(image.path) == image.sha256
        assert image.prompt == "sks dog"
    recorded = Session.open("my_dog", root=session.folder.parent).record["dataset"]
    assert (recorded["size"], recorded["crop"], recorded["skipped"]) == (128, "smart", [])
    first = recorded["images"][0]
    assert first["file"] == "instance_images/sks_dog (1).png"
    assert (first["source"], first["stem_words"], first["caption"]) == ("sks_dog (1).jpg", "sks dog", None)
    left, top, right, bottom = first["box"]
    assert (right - left, bottom - top) == (300, 300)
    assert first["method"] in ("saliency", "center")


def test_the_picture_is_the_cropped_photo_scaled_by_lanczos(session: Session, folder: Path) -> None:
    photo = picture(5, (400, 300))
    photo.save(folder / "a.png")
    run(session, folder, size=96, crop="center")
    with Image.open(session.instance_images / "a.png") as made:
        expected = photo.crop((50, 0, 350, 300)).resize((96, 96), Image.Resampling.LANCZOS)
        assert made.tobytes() == expected.tobytes()


def test_crop_none_keeps_the_shape_with_the_area_of_the_size(session: Session, folder: Path) -> None:
    picture(1, (500, 301)).save(folder / "wide.png")
    picture(2, (301, 700)).save(folder / "tall.png")
    picture(3, (40, 200)).save(folder / "small.png")
    run(session, folder, size=100, crop="none")
    sizes = {path.stem: Image.open(path).size for path in session.instance_images.iterdir()}
    assert sizes == {"wide": (129, 78), "tall": (66, 152), "small": (50, 200)}
    assert session.record["dataset"]["images"][0]["method"] == "none"


def test_a_zip_gives_the_same_pictures_as_its_folder_and_leaves_nothing_unpacked(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    fill(folder, 3)
    (folder / "sks_dog (2).txt").write_text("a dog in a zip")
    members = {f"photos/{path.name}": path.read_bytes() for path in folder.iterdir()}
    rubbish = {"__MACOSX/photos/._sks_dog (1).jpg": b"rubbish", "photos/.DS_Store": b"rubbish", "photos/": b""}
    archive = zip_of(tmp_path / "photos.zip", members | rubbish)
    run(session, folder)
    from_folder = {item["sha256"] for item in session.record["dataset"]["images"]}
    result = run(session, archive)
    assert {item["sha256"] for item in session.record["dataset"]["images"]} == from_folder
    assert result.skipped == ()
    assert [image.prompt for image in load_dataset(session, instance_prompt="x").train] == ["x", "a dog in a zip", "x"]
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"photos", "photos.zip", "sessions"}


def test_one_picture_is_allowed_with_a_warning_and_given_as_a_file_too(session: Session, folder: Path) -> None:
    fill(folder, 1)
    result = run(session, folder / "sks_dog (1).jpg")
    assert result.train == 1
    assert any("With one image" in note for note in result.notes)


@pytest.mark.slow
def test_three_hundred_pictures_are_allowed_with_a_note_and_bounded_memory(session: Session, folder: Path) -> None:
    # Decoded they are 300 x 2.3 MB; only one at a time may be held. In one of ten a subject is looked for.
    for number in range(300):
        small, large = ((218, 218), (872, 872)) if number % 10 else ((250, 190), (1000, 760))
        photo = picture(number, small).resize(large, Image.Resampling.NEAREST)
        photo.save(folder / f"dog ({number}).jpg", quality=60)
    code = (
        "import sys\n"
        "from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare\n"
        "from fastsd_helpers.sessions import Session\n"
        "result = prepare(PrepareConfig(images=sys.argv[1], size=64), Session.open('my_dog', root=sys.argv[2]))\n"
        "print(result.train, result.held_out, *result.notes, sep='|')\n"
        # Not getrusage: its figure starts with the size of the process that started this one.
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)\n"
    )
    done = run_python(code, folder, session.folder.parent)
    said, mib = done.stdout.strip().splitlines()
    assert said.startswith("270|30|")
    assert "270 images are many" in said
    assert int(mib) < 400
    with Image.open(session.logs / "contact-sheet.png") as sheet:
        assert sheet.height < 8000


def run_python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        check=False,
    )


def test_every_tenth_picture_is_held_out_from_ten_up(session: Session, folder: Path) -> None:
    fill(folder, 9)
    assert run(session, folder).held_out == 0
    fill(folder, 21)
    result = run(session, folder)
    dataset = load_dataset(session, instance_prompt=None)
    assert (result.train, result.held_out) == (19, 2)
    assert [image.path.name for image in dataset.held_out] == ["sks_dog (10).png", "sks_dog (20).png"]
    assert {image.path.parent.name for image in dataset.held_out} == {"held_out_images"}
    assert not {image.sha256 for image in dataset.held_out} & {image.sha256 for image in dataset.train}
    assert [item["source"] for item in session.record["dataset"]["images"] if item["held_out"]] == [
        "sks_dog (10).jpg",
        "sks_dog (20).jpg",
    ]


def test_a_held_out_folder_inside_the_photos_is_kept_apart(session: Session, folder: Path) -> None:
    fill(folder, 12)
    held_out = folder / "held out"
    held_out.mkdir()
    picture(50).save(held_out / "sks_dog (1).png")
    (held_out / "copy.jpg").write_bytes((folder / "sks_dog (1).jpg").read_bytes())
    result = run(session, folder, held_out=str(held_out))
    dataset = load_dataset(session, instance_prompt=None)
    assert (len(dataset.train), len(dataset.held_out)) == (12, 1)
    assert dataset.held_out[0].path == session.held_out_images / "sks_dog (1) (2).png"
    assert dataset.held_out[0].prompt == "sks dog"
    # Measuring on a training picture would flatter the model.
    assert result.skipped == ({"source": "copy.jpg", "reason": "is the same image as sks_dog (1).jpg"},)


def test_sub_folders_are_read_and_equal_names_in_them_are_kept_apart(session: Session, folder: Path) -> None:
    for number, name in enumerate(["a", "b"]):
        (folder / name).mkdir()
        picture(number).save(folder / name / "Dog.png")
    picture(7).save(folder / "dog.png")
    run(session, folder)
    names = sorted(image.path.name for image in load_dataset(session, instance_prompt=None).train)
    assert names == ["Dog (2).png", "Dog.png", "dog (3).png"]


# -------------------------------------------------------------------------------------------------- formats


def gradient(mode: str) -> Image.Image:
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    if mode == "I;16":
        return Image.fromarray(values)
    if mode == "I":
        return Image.fromarray(values.astype(np.int32))
    return Image.fromarray((values / 65535).astype(np.float32))


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_deep_greys_are_scaled_and_not_clipped(mode: str, kind: str) -> None:
    photo = decode_photo(as_bytes(gradient(mode), kind))
    greys = np.asarray(photo.image)[0, :, 0].astype(int)
    assert photo.image.mode == "RGB"
    assert abs(greys - np.linspace(0, 255, 64)).max() <= 1
    assert "scaled to 8 bits" in photo.warnings


def png_of_16_bit_rgb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"".join(struct.pack(">HHH", v, 65535 - v, 0) for v in np.linspace(0, 65535, 64).astype(int).tolist())
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress((b"\0" + row) * 64)) + chunk(b"IEND", b"")


def test_16_bit_colour_is_scaled_and_not_clipped() -> None:
    pixels = np.asarray(decode_photo(png_of_16_bit_rgb()).image)[0].astype(int)
    assert abs(pixels[:, 0] - np.linspace(0, 255, 64)).max() <= 1
    assert abs(pixels[:, 1] - np.linspace(255, 0, 64)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_put_on_white_and_reported(mode: str) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    image.putpixel((39, 0), (0, 0, 0, 128))
    photo = decode_photo(as_bytes(image.convert(mode)))
    assert photo.image.getpixel((5, 5)) == (255, 255, 255)
    assert photo.image.getpixel((30, 30)) == (0, 0, 0)
    assert photo.image.getpixel((39, 0)) == (127, 127, 127)
    assert photo.warnings == ("transparent parts were filled with white",)


def test_an_opaque_alpha_channel_is_not_reported() -> None:
    photo = decode_photo(as_bytes(picture(1).convert("RGBA")))
    assert photo.warnings == ()
    assert photo.image.tobytes() == picture(1).tobytes()


def test_palette_pictures_keep_their_colours_and_their_transparency() -> None:
    image = Image.new("P", (30, 30), 0)
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    image.paste(1, (15, 0, 30, 30))
    assert decode_photo(as_bytes(image)).image.getpixel((20, 5)) == (10, 200, 10)
    clear = decode_photo(as_bytes(image, transparency=0))
    assert clear.image.getpixel((5, 5)) == (255, 255, 255)
    assert clear.image.getpixel((20, 5)) == (10, 200, 10)
    assert clear.warnings == ("transparent parts were filled with white",)


def test_cmyk_becomes_rgb_of_about_the_same_colours() -> None:
    photo = decode_photo(as_bytes(Image.new("RGB", (40, 40), (200, 60, 40)).convert("CMYK"), "JPEG", quality=95))
    assert photo.image.mode == "RGB"
    assert np.abs(np.array(photo.image.getpixel((20, 20))) - (200, 60, 40)).max() < 12
    assert photo.warnings == ("CMYK colours were converted to RGB",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_by_their_exif_tag(orientation: int) -> None:
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste((255, 0, 0), (0, 0, 20, 20))
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that undoes each orientation
    stored = upright.transpose(Image.Transpose(turn_back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode_photo(as_bytes(stored, "PNG", exif=exif))
    assert photo.image.size == (60, 40)
    assert photo.image.getpixel((5, 5)) == (255, 0, 0)
    assert photo.image.getpixel((50, 30)) == (255, 255, 255)
    assert not photo.image.getexif()


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("WEBP", 30), ("JPEG", 30), ("BMP", 0), ("TIFF", 0)])
def test_usual_formats_are_read(kind: str, tolerance: int) -> None:
    plain = picture(3).filter(ImageFilter.GaussianBlur(3))
    made = np.asarray(decode_photo(as_bytes(plain, kind, **({"quality": 95} if tolerance else {}))).image, dtype=int)
    assert np.abs(made - np.asarray(plain, dtype=int)).max() <= tolerance


def heic(image: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    return buffer.getvalue()


def test_heic_photos_are_read() -> None:
    plain = Image.new("RGB", (128, 96), (180, 60, 40))
    photo = decode_photo(heic(plain))
    assert photo.image.size == (128, 96)
    assert np.abs(np.array(photo.image.getpixel((60, 60))) - (180, 60, 40)).max() < 12


def test_heic_without_pillow_heif_is_skipped_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.new("RGB", (128, 96), "red"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DatasetError, match="pillow-heif is not installed"):
        decode_photo(data)


def test_wide_gamut_colours_become_srgb() -> None:
    # A profile whose primaries differ is made by exchanging two of sRGB's colorant tags: red and blue change places.
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {profile[o : o + 4].decode(): o for o in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)}
    profile[tags["rXYZ"] : tags["rXYZ"] + 4], profile[tags["bXYZ"] : tags["bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    profile = bytes(profile).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be")).replace(b"sRGB", b"wide")
    image = Image.new("RGB", (40, 40), (250, 10, 10))
    photo = decode_photo(as_bytes(image, icc_profile=profile))
    assert photo.warnings == ()
    red, _, blue = photo.image.getpixel((5, 5))
    assert blue > 200 > 100 > red
    broken = decode_photo(as_bytes(image, icc_profile=b"no profile at all"))
    assert broken.image.getpixel((5, 5)) == (250, 10, 10)
    assert broken.warnings == ("its colour profile is damaged and was ignored",)


def test_an_animation_gives_its_first_frame_and_says_so() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    photo = decode_photo(as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert photo.image.getpixel((5, 5)) == (255, 0, 0)
    assert photo.warnings == ("only its first frame is used",)


# ------------------------------------------------------------------------------------------------- bad input


def huge_png(width: int, height: int) -> bytes:
    """The header of a huge image, and hardly any data."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, body, b"IEND")
    )


BAD = {
    "text file": (lambda: b"this is a text file named .jpg\n" * 9, "is a text file"),
    "web page": (lambda: b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "empty": (lambda: b"", "is empty"),
    "noise": (lambda: bytes(range(256)) * 9, "is not an image"),
    "bomb": (lambda: huge_png(30_000, 30_000), "more than 128 megapixels"),
    "bomb below pillow's own limit": (lambda: huge_png(13_000, 13_000), "13000 x 13000: more than 128 megapixels"),
    "cut jpeg": (lambda: as_bytes(picture(1), "JPEG")[:3000], "truncated or damaged"),
    "cut png": (lambda: as_bytes(picture(1))[:-900], "truncated or damaged"),
    "cut webp": (lambda: as_bytes(picture(1), "WEBP")[:900], "damaged"),
    "damaged header": (lambda: b"\x89PNG\r\n\x1a\n" + b"\1" * 50, "damaged image"),
    "tiny": (lambda: as_bytes(Image.new("RGB", (8, 8))), "only 8 x 8"),
    "ribbon": (lambda: as_bytes(Image.new("RGB", (2000, 20))), "times as long as wide"),
    "transparent": (lambda: as_bytes(Image.new("RGBA", (40, 40))), "fully transparent"),
    "not a number": (lambda: as_bytes(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"), "contains NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_skipped_with_its_reason(name: str, session: Session, folder: Path) -> None:
    make, reason = BAD[name]
    (folder / "bad.jpg").write_bytes(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warnings must not reach users
        with pytest.raises(DatasetError, match=reason):
            run(session, folder)
    picture(1).save(folder / "good.png")
    result = run(session, folder)
    assert result.train == 1
    assert [item["source"] for item in result.skipped] == ["bad.jpg"]
    assert reason in result.skipped[0]["reason"]
    assert any(line.startswith("Skipped bad.jpg: ") for line in result.lines())


def test_a_decompression_bomb_is_refused_before_any_pixel_is_allocated() -> None:
    code = (
        "import sys, resource\n"
        "from fastsd_helpers.dreambooth.photos.decoding import decode_photo\n"
        "from PIL import Image\n"
        "Image.MAX_IMAGE_PIXELS = None\n"  # even with Pillow's own guard off, as notebooks set it
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    decode_photo(open(sys.argv[1], 'rb').read())\n"
        "except Exception as err:\n    print(type(err).__name__, str(err))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    path = Path(os.environ["HOME"]) / "bomb.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(huge_png(30_000, 30_000))
    said, mib = run_python(code, path).stdout.strip().splitlines()
    assert said == "DatasetError is 30000 x 30000: more than 128 megapixels"
    assert int(mib) < 20


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: folder / "nowhere", "no folder or zip"),
        (lambda folder: folder, "no images in"),
        (lambda folder: _write(folder / "notes.txt", b"hello").parent, "no images in"),
        (lambda folder: _write(folder / "clip.mov", b"hello").parent, r"clip\.mov is not an image"),
        (lambda folder: _write(folder / "photos.rar", b"Rar!"), "archive of an unsupported kind"),
        (lambda folder: _write(folder / "photos.zip", b"PK\3\4 cut"), "damaged or not a zip file"),
        (lambda folder: zip_of(folder / "empty.zip", {}), "no images in"),
    ],
)
def test_no_usable_picture_ends_with_what_to_give(
    make: Callable[[Path], Path], problem: str, session: Session, folder: Path
) -> None:
    with pytest.raises(DatasetError, match=problem) as caught:
        run(session, make(folder))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "dataset" not in session.record or not session.record["dataset"]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_no_images_at_all_is_a_dataset_error(session: Session) -> None:
    with pytest.raises(DatasetError, match="No photos were given"):
        prepare(PrepareConfig(), session)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../evil.png", "points outside the zip"),
        ("a/../../evil.png", "points outside the zip"),
        ("..\\evil.png", "points outside the zip"),
        ("/etc/evil.png", "absolute path"),
        ("\\\\host\\evil.png", "absolute path"),
        ("C:\\evil.png", "absolute path"),
        ("C:evil.png", "absolute path"),
    ],
)
def test_a_zip_with_an_unsafe_path_is_refused_as_a_whole(
    name: str, problem: str, session: Session, tmp_path: Path
) -> None:
    archive = zip_of(tmp_path / "photos.zip", {"good.png": as_bytes(picture(1)), name: as_bytes(picture(2))})
    with pytest.raises(DatasetError, match=problem):
        run(session, archive)
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(session.instance_images.iterdir())


def test_a_zip_with_a_link_is_refused(session: Session, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("dog.png")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DatasetError, match="a link or device"):
        run(session, tmp_path / "photos.zip")


def test_a_zip_that_would_unpack_to_too_much_is_refused(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zip_of(tmp_path / "photos.zip", {f"{n}.png": as_bytes(picture(n)) for n in range(3)})
    monkeypatch.setattr(photos_module, "_MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DatasetError, match="would unpack to"):
        run(session, archive)
    monkeypatch.undo()
    monkeypatch.setattr(photos_module, "_MAX_MEMBERS", 2)
    with pytest.raises(DatasetError, match="holds 3 files"):
        run(session, archive)
    monkeypatch.undo()
    monkeypatch.setattr(photos_module, "_MAX_FILES", 2)
    with pytest.raises(DatasetError, match="more than 2 images"):
        run(session, archive)


def test_damaged_and_encrypted_members_of_a_zip_are_skipped(session: Session, tmp_path: Path) -> None:
    path = zip_of(tmp_path / "photos.zip", {"bad.png": as_bytes(picture(2)), "good.png": as_bytes(picture(1))})
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF  # inside the first member, which is stored: its checksum is wrong now
    data[data.rindex(b"PK\1\2") + 8] |= 1  # the second is marked as encrypted
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"bad\.png cannot be unpacked: Bad CRC") as caught:
        run(session, path)
    assert "good.png is encrypted" in caught.value.problem


def test_links_in_a_folder_to_nowhere_are_skipped(session: Session, folder: Path) -> None:
    picture(1).save(folder / "good.png")
    (folder / "lost.png").symlink_to(folder / "gone.png")
    assert run(session, folder).skipped[0]["source"] == "lost.png"


def test_settings_out_of_range_are_named_together() -> None:
    with pytest.raises(SettingsError, match=r"size .* smallest is 64.*face_model.*boxes"):
        PrepareConfig(images="x", size=10, crop="none", boxes="b.json", face_model=3)
    with pytest.raises(SettingsError, match="crop"):
        PrepareConfig(images="x", crop="circle")


def test_a_session_in_use_is_not_prepared(session: Session, folder: Path) -> None:
    fill(folder, 1)
    with session.lock(), pytest.raises(SessionBusy):
        run(Session.open("my_dog", root=session.folder.parent), folder)


# ------------------------------------------------------------------------------------------------- report


def test_copies_are_skipped_and_pictures_nearly_alike_are_reported(session: Session, folder: Path) -> None:
    original = picture(1, (400, 400))
    original.save(folder / "a.png")
    (folder / "b copy.png").write_bytes((folder / "a.png").read_bytes())
    original.save(folder / "c again.png", compress_level=1)  # other bytes, same pixels
    original.resize((320, 320)).save(folder / "d smaller.jpg", quality=60)
    picture(2).save(folder / "e other.png")
    result = run(session, folder)
    assert [item["source"] for item in result.images] == ["a.png", "d smaller.jpg", "e other.png"]
    assert {item["reason"] for item in result.skipped} == {"is the same image as a.png"}
    assert result.images[1]["warnings"] == ["looks almost like a.png"]
    assert result.images[2]["warnings"] == []


def test_small_and_blurred_pictures_are_reported(session: Session, folder: Path) -> None:
    picture(1, (100, 100)).save(folder / "small.png")
    picture(2, (600, 600)).filter(ImageFilter.GaussianBlur(6)).save(folder / "blurred.png")
    picture(3, (600, 600)).save(folder / "sharp.png")
    found = {item["source"]: item["warnings"] for item in run(session, folder, size=128).images}
    assert found["small.png"] == ["too small: 100 px enlarged to 128 px"]
    assert found["blurred.png"] == ["blurred"]
    assert found["sharp.png"] == []


@pytest.mark.skipif(
    not PHOTOS.is_dir(), reason=f"{PHOTOS} is missing: six sets of photos from github.com/google/dreambooth"
)
def test_sharpness_and_likeness_tell_real_photos_apart() -> None:
    hashes = []
    for path in sorted(PHOTOS.glob("*/0[024].jpg")):
        with Image.open(path) as opened:
            photo = opened.convert("RGB").resize((512, 512))
        assert measure_sharpness(photo) > 100, path
        assert measure_sharpness(photo.filter(ImageFilter.GaussianBlur(4))) < 60, path
        hashes.append(perceptual_hash(photo))
        again = perceptual_hash(Image.open(io.BytesIO(as_bytes(photo.resize((300, 300)), "JPEG", quality=50))))
        assert (again ^ hashes[-1]).bit_count() <= 16, path
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 64


def test_the_contact_sheet_shows_every_picture_with_its_crop(session: Session, folder: Path) -> None:
    picture(1, (600, 300)).save(folder / "a name that is far too long to fit into its card, so it is cut.png")
    fill(folder, 4)
    result = run(session, folder)
    assert result.contact_sheet == session.logs / "contact-sheet.png"
    with Image.open(result.contact_sheet) as sheet:
        small = np.asarray(sheet.convert("RGB"))
    assert small.shape[1] == 3 * (2 * 232 + 3 * 14) + 4 * 18
    teal = (np.abs(small.astype(int) - (0, 122, 112)).max(axis=2) == 0).sum()
    assert teal > 300  # the frame drawn on the one photo that is not square


# ------------------------------------------------------------------------------------------------- captions


def test_captions_beside_the_photos_are_exact_prompts_and_edits_count(session: Session, folder: Path) -> None:
    fill(folder, 3)
    (folder / "sks_dog (1).txt").write_bytes(b"\xef\xbb\xbfa sks dog on a sofa\r\n")
    (folder / "sks_dog (2).txt").write_bytes("au café".encode("latin-1"))
    (folder / "sks_dog (3).txt").write_text(" \n")
    run(session, folder)
    assert (session.captions / "sks_dog (1).txt").read_text() == "a sks dog on a sofa\n"
    prompts = [image.prompt for image in load_dataset(session, instance_prompt="photo of sks dog").train]
    assert prompts == ["a sks dog on a sofa", "au café", "photo of sks dog"]
    (session.captions / "sks_dog (1).txt").write_text("edited")
    (session.captions / "sks_dog (3).txt").write_text("added")
    (session.captions / "sks_dog (2).txt").unlink()
    assert [image.prompt for image in load_dataset(session, instance_prompt=None).train] == [
        "edited",
        "sks dog",
        "added",
    ]


def test_captions_edited_in_the_session_stay_with_their_photo_when_prepared_again(
    session: Session, folder: Path
) -> None:
    fill(folder, 3)
    (folder / "sks_dog (1).txt").write_text("from the folder")
    run(session, folder)
    (session.captions / "sks_dog (2).txt").write_text("written by hand")
    (folder / "sks_dog (2).jpg").rename(folder / "other (7).jpg")
    (folder / "sks_dog (1).txt").write_text("changed in the folder")
    run(session, folder, size=96)
    found = {image.path.stem: image.prompt for image in load_dataset(session, instance_prompt="x").train}
    assert found == {"other (7)": "written by hand", "sks_dog (1)": "changed in the folder", "sks_dog (3)": "x"}


def test_a_caption_that_is_none_is_reported_and_ignored(session: Session, folder: Path) -> None:
    fill(folder, 1)
    (folder / "sks_dog (1).txt").write_bytes(b"\0" * 99)
    result = run(session, folder)
    [warning] = result.images[0]["warnings"]
    assert warning.startswith("its .txt was ignored: ")
    assert warning.endswith("contains zero bytes, so it is not a text file")
    assert load_dataset(session, instance_prompt=None).train[0].prompt == "sks dog"


def test_a_session_of_the_old_notebook_is_prepared_from_its_own_pictures(session: Session) -> None:
    picture(1, (512, 512)).save(session.instance_images / "tok-(1).jpg")
    picture(2, (512, 512)).save(session.instance_images / "tok-(2).jpg")
    (session.captions / "tok-(2).txt").write_text("tok in the garden")
    prepare(PrepareConfig(size=64), session)
    assert [image.prompt for image in load_dataset(session, instance_prompt=None).train] == ["tok", "tok in the garden"]
    assert not list(session.instance_images.glob("*.jpg"))
    assert prepare(PrepareConfig(size=128), session).size == 128, "from the photos, not from their crops"
    with Image.open(session.instance_images / "tok-(1).png") as made:
        assert made.size == (128, 128)


class Words:
    """A tokenizer in the one call that is used: as many tokens as words, and a start and an end."""

    model_max_length = 77

    def __call__(self, text: str, *, truncation: bool, verbose: bool) -> dict[str, list[int]]:
        assert truncation is verbose is False
        return {"input_ids": list(range(len(text.split()) + 2))}


def test_the_prompt_table_counts_tokens_and_says_what_is_cut(
    session: Session, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(folder, 2)
    (folder / "sks_dog (2).txt").write_text("word " * 76)
    run(session, folder)
    rows = prompt_table(session, "photo of sks dog", Words())
    assert [(row.image, row.tokens, row.truncated) for row in rows] == [
        ("sks_dog (1).png", 6, False),
        ("sks_dog (2).png", 78, True),
    ]
    assert "1 of 2 prompts are longer" in caplog.text
    first = prompt_table(session)[0]
    assert (first.prompt, first.tokens, first.truncated) == ("sks dog", None, False)


# --------------------------------------------------------------------------------------------------- names


def test_a_numbered_series_shares_its_words_and_a_lone_number_is_kept(session: Session, folder: Path) -> None:
    stems = ["sks_dog_01", "sks_dog_02", "agent 47", "00", "01", "IMG_1", "IMG_2"]
    assert [photo.stem for photo in name_photos([f"{stem}.png" for stem in stems])] == [
        "sks_dog (1)",
        "sks_dog (2)",
        "agent 47",
        "00",
        "01",
        "IMG_1",
        "IMG_2",
    ]
    for number in (1, 2):
        picture(number).save(folder / f"sks-dog-{number}.png")
    picture(3).save(folder / "agent 47.png")
    run(session, folder)
    prompts = {image.path.stem: image.prompt for image in load_dataset(session, instance_prompt=None).train}
    assert prompts == {"sks-dog (1)": "sks dog", "sks-dog (2)": "sks dog", "agent 47": "agent 47"}


@pytest.mark.parametrize(
    ("stem", "safe"),
    [
        ('a<b>:"c"|?*', "a b c"),
        ("con", "_con"),
        ("COM1", "_COM1"),
        ("  dots... ", "dots"),
        ("", "picture"),
        ("...", "picture"),
        ("e\u0301te\u0301", "été"),
        ("🐶 dog", "🐶 dog"),
        ("line\nbreak", "line break"),
    ],
)
def test_file_names_are_safe_on_every_drive(stem: str, safe: str) -> None:
    assert safe_stem(stem) == safe


def test_long_and_equal_names_stay_short_and_apart() -> None:
    assert len(safe_stem("é" * 300).encode()) <= 80
    taken: set[str] = set()
    assert [unique_stem(stem, taken) for stem in ("Dog", "dog", "dog", "dog (2)")] == [
        "Dog",
        "dog (2)",
        "dog (3)",
        "dog (2) (2)",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows such names")
def test_names_that_are_not_utf_8_are_read_and_recorded(session: Session, folder: Path) -> None:
    assert printable("a\udcffb") == "a?b"
    (folder / os.fsdecode(b"dog\xff.png")).write_bytes(as_bytes(picture(1)))
    assert run(session, folder).images[0]["source"] == "dog?.png"
    assert len(load_dataset(Session.open("my_dog", root=session.folder.parent), instance_prompt=None).train) == 1


# --------------------------------------------------------------------------------------------------- boxes


def test_typed_boxes_win_and_count_pixels_after_rotation(session: Session, folder: Path, tmp_path: Path) -> None:
    upright = picture(1, (300, 200))
    upright.paste((250, 0, 0), (200, 100, 280, 180))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    picture(2, (300, 200)).save(folder / "free.png")
    boxes = _write(tmp_path / "boxes.json", json.dumps({"turned.png": [200, 100, 280, 180]}).encode())
    run(session, folder, boxes=str(boxes))
    with Image.open(session.instance_images / "turned.png") as made:
        assert np.asarray(made).reshape(-1, 3).std(axis=0).max() < 1
        assert made.getpixel((32, 32)) == (250, 0, 0)
    found = {item["source"]: (item["method"], item["box"]) for item in session.record["dataset"]["images"]}
    assert found["turned.png"] == ("box", [200, 100, 280, 180])
    assert found["free.png"][0] != "box"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "not a list of four numbers for each"),
        ('{"a.png": 5}', "not a list of four numbers for each"),
        ('{"a.png": [0, 0, 50]}', r"a\.png: .*four numbers"),
        ('{"a.png": [0, 0, 5000, 50]}', r"a\.png: .*outside the photo of 300 x 300"),
        ('{"b.png": [0, 0, 50, 50]}', r"no usable photo has the name b\.png"),
    ],
)
def test_boxes_that_do_not_fit_stop_the_run_and_change_nothing(
    text: str, problem: str, session: Session, folder: Path, tmp_path: Path
) -> None:
    picture(1).save(folder / "a.png")
    boxes = _write(tmp_path / "boxes.json", text.encode())
    with pytest.raises(DatasetError, match=problem):
        run(session, folder, boxes=str(boxes))
    assert not list(session.instance_images.iterdir())
    with pytest.raises(DatasetError, match="no file of crop boxes"):
        run(session, folder, boxes=str(tmp_path / "gone.json"))


# ------------------------------------------------------------------------------------------------- exchange


def snapshot(session: Session) -> dict[str, bytes]:
    wanted = ("instance_images", "held_out_images", "captions")
    return {
        path.relative_to(session.folder).as_posix(): path.read_bytes()
        for name in wanted
        for path in sorted((session.folder / name).rglob("*"))
    }


def test_preparing_again_replaces_all_pictures_and_leaves_nothing_behind(session: Session, folder: Path) -> None:
    fill(folder, 3)
    run(session, folder)
    (session.instance_images / "stray.png").write_bytes(b"stray")
    for path in folder.iterdir():
        path.unlink()
    picture(9).save(folder / "cat.png")
    run(session, folder)
    assert [path.name for path in session.instance_images.iterdir()] == ["cat.png"]
    assert not list(session.folder.glob(".prepare*"))


def test_a_failed_prepare_leaves_the_old_pictures(
    session: Session, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 3)
    (folder / "sks_dog (1).txt").write_text("caption")
    run(session, folder)
    before, record = snapshot(session), json.dumps(session.record["dataset"])
    with pytest.raises(DatasetError):
        run(session, tmp_path / "nowhere")
    real, pictures = os.write, []

    def full_at_the_second_picture(handle: int, data: bytes) -> int:
        pictures.extend([1] if bytes(data[:4]) == b"\x89PNG" else [])
        if len(pictures) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full_at_the_second_picture)
    with pytest.raises(DiskFull):
        run(session, folder, size=96)
    monkeypatch.undo()
    assert snapshot(session) == before
    assert json.dumps(session.record["dataset"]) == record
    assert not list(session.folder.glob(".prepare*"))
    assert len(load_dataset(session, instance_prompt=None).train) == 3


def test_a_record_that_cannot_be_written_puts_the_old_pictures_back(
    session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 3)
    run(session, folder)
    before = snapshot(session)
    real = os.write

    def full_for_the_record(handle: int, data: bytes) -> int:
        if b'"dataset"' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full_for_the_record)
    with pytest.raises(DiskFull):
        run(session, folder, size=96)
    monkeypatch.undo()
    assert snapshot(session) == before
    assert len(load_dataset(session, instance_prompt=None).train) == 3
    assert run(session, folder, size=96).train == 3


@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        ("prepare.between:1", 64),
        ("prepare.between:3", 64),
        ("prepare.before_record:1", 64),
        ("prepare.after_record:1", 96),
    ],
)
def test_killed_during_the_exchange_leaves_one_whole_set(
    fault: str, survives: int, session: Session, folder: Path
) -> None:
    fill(folder, 11)
    (folder / "sks_dog (1).txt").write_text("caption")
    run(session, folder)
    root = session.folder.parent
    code = (
        "import sys\n"
        "from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare\n"
        "from fastsd_helpers.sessions import Session\n"
        "prepare(PrepareConfig(images=sys.argv[1], size=96), Session.open('my_dog', root=sys.argv[2]))\n"
    )
    done = run_python(code, folder, root, FASTSD_FAULT=fault)
    assert done.returncode == -9, done.stderr
    stale = session  # opened before the kill
    session = Session.open("my_dog", root=root)
    dataset = load_dataset(session, instance_prompt=None)
    assert session.record["dataset"]["size"] == survives
    assert {Image.open(image.path).size for image in dataset.train} == {(survives, survives)}
    assert (len(dataset.train), len(dataset.held_out), dataset.train[0].prompt) == (10, 1, "caption")
    # The next run tidies up, whatever the object it is given knows.
    assert run(stale, folder, size=128).train == 10
    assert {Image.open(path).size for path in session.instance_images.iterdir()} == {(128, 128)}
    assert not list(session.folder.glob(".prepare*"))


def test_too_little_room_is_said_before_any_work(
    session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 2)
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda path: 1000)
    with pytest.raises(DiskFull, match="needed for 2 images"):
        run(session, folder, size=1024)


def test_other_pictures_after_training_has_begun_are_warned_about(session: Session, folder: Path) -> None:
    fill(folder, 2)
    assert not any("Training has started" in note for note in run(session, folder).notes)
    session.save(progress={"stage": "unet", "step": 20, "steps": 100})
    assert not any("Training has started" in note for note in run(session, folder).notes)  # the same pictures
    assert any("Training has started" in note for note in run(session, folder, size=128).notes)


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_a_picture_that_is_not_the_recorded_one_is_named(change: str, session: Session, folder: Path) -> None:
    fill(folder, 2)
    run(session, folder)
    path = session.instance_images / "sks_dog (2).png"
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DatasetError, match=rf"sks_dog \(2\)\.png .*{change}") as caught:
        load_dataset(session, instance_prompt=None)
    assert "prepare" in caught.value.hint


def test_reading_before_preparing_says_what_to_run(session: Session) -> None:
    with pytest.raises(DatasetError, match="no prepared images"):
        load_dataset(session, instance_prompt=None)
    with pytest.raises(DatasetError, match="no prepared images"):
        prompt_table(session)


def test_a_record_rebuilt_from_the_pictures_trains_on_the_same_ones_in_the_same_order(
    session: Session, folder: Path
) -> None:
    for number in (10, 9, 1):
        picture(number).save(folder / f"dog ({number}).png")
    run(session, folder)
    before = load_dataset(session)
    for path in [session.folder / "session.json", *(session.folder / ".record").iterdir()]:
        path.unlink()
    rebuilt = Session.open(session.name, root=session.folder.parent)
    # Where each was cut from its photo stood in the record alone.
    known = [replace(image, framing=None) for image in before.train]
    assert load_dataset(rebuilt) == replace(before, train=tuple(known))
    assert run(rebuilt, folder).train == 3  # and preparing again works


def test_listing_photos_sorts_them_as_people_count(folder: Path) -> None:
    for name in ("dog (10).png", "dog (2).png", "Dog (1).png"):
        (folder / name).write_bytes(b"x")
    with open_photos(folder) as found:
        assert found.names == ["Dog (1).png", "dog (2).png", "dog (10).png"]


def test_pipes_among_the_photos_are_skipped_and_not_waited_for(session: Session, folder: Path) -> None:
    picture(1).save(folder / "good.png")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "odd.xyz")  # of an ending that only its first bytes could tell
    report = prepare(PrepareConfig(images=str(folder), size=64), session)
    skipped = {item["source"]: item["reason"] for item in report.skipped}
    assert skipped["pipe.jpg"] == "is not an ordinary file"
    assert "odd.xyz" in skipped
    assert report.train == 1
