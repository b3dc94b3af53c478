"""Ground truth in the forms archives and data sets have: PAGE, ALTO, IAM, Donut, PPOCRLabel, parts, odd names."""

import io
import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.pages.inputs import gather
from fastsd_helpers.trocr.pages.line_images import cut_outline
from fastsd_helpers.trocr.reading.dataset import read_lines, write_table

SIZE = (400, 300)
TEXTS = ("the first line", "a second one", "and the third")
PAGE_OF = "http://schema.primaresearch.org/PAGE/gts/pagecontent/{}"


def page_picture(path: Path, size=SIZE) -> Path:
    """A page with three bars of ink, each of a grey of its own, where its lines are marked."""
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for place in range(3):
        draw.rectangle((50, 40 + 80 * place, 349, 79 + 80 * place), fill=(40 + 40 * place,) * 3)
        draw.line((60, 50 + 80 * place, 80, 50 + 80 * place), fill="white")
    page.save(path)
    return path


def outline(place: int) -> str:
    top = 40 + 80 * place
    return f"50,{top} 350,{top} 350,{top + 40} 50,{top + 40}"


def page_xml(lines: str, *, image="p1.png", year="2019-07-15", size=SIZE, head="") -> str:
    return (
        f'<?xml version="1.0"?>{head}<PcGts xmlns="{PAGE_OF.format(year)}"><Page imageFilename="{image}" '
        f'imageWidth="{size[0]}" imageHeight="{size[1]}">{lines}</Page></PcGts>'
    )


def text_line(place: int, text: str, *, id="", custom="", coords=None) -> str:
    points = f'<Coords points="{outline(place) if coords is None else coords}"/>'
    return (
        f'<TextLine id="{id or f"l{place}"}" custom="{custom}">{points}<TextEquiv><Unicode>{text}</Unicode></TextEquiv>'
        "</TextLine>"
    )


def region(inner: str, name="r1") -> str:
    return f'<TextRegion id="{name}">{inner}</TextRegion>'


def alto(lines: str, *, size=SIZE, unit="pixel", image="p1.png", version=4) -> str:
    of_page = f'WIDTH="{size[0]}" HEIGHT="{size[1]}"' if size else ""
    return (
        f'<alto xmlns="http://www.loc.gov/standards/alto/ns-v{version}#"><Description><MeasurementUnit>{unit}'
        f"</MeasurementUnit><sourceImageInformation><fileName>{image}</fileName></sourceImageInformation></Description>"
        f'<Layout><Page ID="p" {of_page}><PrintSpace><TextBlock ID="b">{lines}</TextBlock></PrintSpace></Page>'
        "</Layout></alto>"
    )


def alto_line(place: int, text: str, *, scale=1.0, shape="", spaced=True) -> str:
    box = f'HPOS="{50 * scale}" VPOS="{(40 + 80 * place) * scale}" WIDTH="{300 * scale}" HEIGHT="{40 * scale}"'
    strings = ("<SP/>" if spaced else "").join(f'<String CONTENT="{word}"/>' for word in text.split())
    return f'<TextLine ID="l{place}" {box}>{shape}{strings}</TextLine>'


def pixels(line) -> np.ndarray:
    (item,) = gather([line.picture])
    return np.asarray(item.picture) if item.picture is not None else item.problem


@pytest.fixture
def folder(tmp_path):
    page_picture(tmp_path / "p1.png")
    return tmp_path


def three(make=text_line) -> str:
    return "".join(make(place, text) for place, text in enumerate(TEXTS))


def test_page_and_alto_of_one_page_give_the_same_lines_and_crops(folder):
    (folder / "p1.xml").write_text(page_xml(region(three())))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == list(TEXTS)
    assert {line.group for line in found.lines} == {line.page for line in found.lines} == {"p1"}
    first = [pixels(line) for line in found.lines]
    assert [crop.shape for crop in first] == [(40, 300, 3)] * 3
    assert [int(crop[20, 150, 0]) for crop in first] == [40, 80, 120]
    (folder / "p1.xml").write_text(alto(three(alto_line)))
    again = read_lines(folder / "p1.xml")
    assert [line.text for line in again.lines] == list(TEXTS)
    assert all(np.array_equal(a, pixels(line)) for a, line in zip(first, again.lines, strict=True))


