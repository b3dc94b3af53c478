"""What every view of a notebook needs: the widgets, to be a cell's last line, and to say a sentence."""

import html
from typing import Any

from fastsd_helpers.errors import needs_package

__all__ = ["View", "load_widgets"]


def load_widgets() -> Any:
    """Import ipywidgets; raises DependencyMissing where it is not installed."""
    with needs_package("A form", "Run: pip install ipywidgets and restart the notebook, or use `fastsd --help`."):
        import ipywidgets
    return ipywidgets


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
