"""Graphs: OpenVINO's .xml and ONNX files, which could name libraries, entities and files elsewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from fastsd_helpers.errors import UnsafeModel

__all__ = ["look_at_graph", "look_at_onnx"]

_MOST_XML = 64_000_000  # the decoder of a large reader has 3 MB
_MOST_ONNX = 64_000_000  # a face model has 230 kB
_OWN_OPERATIONS = re.compile(r"opset\d{1,2}")
_HINT = "Use a model from a source you trust; `fastsd trocr quantize` makes such graphs again."
_DEEPEST = 64


def look_at_graph(path: Path) -> None:
    """Refuse an OpenVINO graph with a document type, entities, or operations that OpenVINO itself does not have.

    Raises:
        UnsafeModel: says what was found.
    """
    raw = path.read_bytes() if path.stat().st_size <= _MOST_XML else None
    if raw is None:
        raise UnsafeModel(f"{path} is too large for a graph.", _HINT)
    parser = expat.ParserCreate()
    depth = 0

    def refuse(*_args: object) -> None:
        raise UnsafeModel(f"{path} is not used: it defines a document type or entities, which no graph has.", _HINT)

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise UnsafeModel(f"{path} is not used: it is nested endlessly.", _HINT)
        version = attributes.get("version", "")
        if name == "layer" and not _OWN_OPERATIONS.fullmatch(version):
            raise UnsafeModel(
                f"{path} is not used: its operation {attributes.get('type', '?')[:60]!r} is of {version[:60]!r} and "
                "not of OpenVINO.",
                _HINT,
            )

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ProcessingInstructionHandler = refuse
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as err:
        raise UnsafeModel(f"{path} is not used: it is not XML ({err}).", _HINT) from err


# Where an ONNX file keeps what can lead elsewhere: message -> field -> message. Source: onnx/onnx.proto.
_MESSAGES = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DOMAINS = (b"", b"ai.onnx", b"ai.onnx.ml")


def look_at_onnx(path: Path) -> None:
    """Refuse an ONNX file that keeps numbers in other files or needs operations of another library.

    Raises:
        UnsafeModel: says what was found.
    """
    hint = "Use face_detection_yunet_2023mar.onnx of opencv_zoo, or another ONNX file that is whole in itself."
    if path.stat().st_size > _MOST_ONNX:
        raise UnsafeModel(f"{path} is too large for a face model.", hint)
    todo = [("model", memoryview(path.read_bytes()), 0)]
    try:
        while todo:
            kind, content, depth = todo.pop()
            if depth > _DEEPEST:
                raise UnsafeModel(f"{path} is not used: its graphs are nested endlessly.", hint)
            for field, value in _fields(content):
                if value is None:
                    raise UnsafeModel(f"{path} is not used: it has groups, which no ONNX file has.", hint)
                if kind == "tensor" and ((field == 14 and value) or field == 13):
                    raise UnsafeModel(f"{path} is not used: it keeps numbers in other files.", hint)
                if kind == "node" and field == 7 and isinstance(value, memoryview) and bytes(value) not in _DOMAINS:
                    raise UnsafeModel(
                        f"{path} is not used: it needs operations of {bytes(value)[:60]!r}, another library.", hint
                    )
                inner = _MESSAGES.get(kind, {}).get(field)
                if inner is not None and isinstance(value, memoryview):
                    todo.append((inner, value, depth + 1))
    except (IndexError, ValueError):
        return  # no protobuf: OpenCV says so


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | int | None]]:
    """The fields of a protobuf message: number and value; None for a group, a form that is out of use."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, place = _varint(content, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        elif kind in (3, 4):
            yield tag >> 3, None
            return
        else:
            raise ValueError(kind)
        if place + length > len(content):
            raise ValueError("truncated")
        yield tag >> 3, content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("an endless number")