@pytest.mark.parametrize("year", ["2010-03-19", "2013-07-15", "2017-07-15", "2019-07-15"])
def test_every_year_of_page_is_read_and_points_may_be_elements(folder, year):
    text = page_xml(region(three()), year=year)
    if year.startswith("2010"):
        for place in range(3):
            points = "".join('<Point x="{}" y="{}"/>'.format(*pair.split(",")) for pair in outline(place).split())
            text = text.replace(f'<Coords points="{outline(place)}"/>', f"<Coords>{points}</Coords>")
    (folder / "p1.xml").write_text(text)
    assert [pixels(line).shape for line in read_lines(folder).lines] == [(40, 300, 3)] * 3


def test_lines_come_in_reading_order_whatever_the_order_of_the_file(folder):
    order = (
        '<ReadingOrder><OrderedGroup id="o"><RegionRefIndexed index="1" regionRef="a"/>'
        '<RegionRefIndexed index="0" regionRef="b"/></OrderedGroup></ReadingOrder>'
    )
    later = text_line(1, "late", custom="readingOrder {index:1;}") + text_line(
        0, "early", custom="readingOrder {index:0;}"
    )
    (folder / "p1.xml").write_text(page_xml(order + region(later, "a") + region(text_line(2, "first"), "b")))
    assert [line.text for line in read_lines(folder).lines] == ["first", "early", "late"]


def test_what_a_page_cannot_give_is_counted_by_reason_and_the_rest_is_used(folder):
    lines = [
        text_line(0, "good"),
        text_line(1, " "),
        text_line(2, "no place", coords=""),
        text_line(0, "good", id="twice"),
        text_line(1, "beyond", coords="900,900 990,900 990,950 900,950"),
        text_line(1, "over the edge", coords="-40,120 350,120 350,160 -40,160"),
    ]
    (folder / "p1.xml").write_text(page_xml(region("".join(lines))))
    (folder / "p2.xml").write_text(page_xml(region(three()), image="../elsewhere/p2.png"))
    (folder / "p3.xml").write_text("<PcGts><Page>")
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["good", "over the edge"]
    assert pixels(found.lines[1]).shape == (40, 350, 3), "what lies outside of the page is left off"
    assert found.left_out_by_reason() == {
        "no image": 3, "no text": 1, "no outline": 1, "twice": 1, "outside of the image": 1,
        "an unreadable transcription": 1,
    }  # fmt: skip
    assert any("there is no image ../elsewhere/p2.png beside it; 3 lines left out" in told for told in found.problems)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ('<!DOCTYPE x [<!ENTITY a "b">]>', "declares the entity 'a'"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>', "declares the entity 'a'"),
        ('<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x.dtd"> %a;]>', "declares the entity 'a'"),
    ],
)
def test_xml_with_entities_is_refused_by_name(folder, head, told):
    (folder / "p1.xml").write_text(page_xml(region(text_line(0, "&a;" if "%" not in head else "x")), head=head))
    with pytest.raises(DatasetError, match=told):
        read_lines(folder / "p1.xml")


def test_xml_that_is_too_large_or_too_deep_is_refused_by_name(folder, monkeypatch):
    from fastsd_helpers.trocr.ground_truth import xml_file

    (folder / "p1.xml").write_text(page_xml("<TextRegion>" * 300 + "</TextRegion>" * 300))
    with pytest.raises(DatasetError, match="more than 200 elements inside each other"):
        read_lines(folder / "p1.xml")
    monkeypatch.setattr(xml_file, "_MOST_BYTES", 100)
    with pytest.raises(DatasetError, match=r"p1\.xml has .*more than a page's transcription can have"):
        read_lines(folder / "p1.xml")


def test_alto_in_other_units_and_of_a_smaller_image_is_scaled(folder):
    (folder / "p1.xml").write_text(alto(three(lambda p, t: alto_line(p, t, scale=2.54)), size=(1016, 762), unit="mm10"))
    assert [pixels(line).shape for line in read_lines(folder).lines] == [(40, 300, 3)] * 3
    (folder / "p1.xml").write_text(alto(three(alto_line), size=None, unit="mm10"))
    with pytest.raises(DatasetError, match="not in pixels"):
        read_lines(folder / "p1.xml")
    page_picture(folder / "p1.png", (300, 400))
    (folder / "p1.xml").write_text(alto(three(alto_line)))
    with pytest.raises(DatasetError, match="is 300 x 400 px, and its transcription is of one of 400 x 300"):
        read_lines(folder / "p1.xml")


