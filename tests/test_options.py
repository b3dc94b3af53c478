"""One field is one widget, one flag and one saved value; every bad value is named at once."""

from dataclasses import MISSING, dataclass
from typing import Any, Literal

import pytest

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import check, from_values, option, options_of, parse_value, to_values


@dataclass(frozen=True)
class PaintConfig:
    """Settings for painting a wall."""

    colour: str = option(help="colour of the wall")
    coats: int = option(2, help="layers of paint", low=1, high=9)
    speed: float = option(0.5, help="square metres a minute", low=0.0, step=0.1)
    finish: Literal["matt", "gloss"] = option("matt", help="how it shines")
    ladder: bool = option(False, help="use the ladder", advanced=True)
    brush: int | None = option(None, help="width in mm", low=10)
    key: str | None = option(None, help="key of the shed", secret=True)
    note: str = "no setting, because it has no help"

    def __post_init__(self) -> None:
        check(self, ["coats and ladder do not fit together"] if self.coats == 9 and self.ladder else [])


def options() -> dict[str, Any]:
    return {item.name: item for item in options_of(PaintConfig)}


def test_every_field_made_with_option_is_listed_in_order() -> None:
    assert list(options()) == ["colour", "coats", "speed", "finish", "ladder", "brush", "key"]


def test_the_annotation_gives_kind_choices_and_whether_it_may_be_left_alone() -> None:
    found = options()
    assert found["finish"].choices == ("matt", "gloss")
    assert (found["brush"].kind, found["brush"].optional) == (int, True)
    assert (found["ladder"].kind, found["ladder"].advanced) == (bool, True)
    assert found["key"].secret
    assert found["colour"].default is MISSING
    assert found["coats"].flag == "--coats"


def test_what_an_option_does_not_say_is_off() -> None:
    """Neither folded away, secret, bounded, nor allowed to be None: whoever declares a setting says what it is."""
    for name, said in {
        "colour": set(),
        "coats": {"low", "high"},
        "speed": {"low", "step"},
        "finish": {"choices"},
        "ladder": {"advanced"},
        "brush": {"low", "optional"},
        "key": {"secret", "optional"},
    }.items():
        found = options()[name]
        usual = {"low": None, "high": None, "step": None, "choices": None}
        usual |= {"secret": False, "advanced": False, "optional": False}
        for aspect, off in usual.items():
            value = getattr(found, aspect)
            assert (value != off) == (aspect in said), (name, aspect)


def test_a_flag_has_hyphens() -> None:
    @dataclass(frozen=True)
    class C:
        unet_steps: int = option(1, help="steps")

    assert options_of(C)[0].flag == "--unet-steps"


def test_what_is_not_said_of_a_setting_is_the_plain_choice() -> None:
    @dataclass(frozen=True)
    class Plain:
        one: int = option(1, help="a number")

    (found,) = options_of(Plain)
    assert (found.low, found.high, found.step, found.choices) == (None, None, None, None)
    assert (found.secret, found.advanced, found.optional) == (False, False, False)
    assert [name for name, item in options().items() if item.advanced] == ["ladder"]
    assert [name for name, item in options().items() if item.secret] == ["key"]
    assert [name for name, item in options().items() if item.optional] == ["brush", "key"]


def test_limits_steps_and_words_reach_the_form() -> None:
    found = options()
    assert (found["coats"].low, found["coats"].high, found["coats"].step) == (1, 9, None)
    assert (found["speed"].low, found["speed"].high, found["speed"].step) == (0.0, None, 0.1)
    assert (found["coats"].help, found["coats"].default) == ("layers of paint", 2)
    assert {name: item.kind for name, item in found.items()} == {
        "colour": str, "coats": int, "speed": float, "finish": str, "ladder": bool, "brush": int, "key": str,
    }  # fmt: skip


