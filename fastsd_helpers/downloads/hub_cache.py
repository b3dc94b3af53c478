"""What one call adds to a repository's folder in the Hub's cache, and takes away again when it is refused."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.errors import FastSDError, UnsafeModel

__all__ = ["removed_when_refused"]


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
            raise UnsafeModel(shown, f"What was fetched of it is removed. {err.hint}") from err
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
