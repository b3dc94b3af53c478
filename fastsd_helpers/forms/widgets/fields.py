"""One setting as one widget, on ipywidgets 7.7.1 (Colab) and 8 alike.

Numbers are text fields: a bounded number widget silently moves a typed 20000 to its largest value, where we want to
say what is wrong; and a field that is optional has to be able to be empty.
"""

import html
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

from fastsd_helpers.errors import FastSDError, SettingsError
from fastsd_helpers.forms.widgets.choice import Choice
from fastsd_helpers.forms.widgets.known import OTHER, known_values
from fastsd_helpers.forms.widgets.view import draw_notice, load_widgets, make_field
from fastsd_helpers.options import Option, parse_value
from fastsd_helpers.wording import for_notebook, label_of

__all__ = ["Field", "known_choice"]

_ALONE = ""  # what an empty field and the first entry of a choice hold
_FITS = 34  # characters that a list shows beside its label and help; a list cannot wrap


def known_choice(option: Option, session: Any = None) -> Choice:
    """The list of a setting's known values that takes any other text too."""
    try:
        entries = list(known_values(option.known, session))
    except FastSDError as err:  # a Drive that is not there must not cost the user the form
        entries, problem = [], err.problem
    else:
        problem = ""
    # A list with an entry of its own for another text says what an empty field means, where it may be empty.
    may_be_empty = option.default in ("", None) and OTHER not in [value for _words, value in entries]
    if may_be_empty and entries and "" not in [value for _words, value in entries]:
        entries.insert(0, ("automatic" if option.optional else "none", ""))
    return Choice(entries, label=label_of(option.name), value="" if may_be_empty else None, remark=problem)


class Field:
    """The widget of one setting with its name before it, its help beside or beneath it, and what is wrong below.

    Args:
        option: the setting.
        choice: the list of known values, for a setting that has one; its text field is the setting's widget.

    Attributes:
        widget: what holds the value. row: the whole of it, to be placed in a form. problem: what is wrong, or "".
    """

    def __init__(self, option: Option, *, choice: Choice | None = None) -> None:
        self.option, self.choice = option, choice
        self.problem, self._about, self._help_text = "", None, ""
        widgets = load_widgets()
        self.widget = choice.text if choice else self._make_widget(widgets)
        self._below = widgets.HTML(layout=widgets.Layout(display="none"))
        help = for_notebook(self._help())
        if choice:
            about = widgets.VBox([widgets.HTML(html.escape(help)), choice.about])
            about.add_class("fastsd-help")
            inputs = widgets.VBox([choice.known, choice.text])
            inputs.add_class("fastsd-input")
            self._below.add_class("fastsd-below")
            self.row = widgets.HBox([inputs, about, self._below])
            self.row.add_class("fastsd-field")
            if max(len(words) for words, _value in choice.known.options) > _FITS:
                self.row.add_class("fastsd-wide")
        else:
            self.row = make_field(self.widget, help, below=self._below)
            self._about, self._help_text = self.row.children[1] if help else None, html.escape(help)
        if option.default is not MISSING:
            self.write(None if option.follows else option.default)

    def _make_widget(self, widgets: Any) -> Any:
        option = self.option
        name = {"description": label_of(option.name)}
        # Where the help says what an empty field means, it is not chosen automatically.
        empty = "automatic" if (option.optional or option.follows) and "; empty:" not in option.help else ""
        # The first entry of a choice; with a value of None it would show as nothing once it is chosen again. A default
        # that follows the model would be shown where the model's is used, and could not be chosen.
        alone = [(empty, _ALONE)] if option.optional or option.follows else []
        if option.secret:
            return widgets.Password(**name)
        if option.choices is not None:
            return widgets.Dropdown(options=[*alone, *((str(choice), choice) for choice in option.choices)], **name)
        if option.kind is bool and option.optional:
            return widgets.Dropdown(options=[*alone, ("yes", True), ("no", False)], **name)
        if option.kind is bool:
            return widgets.Checkbox(indent=True, **name)
        return widgets.Text(continuous_update=False, placeholder=empty, **name)

    def _help(self) -> str:
        bounds = (self.option.low, self.option.high)
        if None in bounds or self.option.choices is not None:
            return self.option.help
        low, high = (f"{limit:g}" if self.option.kind is float else str(limit) for limit in bounds)
        return f"{self.option.help} ({low} to {high})"

    @property
    def alone(self) -> bool:
        """Whether it is left to the base model although it has a default."""
        return self.option.follows and self.widget.value == _ALONE

    def read(self) -> Any:
        """The setting's value; text that is not a number is returned as it was typed, for `check` to name it."""
        value = self.option.default if self.alone else self.widget.value
        if not isinstance(value, str) or self.option.choices is not None:
            return None if value == _ALONE else value
        try:
            return parse_value(self.option, value.strip())
        except ValueError:
            return value.strip()

    def write(self, value: Any) -> None:
        """Show a value; None shows the empty field that means "left alone"."""
        from traitlets import TraitError

        if value is None:
            value = _ALONE
        elif hasattr(self.widget, "placeholder"):
            value = str(value)
        try:
            self.widget.value = value
        except TraitError as err:
            choices = self.option.choices or ("yes", "no")
            raise SettingsError(
                f"{self.option.name} ({self.option.flag}) is {value!r}; choose {', '.join(choices)}.",
                "Change the value named above and run again.",
            ) from err

    def suggest(self, text: str) -> None:
        """Say beside the field what it will use when it is left empty.

        Not in the field itself: ipywidgets takes whatever comes for a text field as a reason to show the last value
        that was sent, and what somebody is typing at that moment would be gone.
        """
        if self._about is not None:
            self._about.value = self._help_text + (f" · <b>{html.escape(text)}</b>" if text else "")

    def complain(self, problem: str) -> None:
        """Say beneath the field what is wrong with its value; "" takes it back."""
        self.problem = for_notebook(problem)
        self._below.value = draw_notice(problem, "bad")
        self._below.layout.display = "" if problem else "none"

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after the user has entered something."""
        self.widget.observe(lambda _change: changed(), names="value")
