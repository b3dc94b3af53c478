"""The site's pages say what the code says: settings, commands, errors, the environment; their links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest
from snapshots import commands, environment_variables

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import check_links  # noqa: E402
import error_texts  # noqa: E402
import make_colab_page  # noqa: E402
import make_reference  # noqa: E402
import site_hooks  # noqa: E402

from fastsd_helpers.options import options_of  # noqa: E402

DOCS = ROOT / "docs"


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ settings, commands


@pytest.mark.parametrize("path", list(make_reference.pages()), ids=lambda path: path.name)
def test_the_reference_pages_are_what_the_code_says(path):
    text = path.read_text(encoding="utf-8")
    assert text == make_reference.pages()[path], "python scripts/make_reference.py writes it"


def test_the_page_of_what_colab_gets_is_what_the_lock_adds_to_its_images():
    text = make_colab_page.PAGE.read_text(encoding="utf-8")
    assert text == make_colab_page.colab_page(), "python scripts/make_colab_page.py writes it"


def test_every_settings_class_has_its_table_once():
    shown = [name for part in make_reference.PARTS.values() for name in part]
    assert sorted(shown) == sorted(make_reference.settings_classes())


def test_every_setting_stands_in_the_page_with_its_help_default_and_limits():
    rows = read("reference/settings.md").splitlines()
    for settings in make_reference.settings_classes().values():
        for item in options_of(settings):
            words = [
                f"| `{item.name}` |",
                make_reference.cell(item.help),
                *(f"`{choice}`" for choice in item.choices or ()),
            ]
            words += [f"{item.low:g} to {item.high:g}"] if item.low is not None and item.high is not None else []
            assert any(all(word in row for word in words) for row in rows), (settings, item)


def test_every_command_and_flag_stands_in_the_page():
    page = read("reference/commands.md")
    sections = dict(re.findall(r"^## (fastsd [a-z ]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    leaves = [parser for parser in commands() if not parser._subparsers]
    assert set(sections) == {parser.prog for parser in leaves}
    for parser in leaves:
        for action in parser._actions:
            if "--help" not in action.option_strings and action.help != "==SUPPRESS==":
                assert all(f"`{flag}" in sections[parser.prog] for flag in action.option_strings), action


# ------------------------------------------------------------------------------------------------------------ errors


def test_every_kind_of_error_has_its_cause_and_ways_out():
    page = read("troubleshooting.md")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(error_texts.error_classes())
    for name, section in sections.items():
        assert re.match(r"\s*Cause: .*?Ways? out: ", " ".join(section.split())), name
        assert f"<!-- errors: {name} -->" in section


def test_every_text_of_an_error_is_a_heading_with_its_hint():
    text = site_hooks.filled("errors", "SessionBusy")
    assert re.search(r"^### Session … is in use by …\.\n\n→ Wait until it has ended or stop it;", text, re.MULTILINE)
    assert sum(len(texts) for texts in error_texts.error_texts().values()) > 500


def test_texts_of_errors_are_found_in_all_their_forms(tmp_path, monkeypatch):
    (tmp_path / "fastsd_helpers").mkdir()
    source = (
        'raise DiskFull(f"The disk {x} is\\n full." if x else "There is *no* room here.", hint="Free " + some())\n'
        'raise DiskFull(problem, "Nothing to list.")\nraise ValueError("Not one of ours at all.")\n'
    )
    (tmp_path / "fastsd_helpers" / "a.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(error_texts, "ROOT", tmp_path)
    error_texts.error_texts.cache_clear()
    try:
        assert error_texts.error_texts()["DiskFull"] == {
            "The disk … is full.": ["Free …"],
            "There is *no* room here.": ["Free …"],
        }
        assert "### There is \\*no\\* room here.\n\n→ Free …" in error_texts.as_markdown("DiskFull")
    finally:
        error_texts.error_texts.cache_clear()


# ------------------------------------------------------------------------------------- environment, results, the menu


def test_every_environment_variable_of_the_code_is_told_and_no_other():
    section = read("data-and-privacy.md").split("## Environment variables")[1]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([A-Z_0-9]+)`", " ".join(rows))) == environment_variables()


def test_the_index_of_benchmarks_leads_to_every_results_page():
    linked = set(re.findall(r"\.\./benchmarks/results/([\w-]+\.md)", read("benchmarks.md")))
    assert linked == {path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")}


def test_every_page_stands_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    named = re.findall(r": ([\w/.-]+\.md)$", menu, re.MULTILINE)
    assert len(named) == len(set(named))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    pages -= {"images/README.md"}  # for those who make the pictures
    assert set(named) == pages | {"CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"}


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("path", check_links.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere_or_stands_in_the_list(path):
    assert check_links.problems(path) == []


def test_the_list_of_outside_links_says_when_each_was_looked_at():
    assert all(re.match(r"\d{4}-\d\d-\d\d ", seen) for seen in check_links.outside_links().values())


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("hardwear.md", "leads to no file"),
        ("hardware.md#disc-and-drive", "names a heading that hardware.md does not have"),
        ("https://example.org/", "is not in docs/outside-links.txt"),
        (f"{check_links.OWN}/blob/main/notebooks/dreamboot.ipynb", "names a file that is not here"),
    ],
)
def test_a_planted_broken_link_is_found(link, said):
    assert said in check_links.problem_with(link, DOCS / "index.md")


def test_links_are_seen_in_markdown_and_html_and_not_in_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('[a](b.md "t") ![i](i.png) <https://x.org> <img src="p.png">\n`[c](d.md)`\n```\n[e](f.md)\n```\n')
    assert check_links.links_of(page) == ["b.md", "i.png", "https://x.org", "p.png"]


# The site has the results pages and those of the root; links of the repository become links of the site.
@pytest.mark.parametrize(
    ("link", "page", "there"),
    [
        ("../../benchmarks/results/gate.md", "how/gate.md", "../benchmarks/gate.md"),
        ("gate_security.md#one", "benchmarks/gate.md", "gate_security.md#one"),
        ("docs/api-clients.md", "SECURITY.md", "api-clients.md"),
        ("../README.md", "hardware.md", "index.md"),
        ("../../notebooks/trocr.ipynb", "start/trocr.md", f"{check_links.OWN}/blob/main/notebooks/trocr.ipynb"),
        ("#here", "how/gate.md", "#here"),
        ("https://x.org/a.md", "how/gate.md", "https://x.org/a.md"),
        ("gone.md", "how/gate.md", "gone.md"),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(link, page, there):
    known = {"benchmarks/gate.md", "benchmarks/gate_security.md", "api-clients.md", "index.md", "how/gate.md"}
    assert site_hooks.site_link(link, page, known) == there


def test_links_in_code_are_left_and_those_with_code_in_their_words_are_not():
    text = "[`lock`](../../wheels.lock)\n```\n[a](../hardware.md)\n```\n"
    changed = site_hooks.with_site_links(text.replace("wheels.lock", "Makefile"), "how/lock.md", {"hardware.md"})
    assert f"]({check_links.OWN}/blob/main/Makefile)" in changed
    assert "[a](../hardware.md)" in changed


def test_a_page_that_fetches_from_elsewhere_is_found():
    own = '<script src="../assets/a.js"></script><a href="https://x.org">x</a>'
    assert site_hooks.fetched_from_elsewhere(own) == []
    html = (
        '<link rel="stylesheet" href="https://fonts.x.org/a.css"><img src="http://x.org/a.png"><script src=//x.org/j>'
    )
    assert len(site_hooks.fetched_from_elsewhere(html)) == 3
