"""CopyQueue: the generations on their way to the mount, copied in order by one thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.dreambooth.resume.generation import Job, describe
from fastsd_helpers.errors import FastSDError

__all__ = ["CopyQueue"]

_MOST_QUEUED = 2


class CopyQueue:
    """Generations that wait to be copied, those that could not be, and the thread that copies them.

    Args:
        deliver: copies one; what went wrong is its value and never raised.
        idle: called after each pause in which nothing was queued.
        pause_s: seconds of such a pause, None: until something is queued; called with whether a copy has failed.

    Attributes:
        change: guards all of this, and whatever else must change at the same time.
        closed: nothing is copied any more.
        failed: those to be tried again, each with its problem.
    """

    def __init__(
        self,
        deliver: Callable[[Job], FastSDError | None],
        *,
        idle: Callable[[], None],
        pause_s: Callable[[bool], float | None],
    ) -> None:
        self.change = threading.Condition()
        self.closed = False
        self.failed: list[Job] = []
        self._deliver, self._idle, self._pause_s = deliver, idle, pause_s
        self._queue: deque[Job] = deque()  # the first one is being copied
        self._dropped: list[Job] = []
        self._thread: threading.Thread | None = None

    def jobs(self) -> list[Job]:
        """All that is not yet copied, those that failed included."""
        with self.change:
            return [*self._queue, *self.failed]

    def add(self, job: Job, *, supersedes: bool = True) -> None:
        """Queue a generation.

        Args:
            job: it.
            supersedes: older ones that failed are dropped for it, unless they are to be kept.
        """
        with self.change:
            if supersedes:
                self._dropped += [failed for failed in self.failed if not failed.keep]
                self._queue.extend(failed for failed in self.failed if failed.keep)
                self.failed = []
            self._queue.append(job)
            self._start()

    def take_dropped(self) -> list[Job]:
        """Those that were given up since the last call."""
        with self.change:
            dropped, self._dropped = self._dropped, []
            return dropped

    def wait_for_turn(self, folder: Path, *, patience_s: float, report: Callable[[str], None]) -> None:
        """Wait while two generations are being copied; an older one is dropped after `patience_s` seconds.

        Args:
            folder: where they are copied to, in the sentences.
            patience_s: how long the mount may take nothing.
            report: gets a sentence on either.
        """
        started = time.monotonic()
        with self.change:
            if len(self._queue) < _MOST_QUEUED:
                return
            report(
                f"The training waits: {len(self._queue)} checkpoints are still being copied to {folder}. "
                "Save less often (save_every) if this happens again."
            )
            while len(self._queue) >= _MOST_QUEUED:
                self.change.wait(timeout=min(1.0, patience_s))
                waiting = [job for job in list(self._queue)[1:] if not job.keep]
                if waiting and time.monotonic() - started > patience_s:
                    self._queue.remove(waiting[-1])
                    self._dropped.append(waiting[-1])
                    report(
                        f"Checkpoint {describe(waiting[-1].name)} was dropped for a newer "
                        f"one: {folder} has accepted nothing for {patience_s:.0f} s."
                    )

    def flush(self) -> list[Job]:
        """Wait until everything is copied, trying what failed once more; those that fail again."""
        with self.change:
            if self.failed:
                self._queue.extend(self.failed)
                self.failed = []
                self._start()
            while self._queue:
                self.change.wait()
            return [job for job in self.failed if job.problem is not None]

    def close(self) -> None:
        """Stop the thread, which waits for a copy under way."""
        with self.change:
            self.closed = True
            self.change.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-copy", daemon=True)
            self._thread.start()
        self.change.notify_all()

    def _work(self) -> None:
        while True:
            with self.change:
                while not self._queue:
                    if self.closed:
                        return
                    if not self.change.wait(timeout=self._pause_s(bool(self.failed))):
                        break
                if not self._queue:
                    self._queue.extend(self.failed)
                    self.failed = []
                job = self._queue[0] if self._queue else None
            if job is None:
                self._idle()
                continue
            problem = self._deliver(job)
            with self.change:
                job.problem = problem
                self._queue.popleft()
                if problem is not None:
                    newer = any(not queued.keep for queued in self._queue)
                    (self._dropped if newer and not job.keep else self.failed).append(job)
                self.change.notify_all()