def test_the_older_way_to_say_that_none_is_allowed_is_understood_too() -> None:
    import typing

    @dataclass(frozen=True)
    class Old:
        one: typing.Optional[int] = option(None, help="a number")  # noqa: UP045
        two: typing.Union[int, str] = option(1, help="first of two")  # noqa: UP007
        three: Literal["a", "b"] | None = option(None, help="a choice")

    one, two, three = options_of(Old)
    assert (one.kind, one.optional) == (int, True)
    assert (two.kind, two.optional) == (int, False)
    assert (three.kind, three.choices, three.optional) == (str, ("a", "b"), True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"coats": 0}, "coats (--coats) is 0; the smallest is 1"),
        ({"coats": 10}, "is 10; the largest is 9"),
        ({"coats": -3}, "is -3; the smallest is 1"),
        ({"coats": 1.5}, "is 1.5; it must be an integer"),
        ({"coats": True}, "is True; it must be an integer"),
        ({"coats": "many"}, "is 'many'; it must be an integer"),
        ({"coats": None}, "is required"),
        ({"speed": float("nan")}, "is nan; it must be a finite number"),
        ({"speed": float("inf")}, "is inf; it must be a finite number"),
        ({"speed": float("-inf")}, "is -inf; it must be a finite number"),
        ({"speed": True}, "is True; it must be a number"),
        ({"speed": "0.5"}, "is '0.5'; it must be a number"),
        ({"speed": -1}, "is -1.0; the smallest is 0.0"),
        ({"colour": 7}, "is 7; it must be text"),
        ({"colour": None}, "colour (--colour) is required"),
        ({"finish": None}, "is required"),
        ({"ladder": 1}, "is 1; it must be yes or no"),
        ({"brush": 1e3}, "is 1000.0; it must be an integer"),
        ({"speed": -0.1}, "is -0.1; the smallest is 0.0"),
        ({"finish": "silk"}, "is 'silk'; choose matt, gloss"),
        ({"ladder": "yes"}, "is 'yes'; it must be yes or no"),
        ({"brush": 5}, "is 5; the smallest is 10"),
        ({"coats": 9, "ladder": True}, "do not fit together"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        PaintConfig(**{"colour": "red", **values})
    assert words in caught.value.problem
    assert caught.value.hint


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        PaintConfig(colour=7, coats=0, finish="silk", brush=1)
    for name in ("colour", "coats", "finish", "brush"):
        assert name in caught.value.problem


@pytest.mark.parametrize(
    "values",
    [
        {"coats": 1},
        {"coats": 9},
        {"speed": 3},
        {"speed": 0.0},
        {"speed": 0},
        {"speed": 1e9},
        {"brush": None},
        {"brush": 10},
        {"finish": "gloss"},
        {"ladder": True},
        {"key": None},
    ],
)
def test_values_at_the_limits_are_fine(values: dict[str, Any]) -> None:
    config = PaintConfig(colour="red", **values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("coats", "3", 3),
        ("speed", "2e-6", 2e-6),
        ("brush", "none", None),
        ("brush", "", None),
        ("brush", "12", 12),
        ("ladder", "on", True),
        ("ladder", "No", False),
        ("ladder", "1", True),
        ("ladder", "TRUE", True),
        ("ladder", "yes", True),
        ("ladder", "off", False),
        ("ladder", "0", False),
        ("ladder", "false", False),
        ("brush", "None", None),
        ("key", "none", None),
        ("finish", "gloss", "gloss"),
        ("colour", "none", "none"),
    ],
)
def test_a_word_becomes_the_value(name: str, text: str, value: Any) -> None:
    assert parse_value(options()[name], text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("coats", "three"), ("coats", "1.5"), ("coats", ""), ("ladder", "maybe"), ("ladder", ""), ("speed", "")],
)
def test_a_word_that_is_no_value_raises(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text or "could not convert|invalid literal|^$"):
        parse_value(options()[name], text)


def test_saved_values_come_back_without_the_secret() -> None:
    config = PaintConfig(colour="red", coats=3, key="under the mat")
    saved = to_values(config)
    assert "key" not in saved
    assert from_values(PaintConfig, saved) == PaintConfig(colour="red", coats=3)


def test_a_saved_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(SettingsError) as caught:
        from_values(PaintConfig, {"colour": "red", "roller": 1})
    assert "roller" in caught.value.problem
    assert "coats" in caught.value.hint
    with pytest.raises(SettingsError, match="Unknown setting hue, roller"):
        from_values(PaintConfig, {"roller": 1, "hue": 2})
    with pytest.raises(SettingsError, match="the smallest is 1"):
        from_values(PaintConfig, {"colour": "red", "coats": 0})


def test_numbers_without_limits_are_only_looked_at_for_their_kind() -> None:
    @dataclass(frozen=True)
    class Free:
        count: int = option(1, help="any whole number")
        share: float = option(1.0, help="any number", low=0.0)
        most: int = option(1, help="at most", high=5)

        def __post_init__(self) -> None:
            check(self)

    for values in ({"count": -(10**9)}, {"count": 10**9}, {"share": 1e30}, {"most": -5}, {"most": 5}):
        assert Free(**values)
    for values, words in (({"share": -1.0}, "the smallest is 0.0"), ({"most": 6}, "the largest is 5")):
        with pytest.raises(SettingsError, match=words):
            Free(**values)