def test_strings_without_blanks_between_them_are_words_and_an_older_altos_points_have_no_commas(folder):
    shape = '<Shape><Polygon POINTS="50 40 350 40 350 80 50 80"/></Shape>'
    (folder / "p1.xml").write_text(alto(alto_line(2, "two words", shape=shape, spaced=False), version=2))
    (line,) = read_lines(folder).lines
    assert line.text == "two words"
    assert int(pixels(line)[20, 150, 0]) == 40, "the polygon counts before the box"


def test_an_export_as_zip_with_page_and_alto_is_read_once_each(tmp_path, caplog):
    data = io.BytesIO()
    page_picture(tmp_path / "p.png")
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as packed:
        for number in (1, 2):
            packed.write(tmp_path / "p.png", f"doc/000{number}.png")
            packed.writestr(f"doc/page/000{number}.xml", page_xml(region(three()), image=f"000{number}.png"))
            packed.writestr(f"doc/alto/000{number}.xml", alto(three(alto_line), image=f"000{number}.png"))
        packed.writestr("doc/mets.xml", "<mets/>")
        packed.writestr("../../escape.png", data.getvalue())
    with caplog.at_level("INFO"):
        found = read_lines(tmp_path / "export.zip")
    assert [line.text for line in found.lines] == [*TEXTS, *TEXTS]
    assert {line.group for line in found.lines} == {"doc/page/0001", "doc/page/0002"}
    assert "2 ALTO files are not used" in caplog.text
    assert not (tmp_path.parent / "escape.png").exists()
    assert pixels(found.lines[5]).shape == (40, 300, 3)
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DatasetError, match=r"bad\.zip is damaged"):
        read_lines(tmp_path / "bad.zip")


def test_a_sloping_line_is_cut_level_with_paper_around_it():
    page = Image.new("RGB", (600, 300), (200, 190, 180))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 600, 60), fill=(0, 90, 0))  # the line above, which must not be in it
    draw.line((60, 220, 540, 120), fill=(20, 20, 20), width=8)
    shape = ((40, 190), (540, 86), (552, 140), (52, 244))
    cut = np.asarray(cut_outline(page, shape, ((60, 224), (540, 124))))
    dark = np.argwhere(cut[:, :, 0] < 90)
    assert np.ptp(dark[:, 0]) < 16, "level: 100 px of fall are gone"
    assert np.ptp(dark[:, 1]) > 450
    green = cut[:, :, 1].astype(int) - cut[:, :, 0]
    assert green.max() < 40, "nothing of the line above"
    assert cut[0, 0].tolist() == [200, 190, 180], "outside of the outline is paper"
    without = np.asarray(cut_outline(page, shape))
    assert abs(without.shape[0] - cut.shape[0]) <= 4, "the outline alone says how it lies, too"
    with pytest.raises(DatasetError, match="lies outside of the image"):
        cut_outline(page, ((900, 10), (950, 10), (950, 40), (900, 40)))


# ------------------------------------------------------------------------------------------------ data sets


def lines_in(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (24, 60, 3), dtype=np.uint8)).save(path)
    return folder


IAM = (
    "#--- lines.txt ---#\na01-000u-00 ok 154 19 408 746 1661 89 A|MOVE|to|stop\n"
    "a01-000u-01 err 156 19 395 932 1850 105 nominating|any|more\na01-000u-02 ok 1 1 1 1 1 1 gone\n"
)


@pytest.mark.parametrize("place", ["", "a01/a01-000u/", "lines/a01/a01-000u/"])
def test_iams_own_list_gives_texts_and_forms_wherever_the_images_lie(tmp_path, place):
    lines_in(tmp_path, f"{place}a01-000u-00.png", f"{place}a01-000u-01.png")
    (tmp_path / "lines.txt").write_text(IAM)
    found = read_lines(tmp_path)
    assert [line.text for line in found.lines] == ["A MOVE to stop", "nominating any more"]
    assert {line.group for line in found.lines} == {"a01-000u"}
    assert found.left_out_by_reason() == {"no image": 1}
    (tmp_path / "forms.txt").write_text("a01-000u 007 2 prt 7 5 52 36\n")
    assert {line.group for line in read_lines(tmp_path / "lines.txt").lines} == {"writer 007"}


