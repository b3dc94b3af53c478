"""Settings, defined once: one dataclass field is one widget, one command-line flag and one saved value."""

import dataclasses
import re
import types
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar

from fastsd_helpers.errors import SettingsError

__all__ = [
    "GIVEN",
    "Checked",
    "Option",
    "check",
    "from_values",
    "given_names",
    "option",
    "options_of",
    "parse_value",
    "to_values",
    "words_of",
]

Config = TypeVar("Config")

GIVEN = "_given"  # attribute of settings that know which of them were given; no field, so it is neither shown nor saved


@dataclass(frozen=True)
class Option:
    """One setting as the form, the command line and the docs table see it."""

    name: str
    kind: type  # bool, int, float or str
    default: Any  # MISSING when the user must give it
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] | None = None
    secret: bool = False
    advanced: bool = False
    optional: bool = False  # None is allowed: "left alone"
    known: str = ""  # which list of known values a form offers beside free text
    follows: bool = False  # left alone, it is what the base model says, and its default where that says nothing

    @property
    def flag(self) -> str:
        """The command-line flag: `unet_steps` is `--unet-steps`."""
        return "--" + self.name.replace("_", "-")


def option(
    default: Any = MISSING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    secret: bool = False,
    advanced: bool = False,
    known: str = "",
    follows: bool = False,
) -> Any:
    """Declare one setting of a frozen dataclass.

    The annotation gives the rest: `Literal["a", "b"]` is a dropdown and a list of choices, `bool` a
    checkbox and `--x/--no-x`, `int | None` a field that is optional.

    Args:
        default: value when the user says nothing; absent means the user must give it.
        help: one line, with the unit where there is one.
        low: smallest value allowed.
        high: largest value allowed.
        step: the widget's step.
        secret: a password widget, never a flag, never saved, never in a repr or an error.
        advanced: folded away in the form.
        known: a key of `forms.known`: values that the form offers beside free text.
        follows: left alone, it is what the base model says; the form shows that it is, not the default.

    Returns:
        The field, for the dataclass.
    """
    metadata = {"help": help, "low": low, "high": high, "step": step}
    metadata |= {"secret": secret, "advanced": advanced, "known": known, "follows": follows}
    return field(default=default, metadata=metadata, repr=not secret)


def options_of(settings: type) -> list[Option]:
    """List the settings of a dataclass in the order they were declared.

    Args:
        settings: the class.

    Returns:
        Name, type, default, limits, choices and help of each.
    """
    hints = typing.get_type_hints(settings)
    found = []
    for spec in dataclasses.fields(settings):
        if "help" not in spec.metadata:
            continue
        kind, choices, optional = _read_annotation(hints[spec.name])
        found.append(Option(spec.name, kind, spec.default, choices=choices, optional=optional, **spec.metadata))
    return found


def _read_annotation(annotation: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    optional = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        optional = len(inner) < len(typing.get_args(annotation))
        annotation = inner[0]
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), optional
    return annotation, None, optional


def _problem_with(spec: Option, value: Any) -> str | None:
    if value is None:
        return None if spec.optional else "is required"
    if spec.choices is not None:
        return None if value in spec.choices else f"is {value!r}; choose {', '.join(spec.choices)}"
    if spec.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, spec.kind) or (spec.kind is int and isinstance(value, bool)):
        return f"is {value!r}; it must be {_kind_in_words(spec.kind)}"
    if isinstance(value, (int, float)) and spec.kind in (int, float):
        if value != value or value in (float("inf"), float("-inf")):
            return f"is {value}; it must be a finite number"
        if spec.low is not None and value < spec.low:
            return f"is {value}; the smallest is {spec.low}"
        if spec.high is not None and value > spec.high:
            return f"is {value}; the largest is {spec.high}"
    return None


def _kind_in_words(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "yes or no", str: "text"}[kind]


