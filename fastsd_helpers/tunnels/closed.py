"""Paths that are closed on every link: closed.toml, by what is behind the link."""

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.tunnels.gate.passing import ClosedPath

__all__ = ["A1111_CLOSED", "COMFYUI_CLOSED", "GRADIO_CLOSED", "UNKNOWN_CLOSED"]


def _closed(part: str) -> tuple[ClosedPath, ...]:
    rows = read_table("tunnels/closed.toml")[part]
    return tuple(ClosedPath(row["pattern"], row["why"], tuple(row.get("methods", ()))) for row in rows)


UNKNOWN_CLOSED = _closed("unknown")
GRADIO_CLOSED = (*UNKNOWN_CLOSED, *_closed("gradio"))
A1111_CLOSED = (*GRADIO_CLOSED, *_closed("a1111"))
COMFYUI_CLOSED = (*UNKNOWN_CLOSED, *_closed("comfyui"))