def test_words_of_iam_that_are_cut_wrong_are_left_out(tmp_path):
    lines_in(tmp_path, "a01-000u-00-00.png", "a01-000u-00-01.png")
    (tmp_path / "words.txt").write_text(
        "a01-000u-00-00 ok 154 408 768 27 51 AT A\na01-000u-00-01 err 154 507 766 213 48 NN MOVE\n"
    )
    found = read_lines(tmp_path)
    assert [line.text for line in found.lines] == ["A"]
    assert found.left_out_by_reason() == {"marked err": 1}


def test_donut_and_ppocr_labels_become_their_texts(tmp_path):
    lines_in(tmp_path, "1.png", "2.png", "3.png")
    rows = [
        {"file_name": "1.png", "ground_truth": json.dumps({"gt_parse": {"text_sequence": "the quick"}})},
        {"file_name": "2.png", "ground_truth": json.dumps({"gt_parse": {"total": "12", "menu": []}})},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_lines(tmp_path)
    assert [line.text for line in found.lines] == ["the quick"]
    assert found.left_out_by_reason() == {"JSON": 1}
    (tmp_path / "metadata.jsonl").unlink()
    page_picture(tmp_path / "p1.png")
    marked = [
        {"transcription": TEXTS[0], "points": [[50, 40], [350, 40], [350, 80], [50, 80]], "difficult": False},
        {"transcription": "###", "points": [[0, 0], [9, 0], [9, 9], [0, 9]]},
    ]
    (tmp_path / "Label.txt").write_text(f"{tmp_path.name}/p1.png\t{json.dumps(marked)}\n")
    found = read_lines(tmp_path)
    assert [(line.text, line.group, pixels(line).shape) for line in found.lines] == [
        (TEXTS[0], f"{tmp_path.name}/p1", (40, 300, 3))
    ]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ('{"a": 1}', "JSON"),
        ('[{"transcription": "x"}]', "JSON"),
        ("images/0001.png", "a path"),
        ("C:\\scans\\my page.JPG", "a path"),
        ("[sic]", None),
        ("{12}", None),
        ("1/2 lb. of tea", None),
        ("saved as page one .png", None),
        ("line one\u2028line two", None),
    ],
)
def test_labels_that_are_no_text_of_a_line_are_left_out_and_others_kept(label, reason):
    found = read_lines([(Image.new("RGB", (9, 9)), "good"), (Image.new("RGB", (9, 9)), label)])
    assert [line.text for line in found.lines] == ["good"] + ([label] if reason is None else [])
    assert found.left_out_by_reason() == ({reason: 1} if reason else {})


def test_a_pages_text_beside_its_picture_is_no_line(tmp_path):
    lines_in(tmp_path, "p1.png", "p2.png")
    (tmp_path / "p1.txt").write_text("first\nsecond\nthird\n")
    (tmp_path / "p2.txt").write_text("one line\r\n")
    found = read_lines(tmp_path)
    assert [line.text for line in found.lines] == ["one line"]
    assert found.problems[0].startswith("p1.png has 3 lines of text")


def test_the_ground_truth_counts_before_a_guess_and_one_version_of_an_image(tmp_path):
    lines_in(tmp_path, "0001.nrm.png", "0001.bin.png", "0002.PNG")
    (tmp_path / "0001.gt.txt").write_text("true")
    (tmp_path / "0001.txt").write_text("trve")
    (tmp_path / "0002.GT.TXT").write_text("other case")
    found = read_lines(tmp_path)
    assert [(line.picture.name, line.text) for line in found.lines] == [
        ("0001.nrm.png", "true"),
        ("0002.PNG", "other case"),
    ]


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("images/001.png", "images\\001.png"),
        ("images/001.png", "C:\\Users\\me\\lines\\images\\001.png"),
        ("Grüße.png", unicodedata.normalize("NFD", "Grüße.png")),
        (unicodedata.normalize("NFD", "Grüße.png"), "Grüße.png"),
        ("A.JPG", "a.jpg"),
        ("A.JPG", "A"),
        ("c04-110-01.jpg", "c04-110-01.jp"),
        ("x.tiff", "x"),
        ("1a2b-line1.png", "/data/upload/1/1a2b-line1.png"),
        ("v1.2.png", "v1.2"),
    ],
)
def test_an_image_is_found_whatever_the_form_of_its_name(tmp_path, there, named):
    lines_in(tmp_path, there)
    (tmp_path / "labels.csv").write_text(f"file_name,text\n{named},the quick\n", encoding="utf-8")
    (line,) = read_lines(tmp_path).lines
    assert line.picture.samefile(tmp_path / there)


