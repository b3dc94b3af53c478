"""A repository's folder in the Hub's cache: the snapshot it stands for, and what a refused call added to it."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.errors import FastSDError, ModelError, UnsafeModel
from fastsd_helpers.wording import list_some

__all__ = ["removed_when_refused", "snapshot_of"]


def snapshot_of(root: Path) -> Path | None:
    """The snapshot that a Hub cache stands for: the one refs/main names, else its only one; None for other folders.

    Raises:
        ModelError: it holds several and refs/main names none of them, or it is a cache of several models.
    """
    if root.name == "snapshots" and (root.parent / "refs").is_dir():
        root = root.parent
    if not (root / "snapshots").is_dir() or not any((root / name).is_dir() for name in ("refs", "blobs")):
        models = sorted(path.name for path in root.glob("models--*") if path.is_dir())
        if not models:
            return None
        raise ModelError(
            f"{root} is a Hub cache of {len(models)} model{'s' * (len(models) > 1)}: {list_some(models, 5)}.",
            f"Give one of them, such as {root / models[0]}.",
        )
    snapshots = sorted(path for path in (root / "snapshots").iterdir() if path.is_dir())
    named = root / "refs" / "main"
    commit = named.read_text(encoding="utf-8", errors="replace").strip() if named.is_file() else ""
    for snapshot in snapshots:
        if snapshot.name == commit:
            return snapshot
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise ModelError(
            f"{root} is the Hub cache of a model and holds no snapshot of it.", "Download the model again."
        )
    raise ModelError(
        f"{root} is a Hub cache with {len(snapshots)} snapshots ({list_some((path.name for path in snapshots), 5)}), "
        "and refs/main names none of them.",
        f"Give one of them, such as {snapshots[0]}.",
    )


@contextlib.contextmanager
def removed_when_refused(
    cache_dir: Path, repo: str, *, at: tuple[type[FastSDError], ...], kept_at: tuple[type[FastSDError], ...] = ()
) -> Iterator[None]:
    """Remove what came into the cache of a repository while the block ran, when the block refuses the model.

    What was there before stays as it was; where the branch pointed is put back. Errors of the types `at` are refusals,
    but for those of `kept_at`; any other one removes nothing, for what came whole is of use to the next try.
    """
    name = f"models--{repo.replace('/', '--')}"
    places = [cache_dir / name, cache_dir / ".locks" / name]
    before = {place: _listed(place) for place in places}
    refs = {path: path.read_bytes() for path in (cache_dir / name / "refs").rglob("*") if path.is_file()}
    try:
        yield
    except at as err:
        if isinstance(err, kept_at):
            raise
        came = any(_listed(place) - before[place] for place in places)
        for place in places:
            _remove_new(place, before[place])
        for path, content in refs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if came and isinstance(err, UnsafeModel):
            # The place is gone: what is named is the repository.
            shown = re.sub(rf"{re.escape(str(places[0]))}/snapshots/\w+", repo, err.problem)
            raise UnsafeModel(shown, f"The partial download was deleted. {err.hint}") from err
        raise


def _listed(place: Path) -> set[Path]:
    return set(place.rglob("*")) if place.is_dir() else set()


def _remove_new(place: Path, before: set[Path]) -> None:
    if not before:
        shutil.rmtree(place, ignore_errors=True)
        return
    for path in sorted(_listed(place) - before, reverse=True):  # what is in a folder before the folder
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
