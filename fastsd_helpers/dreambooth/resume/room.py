"""Room: how many bytes a Drive is sure to take, although it says so late and may keep what is deleted in its trash.

Free space as the mount reports it is an old answer: what was written since is not in it yet, and what was emptied may
come back later or never. So only what was seen counts: `left` is the last report less all that was written and has not
been seen to go off a report. Room that comes back shows as a report that rises; nothing else is taken for it. An upload
may take longer than a report: what the mount says is still to be uploaded is in no report, however old it is.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.drive import has_arrived
from fastsd_helpers.errors import DiskFull, DriveError
from fastsd_helpers.files import free_bytes
from fastsd_helpers.wording import size_in_words

__all__ = ["Room"]

_LAG_S = 600.0  # a report is hardly ever older than this
_SAVES = 3  # so many saves later an emptied file should be seen


@dataclass
class _Debt:
    """Bytes that were written and that no report shows yet."""

    bytes: int
    at: float  # when it was written, or last known not to have arrived
    path: Path | None = None


class Room:
    """The room on the Drive that a folder lies on.

    Args:
        folder: any folder of it.
        gives_back: what is known from before: whether emptied files give their room back.
        lag_s: how late a report may be; by default ten minutes.
        clock: monotonic seconds.

    Attributes:
        gives_back: True once most of what was emptied was seen to come back, False when it did not after three saves
            and the time a report may take; None while it is not known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gives_back: bool | None = None,
        lag_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gives_back = gives_back
        self._folder, self.lag_s, self._clock = folder, _LAG_S if lag_s is None else lag_s, clock
        self._reported: int | None = None
        self._changed_at = float("-inf")
        self._debts: list[_Debt] = []
        self._returned = 0  # seen to come back since the first file was emptied
        self._emptied: list[tuple[int, float, int]] = []  # bytes, when, after how many saves
        self._saves = 0
        self.look()

    def look(self) -> None:
        """Read what the mount reports; a mount that does not answer changes nothing."""
        try:
            free = free_bytes(self._folder)
        except DriveError:
            return
        if self._reported is None:
            self._reported = free
            return
        if free == 0 < self._reported:  # also what some mounts say while they are reconnecting
            return
        now = self._clock()
        for debt in self._debts:
            if debt.path is not None and debt.at <= now and has_arrived(debt.path) is False:
                debt.at = now
        if free != self._reported:
            self._changed_at = now
        if free < self._reported:
            self._pay(self._reported - free)
        else:
            self._note_returned(free - self._reported)
        self._reported = free
        # Written and given back between two reports, it is never seen to sink. A report that has moved since and is
        # old enough has it in; one that never moves says nothing.
        seen = [debt for debt in self._debts if debt.at < self._changed_at and now - debt.at > self.lag_s]
        for debt in seen:
            self._debts.remove(debt)
            self._note_returned(debt.bytes)
        self._judge()

    def _pay(self, sunk: int) -> None:
        for debt in self._debts:  # the oldest first
            paid = min(sunk, debt.bytes)
            debt.bytes -= paid
            sunk -= paid
        self._debts = [debt for debt in self._debts if debt.bytes]

    def _note_returned(self, count: int) -> None:
        if self._emptied:
            self._returned += count

    @property
    def left(self) -> int | None:
        """Bytes that can certainly still be written; None while the mount has never answered."""
        if self._reported is None:
            return None
        return max(0, self._reported - sum(debt.bytes for debt in self._debts))

    def check(self, needed: int, spare: int, *, what: str = "it", then: str = "") -> None:
        """Refuse what there is not surely room for; a mount that never answered refuses nothing.

        Args:
            needed: bytes to be written.
            spare: bytes that must be free beside them.
            what: what takes them, in the sentence.
            then: what to do once there is room, as a sentence.

        Raises:
            DiskFull: with both figures.
        """
        left = self.left
        if left is None or needed + spare <= left:
            return
        beside = f", and {size_in_words(spare)} must stay free for the end of the run" if spare else ""
        raise DiskFull(
            f"Only {size_in_words(left)} are surely free on Drive; {what} takes {size_in_words(needed)}{beside}.",
            "Empty Drive's trash (drive.google.com/drive/trash) or delete old sessions to free some space. "
            f"{then}".rstrip(),
        )

    @contextlib.contextmanager
    def writing(self, count: int, path: Path | None = None) -> Iterator[None]:
        """Note bytes that the block writes there; when it fails, nothing of them stays.

        Args:
            count: so many.
            path: the file they make, which the mount may be asked about.
        """
        debt = _Debt(count, float("inf"), path)
        self._debts.append(debt)
        try:
            yield
        except BaseException:
            debt.bytes = 0
            raise
        debt.at = self._clock()

    def emptied(self, count: int) -> None:
        """Note bytes of files that were emptied and removed."""
        if count:
            self._emptied.append((count, self._clock(), self._saves))

    def saved(self) -> None:
        """Note that another checkpoint is there."""
        self._saves += 1
        self._judge()

    def _judge(self) -> None:
        if not self._emptied:
            return
        now = self._clock()
        due = sum(size for size, at, saves in self._emptied if self._saves - saves >= _SAVES and now - at >= self.lag_s)
        if self._returned >= max(self._emptied[0][0], due) / 2:
            self.gives_back = True
        elif due:
            self.gives_back = False
