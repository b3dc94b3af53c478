"""Choosing a known value in a list, or typing any other one."""

import html
from collections.abc import Sequence

from fastsd_helpers.forms.widgets.known import OTHER
from fastsd_helpers.forms.widgets.view import draw_notice, load_widgets

__all__ = ["Choice"]

_OTHER_WORDS = "another one: type it"


class Choice:
    """A list of known values, and below it a text field, which is there while the list says "another one".

    The text is the value: choosing in the list fills it in. Show `widget` in a cell, or place `text`, `known` and
    `about` yourself.

    Args:
        entries: (what the list shows, value), the first one to offer at the front. An entry with the value `OTHER`
            words the choice to type something; left out, it is the last one.
        label: name of the setting, for those who hear the form.
        placeholder: an example of what can be typed.
        value: what is chosen at first; None: the first entry.
        remark: said about the list, whatever is chosen.

    Attributes:
        text: the text field. known: the list. about: what is said about the value.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, str]],
        *,
        label: str = "",
        placeholder: str = "",
        value: str | None = None,
        remark: str = "",
    ) -> None:
        widgets = load_widgets()
        self._remark = remark
        self._keys = [key for _words, key in entries if key != OTHER]
        # "" is a value where a list has it; elsewhere it stands for "another one".
        self._other = OTHER if "" in self._keys else ""
        offered = [(words, self._other if key == OTHER else key) for words, key in entries]
        if self._other not in [key for _words, key in offered]:
            offered.append((_OTHER_WORDS, self._other))
        self.known = widgets.Dropdown(options=offered, value=self._other, description=label)
        self.text = widgets.Combobox(
            options=[key for key in self._keys if key],
            placeholder=placeholder,
            ensure_option=False,
            continuous_update=False,
            description=f"{label}: another one" if label and self._keys else label,
        )
        self.text.add_class("fastsd-more" if self._keys else "fastsd-typed")
        self.about = widgets.HTML()
        self.widget = widgets.VBox([self.known, self.text, self.about])
        if not self._keys:
            self.known.layout.display = "none"
        self.text.observe(lambda _change: self._typed(), names="value")
        self.known.observe(lambda _change: self._picked(), names="value")
        self.text.value = next(iter(self._keys), "") if value is None else value
        self._typed()

    def read(self) -> str:
        """What was chosen: a known value, or any other text without blanks around it."""
        return self.text.value.strip()

    def first(self) -> str:
        """The value that the list offers first; "" for a list without values."""
        return next(iter(self._keys), "")

    def write(self, value: str) -> None:
        """Choose a known value, or type any other text."""
        self.text.value = value

    def _typed(self) -> None:
        self.known.value = self.read() if self.read() in self._keys else self._other
        self._arrange()
        self._show()

    def _picked(self) -> None:
        if self.known.value != self._other:
            self.text.value = self.known.value
        elif self.read() in self._keys:
            self.text.value = ""  # "another one" makes room for it
            self.known.value = self._other  # where "" is a known value, the empty text has just chosen that
        self._arrange()

    def _arrange(self) -> None:
        typing = self.known.value == self._other
        self.text.layout.display = "" if typing else "none"

    def _show(self) -> None:
        lines = "<br>".join(html.escape(line) for line in self._lines())
        self.about.value = draw_notice(self._remark, "warn") + lines

    def _lines(self) -> list[str]:
        """What is said about the value."""
        return []
