"""Parquet files as the Hub has them: columns image (bytes and path) and text; images wait in a temporary folder."""

import functools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, needs_package
from fastsd_helpers.trocr.ground_truth.objects import EncodedImage, rows_of_objects
from fastsd_helpers.trocr.ground_truth.pictures import PictureFinder
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row

__all__ = ["rows_of_parquet"]

_ROWS_AT_ONCE = 256


class _Spooled:
    """Images of one file, written to a folder that goes when this object does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastsd-parquet-"))
        weakref.finalize(self, shutil.rmtree, self.folder, True)
        self.rows: list[Row | LeftOut] = []


def rows_of_parquet(path: Path, part: str = "") -> list[Row | LeftOut]:
    """The lines of one file.

    Raises:
        DependencyMissing: pyarrow is not installed.
        DatasetError: the file is damaged, or lacks the columns.
    """
    state = path.stat()
    return _spooled(path, state.st_mtime_ns, state.st_size, part).rows


@functools.cache
def _spooled(path: Path, _changed: int, _size: int, part: str) -> _Spooled:
    found, finder = _Spooled(), PictureFinder(path.parent)
    for number, row in enumerate(rows_of_objects(_rows(path), part)):
        if isinstance(row, Row):
            name = f"{path.stem} {row.name}"
            picture = row.picture
            if isinstance(picture, EncodedImage):  # written down, for many of them fit no memory
                picture = found.folder / f"{number}.image"
                picture.write_bytes(row.picture.data)
            elif isinstance(picture, (str, Path)) and "://" not in str(picture):  # a name is one beside the file
                picture = finder.find(str(picture))
                if picture is None:
                    told = f"{name}: there is no image {row.picture} beside {path.name}."
                    found.rows.append(LeftOut(told, "no image"))
                    continue
            group = row.group if row.group != row.name else name
            row = Row(name, picture, row.text, group, row.page, part)
        found.rows.append(row)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with needs_package("Reading parquet", "Run: pip install pyarrow, or save the set as images with a metadata.jsonl."):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as err:
        raise DatasetError(f"{path.name} is damaged or no parquet file: {err}.", "Download it again.") from err
