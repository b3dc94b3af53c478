"""What the writers of XML share: lxml, opened when it is needed, a tree and its elements, points and times as text."""

import datetime
from collections.abc import Callable, Iterable
from typing import Any

from fastsd_helpers.errors import needs_package

__all__ = ["as_bytes", "load_lxml", "new_tree", "points_text", "time_text"]

_INSTANCE = "http://www.w3.org/2001/XMLSchema-instance"


def load_lxml() -> Any:
    """The module lxml.etree.

    Raises:
        DependencyMissing: lxml is not installed.
    """
    with needs_package("Writing ALTO, PAGE or hOCR", "Run: fastsd install trocr, or choose txt, json or csv."):
        from lxml import etree
    return etree


def new_tree(namespace: str, schema: str, tag: str, **attributes: str) -> tuple[Any, Callable[..., Any]]:
    """The root of a new tree, which names its schema, and what adds an element to a parent: tag, text, attributes."""
    etree = load_lxml()

    def add(parent: Any, tag: str, text: str | None = None, **attributes: str) -> Any:
        made = etree.SubElement(parent, f"{{{namespace}}}{tag}", attributes)
        made.text = text
        return made

    attributes = {f"{{{_INSTANCE}}}schemaLocation": f"{namespace} {schema}", **attributes}
    return etree.Element(f"{{{namespace}}}{tag}", attributes, nsmap={None: namespace, "xsi": _INSTANCE}), add


def points_text(points: Iterable[tuple[int, int]], separator: str = ",") -> str:
    """Points as `x,y x,y`."""
    return " ".join(f"{x}{separator}{y}" for x, y in points)


def time_text(seconds: float) -> str:
    """Seconds since 1970 as XML writes a time, in UTC."""
    return datetime.datetime.fromtimestamp(max(0, int(seconds)), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def as_bytes(root: Any, **how: Any) -> bytes:
    """A tree as the content of a file, in UTF-8."""
    return bytes(load_lxml().tostring(root, xml_declaration=True, encoding="UTF-8", pretty_print=True, **how))
