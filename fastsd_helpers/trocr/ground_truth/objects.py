"""Data set objects as people have them: datasets, DatasetDict, streams, data frames, lists of rows or of pairs."""

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.ground_truth.labels import (
    GROUP_COLUMNS,
    PAGE_COLUMNS,
    PICTURE_COLUMNS,
    TEXT_COLUMNS,
    column_of,
    label_text,
)
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row
from fastsd_helpers.trocr.ground_truth.tables import no_columns

__all__ = ["EncodedImage", "rows_of_objects"]


class EncodedImage:
    """An image as a file's bytes, for whatever takes an array: it is decoded when it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        from fastsd_helpers.images import files

        try:
            return np.asarray(files.read_rgb(self.data), dtype=dtype)
        except files.PictureProblem as err:
            raise DatasetError(f"The image {err.problem}.", "Leave this line out.") from err


def rows_of_objects(source: Any, part: str = "") -> Iterator[Row | LeftOut]:
    """The lines of an object: a Hub dataset or several by split, a stream of rows, a data frame, columns, or pairs.

    Raises:
        DatasetError: it is nothing of the kind, or has no columns for images and texts.
    """
    if isinstance(source, Mapping):
        if source and all(_is_set(value) for value in source.values()):
            for name, inner in source.items():
                yield from rows_of_objects(inner, str(name))
            return
        columns = list(source)
        rows: Iterable[Any] = zip(*source.values(), strict=True) if source else ()
        yield from _rows_of_dicts((dict(zip(columns, row, strict=True)) for row in rows), columns, part)
        return
    if hasattr(source, "itertuples"):
        columns = list(source.columns)
        rows = (dict(zip(columns, row, strict=True)) for row in source.itertuples(index=False, name=None))
        yield from _rows_of_dicts(rows, columns, part)
        return
    named = getattr(source, "column_names", None)
    if isinstance(named, (list, tuple)):
        yield from _rows_of_dicts(source, named, part)
        return
    try:
        stream = iter(source)
        first = next(stream)
    except StopIteration:
        return
    except TypeError as err:
        raise DatasetError(
            f"A {type(source).__name__} is no set of lines.",
            "Give a folder, a table, a data set, or (image, text) pairs.",
        ) from err
    rows = chain([first], stream)
    yield from _rows_of_dicts(rows, list(first), part) if isinstance(first, Mapping) else _rows_of_pairs(rows, part)


def _is_set(value: Any) -> bool:
    """Whether a value of a mapping is a data set of its own, not a column's values."""
    return isinstance(getattr(value, "column_names", None), (list, tuple)) or hasattr(value, "itertuples")


def _rows_of_dicts(source: Iterable[Any], columns: Any, part: str) -> Iterator[Row | LeftOut]:
    of_picture, of_text = column_of(columns, PICTURE_COLUMNS), column_of(columns, TEXT_COLUMNS)
    # Columns of pictures are called image more often than file_name, and tables of files may have both.
    of_image = column_of(columns, ("image", "picture", "img"))
    of_picture = of_image or of_picture
    if not of_picture or not of_text:
        raise no_columns("The dataset", columns, of_picture, of_text)
    of_group, of_page = column_of(columns, GROUP_COLUMNS), column_of(columns, PAGE_COLUMNS)
    for place, row in enumerate(source, 1):
        name = f"{part} line {place}".strip()
        group = str(row[of_group]) if of_group and row.get(of_group) is not None else name
        page = str(row[of_page]) if of_page and row.get(of_page) is not None else ""
        yield _row(name, row.get(of_picture), row.get(of_text), group, page, part)


def _rows_of_pairs(source: Iterable[Any], part: str) -> Iterator[Row | LeftOut]:
    for place, row in enumerate(source, 1):
        name = f"{part} line {place}".strip()
        if not isinstance(row, (list, tuple)) or len(row) not in (2, 3):
            yield LeftOut(
                f"{name} is neither (image, text), (image, text, group) nor a row with names.", "a broken row"
            )
            continue
        yield _row(name, row[0], row[1], str(row[2]) if len(row) == 3 and row[2] is not None else name, "", part)


def _row(name: str, picture: Any, text: Any, group: str, page: str, part: str) -> Row | LeftOut:
    if isinstance(picture, Mapping):  # what datasets gives with Image(decode=False)
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, io.BytesIO):
        picture = picture.getvalue()
    if isinstance(picture, (bytes, bytearray)):
        picture = EncodedImage(bytes(picture))
    if picture is None:
        return LeftOut(f"{name} has no image.", "no image")
    label = label_text(text, name)
    return label if isinstance(label, LeftOut) else Row(name, picture, label, group, page, part)
