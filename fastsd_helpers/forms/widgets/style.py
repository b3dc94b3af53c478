"""How everything below a notebook's cell looks: style.css with the colours here, and the scripts of its page.

Text takes the theme's own colour. Whatever has a colour of its own brings its background too, so that no theme can
make it hard to read; a test measures the contrast of each pair.
"""

import functools
import re
from pathlib import Path

__all__ = ["COLOURS", "read_script", "read_style"]

# What has a colour of its own: text, background; each pair is readable on its own, whatever is around it.
COLOURS: dict[str, tuple[str, str]] = {
    "bad": ("#7a120d", "#fdecea"),
    "warn": ("#5c3700", "#fff3dc"),
    "good": ("#0b4a22", "#e4f4e9"),
    "primary": ("#ffffff", "#1761ad"),
    "warning": ("#ffffff", "#8a4b00"),
    "danger": ("#ffffff", "#a3201a"),
    "success": ("#ffffff", "#1d6b35"),
}


@functools.cache
def read_style() -> str:
    """The stylesheet of every frame."""
    pairs = {kind: f"color:{text};background:{ground}" for kind, (text, ground) in COLOURS.items()}
    notices = [f".fastsd-notice.{kind}{{{pairs[kind]}}}" for kind in ("bad", "warn", "good")]
    for kind in ("primary", "warning", "danger", "success"):
        button = f".fastsd .jupyter-button.mod-{kind}"
        notices.append(f"{button},{button}:hover,{button}:active{{{pairs[kind]}}}")
    return _read("style.css") + "".join(notices)


@functools.cache
def read_script(name: str) -> str:
    """A script of this folder in one line, for an attribute: one that is put into a page in a <script> is not run."""
    return " ".join(_read(name).split())


def _read(name: str) -> str:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/\s*", "", text, flags=re.DOTALL)
