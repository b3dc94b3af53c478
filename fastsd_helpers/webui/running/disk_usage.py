"""What a web UI keeps, by kind and size, and deleting it: models and images in the store, the program here."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.errors import WebUIError
from fastsd_helpers.files import bytes_in, file_errors
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.extensions.kept import keep_settings
from fastsd_helpers.webui.places import Places, store_folder
from fastsd_helpers.webui.running.process import is_running, read_run

__all__ = ["Kept", "delete_kept", "list_kept"]

_PROGRAM = "program"
_PICTURES = "pictures"


@dataclass(frozen=True)
class Kept:
    """One thing that can be deleted."""

    kind: str  # checkpoint, lora, ..., images, program
    name: str
    path: Path
    bytes: int


def list_kept(places: Places, ui: WebUI) -> list[Kept]:
    """Everything a web UI keeps: each model in the store, all images together, and the program; largest first.

    Args:
        places: its folders, as `find_places` gives them.
        ui: the web UI, as `find_ui` gives it.

    Raises:
        DriveError: the store does not answer.
    """
    found = []
    with file_errors(places.store, "read"):
        seen = set()  # two kinds may share a folder
        for kind, _name in ui.folders:
            folder = store_folder(places, ui, kind)
            if folder in seen:
                continue
            seen.add(folder)
            for path in sorted(folder.rglob("*")):
                # A note that tells web UIs "put models here" is not a model.
                if path.is_file() and path.stat().st_size > 0 and path.suffix not in (".txt", ".yaml"):
                    found.append(Kept(kind, str(path.relative_to(folder)), path, path.stat().st_size))
        pictures = places.store / "outputs"
        found.append(Kept(_PICTURES, "all generated images", pictures, bytes_in(pictures)))
    with file_errors(places.root, "read"):
        found.append(Kept(_PROGRAM, f"{ui.title} itself, with its environment", places.root, bytes_in(places.root)))
    return sorted((item for item in found if item.bytes), key=lambda item: -item.bytes)


def delete_kept(item: Kept, places: Places) -> int:
    """Delete one thing; the bytes that were freed. A model's .yaml goes with it; the program can be installed again.

    Args:
        item: one of those that `list_kept` gives.
        places: its folders, as `find_places` gives them.

    Returns:
        Bytes that were freed.

    Raises:
        WebUIError: the program runs.
        DriveError: it cannot be deleted.
    """
    state = read_run(places.run)
    if item.kind == _PROGRAM and state is not None and is_running(state):
        raise WebUIError(f"{state.title} is running, so it was not deleted.", "Stop it first.")
    with file_errors(item.path, "delete"):
        if item.kind == _PROGRAM:
            keep_settings(places)  # of its extensions, whose folders go with it
            shutil.rmtree(item.path)  # links to the store are removed, not followed
        elif item.kind == _PICTURES:
            for path in item.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        else:
            item.path.unlink()
            item.path.with_suffix(".yaml").unlink(missing_ok=True)
    return item.bytes
