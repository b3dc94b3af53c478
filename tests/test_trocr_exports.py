"""Pages as files: valid by their schemas, read back by other readers, words in their places, nothing that harms."""

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")

from fastsd_helpers.errors import SettingsError  # noqa: E402
from fastsd_helpers.trocr.exports.formats import parse_formats  # noqa: E402
from fastsd_helpers.trocr.exports.record import PageRecord, place_words, record_of, settled  # noqa: E402
from fastsd_helpers.trocr.exports.tables import pages_csv, pages_json, pages_text  # noqa: E402
from fastsd_helpers.trocr.model.line import Line, Token  # noqa: E402
from fastsd_helpers.trocr.pages.page_reader import Page  # noqa: E402

SCHEMAS = Path(__file__).parent / "data" / "schemas"


def rectangle(left, top, right, bottom):
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def line(text, confidence=0.9, box=(40, 40, 400, 100), **more):
    left, _top, right, bottom = box
    base = ((left, bottom - 12), (right, bottom - 12))
    return Line(text, confidence, box=rectangle(*box), polygon=rectangle(*box), baseline=base, **more)


UPWARDS = Line(
    "up down", 0.8, box=((700, 380), (700, 50), (760, 50), (760, 380)), baseline=((750, 380), (750, 50)),
    polygon=rectangle(700, 50, 760, 380), region=("margin", 2),
)  # fmt: skip


@pytest.fixture
def record() -> PageRecord:
    lines = (
        line('the "quick" <&> fox'),
        line("jumps über den 𝔸Hund\x00\x0b", 0.4, (40, 145, 460, 200)),
        line("", 0.1, (40, 230, 300, 280)),
        line("=1+2 שלום עולם", 0.5, (-9, 330, 812, 420)),  # reaches over the edges of the page
        UPWARDS,
    )
    page = Page('a "b".png, page 2', lines, 0.0, (800, 400))
    return record_of(page, file='a "b".png', number=2, dpi=150, reader="demo-reader", changed=1e9)


def schema(name: str, folder: Path):
    etree = pytest.importorskip("lxml.etree")
    for packed in SCHEMAS.glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return etree.XMLSchema(etree.parse(folder / name))


@pytest.mark.parametrize("name", ["alto-4-3.xsd", "pagecontent-2019-07-15.xsd"])
def test_alto_and_page_are_valid_by_their_schemas_with_any_text_and_without(record, name, tmp_path):
    etree = pytest.importorskip("lxml.etree")
    from fastsd_helpers.trocr.exports.alto import alto_xml
    from fastsd_helpers.trocr.exports.page_xml import page_xml

    rules = schema(name, tmp_path)
    writer = alto_xml if "alto" in name else page_xml
    for page in (record, replace(record, regions=(), dpi=None, number=1)):
        data = writer(page)
        rules.assertValid(etree.fromstring(data))
        assert data == writer(page), "the same page gives the same bytes"


def test_what_was_read_is_in_page_and_alto_with_its_place_and_order(record):
    etree = pytest.importorskip("lxml.etree")
    from fastsd_helpers.trocr.exports.alto import alto_xml
    from fastsd_helpers.trocr.exports.page_xml import page_xml

    page = etree.fromstring(page_xml(record))
    found = [node for node in page.iter("{*}TextLine")]
    texts = [node.find("{*}TextEquiv/{*}Unicode").text or "" for node in found]
    assert texts == [one.text for one in record.lines]
    assert found[0].find("{*}Coords").get("points") == "40,40 400,40 400,100 40,100"
    assert found[0].find("{*}Baseline").get("points") == "40,88 400,88"
    assert found[0].find("{*}TextEquiv").get("conf") == "0.9000"
    assert found[3].find("{*}Coords").get("points") == "0,330 800,330 800,400 0,400"
    assert [node.get("type") for node in page.iter("{*}TextRegion")] == ["paragraph", "marginalia"]
    assert page.find("{*}Page").get("imageFilename") == 'a "b".png'
    order = [node.get("regionRef") for node in page.iter("{*}RegionRefIndexed")]
    assert order == [node.get("id") for node in page.iter("{*}TextRegion")]
    alto = etree.fromstring(alto_xml(record))
    words = [[word.get("CONTENT") for word in node.iter("{*}String")] for node in alto.iter("{*}TextLine")]
    assert [" ".join(one) for one in words] == texts
    assert alto.findtext("{*}Description/{*}sourceImageInformation/{*}fileName") == 'a "b".png'
    assert alto.find(".//{*}Page").get("PHYSICAL_IMG_NR") == "2"
    assert {word.get("TAGREFS") for word in alto.iter("{*}String") if word.get("CONTENT")} == {"estimated"}


