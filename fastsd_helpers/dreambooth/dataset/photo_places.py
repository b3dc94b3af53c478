"""Where a session's photos are: named, recorded by the `prepare` before, or kept in the session itself."""

import contextlib
from pathlib import Path

from fastsd_helpers.dreambooth.dataset.originals import own_place, photos_of_user
from fastsd_helpers.dreambooth.photos.own_output import MADE_HERE, session_around
from fastsd_helpers.drive import shared_folder
from fastsd_helpers.errors import DatasetError, DriveError
from fastsd_helpers.sessions import Session

__all__ = ["find_held_out", "find_photos", "nothing_usable"]

_LINK = "drive.google.com/"
_NO_PICTURES = "Give a folder or a zip with 5 to 30 photos of the subject (JPEG, PNG, WebP or HEIC)."


def find_photos(images: str, session: Session) -> Path:
    """The photos to prepare: those that are named, those that were prepared before, or those the session keeps.

    Raises:
        DatasetError: there are none, or what is named was made here.
    """
    if images:
        return _not_own_output(own_place(session, _place(images)), session, "instance_images")
    recorded = ((session.record.get("dataset") or {}).get("settings") or {}).get("images")
    before = own_place(session, Path(recorded).expanduser()) if recorded else None
    if before is not None and before.exists():
        return _not_own_output(before, session, "instance_images")
    # A session of the old notebook brings its images along; they were set aside just now, or earlier.
    own = photos_of_user(session)
    if own is not None:
        return own
    if before is not None:
        raise DatasetError(f"The photos that were prepared before are no longer in {before}.", _NO_PICTURES)
    raise DatasetError("No photos were given.", _NO_PICTURES)


def _place(text: str) -> Path:
    if _LINK in text:
        with contextlib.suppress(DriveError):  # then it is said what to do with a link
            return shared_folder(text)
    return Path(text).expanduser()


def find_held_out(held_out: str, images: str, session: Session) -> Path | None:
    """The photos that are only measured; None where none are named and none went with those before.

    Raises:
        DatasetError: what is named was made here.
    """
    if held_out:
        return _not_own_output(own_place(session, Path(held_out).expanduser()), session, "held_out_images")
    recorded = ((session.record.get("dataset") or {}).get("settings") or {}).get("held_out")
    if images or not recorded:
        return None
    before = own_place(session, Path(recorded).expanduser())
    return before if before.exists() else None


def nothing_usable(path: Path, skipped: list[dict[str, str]], notes: list[str]) -> DatasetError:
    """The error that says why no image is left, with the first reasons for which one was skipped."""
    if not skipped:
        return DatasetError(" ".join([f"There are no images in {path}.", *notes]), _NO_PICTURES)
    reasons = "; ".join(f"{item['source']} {item['reason']}" for item in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return DatasetError(f"None of the images in {path} is usable: {reasons}{more}.", _NO_PICTURES)


def _not_own_output(path: Path, session: Session, folder: str) -> Path:
    """The path itself, or what a user put there where it is a folder of this session.

    Raises:
        DatasetError: it holds what was made here.
    """
    around = session_around(path) if path.exists() else None
    if around is None:
        return path
    inside = path.resolve().relative_to(around).parts
    if inside and inside[0] not in MADE_HERE:
        return path
    if around == session.folder.resolve() and (not inside or inside[0] == folder):
        own = photos_of_user(session, folder)
        if own is not None:
            return own
    if not inside:
        return path  # of which the folders of what was made here are not read
    recorded = ((session.record.get("dataset") or {}).get("settings") or {}).get("images")
    is_own = recorded and around == session.folder.resolve()
    again = f" Those of this session were made from {recorded}." if is_own else ""
    raise DatasetError(
        f"{path} is part of the session {around.name}: it holds images that were made here, not photos.",
        f"Give the photos that they were made from.{again}",
    )
