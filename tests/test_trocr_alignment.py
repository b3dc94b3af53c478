"""A page's known text aligned to its lines: whatever is odd about the text, no line gets a text that is not its own."""

import json
import random

import pytest

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.alignment.texts import align_text

pytest.importorskip("rapidfuzz")

LINES = """In the year 1818 the harbour was opened,
and forty ships came in before winter;
the merchants of the upper town
complained of the noise until the council
granted them a market of their own on
Thursdays. Nobody asked the fishermen,
who had built the first quay by hand and
were now to pay for every basket landed.
A petition was written, signed by ninety
names, and lost; a second one was found
many years later in a chest of linen""".splitlines()
# Short ones, as the demo reader can read.
PAGES = (
    ["In the year 1818 the", "harbour was opened and", "forty ships came in", "before winter began"],
    ["the merchants of the", "upper town complained", "of the noise until", "the council gave way"],
)
OTHER = """Take six eggs, well beaten, a pint of cream,
grated nutmeg and the rind of two lemons;
bake it slowly in a dish lined with paste.
Serve when it trembles but does not run,
with sugar strewn over it while still warm."""


def misread(line, rate, chance):
    """The line as a reader might give it: characters lost, exchanged and made up."""
    found = []
    for letter in line:
        drawn = chance.random() / max(rate, 1e-9)
        found += [] if drawn < 1 / 3 else [chance.choice("aeinrst lo")] if drawn < 2 / 3 else [letter]
        found += [chance.choice("aeinrst lo")] if 2 / 3 <= drawn < 1 else []
    return "".join(found)


def check(read, text, truths, *, at_least):
    """Every line has its own text or none, and enough have one."""
    found = align_text(read, text)
    assert len(found) == len(read)
    wrong = [(one.text, truth) for one, truth in zip(found, truths, strict=True) if one.text not in (None, truth)]
    assert wrong == []
    assert all(one.why and one.reason for one in found if one.text is None)
    kept = sum(one.text is not None for one in found)
    assert kept >= at_least, [one.why for one in found]
    return found


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("breaks", ["\n", " ", "\r\n\r\n", "  \n "])
def test_a_page_with_or_without_its_line_breaks(rate, breaks):
    for seed in range(2):
        chance = random.Random(seed)
        check([misread(line, rate, chance) for line in LINES], breaks.join(LINES), LINES, at_least=9 if rate else 11)


def test_line_breaks_of_another_edition_are_those_of_paragraphs():
    words = " ".join(LINES).split()
    for width in (3, 25, 40):
        text = "\n".join(" ".join(words[at : at + width]) for at in range(0, len(words), width))
        check(LINES, text, LINES, at_least=11)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rate", [0.0, 0.15])
def test_planted_errors_leave_lines_out_and_give_none_a_wrong_text(seed, rate):
    chance = random.Random(seed)
    read = [misread(line, rate, chance) for line in LINES]
    place = chance.randrange(1, 9)
    without = [*LINES[:place], *LINES[place + 1 :]]
    for breaks in ("\n", " "):
        truths = [line if at != place else None for at, line in enumerate(LINES)]
        found = check(read, breaks.join(without), truths, at_least=8)
        assert found[place].text is None, "the line that the text lacks"
        heading = ["THE THIRD CHAPTER, of the harbour", *LINES, "footnote of the editor, compare page twelve"]
        check(read, breaks.join(heading), LINES, at_least=9)
        check(["Stamp of a library 1907 B", *read], breaks.join(LINES), [None, *LINES], at_least=9)
        check([*read[:4], *read[5:]], breaks.join(LINES), [*LINES[:4], *LINES[5:]], at_least=8)
    swapped = [*LINES[:place], LINES[place + 1], LINES[place], *LINES[place + 2 :]]
    check(read, "\n".join(swapped), LINES, at_least=9)
    check([read[-1], *read[:-1]], "\n".join(LINES), [LINES[-1], *LINES[:-1]], at_least=9)


@pytest.mark.parametrize("hyphen", ["-", "¬", "=", "⸗"])
def test_a_word_that_the_page_divides_may_be_whole_in_the_text(hyphen):
    read = [LINES[0], LINES[1], "the mer" + hyphen, "chants of the upper town com" + hyphen, "plained of the noise"]
    text = f"{LINES[0]} {LINES[1]} the merchants of the upper town complained of the noise"
    assert [one.text for one in align_text(read, text)] == read
    divided = f"{LINES[0]}\n{LINES[1]}\nthe mer{hyphen}\nchants of the upper town com{hyphen}\nplained of the noise"
    assert [one.text for one in align_text(read, divided)] == read, "as it is in the text"


