"""What every view of a notebook can do: be a cell's last line, and say a sentence."""

import html
from typing import Any

__all__ = ["View"]


class View:
    """A box of widgets; `_say` needs a `_message` among them.

    Attributes:
        box: the outermost widget.
    """

    box: Any
    _message: Any

    def display(self) -> None:
        """Show it below the cell that is running."""
        from IPython.display import display

        display(self.box)

    def _ipython_display_(self) -> None:
        self.display()

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)
