"""What a file is by its first bytes, whatever it is called: safetensors, or something that is not a model at all."""

from pathlib import Path

from fastsd_helpers.checkpoints.formats.pickled import PICKLE_ENDINGS
from fastsd_helpers.downloads.content import describe_content
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.inert.pickles import has_pickle, is_archive
from fastsd_helpers.inert.tensors import is_safetensors

__all__ = ["is_safetensors_file", "refuse_other_content"]

_POINTER = b"version https://git-lfs.github.com/spec/"
_NO_MODELS = ("zip archive", "image", "PDF document", "compressed archive", "document or installer", "program")
_AGAIN = "Download the file again, or choose another one."


def is_safetensors_file(path: Path) -> bool:
    """Whether a file begins as a safetensors file does; whether it is whole, its reader says."""
    return is_safetensors(_head(path)[:16])


def refuse_other_content(path: Path) -> None:
    """Refuse what is often found under the name of a model and is none.

    Raises:
        CheckpointError: a GGUF file, a Git LFS pointer, a web page, an image, an archive, a program: says which.
    """
    head = _head(path)
    if head.startswith(b"GGUF") or (path.suffix.lower() == ".gguf" and not is_safetensors(head[:16])):
        raise CheckpointError(
            f"{path} is a GGUF file: its weights are quantized to few bits, and what was lost cannot be restored.",
            "Give the model's .safetensors file.",
        )
    if head.startswith(_POINTER):
        size = next((line.split()[1] for line in head.decode("latin-1").splitlines() if line.startswith("size ")), "")
        whole = f"; the file itself has {int(size):,} bytes" if size.isdigit() else ""
        raise CheckpointError(
            f"{path} is a Git LFS pointer, a few lines of text in place of the model{whole}.",
            "Run `git lfs pull` in its repository, or download the file itself.",
        )
    if is_archive(head):
        kind = "" if has_pickle(path) else "zip archive"
    else:
        kind = describe_content(path) if head and not is_safetensors(head[:16]) else ""
    if kind == "web page":
        raise CheckpointError(
            f"{path} is a web page that was saved under the name of a model.",
            "Log in at the site, or accept the model's terms there, and download the file itself.",
        )
    if kind == "onnx":
        raise CheckpointError(
            f"{path} is an ONNX model, which is not converted.", "Give the model's .safetensors file."
        )
    # A pickle of the oldest kind is text too, and of a few bytes nothing can be told.
    if kind == "text" and len(head) > 8 and path.suffix.lower() not in PICKLE_ENDINGS:
        index = path.name.endswith(".index.json")
        raise CheckpointError(
            f"{path} is {'the list of the files of a model' if index else 'a text file'}, not a model.",
            _AGAIN if path.suffix.lower() in (".safetensors", ".sft") else "Give the weights, or the folder of them.",
        )
    if kind in _NO_MODELS:
        raise CheckpointError(f"{path} is {'an' if kind == 'image' else 'a'} {kind}, not a model.", _AGAIN)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as err:
        raise CheckpointError(
            f"{path} cannot be opened: {err.strerror}.", "Check the path and that the file may be read."
        ) from err