def check(settings: Any, extra: typing.Iterable[str] = ()) -> None:
    """Raise one SettingsError that names every bad field of `settings`.

    Call it in `__post_init__`; `extra` adds sentences about fields that do not fit together.

    Args:
        settings: an instance of the settings class.
        extra: sentences that count as bad fields too.
    """
    problems: list[str] = []
    fields: dict[str, str] = {}
    specs = options_of(type(settings))
    for spec in specs:
        problem = _problem_with(spec, getattr(settings, spec.name))
        if problem and spec.secret:  # it has no flag, and its value is not for an error's text
            problem = f"{spec.name} must be {_kind_in_words(spec.kind)}"
        elif problem:
            problem = f"{spec.name} ({spec.flag}) {problem}"
        if problem:
            problems.append(problem)
            fields[spec.name] = problem
    for sentence in extra:
        problems.append(sentence)
        name = _first_named(specs, sentence)
        fields[name] = f"{fields[name]}; {sentence}" if name in fields else sentence
    if problems:
        raise SettingsError(f"{'; '.join(problems)}.", "Change the values named above and run again.", fields=fields)


class Checked:
    """Settings whose fields are checked, one by one, when they are made."""

    def __post_init__(self) -> None:
        check(self)


def _first_named(specs: list[Option], sentence: str) -> str:
    """The setting that a sentence names first, by its name or its flag: there a form shows it; "" for none."""
    places = {}
    for spec in specs:
        found = re.search(rf"(?<![\w-])({re.escape(spec.flag)}|{re.escape(spec.name)})(?![\w-])", sentence)
        if found:
            places[spec.name] = found.start()
    return min(places, key=lambda name: places[name], default="")


def parse_value(spec: Option, text: str) -> Any:
    """Turn one command-line word into the setting's value; raises ValueError on a word that is none.

    Args:
        spec: the setting.
        text: the word.

    Returns:
        The value, in the setting's type; its limits are not looked at.
    """
    if spec.optional and text.lower() in ("", "none", *(("auto",) if spec.kind is int else ())):
        return None
    if spec.kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(text)
    return spec.kind(text)


def words_of(settings: Any, names: typing.Container[str]) -> list[str]:
    """The words of a command line that give these settings the values they have.

    What is left alone (None) is left out, and so is every secret. A value is in one word with its flag, so that one
    that begins with a dash is not a flag.

    Args:
        settings: an instance of the settings class.
        names: of the settings that are wanted.
    """
    words = []
    for spec in options_of(type(settings)):
        value = getattr(settings, spec.name)
        if spec.name not in names or spec.secret or value is None:
            continue
        if spec.kind is bool:
            words.append(spec.flag if value else spec.flag.replace("--", "--no-", 1))
        else:
            words.append(f"{spec.flag}={value}")
    return words


def to_values(settings: Any) -> dict[str, Any]:
    """The settings as a JSON-able dict, without secrets.

    Args:
        settings: an instance of the settings class.
    """
    return {spec.name: getattr(settings, spec.name) for spec in options_of(type(settings)) if not spec.secret}


def from_values(settings: type[Config], values: dict[str, Any], *, given: typing.Iterable[str] | None = None) -> Config:
    """Build settings from a saved dict; raises SettingsError for a name that does not exist.

    Args:
        settings: the class.
        values: name -> value.
        given: which of them the user chose; left alone, all of them.

    Returns:
        An instance of the settings class.
    """
    known = {spec.name for spec in options_of(settings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(
            f"Unknown setting {', '.join(unknown)}.", f"Settings of this step: {', '.join(sorted(known))}."
        )
    config = settings(**values)
    if given is not None and hasattr(config, GIVEN):
        object.__setattr__(config, GIVEN, frozenset(given))
    return config


def given_names(settings: Any) -> frozenset[str]:
    """Which settings were given; for a class that does not note it, those that differ from their defaults.

    Args:
        settings: an instance of the settings class.
    """
    noted = getattr(settings, GIVEN, None)
    if noted is not None:
        return noted
    return frozenset(item.name for item in options_of(type(settings)) if getattr(settings, item.name) != item.default)