@pytest.mark.parametrize("text", [OTHER, " ".join(OTHER.split()), "Amen.", "the\nof\nand"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_text_of_another_page_leaves_all_lines_out_and_says_so(text, rate):
    chance = random.Random(1)
    found = align_text([misread(line, rate, chance) for line in LINES], text)
    assert {(one.text, one.reason) for one in found} == {(None, "another page's text")}


def test_nothing_read_no_text_and_far_too_much_text_are_named():
    assert [one.reason for one in align_text(["a b", ""], " \n ")] == ["no text", "no text"]
    assert align_text([], "some text") == []
    assert {one.reason for one in align_text(["", ""], "some text of a page")} <= {
        "nothing read",
        "another page's text",
    }
    found = align_text(["a short line", ""], "a book of many words " * 3000)
    assert {one.reason for one in found} == {"another page's text"}
    found = align_text([*LINES, ""], "\n".join(LINES))
    assert found[-1].reason == "nothing read"
    assert [one.text for one in found[:-1]] == LINES


def test_lines_that_repeat_each_other_are_told_apart_by_their_neighbours():
    read = ["item one basket of herring", "ditto", "ditto", "item two barrels of tar", "ditto", "total paid in full"]
    assert [one.text for one in align_text(read, "\n".join(read))] == read
    found = align_text(read[:2] + read[3:], "\n".join(read))
    assert found[0].text == read[0]
    assert found[2].text == read[3]
    assert found[-1].text == read[-1]


# ----------------------------------------------------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two drawn pages of four lines, and the demo reader."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("transformers")
    from PIL import Image, ImageDraw, ImageFont

    from fastsd_helpers.trocr import Reader

    folder = tmp_path_factory.mktemp("pages")
    font = ImageFont.load_default(size=30)
    for number, lines in enumerate(PAGES, 1):
        page = Image.new("RGB", (560, 340), "white")
        for row, line in enumerate(lines):
            ImageDraw.Draw(page).text((40, 30 + 75 * row), line, font=font, fill="black")
        page.save(folder / f"scan {number}.png")
    return folder, Reader("demo-reader", precision="fp32")


def test_pages_become_lines_with_the_parts_of_their_texts(pages, tmp_path):
    from fastsd_helpers.trocr.reading.dataset import align_lines, read_lines

    folder, reader = pages
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "scan 1.txt").write_text("Chapter three\n" + " ".join(PAGES[0][:3]), encoding="utf-16")
    (texts / "scan 2.txt").write_text(OTHER)
    kept = tmp_path / "run" / "aligned.jsonl"
    found = align_lines(reader, folder, texts, keep=kept)
    assert [(line.name, line.text) for line in found.lines] == [
        (f"scan 1.png line {number}", line) for number, line in enumerate(PAGES[0][:3], 1)
    ]
    assert {line.group for line in found.lines} == {"scan 1.png"}
    again = align_lines(reader, folder, texts)
    assert [line.text for line in again.lines] == [line.text for line in found.lines]
    assert again.left_out_by_reason() == {"another page's text": 4, "not in the text": 1}
    assert any(
        problem.startswith("scan 2.png: too little of what is read is in the text") for problem in again.problems
    )
    # What was aligned once is taken as it is, corrections too, until a page or its text changes.
    rows = [json.loads(row) for row in kept.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == PAGES[0][:3]
    kept.write_text("".join(json.dumps(row | {"text": row["text"].upper()}) + "\n" for row in rows))
    assert [line.text for line in align_lines(reader, folder, texts, keep=kept).lines] == [
        line.upper() for line in PAGES[0][:3]
    ]
    (texts / "scan 2.txt").write_text("\n".join(PAGES[1]))
    assert len(align_lines(reader, folder, texts, keep=kept).lines) == 7
    assert len(read_lines(kept).lines) == 7


def test_a_command_evaluates_on_pages_and_their_text(pages, tmp_path, capsys):
    from fastsd_helpers.cli import main

    folder, _reader = pages
    text = tmp_path / "both.txt"
    text.write_text("\n".join(PAGES[0]) + "\f" + " ".join(PAGES[1]))
    words = ["trocr", "evaluate", str(folder), "--align", str(text), "--model", "demo-reader", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["lines"] >= 7
    assert found["cer"] < 0.3
    assert {row["name"] for row in found["per_page"]} == {"scan 1.png", "scan 2.png"}


def test_a_text_that_is_not_there_or_of_another_number_of_pages_is_told(pages, tmp_path):
    from fastsd_helpers.trocr.reading.dataset import align_lines

    folder, reader = pages
    one, three = tmp_path / "one.txt", tmp_path / "three.txt"
    one.write_text(" ".join(PAGES[0]))
    three.write_text("a\fb\fc")
    with pytest.raises(DatasetError, match="There is no file or folder"):
        align_lines(reader, folder, tmp_path / "none.txt")
    with pytest.raises(DatasetError, match=r"one\.txt has the text of 1 page, and there are more"):
        align_lines(reader, folder, one)
    with pytest.raises(DatasetError, match=r"three\.txt has the text of 3 pages, and there are 1"):
        align_lines(reader, folder / "scan 1.png", three)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"scan 1\.png: .* has no text for it"):
        align_lines(reader, folder / "scan 1.png", tmp_path / "empty")
