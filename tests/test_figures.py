"""Every figure in prose is that of its results page, or is said to need none (scripts/figures.py)."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import figures  # noqa: E402


@pytest.mark.parametrize("path", list(figures.pages()), ids=lambda path: path.name)
def test_every_figure_in_prose_is_that_of_its_results_page(path):
    found = figures.problems(path, path.read_text(encoding="utf-8"))
    assert found == [], "\n".join([*found, "python scripts/figures.py --write corrects the marked ones"])


def test_every_named_figure_is_in_its_results_page_once():
    assert all(figure.value() for figure in figures.figures().values())


README = ROOT / "README.md"
MARK = "falls by <!--=demo-loss-mean-->{}<!--/--> on average"


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        (MARK.format("72 %"), "demo-loss-mean is '62 %' in its results page, here '72 %'"),
        (MARK.format("62"), "demo-loss-mean is '62 %' in its results page, here '62'"),
        (MARK.format("62 %").replace("demo-loss-mean", "demo-los"), "no figure 'demo-los'"),
        ("The loss falls by 62 % on average.", "'62 %' has no mark and no line"),
        ("It is 7 times faster than the other.", "'7 times faster' has no mark and no line"),
        ("It falls by\n <!--=demo-loss-mean-->62 %<!--/--> on average.", "begins with a mark"),
        ("Half of it, 50%, is\nread.", "'50%' has no mark and no line"),
    ],
)
def test_a_planted_figure_is_found(sentence, said):
    [problem] = figures.problems(README, sentence)
    assert said in problem


@pytest.mark.parametrize(
    "sentence",
    [
        MARK.format("62\n%"),
        "Set `width: 100%` and step 3 of 4, in 1500 steps.",
        "```\nfastsd bench  # 40 % of it\n```",
        "in brackets the 95 % confidence interval",
        "an address with %20 in it, and 5 %d",
    ],
)
def test_what_is_right_or_no_measurement_is_let_pass(sentence):
    assert figures.problems(README, sentence) == []


def test_a_figure_in_a_notebook_text_is_read_and_in_its_code_is_not():
    cells = [
        {"cell_type": "markdown", "source": ["It reads\n", "91 % of them."]},
        {"cell_type": "code", "source": ["# 92 %"]},
    ]
    [problem] = figures.problems(ROOT / "notebooks" / "x.ipynb", json.dumps({"cells": cells}))
    assert "'91 %'" in problem


@pytest.fixture
def measured_again(monkeypatch, tmp_path):
    """The results pages, one of them with another result."""
    page = figures.RESULTS / "demo_dreambooth.md"
    (tmp_path / page.name).write_text(page.read_text(encoding="utf-8").replace("56.7%", "46.7%"), encoding="utf-8")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path / page.name


def test_a_page_that_was_measured_again_changes_what_prose_must_say(measured_again):
    [problem] = figures.problems(README, MARK.format("62 %"))
    assert "is '58 %'" in problem
    assert figures.filled(MARK.format("62 %")) == MARK.format("58 %")


def test_a_figure_that_left_its_page_is_named(measured_again):
    measured_again.write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(LookupError, match=r"demo-loss-mean: .* finds nothing in benchmarks/results/demo_dreambooth.md"):
        figures.problems(README, MARK.format("62 %"))
    measured_again.unlink()
    with pytest.raises(LookupError, match="there is no results page"):
        figures.problems(README, MARK.format("62 %"))


def test_two_numbers_where_one_is_meant_are_an_error():
    figure = figures.Figure("both", "demo_dreambooth", r"\| (\d+) \|$")
    with pytest.raises(LookupError, match="finds 279, 241, 293"):
        figure.value()
    assert figures.Figure("least", "demo_dreambooth", r"\| (\d+) \|$", take="lowest").value() == "241"


def test_what_is_left_of_a_hundred_and_a_half_are_shown_as_people_write_them():
    find = r"^\| greedy, fp32 \| .*?\| ([\d.]+) %"
    assert figures.Figure("rounded", "reader", find, show="{:.0f} %").value() == "18 %"
    assert figures.Figure("rest", "reader", find, show="{:.1f} %", left=True).value() == "82.5 %"
