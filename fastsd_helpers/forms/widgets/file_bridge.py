"""Files from the browser, in pieces: a notebook's connection drops any message above 10 MB, and with it whole uploads.

The page's own file button reads each file piece by piece and writes a piece into a hidden text field; Python takes it
and answers with its number, and then the next piece comes. So a file may be of any size, and none is lost unnoticed.
"""

import base64
import binascii
import html
import json
import uuid
from collections.abc import Callable
from typing import Any

from fastsd_helpers.forms.widgets.style import read_script
from fastsd_helpers.forms.widgets.view import load_widgets
from fastsd_helpers.wording import size_in_words

__all__ = ["FileBridge"]

_PIECE_BYTES = 1024 * 1024
_MOST_BYTES = 1024 * 2**20


class FileBridge:
    """A file button whose files come in pieces.

    Args:
        accept: what the file dialogue offers, as HTML has it.
        take: called with the name and the content of each whole file.

    Attributes:
        box: the widgets.
    """

    def __init__(self, accept: str, take: Callable[[str, bytes], None]) -> None:
        widgets = load_widgets()
        self._take = take
        self._name: str | None = None
        self._parts: list[bytes] = []
        self._id = f"fastsd-files-{uuid.uuid4().hex[:8]}"
        self._button = widgets.HTML(self._draw(accept))
        self._field = widgets.Text(continuous_update=False, layout=widgets.Layout(display="none"))
        self._field.add_class(self._id)
        self._field.observe(lambda change: self._receive(change["new"]), names="value")
        self._ack = widgets.HTML()
        self.box = widgets.VBox([self._button, self._field, self._ack])

    def _draw(self, accept: str) -> str:
        code = html.escape(read_script("upload.js"), quote=True)
        return (
            '<div style="line-height:1.6"><label style="max-width:100%"><b>Upload:</b> '
            '<input style="max-width:100%" type="file" multiple class="fastsd-file" '
            f'accept="{html.escape(accept, quote=True)}" '
            f'data-bridge="{self._id}" data-piece="{_PIECE_BYTES}" data-most="{_MOST_BYTES}" '
            f'data-limit="{size_in_words(_MOST_BYTES)}" onchange="{code}"></label> '
            '<span class="fastsd-said fastsd-quiet" role="status"></span></div>'
        )

    def _receive(self, text: str) -> None:
        if not text:
            return
        try:
            piece: dict[str, Any] = json.loads(text)
            number, name, offset, size = int(piece["n"]), str(piece["name"]), int(piece["offset"]), int(piece["size"])
            data = base64.b64decode(piece["data"], validate=True)
        except (ValueError, KeyError, TypeError, binascii.Error):
            return  # not from our own page; without an answer the page says that it stopped
        if size > _MOST_BYTES:
            return
        if offset == 0:
            self._name, self._parts = name, []
        if name != self._name or offset != sum(map(len, self._parts)):
            return
        self._parts.append(data)
        if offset + len(data) == size:
            content, self._name, self._parts = b"".join(self._parts), None, []
            self._take(name, content)
        self._field.value = ""
        self._ack.value = f'<span class="{self._id}-ack" data-n="{number}"></span>'
