"""One setting as one widget, on ipywidgets 7.7.1 (Colab) and 8 alike.

Numbers are text fields: a bounded number widget silently moves a typed 20000 to its largest value, where we want to
say what is wrong; and a field that may be left alone has to be able to be empty.
"""

import html
from collections.abc import Callable
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.forms.view import load_widgets
from fastsd_helpers.options import Option, parse_value

if TYPE_CHECKING:
    from fastsd_helpers.forms.model_choice import ModelChoice

__all__ = ["Field"]


def _trait_error() -> type[Exception]:
    from traitlets import TraitError

    return TraitError


class Field:
    """The widget of one setting, with its name on the left and its help on the right.

    Args:
        option: the setting.
        choice: the dropdown of models, for a setting that names one; its text field is the setting's widget.
    """

    def __init__(self, option: Option, *, choice: "ModelChoice | None" = None) -> None:
        self.option, self.choice = option, choice
        widgets = load_widgets()
        self.widget = choice.text if choice else self._make_widget(widgets)
        name = html.escape(option.name.replace("_", " "))
        label = widgets.HTML(f"<b>{name}</b>", layout=widgets.Layout(flex="0 0 170px"))
        about = widgets.HTML(f"<div style='opacity:.7; line-height:1.4'>{html.escape(self._help())}</div>")
        parts = [label, self.widget, about]
        if choice:
            column = widgets.Layout(flex="0 0 240px", overflow="hidden")
            parts = [
                label,
                widgets.VBox([choice.text, choice.known], layout=column),
                widgets.VBox([about, choice.about]),
            ]
        self.row = widgets.HBox(parts, layout=widgets.Layout(align_items="center"))
        if option.default is not MISSING:
            self.write(option.default)

    def _make_widget(self, widgets: Any) -> Any:
        option = self.option
        # Columns of a fixed width: a long help text beside it must not push a field out of line.
        layout = widgets.Layout(flex="0 0 240px")
        if option.secret:
            return widgets.Password(layout=layout)
        if option.choices is not None:
            # The empty first entry is how a choice is left alone.
            entries = [(str(choice), choice) for choice in option.choices]
            return widgets.Dropdown(options=[("", None), *entries] if option.optional else entries, layout=layout)
        if option.kind is bool and option.optional:
            return widgets.Dropdown(options=[("", None), ("yes", True), ("no", False)], layout=layout)
        if option.kind is bool:
            return widgets.Checkbox(indent=False, layout=layout)
        return widgets.Text(continuous_update=False, layout=layout)

    def _help(self) -> str:
        bounds = (self.option.low, self.option.high)
        if None in bounds or self.option.choices is not None:
            return self.option.help
        low, high = (f"{limit:g}" if self.option.kind is float else str(limit) for limit in bounds)
        return f"{self.option.help} ({low} to {high})"

    def read(self) -> Any:
        """The setting's value; text that is no number is returned as it was typed, for `check` to name it."""
        value = self.widget.value
        if not isinstance(value, str) or self.option.choices is not None:
            return value
        try:
            return parse_value(self.option, value.strip())
        except ValueError:
            return value.strip()

    def write(self, value: Any) -> None:
        """Show a value; None shows the empty field that means "left alone"."""
        if hasattr(self.widget, "placeholder"):
            value = "" if value is None else str(value)
        try:
            self.widget.value = value
        except _trait_error() as err:
            choices = self.option.choices or ("yes", "no")
            raise SettingsError(
                f"{self.option.name} ({self.option.flag}) is {value!r}; choose {', '.join(choices)}.",
                "Change the value named above and run again.",
            ) from err

    def suggest(self, text: str) -> None:
        """Say in grey what an empty field will use."""
        if hasattr(self.widget, "placeholder"):
            self.widget.placeholder = text

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after the user has entered something."""
        self.widget.observe(lambda _change: changed(), names="value")