def test_hocr_names_all_that_occurs_and_nests_words_in_their_lines(record):
    etree = pytest.importorskip("lxml.etree")
    from fastsd_helpers.trocr.exports.hocr import hocr_html

    root = etree.fromstring(hocr_html(record))
    classes = {node.get("class") for node in root.iter() if node.get("class")}
    told = root.find(".//{*}meta[@name='ocr-capabilities']").get("content").split()
    assert classes <= set(told)
    assert {"ocr_page", "ocr_line", "ocrx_word"} <= classes

    def box(node):
        fields = dict(part.strip().split(" ", 1) for part in node.get("title").split(";") if "bbox" in part)
        return [int(value) for value in fields["bbox"].split()]

    for one in root.iterfind(".//{*}span[@class='ocr_line']"):
        left, top, right, bottom = box(one)
        for word in one:
            a, b, c, d = box(word)
            assert left <= a <= c <= right
            assert top <= b <= d <= bottom
    assert "textangle 90" in etree.tostring(root).decode()


@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp", "rgba", "turned", "pdf", "pdf-rotated"])
def test_a_searchable_pdf_has_each_word_in_its_line_and_the_scans_own_bytes(record, kind, tmp_path):
    pikepdf = pytest.importorskip("pikepdf")
    pytest.importorskip("img2pdf")
    pypdfium2 = pytest.importorskip("pypdfium2")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf

    scan = Image.radial_gradient("L").resize((800, 400)).convert("RGB")
    path = tmp_path / f"scan.{ {'rgba': 'png', 'turned': 'jpg'}.get(kind, kind[:4].rstrip('-')) }"
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        scan.rotate(90, expand=True).save(path, exif=exif, dpi=(150, 150))
    elif kind.startswith("pdf"):
        path = tmp_path / "scan.pdf"
        scan.rotate(90 if "rot" in kind else 0, expand=True).save(path, resolution=150)
        if "rot" in kind:
            with pikepdf.open(path, allow_overwriting_input=True) as document:
                document.pages[0].Rotate = 90
                document.save(path)
    else:
        (scan.convert("RGBA") if kind == "rgba" else scan).save(path, dpi=(150, 150))
    record = replace(record, number=1)
    data = searchable_pdf(path, [record])
    assert data == searchable_pdf(path, [record])
    with pikepdf.open(io.BytesIO(data)) as document:
        assert not document.check_pdf_syntax() if hasattr(document, "check_pdf_syntax") else not document.check()
        (image,) = get_images(document.pages[0])
        made, saved = map(bytes, document.trailer["/ID"])
        assert kind.startswith("pdf") or made == saved, "img2pdf's own is made of the clock: other bytes each second"
        if kind in ("jpg", "turned"):
            assert image.read_raw_bytes() == path.read_bytes()
    document = pypdfium2.PdfDocument(data)
    page = document[0]
    text = page.get_textpage()
    said = text.get_text_range()
    for word in ("quick", "<&>", "über", "𝔸Hund", "down"):
        assert word in said, said
    width, height = page.get_size()
    assert width / height == pytest.approx(2, rel=0.01)
    # The middle of each word's first character lies in its line.
    for one, word in ((record.lines[0], "fox"), (record.lines[1], "den"), (record.lines[4], "down")):
        left, bottom, right, top = text.get_charbox(said.index(word) if "𝔸" not in said[: said.index(word)] else 0)
        if "𝔸" in said[: said.index(word)]:
            found = text.search(word).get_next()
            left, bottom, right, top = text.get_charbox(found[0])
        if "rot" in kind or kind == "turned":
            continue  # boxes are in the page's own space there; that words are read in order says they lie right
        x, y = (left + right) / 2 / width * 800, (1 - (bottom + top) / 2 / height) * 400
        assert one.box[0] - 2 <= x <= one.box[2] + 2
        assert one.box[1] - 2 <= y <= one.box[3] + 2
    drawn = page.render(scale=800 / width).to_pil().convert("L")
    wanted = scan.convert("L").resize(drawn.size)
    off = sum(abs(a - b) for a, b in zip(drawn.tobytes(), wanted.tobytes(), strict=True)) / len(drawn.tobytes())
    assert off < 8, "what was read is not seen"


