"""Bad and odd images: each is reported with its name, and those after it are read."""

import numpy as np
import pytest
from PIL import Image
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.pages.inputs import gather, list_files, open_picture, to_rgb


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_reader(folder, "base", seed=1)
    return Reader(folder, precision="fp32", max_new_tokens=6)


def ink(width=120, height=32):
    """Grey with dark strokes."""
    values = np.full((height, width, 3), 200, np.uint8)
    values[height // 2, 5:-5] = 20
    return Image.fromarray(values)


@pytest.mark.numeric
def test_every_kind_of_bad_file_is_named_and_the_good_ones_are_read(reader, tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    ink().save(folder / "a-good.png")
    (folder / "b-empty.png").write_bytes(b"")
    (folder / "c-corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 50)
    ink().save(folder / "d.png")
    (folder / "d-cut.png").write_bytes((folder / "d.png").read_bytes()[:60])
    Image.new("RGB", (1, 1)).save(folder / "e-tiny.png")
    Image.new("RGB", (200, 40), "white").save(folder / "f-blank.png")
    ink(20_000, 40).save(folder / "g-wide.png")
    ink().convert("CMYK").save(folder / "h-cmyk.jpg")
    Image.fromarray(np.asarray(ink().convert("L")).astype(np.uint16) * 257).save(folder / "i-16bit.png")
    ink().save(folder / "j-moving.gif", save_all=True, append_images=[ink(), ink()])
    (folder / "k-text.png").write_text("no image")
    lines = {line.name: line for line in reader.read(folder)}
    bad = {name: line.problem for name, line in lines.items() if line.problem}
    assert sorted(bad) == ["b-empty.png", "c-corrupt.jpg", "d-cut.png", "e-tiny.png", "f-blank.png", "k-text.png"]
    assert all(name in problem for name, problem in bad.items())
    for name, words in (("b-empty.png", "0 bytes"), ("d-cut.png", "damaged"), ("e-tiny.png", "1 x 1 px"),
                        ("f-blank.png", "blank"), ("k-text.png", "not an image")):  # fmt: skip
        assert words in bad[name]
    assert all(lines[name].tokens for name in ("a-good.png", "g-wide.png", "h-cmyk.jpg", "i-16bit.png", "j-moving.gif"))
    # One and the same line in another mode is read alike.
    same = [[token.id for token in lines[name].tokens] for name in ("a-good.png", "i-16bit.png", "j-moving.gif")]
    assert same[0] == same[1] == same[2]


def test_arrays_of_every_usual_kind_become_the_same_picture():
    grey = np.asarray(ink().convert("L"))
    expected = np.asarray(to_rgb(grey))
    for array in (grey[:, :, None], np.stack([grey] * 3, 2), grey.astype(np.uint16) * 257, grey.astype(np.int64)):
        assert np.array_equal(np.asarray(to_rgb(array)), expected)
    assert np.abs(np.asarray(to_rgb(grey / 255)).astype(int) - expected).max() <= 1
    assert np.asarray(to_rgb(grey > 100)).max() == 255


def test_transparency_is_white_paper():
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4, 5)), np.zeros(7), np.full((8, 8), 2.5), np.full((8, 8), -3)])
def test_an_array_that_is_no_picture_is_a_problem_of_its_own(reader, array):
    lines = reader.read([array, noise_pictures(1)[0]])
    assert lines[0].problem
    assert lines[1].tokens


def test_a_wrong_path_and_an_empty_folder_are_told(reader, tmp_path):
    with pytest.raises(DatasetError, match="no file or folder"):
        reader.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no image in"):
        list(gather(tmp_path / "empty"))


def test_a_pdf_gives_its_pages_and_one_with_a_password_says_so(reader, tmp_path):
    pytest.importorskip("pypdfium2")
    ink(400, 100).save(tmp_path / "two.pdf", save_all=True, append_images=[ink(400, 100)])
    names = [line.name for line in reader.read(tmp_path / "two.pdf")]
    assert names == ["two.pdf, page 1", "two.pdf, page 2"]
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    assert "damaged" in reader.read(tmp_path / "broken.pdf")[0].problem
    (tmp_path / "locked.pdf").write_bytes(LOCKED_PDF)
    assert "protected by a password" in reader.read(tmp_path / "locked.pdf")[0].problem


