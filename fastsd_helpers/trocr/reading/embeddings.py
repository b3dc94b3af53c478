"""Write the encoder's vectors of many lines to a file: .safetensors with an index beside it."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import check_writable, sha256_of, write_atomic

__all__ = ["EmbedResult", "write_embeddings"]


@dataclass(frozen=True)
class EmbedResult:
    """The file with the tensor `embeddings` (float32 [n, tokens, width]) and the index of its rows."""

    path: Path
    index: Path
    shape: tuple[int, int, int]
    left_out: tuple[str, ...]
    sha256: str


def write_embeddings(
    reader: Any, images: Any, out: Path, *, pool: str = "mean", progress: Callable[[int], None] | None = None
) -> EmbedResult:
    """Embed images of lines and write `embeddings.safetensors` and `index.csv` (row, name) into the folder `out`.

    Args:
        reader: see `Reader.embed`.
        images: see `Reader.embed`.
        pool: see `Reader.embed`.
        progress: called after each image with how many are done.

    Raises:
        DatasetError: no image can be used.
    """
    import numpy as np
    from safetensors.numpy import save

    check_writable(out)
    names, rows, left_out = [], [], []
    for item, values in reader.embed_stream(images, pool):
        if values is None:
            left_out.append(str(item.problem))
        else:
            names.append(item.name)
            rows.append(values)
        if progress is not None:
            progress(len(names) + len(left_out))
    if not rows:
        raise DatasetError("None of the images can be used.", left_out[0] if left_out else "Give some images.")
    stacked = np.ascontiguousarray(np.stack(rows), dtype=np.float32)
    path, index = out / "embeddings.safetensors", out / "index.csv"
    about = {"pool": pool, "reader": reader.checkpoint.folder.name}
    write_atomic(path, save({"embeddings": stacked}, metadata=about))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["row", "name"], *enumerate(names)])
    write_atomic(index, text.getvalue().encode())
    return EmbedResult(path, index, stacked.shape, tuple(left_out), sha256_of(path))