def get_images(page):
    """The images of a page, as older and newer versions of pikepdf give them."""
    return list((page.get_images() if hasattr(page, "get_images") else page.images).values())


def test_a_pdf_of_several_pages_keeps_its_pages_and_gets_text_on_those_that_were_read(record, tmp_path):
    pytest.importorskip("pikepdf")
    pypdfium2 = pytest.importorskip("pypdfium2")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf

    sheet = Image.new("RGB", (800, 400), "white")
    sheet.save(tmp_path / "three.pdf", save_all=True, append_images=[sheet, sheet])
    data = searchable_pdf(tmp_path / "three.pdf", [record])  # that of page 2
    document = pypdfium2.PdfDocument(data)
    assert ["quick" in page.get_textpage().get_text_range() for page in document] == [False, True, False]


def test_a_spreadsheet_gets_a_mark_of_its_letters_boxes_and_no_formula(record):
    data = pages_csv([record, replace(record, regions=(), problem="x.png is blank.")])
    assert data.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert [row["text"] for row in rows][3].startswith("'=1+2")
    assert [rows[0][name] for name in ("left", "top", "right", "bottom")] == ["40", "40", "400", "100"]
    assert rows[-1]["problem"] == "x.png is blank."


def test_unsure_lines_lose_their_text_where_it_is_shown_and_nowhere_else(record):
    kept, unsure = settled(record, 0.5)
    assert unsure == 1
    assert pages_text([kept]).decode().split("\n")[:3] == ['the "quick" <&> fox', "", ""]
    known = json.loads(pages_json([record]))["pages"][0]
    assert PageRecord.from_json(known) == record
    assert settled(record, 0.0) == (record, 0)


def test_words_lie_where_the_reader_looked_or_as_wide_as_their_letters():
    tokens = tuple(Token(place, piece, 0.9) for place, piece in enumerate(["iii", " mmm", "m"]))
    guessed = list(place_words(line("iii mmmm", box=(0, 0, 100, 20), tokens=tokens)))
    assert [word for word, *_ in guessed] == ["iii", "mmmm"]
    assert guessed[0][1][1][0] < 30, "narrow letters take less room"
    assert all(estimated for *_, estimated in guessed)
    seen = list(place_words(line("iii mmmm", box=(0, 0, 100, 20), tokens=tokens, centres=(0.1, 0.5, 0.7))))
    assert not any(estimated for *_, estimated in seen)
    assert seen[0][1][1][0] < seen[1][1][0][0]
    # Where it looked back and forth, that says nothing.
    lost = list(place_words(line("iii mmmm", box=(0, 0, 100, 20), tokens=tokens, centres=(0.9, 0.5, 0.7))))
    assert [box for _, box, *_ in lost] == [box for _, box, *_ in guessed]
    right = list(place_words(line("שלום אב", box=(0, 0, 100, 20))))
    assert right[0][1][0][0] > right[1][1][1][0], "the first word of Hebrew is at the right"


def test_formats_are_named_with_commas_and_a_wrong_one_is_refused():
    assert parse_formats("PDF, alto,pdf") == ("pdf", "alto")
    for wrong in ("", "docx", "alto;pdf"):
        with pytest.raises(SettingsError, match="--format"):
            parse_formats(wrong)


