"""XML from anywhere, opened without its dangers: no entities, no network, bounded size and depth, no namespaces."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.wording import size_in_words

__all__ = ["parse_xml", "root_name"]

_MOST_BYTES = 32_000_000  # a page of 400 lines with every word and glyph outlined has 5 MB
_DEEPEST = 200
_HEAD_BYTES = 4096


class _Refused(Exception):
    """Raised in a handler; what it says becomes a DatasetError with the file's name."""


def root_name(path: Path) -> str:
    """The name of a file's first element, without its namespace; empty where it is no XML."""
    found: list[str] = []
    parser = expat.ParserCreate(namespace_separator="}")

    def note(name: str, _attributes: object) -> None:
        found.append(_local(name))
        raise _Refused

    parser.StartElementHandler = note
    try:
        with path.open("rb") as file:
            parser.Parse(file.read(_HEAD_BYTES), False)
    except (_Refused, expat.ExpatError, OSError, ValueError, LookupError):
        pass
    return found[0] if found else ""


def parse_xml(path: Path) -> Element:
    """Parse a file into elements whose names and attributes have no namespace.

    Raises:
        DatasetError: it is no XML, is damaged, too large, too deep, or declares or uses entities, which can read other
            files, reach the network or grow without end. Nothing of the kind is done here.
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise DatasetError(
                f"{path.name} has {size_in_words(size)}, more than a page's transcription can have "
                f"({size_in_words(_MOST_BYTES)}).",
                "Export one file per page, without glyphs.",
            )
        return _parse(path.read_bytes())
    except _Refused as err:
        raise DatasetError(f"{path.name} {err}.", "Export it again as plain PAGE or ALTO.") from err
    except expat.ExpatError as err:
        raise DatasetError(f"{path.name} is damaged or no XML: {err}.", "Export or copy it again.") from err
    except (OSError, ValueError, LookupError) as err:
        raise DatasetError(f"{path.name} cannot be read: {err}.", "Copy it again.") from err


def _parse(data: bytes) -> Element:
    builder = TreeBuilder()
    depth = 0
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise _Refused(f"has more than {_DEEPEST} elements inside each other")
        builder.start(_local(name), {_local(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_local(name))

    def refuse_declared(name: str, *_rest: object) -> None:
        raise _Refused(f"declares the entity {name!r}, which is not opened here")

    def refuse_used(name: str, _is_parameter: object) -> None:
        raise _Refused(f"uses the entity {name!r}, which it does not define")

    def refuse_outside(*_what: object) -> int:
        raise _Refused("refers to something outside of itself, which is not fetched")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler, parser.SkippedEntityHandler = refuse_declared, refuse_used
    parser.ExternalEntityRefHandler = refuse_outside
    parser.Parse(data, True)
    return builder.close()


def _local(name: str) -> str:
    return name.rpartition("}")[2].rpartition(":")[2]