@pytest.mark.parametrize(("there", "named"), [("01.png", "page2/01.png"), ("a/1.png", "b/1.png"), ("x.png", "../x")])
def test_another_image_of_the_same_name_is_never_taken(tmp_path, there, named):
    lines_in(tmp_path, there)
    (tmp_path / "labels.csv").write_text(f"file_name,text\n{named},the quick\n")
    with pytest.raises(DatasetError, match="there is no image"):
        read_lines(tmp_path)


def test_a_set_in_parts_keeps_them_and_names_do_not_clash(tmp_path):
    for part in ("train", "test"):
        lines_in(tmp_path, f"{part}/0001.png", f"{part}/0002.png")
        (tmp_path / part / "metadata.jsonl").write_text(
            "\n".join(json.dumps({"file_name": f"000{n}.png", "text": f"{part} {n}"}) for n in (1, 2))
        )
    found = read_lines(tmp_path)
    assert [line.name for line in found.of_part("train").lines] == ["train/0001.png", "train/0002.png"]
    assert [line.text for line in found.of_part("validation", "test").lines] == ["test 1", "test 2"]
    lines_in(tmp_path / "unilm", "image/a-1.jpg", "image/b-1.jpg")
    (tmp_path / "unilm" / "gt_train.txt").write_text("a-1.jpg\tone\n")
    (tmp_path / "unilm" / "gt_test.txt").write_text("b-1.jp\ttwo\n")
    found = read_lines(tmp_path / "unilm")
    assert {(line.text, line.part) for line in found.lines} == {("one", "train"), ("two", "test")}


class Columns(list):
    column_names = ["image", "text"]  # noqa: RUF012  as datasets has it


class Stream(list):
    column_names = None


def picture_bytes() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 60, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda row: [row],
        lambda row: Columns([row]),
        lambda row: Stream([row]),
        lambda row: iter([row]),
        lambda row: {"image": [row["image"]], "text": [row["text"]]},
        lambda row: {"train": Columns([row])},
        lambda row: [(row["image"], row["text"])],
    ],
    ids=["list", "dataset", "stream", "iterator", "columns", "DatasetDict", "pairs"],
)
@pytest.mark.parametrize("encoded", [False, True], ids=["bytes", "decode=False"])
def test_data_set_objects_of_every_shape_give_their_lines(make, encoded):
    image = {"bytes": picture_bytes(), "path": None} if encoded else picture_bytes()
    (line,) = read_lines(make({"image": image, "text": " the quick "})).lines
    assert line.text == "the quick"
    assert pixels(line).shape == (24, 60, 3)


