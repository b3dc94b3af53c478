"""Reading with some characters only: what is meant by a list of them, and that nothing else is ever written."""

import pytest
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.trocr import ReadConfig, Reader
from fastsd_helpers.trocr.language.allowed_characters import parse_characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-9.,/", "0123456789.,/"),
        ("a-c", "abc"),
        ("abc-", "abc-"),
        ("-9", "-9"),
        ("A-Ca-c", "ABCabc"),
        ("0-9 -", "0123456789 -"),
        ("α-γ", "αβγ"),
        ("x", "x"),
    ],
)
def test_ranges_and_single_characters_are_told_apart(text, expected):
    assert parse_characters(text) == frozenset(expected)


@pytest.mark.parametrize("text", ["9-0", "z-a", "\x00-\U0010ffff"])
def test_a_range_that_means_nothing_is_refused_before_a_model_is_looked_for(text):
    with pytest.raises(SettingsError, match="is empty or too long"):
        ReadConfig(allowed_characters=text)


@pytest.mark.parametrize("kind", ["base", "small"])
@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_but_the_allowed_characters_is_written(tmp_path, kind, beams):
    write_reader(tmp_path / "reader", kind, seed=3, end=2.0)
    pictures = noise_pictures(6)
    options = {"precision": "fp32", "max_new_tokens": 8, "beams": beams}
    free = Reader(tmp_path / "reader", **options).read(pictures)
    assert any(set(line.text) - set("0123456789.,") for line in free), "the mask has something to do"
    numbers = Reader(tmp_path / "reader", allowed_characters="0-9.,", **options)
    lines = numbers.read(pictures)
    # A sentencepiece token may begin a word, and then there is a blank before it.
    assert (
        not {letter for line in lines for letter in line.text}
        - set("0123456789.,")
        - ({" "} if kind == "small" else set())
    )
    assert all(0 <= line.confidence <= 1 for line in lines)
    assert any(line.text for line in lines)


def test_a_character_the_model_cannot_write_is_named(tmp_path):
    write_reader(tmp_path / "reader", "small")
    with pytest.raises(SettingsError, match="This model cannot write 'ꝑ'"):
        Reader(tmp_path / "reader", precision="fp32", allowed_characters="0-9ꝑ")


def test_rows_that_were_read_with_other_characters_are_read_again_and_older_ones_are_not(tmp_path):
    from fastsd_helpers.trocr.reading.rows import _settings_of

    write_reader(tmp_path / "reader", "base")
    free, numbers = (Reader(tmp_path / "reader", precision="fp32", allowed_characters=text) for text in ("", "0-9"))
    assert _settings_of(free, "lines") == ["fp32", 1, str(free.limits), True, "lines"]
    assert _settings_of(numbers, "lines") != _settings_of(free, "lines")
