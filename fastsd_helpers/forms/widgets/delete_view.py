"""A list of things with their sizes, and a button that deletes the chosen one after a second press."""

import html
from collections.abc import Callable
from typing import Generic, TypeVar

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.view import View, load_widgets, make_button, make_field, make_frame
from fastsd_helpers.wording import size_in_words

__all__ = ["DeleteView"]

Thing = TypeVar("Thing")


class DeleteView(View, Generic[Thing]):
    """The list, the button and the second button that asks whether you are sure.

    Args:
        listed: what is free, in HTML, and (label, thing) of what can be deleted.
        name: the thing in the question whether to delete it.
        remove: deletes it; gives the bytes that were freed.
        note: when deleting makes room, of one thing, or of things in general (None); "" where that is at once.
    """

    def __init__(
        self,
        listed: Callable[[], tuple[str, list[tuple[str, Thing]]]],
        name: Callable[[Thing], str],
        remove: Callable[[Thing], int],
        note: Callable[[Thing | None], str],
    ) -> None:
        self._list, self._name, self._remove, self._note = listed, name, remove, note
        widgets = load_widgets()
        self._head = widgets.HTML()
        self._choice = widgets.Select(description="what to delete", rows=9)
        self._delete = make_button("Delete…", icon="trash")
        self._sure = make_button("Yes, delete it", kind="danger")
        self._sure.layout.display = "none"
        self._message = widgets.HTML()
        self._choice.observe(lambda _change: self._ask(False), names="value")
        self._delete.on_click(lambda _button: self._ask(True))
        self._sure.on_click(lambda _button: self._go())
        field = make_field(self._choice)
        field.add_class("fastsd-wide")
        self.box = make_frame(self._head, field, widgets.HBox([self._delete, self._sure]), self._message)
        self._load()

    def _load(self) -> None:
        try:
            head, entries = self._list()
        except FastSDError as err:
            self._say_error(err)
            return
        self._choice.options = entries
        self._delete.disabled = not entries
        self._head.value = f"{head} {html.escape(self._note(None))}"
        self._ask(False)

    def _ask(self, asking: bool) -> None:
        thing = self._choice.value
        asking = asking and thing is not None
        self._sure.layout.display = "" if asking else "none"
        self._say(f"Delete {self._name(thing)}? This cannot be undone." if asking else "")

    def _go(self) -> None:
        thing = self._choice.value
        if thing is None:
            return
        try:
            note = self._note(thing)  # while it is there
            freed = self._remove(thing)
        except FastSDError as err:
            self._say_error(err)
            return
        self._load()
        self._say(f"Deleted: {size_in_words(freed)}. {note}")