def covered_ink(data: bytes) -> list[float]:
    """The share of each page's ink that lies in a box of its characters, as the page is shown."""
    import ctypes

    raw, pypdfium2 = pytest.importorskip("pypdfium2.raw"), pytest.importorskip("pypdfium2")
    shares = []
    for page in pypdfium2.PdfDocument(data):
        drawn = page.render(scale=800 / max(page.get_size())).to_pil().convert("L")
        boxes, text = Image.new("1", drawn.size), page.get_textpage()
        for place in range(text.count_chars()):
            left, bottom, right, top = text.get_charbox(place)
            corners = []
            for x, y in ((left, top), (right, bottom)):
                across, down = ctypes.c_int(), ctypes.c_int()
                raw.FPDF_PageToDevice(page.raw, 0, 0, *drawn.size, 0, x, y, across, down)
                corners.append((across.value, down.value))
            xs, ys = zip(*corners, strict=True)
            boxes.paste(1, (min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        ink = drawn.point(lambda grey: 255 if grey < 130 else 0).convert("1")
        both = Image.composite(ink, Image.new("1", ink.size), boxes)
        shares.append(both.histogram()[-1] / max(1, ink.histogram()[-1]))
    return shares


@pytest.fixture
def inked():
    """A page with one bar of ink, and its record, whose line lies there."""
    scan = Image.new("RGB", (800, 400), "white")
    scan.paste("black", (50, 50, 390, 84))
    page = Page("scan", (line("mmmmmmmm"),), 0.0, scan.size)
    return scan, record_of(page, file="scan", dpi=150)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["tif", "jpg", "png"])
def test_text_lies_on_its_ink_however_the_file_says_it_is_turned(inked, orientation, ending, tmp_path):
    pytest.importorskip("pikepdf")
    pytest.importorskip("img2pdf")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf
    from fastsd_helpers.trocr.pages.inputs import open_picture

    scan, record = inked
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = scan if back is None else scan.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"scan.{ending}"
    stored.save(path, exif=exif)
    assert open_picture(path).tobytes() == scan.tobytes() or ending == "jpg"
    assert min(covered_ink(searchable_pdf(path, [record]))) > 0.9


@pytest.mark.parametrize("box", [[-500, -500, 5000, 5000], [0, 96, 384, 192], [384, 192, 0, 0]])
def test_text_lies_on_its_ink_whatever_the_page_is_cropped_to(inked, box, tmp_path):
    pikepdf = pytest.importorskip("pikepdf")
    pytest.importorskip("pypdfium2")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf
    from fastsd_helpers.trocr.pages.inputs import open_page

    scan, record = inked
    path = tmp_path / "scan.pdf"
    scan.save(path, resolution=150)
    with pikepdf.open(path, allow_overwriting_input=True) as document:
        document.pages[0].CropBox = pikepdf.Array(box)
        document.save(path)
    size = open_page(path, 1).size
    assert size[0] == 800
    record = replace(record, size=size)
    assert min(covered_ink(searchable_pdf(path, [record]))) > 0.9


def test_a_frame_that_could_not_be_read_shifts_no_text(inked, tmp_path):
    pytest.importorskip("pikepdf")
    pytest.importorskip("img2pdf")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf

    scan, record = inked
    frames = [frame.convert("LAB") for frame in (scan, Image.new("RGB", scan.size, "white"), scan)]  # PDF lacks it
    frames[0].save(tmp_path / "scan.tif", save_all=True, append_images=frames[1:])
    data = searchable_pdf(tmp_path / "scan.tif", [record, replace(record, number=3)])
    first, blank, last = covered_ink(data)
    assert (min(first, last) > 0.9, blank) == (True, 0)


def test_text_that_a_pdf_has_already_is_told_of(inked, tmp_path, caplog):
    pytest.importorskip("pikepdf")
    from fastsd_helpers.trocr.exports.pdf import searchable_pdf

    scan, record = inked
    path = tmp_path / "scan.pdf"
    scan.save(path, resolution=150)
    once = searchable_pdf(path, [record])
    assert "has text already" not in caplog.text
    path.write_bytes(once)
    searchable_pdf(path, [record])
    assert "scan.pdf has text already, which stays" in caplog.text