def test_numbers_in_lines_of_json_are_texts_and_those_that_lost_zeros_are_not(tmp_path):
    lines_in(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name":"1.png","text":1984}\n{"file_name":"2.png","text":12.5}\n')
    found = read_lines(tmp_path)
    assert [line.text for line in found.lines] == ["1984"]
    assert found.left_out_by_reason() == {"a number": 1}


def test_signs_that_python_takes_for_the_end_of_a_line_stay_in_the_text(tmp_path):
    lines_in(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.txt").write_text("1.png\tone\u2028two\x85\x0cx\n2.png\tthree\n", encoding="utf-8")
    assert [line.text for line in read_lines(tmp_path).lines] == ["one\u2028two\x85\x0cx", "three"]


def test_excels_line_about_its_separator_is_no_head(tmp_path):
    lines_in(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_text("sep=;\nfile_name;text\n1.png;the, quick\n")
    assert [line.text for line in read_lines(tmp_path).lines] == ["the, quick"]


def test_numbered_images_of_one_folder_are_groups_of_their_own(tmp_path):
    lines_in(tmp_path, *(f"images/{n:04d}.png" for n in range(4)))
    (tmp_path / "labels.txt").write_text("".join(f"images/{n:04d}.png\tt{n}\n" for n in range(4)))
    rest, held = read_lines(tmp_path).split(0.25)
    assert (len(rest.lines), len(held.lines)) == (3, 1)


def test_lines_of_pages_and_of_objects_go_into_a_table_with_their_images(folder):
    (folder / "p1.xml").write_text(page_xml(region(three())))
    found = read_lines(folder / "p1.xml")
    table = write_table(folder / "out" / "measured.jsonl", found.lines)
    again = read_lines(table)
    assert [(line.name, line.text, line.group) for line in again.lines] == [
        (line.name, line.text, line.group) for line in found.lines
    ]
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(found.lines, again.lines, strict=True))


PAGE_OF_KRAKEN = Path(os.environ.get("FASTSD_KRAKEN_PAGE", ""))


@pytest.mark.skipif(
    not PAGE_OF_KRAKEN.is_file(),
    reason="FASTSD_KRAKEN_PAGE names no file: of kraken 4.3.13, tests/resources/170025120000003,0074.xml",
)
def test_a_real_transcribed_page_gives_all_of_its_lines():
    found = read_lines(PAGE_OF_KRAKEN)
    assert (len(found.lines), found.problems) == (44, [])
    assert found.lines[1].text.startswith("$-nor su hijo")
    sizes = [pixels(line).shape for line in found.lines]
    assert all(40 < height < 90 and width > height for height, width, _bands in sizes)


def test_a_parquet_file_of_names_means_the_images_beside_it(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    page_picture(tmp_path / "one.png")
    table = pyarrow.table({"file_name": ["one.png", "gone.png"], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "names.parquet")
    monkeypatch.chdir("/")
    found = read_lines(tmp_path / "names.parquet")
    assert [(line.picture, line.text) for line in found.lines] == [(tmp_path / "one.png", "one")]
    assert "there is no image gone.png beside names.parquet" in found.problems[0]


@pytest.mark.parametrize(
    "named", ["p%201.png", "https://iiif.example.org/p%201.png?size=max", "P%201.TIF", "..\\img\\p 1.png"]
)
def test_a_page_finds_its_image_however_it_is_written_there(tmp_path, named):
    page_picture(tmp_path / "p 1.png")
    (tmp_path / "other.xml").write_text(page_xml(region(three()), image=named))
    assert len(read_lines(tmp_path).lines) == 3


def test_texts_of_pages_are_labels_like_any_other(folder):
    strings = alto_line(0, "the first line").replace("</TextLine>", "<SP/></TextLine>")
    (folder / "p1.xml").write_text(alto(strings))
    assert [line.text for line in read_lines(folder).lines] == ["the first line"]
    lines = [text_line(0, "\n  a second one\n"), text_line(1, "two\nlines"), text_line(2, "{&quot;a&quot;: 1}")]
    (folder / "p1.xml").write_text(page_xml(region("".join(lines))))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["a second one"]
    assert found.left_out_by_reason() == {"several lines": 1, "JSON": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p1.hocr", "<html/>", "hOCR"),
        ("p1.html", "<html/>", "hOCR"),
        ("p1.xml", '<html xmlns="http://www.w3.org/1999/xhtml"/>', "hOCR"),
        ("p1.xml", '<TEI xmlns="http://www.tei-c.org/ns/1.0"/>', "TEI"),
        ("p1.xml", "<document/>", "ABBYY"),
        ("p1.xml", '<form id="a01-000u"/>', "IAM's XML"),
        ("lines.xlsx", "PK", "spreadsheet"),
        ("p1.docx", "PK", "text document"),
    ],
)
def test_ground_truth_of_kinds_that_are_not_read_is_named_in_folders_zips_and_alone(folder, name, content, words):
    (folder / name).write_text(content)
    with zipfile.ZipFile(folder.parent / f"{folder.name}.zip", "w") as packed:
        for file in folder.iterdir():
            packed.write(file, file.name)
    for source in (folder, folder / name, folder.parent / f"{folder.name}.zip"):
        with pytest.raises(DatasetError, match=words) as caught:
            read_lines(source)
        assert name in caught.value.problem
    (folder / "p1.txt").write_text("but there is a text")
    assert len(read_lines(folder).lines) == 1
