"""What an editor asks of an evaluation: which pages, which characters, which Unicode form, images to look at."""

import json
import unicodedata

import pytest
from PIL import Image

from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet
from fastsd_helpers.trocr.teaching.evaluation import evaluate, evaluation_from
from fastsd_helpers.trocr.teaching.metrics import count_confusions
from fastsd_helpers.trocr.teaching.report import write_report

pytest.importorskip("jiwer")


class Knows:
    """A reader that gives known texts: evaluation asks nothing else of one."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def read(self, pictures, progress=None):
        return [Line(text, 0.5, name=f"{place}") for place, text in enumerate(self.texts[: len(pictures)])]


def line_set(*rows: tuple[str, str, str]) -> LineSet:
    return LineSet([LabelledLine(f"line {n}", Image.new("RGB", (60, 20), (n, n, 200)), text, group, page)
                    for n, (text, group, page) in enumerate(rows)])  # fmt: skip


def test_rates_are_given_by_page_and_by_group_and_add_up_to_the_whole():
    lines = line_set(("abcd", "anna", "p1"), ("efgh", "anna", "p2"), ("ijkl", "otto", "p2"), ("mnop", "otto", ""))
    result = evaluate(Knows("abcd", "exgh", "ijk", "mnop"), lines)
    pages = {row["name"]: (row["lines"], row["characters"], row["cer"]) for row in result.per_page}
    assert pages == {"p1": (1, 4, 0), "p2": (2, 8, 0.25), "otto": (1, 4, 0)}
    assert [(row["name"], row["cer"], row["wer"]) for row in result.per_group] == [
        ("anna", 0.125, 0.5),
        ("otto", 0.125, 0.5),
    ]
    assert result.summary()["cer"] == result.scores.cer.rate == 2 / 16
    assert result.summary()["lines"] == 4
    assert result.summary()["interval"] == [result.scores.cer.low, result.scores.cer.high]
    assert evaluation_from(json.loads(json.dumps(vars(result), default=vars))) == result


def test_an_evaluation_of_an_earlier_version_is_opened():
    scores = vars(evaluate(Knows("a"), line_set(("a", "g", ""))).scores)
    old = {"scores": scores, "confidence": 0.5, "looped": 0, "cut": 0, "worst": [], "left_out": []}
    assert evaluation_from(json.loads(json.dumps(old, default=vars))).per_page == ()


@pytest.mark.parametrize(
    ("truth", "read", "confusions", "missing"),
    [
        ("hand", "hund", [("a", "u", 1)], []),
        ("hand", "and", [("h", "", 1)], [("h", 1, 1)]),
        ("hand", "hhand", [("", "h", 1)], []),
        ("aaaa", "abab", [("a", "b", 2)], []),
        ("the end", "theend", [(" ", "", 1)], [(" ", 1, 1)]),
        ("  hand ", "hand", [], []),
        ("", "x", [("", "x", 1)], []),
        ("ſo ſey", "so ſy", [("e", "", 1), ("ſ", "s", 1)], [("e", 1, 1)]),
    ],
)
def test_edits_become_confusions_and_missing_characters(truth, read, confusions, missing):
    found, lost = count_confusions([(truth, read)])
    assert [(row["truth"], row["read"], row["count"]) for row in found] == confusions
    assert [(row["letter"], row["count"], row["of"]) for row in lost] == missing


def test_the_most_frequent_confusion_comes_first_over_all_lines():
    found, _lost = count_confusions([("au", "ov"), ("a", "o"), ("u", "v"), ("a", "o")])
    assert [(row["truth"], row["read"], row["count"]) for row in found] == [("a", "o", 3), ("u", "v", 2)]


@pytest.mark.parametrize(("form", "cer"), [("NFC", 0), ("NFD", 0), ("none", 1)])
def test_the_same_letters_in_another_unicode_form_are_no_error(form, cer):
    lines = line_set((unicodedata.normalize("NFD", "é"), "g", ""))
    result = evaluate(Knows("é"), lines, normal_form=form)
    assert (result.scores.cer.rate > 0) == bool(cer)
    assert result.scores.cer.symbols == (1 if form == "NFC" else 2)


def test_of_a_set_in_parts_the_test_lines_are_measured():
    lines = LineSet([LabelledLine(part, Image.new("RGB", (60, 20)), part, "g", "", part)
                     for part in ("train", "validation", "test")])  # fmt: skip
    assert evaluate(Knows("test"), lines).scores.lines == 1
    lines = LineSet(lines.lines[:2])
    assert evaluate(Knows("validation"), lines).scores.cer.rate == 0


def test_the_report_shows_the_worst_lines_and_runs_nothing_of_what_it_quotes(tmp_path):
    lines = line_set(("<script>alert(1)</script>", "g&g", ""), ("right", "h", ""))
    pictures = [Image.effect_noise((60, 20), 80).convert("RGB") for _line in lines.lines]
    lines.lines = [LabelledLine(line.name, picture, line.text, line.group)
                   for line, picture in zip(lines.lines, pictures, strict=True)]  # fmt: skip
    result = evaluate(Knows("<b>", "right"), lines)
    text = write_report(tmp_path / "r.html", result, lines, title="a <title>").read_text(encoding="utf-8")
    assert text.count('<img alt="the line" src="data:image/png;base64,') == 1, "lines without errors are not shown"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "g&amp;g" in text
    assert "http" not in text