def test_a_photo_taken_sideways_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ink(120, 32).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (32, 120)


# An encrypted document with nothing in it: RC4, 40 bits, owner and user keys that no empty password opens.
LOCKED_PDF = b"""%PDF-1.4
1 0 obj
<</Type/Catalog/Pages 2 0 R>>
endobj
2 0 obj
<</Type/Pages/Kids[]/Count 0>>
endobj
3 0 obj
<</Filter/Standard/V 1/R 2/P -4/O<0102030405060708091011121314151617181920212223242526272829303132>
/U<3132333435363738394041424344454647484950515253545556575859606162>>>
endobj
trailer
<</Root 1 0 R/Size 4/Encrypt 3 0 R/ID[<00112233445566778899AABBCCDDEEFF><00112233445566778899AABBCCDDEEFF>]>>
"""


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_pixels_of_few_bits_in_sixteen_are_as_bright_as_they_were_taken(bits, tmp_path):
    grey = np.asarray(ink().convert("L")).astype(np.uint16)
    grey[0, 0] = 255  # paper as white as can be
    Image.fromarray((grey * ((2**bits - 1) / 255)).astype(np.uint16)).save(tmp_path / "scan.tif")
    found = np.asarray(open_picture(tmp_path / "scan.tif"))[:, :, 0].astype(int)
    assert np.abs(found - grey).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_fractions_and_numbers_to_255_are_told_apart(top, tmp_path):
    grey = np.asarray(ink().convert("L")).astype(np.float32)
    Image.fromarray(grey / 255 * top).save(tmp_path / "scan.tif")
    found = np.asarray(open_picture(tmp_path / "scan.tif"))[:, :, 0].astype(int)
    assert np.abs(found - grey).max() <= 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>Log in</title>", "a web page"),
        (b"PK\x03\x04" + b"\0" * 60, "a zip archive"),
        (b"%PDF-1.4 nothing", "damaged"),
        ("pages", "no pages"),
        ("image", "give its name the ending of its kind"),
    ],
)
def test_what_is_called_a_pdf_and_is_none_is_named_for_what_it_is(content, words, tmp_path):
    pytest.importorskip("pypdfium2")
    path = tmp_path / "scan.pdf"
    if content == "pages":
        pytest.importorskip("pikepdf").new().save(path)
    elif content == "image":
        ink().save(path, format="PNG")
    else:
        path.write_bytes(content)
    (item,) = gather(path)
    assert item.problem.startswith("scan.pdf")
    assert words in item.problem


def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    scans, other = tmp_path / "scans", tmp_path / "other"
    for path in (scans / "a", scans / "z", other):
        path.mkdir(parents=True)
        ink().save(path / "1.png")
    (scans / "a" / "to-z").symlink_to(scans / "z")
    (scans / "b").symlink_to(other)
    (other / "back").symlink_to(scans)
    (scans / "out").mkdir()
    ink().save(scans / "out" / "made.png")
    assert list_files(scans, leave_out=scans / "out") == ["a/1.png", "b/1.png", "z/1.png"]
    assert list_files(scans, leave_out=scans) == list_files(scans), "results may be written beside the scans"


def test_what_may_be_a_scan_and_is_not_opened_is_named_and_rare_endings_are_read(tmp_path):
    ink().save(tmp_path / "a.jfif", "JPEG")
    ink().convert("1").save(tmp_path / "b.pbm")
    (tmp_path / "c.djvu").write_bytes(b"AT&TFORM\0\0\0\0DJVU")
    (tmp_path / "d.jpf").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n")
    (tmp_path / "e.txt").write_text("no image")
    found = {item.name: item.problem for item in gather(tmp_path)}
    assert (found.pop("a.jfif"), found.pop("b.pbm")) == (None, None)
    assert "DjVu" in found.pop("c.djvu")
    assert "JPEG 2000" in found.pop("d.jpf")
    assert found == {}
