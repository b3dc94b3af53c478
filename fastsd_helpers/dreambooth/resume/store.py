"""CheckpointStore: write locally, prove it, copy in the background, find the newest whole generation again.

The training thread only waits for the local write. One background thread puts generations on the mount in order. A full
disk or a lost mount is reported once, and tried again while the training goes on; what never reached the mount stays in
the scratch folder, where a new process on the same machine finds it.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.resume.copy_queue import CopyQueue
from fastsd_helpers.dreambooth.resume.generation import (
    MANIFEST,
    FileEntry,
    Generation,
    Job,
    NotWhole,
    Snapshot,
    describe,
    generation_name,
    list_generations,
    read_generation,
    require_name,
    role_problem,
    summary_row,
    verify_files,
)
from fastsd_helpers.dreambooth.resume.mount import Shelf
from fastsd_helpers.dreambooth.resume.room import Room
from fastsd_helpers.dreambooth.resume.scratch import Scratch
from fastsd_helpers.drive import delivers_late, keeps_trash
from fastsd_helpers.errors import CheckpointError, DiskFull, DriveError, FastSDError, VerificationFailed
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.runtime import fault_point, logger

__all__ = ["CheckpointStore"]

_PATIENCE_S = 900.0  # a mount that hangs must not hold a training for ever
_RETRY_S = 60.0
_SETTLE_S = 120.0  # how long Drive gets to deliver a generation before an older one may go
_LOOK_S = 30.0  # how often a Drive with a trash is asked how much is free, and whether an old one may go by now


class CheckpointStore(contextlib.AbstractContextManager["CheckpointStore", None]):
    """The generations of one session.

    Args:
        folder: the session's checkpoints folder, possibly on an unreliable mount.
        scratch: a local folder for this session alone, the same one each time, so that what an earlier process on
            this machine could not copy is found there.
        keep_last: how many whole generations are kept (snapshots saved with `keep` come on top).
        report: gets one sentence whenever the user should know something; called from both threads.
        timeline: generations of another timeline (a run that was started over) are not resumed from.
        settle_s: how long a generation must have been whole before older ones may go; by default 2 minutes
            on Drive and other FUSE mounts, where files are delivered later, and 0 elsewhere.
        retry_s: how often a failed copy is tried again while nothing new is saved.
        patience_s: how long `save` waits for the mount before an older checkpoint is given up for the new one.
        gives_back: what is known of a Drive with a trash: whether files that are emptied before they are removed give
            their room back. On such a Drive nothing is written that there is not surely room for.

    Raises:
        DriveError: one of the folders cannot be used at all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        scratch: Path,
        keep_last: int = 2,
        report: Callable[[str], None],
        timeline: str = "",
        settle_s: float | None = None,
        retry_s: float = _RETRY_S,
        patience_s: float = _PATIENCE_S,
        gives_back: bool | None = None,
    ) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}.", "Keep at least 1 checkpoint.")
        self.folder, self.scratch, self.timeline = Path(folder), Path(scratch), timeline
        settle_s = _SETTLE_S * delivers_late(folder) if settle_s is None else settle_s
        self._report, self._retry_s, self._patience_s, self._settle_s = report, retry_s, patience_s, settle_s
        self._queue = CopyQueue(self._deliver, idle=self._look_around, pause_s=self._pause_s)
        self._change = self._queue.change  # guards what follows too
        self._latest: dict[str, FileEntry] = {}  # role -> its file in the newest generation
        self._reported: set[str] = set()
        self._local_problem: str | None = None
        for used in (self.folder, self.scratch):
            with file_errors(used, "create"):
                used.mkdir(parents=True, exist_ok=True)
        self._room = Room(self.folder, gives_back=gives_back) if keeps_trash(self.folder) else None
        self._shelf = Shelf(self.folder, keep_last=keep_last, timeline=timeline, settle_s=settle_s, room=self._room)
        self._local = Scratch(self.scratch)
        self._pruning, self._told_kept = threading.Lock(), gives_back is False
        # Behind every number ever seen here, whole or not: sequence numbers never repeat where they can be seen, and
        # the random suffix keeps two runs apart that could not see each other.
        seen = list_generations(self.folder) + list_generations(self.scratch)
        self._next_seq = 1 + max((require_name(name)[0] for name in seen), default=0)

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------- resume

    def newest(self) -> tuple[Generation | None, list[str]]:
        """Find the newest whole generation by manifest, sizes and sha256; carried roles then refer to it.

        Call it once, before the first save. A generation that a killed process left on this machine counts too, and
        is copied now; older ones that were left here are removed.

        Returns:
            The generation, or None, and one sentence on every newer one that was passed over.

        Raises:
            DriveError: a folder cannot be read.
        """
        local = list_generations(self.scratch)
        names = sorted({*list_generations(self.folder), *local}, key=lambda name: (require_name(name)[0], name))
        passed_over: list[str] = []
        chosen: Generation | None = None
        while names and chosen is None:
            name = names.pop()
            try:
                generation = read_generation(self.folder, name, scratch=self.scratch)
                if generation.timeline == self.timeline:
                    verify_files(generation)
                    chosen = generation
            except NotWhole as err:
                if name not in local or (self.folder / name).is_dir():  # a local write that was cut is no loss
                    passed_over.append(f"Checkpoint {describe(name)} {err}")
        if chosen is not None:
            self._go_on_from(chosen, is_local=chosen.name in local)
        self._local.clear()
        going_on = f"resuming from {describe(chosen.name)}" if chosen else "starting from the beginning"
        return chosen, [f"{sentence}; {going_on}." for sentence in passed_over]

    def _go_on_from(self, generation: Generation, *, is_local: bool) -> None:
        with self._change:
            self._latest = {entry.role: entry for entry in generation.files}
        if not is_local or self._shelf.is_whole(generation.name):
            self._shelf.remember(generation)
            return
        local = self._local.adopt(generation)
        self._shelf.remember_files(entry for entry in generation.files if entry.sha256 not in local)
        self._report(
            f"Checkpoint {describe(generation.name)} was found on this machine; it is copied to {self.folder}."
        )
        job = Job(generation.name, generation.files, generation.record, generation.keep)
        self._queue.add(job, supersedes=False)

    def keep(self, last: int) -> None:
        """Change how many whole generations are kept from here on."""
        if last < 1:
            raise CheckpointError(f"keep_last is {last}.", "Keep at least 1 checkpoint.")
        self._shelf.keep_last = last

    @property
    def gives_back(self) -> bool | None:
        """Whether emptied files give their room back on this Drive; None while that is not known, and elsewhere."""
        return self._room.gives_back if self._room is not None else None

    @property
    def held_bytes(self) -> int:
        """What the generations of this run take in the folder, by their sizes: it comes free when they are emptied."""
        return self._shelf.held_bytes()

    def flush_for(self, needed: int, *, stopped: Callable[[], bool] = lambda: False) -> list[str]:
        """As `flush`; on a Drive with a trash, also let old generations go until so many bytes are surely free.

        That takes as long as the newest needs to settle and Drive to report; then it is given up.
        """
        problems = self.flush()
        room, began, told = self._room, time.monotonic(), False
        while room is not None and room.left is not None and not stopped():
            self._prune()
            self._look()
            waiting = any(isinstance(job.problem, DiskFull) for job in self._queue.failed)
            if waiting:
                problems = self.flush()
            elif room.left >= needed:
                break
            if room.gives_back is False or time.monotonic() - began > self._settle_s + room.lag_s:
                break
            if not told:
                told = True
                self._report("Waiting until the space of an older checkpoint is free on Drive.")
            with self._change:
                self._change.wait(timeout=min(_LOOK_S, self._settle_s + 0.05))
        return problems

    def require_room(self, needed: int, *, what: str, then: str) -> None:
        """Refuse, on a Drive with a trash, what there is not surely room for beside the checkpoints.

        Args:
            needed: its bytes.
            what: it, in the sentence.
            then: what to do once there is room.

        Raises:
            DiskFull: there is not, however long was waited.
        """
        if self._room is not None:
            self._look()
            self._room.check(needed, 0, what=what, then=then)

    def can_carry(self, role: str) -> bool:
        """Say whether a role's file is still available, so that an unchanged role need not be saved again."""
        with self._change:
            entry = self._latest.get(role)
        return entry is not None and (self._local.find(entry) is not None or self._shelf.find(entry) is not None)

    def generations(self, *, verify: bool = False) -> list[dict[str, Any]]:
        """List the generations, oldest first, those still being copied included.

        Returns:
            name, seq, stage, step, keep, bytes (of its own files), sha256s (by role), whole (by sizes; with `verify`
            by hashes too) and state: "whole", "copying" or why it is not whole.
        """
        jobs = {job.name: job for job in self._queue.jobs()}
        rows = [summary_row(job.name, job.files, job.keep, state="copying") for job in jobs.values()]
        rows += self._shelf.rows(but=set(jobs), verify=verify)
        return sorted(rows, key=lambda row: (row["seq"], row["name"]))

    # ---------------------------------------------------------------------------------------------- save

    def save(self, snapshot: Snapshot) -> str | None:
        """Write a snapshot locally, prove it, and queue it for the mount.

        Waits while two generations are still being copied.

        Returns:
            The new generation's name; None when the local disk could not take it, which is reported.

        Raises:
            CheckpointError: a carried role is not known, or the record holds what JSON cannot.
        """
        self._check(snapshot)
        self._queue.wait_for_turn(self.folder, patience_s=self._patience_s, report=self._report)
        fault_point("checkpoint.begin")
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        name = generation_name(seq, snapshot.stage, snapshot.step)
        with self._change:
            carried = [replace(self._latest[role], carried=True) for role in snapshot.carried]
        try:
            written = self._local.write(name, snapshot)
            job = Job(name, (*written, *carried), snapshot.record, snapshot.keep, spare_bytes=snapshot.spare_bytes)
            write_atomic(self.scratch / name / MANIFEST, job.manifest(self.timeline, job.files))
        except DriveError as err:
            self._local.discard(name)
            self._local_problem = f"Checkpoint {describe(name)} was not saved: {err.problem}"
            self._report_once("local", f"{self._local_problem} The training continues. {err.hint}")
            return None
        with self._change:
            self._local_problem = None
            self._latest = {entry.role: entry for entry in job.files}
            self._local.hold(written)
            self._queue.add(job)  # the files of a superseded one stay as long as this one needs them
        return name

    def flush(self) -> list[str]:
        """Wait until everything is copied, trying what failed once more.

        Returns:
            Sentences on what could not be written; empty when the newest generation is whole on the mount.
        """
        problems = [job.not_written(self.folder, self.scratch) for job in self._queue.flush()]
        return problems + ([self._local_problem] if self._local_problem else [])

    def close(self) -> None:
        """Finish copying and stop the background thread; what could not be written is reported. Twice is harmless."""
        if self._queue.closed:
            return
        problems = self.flush()
        self._queue.close()
        for problem in problems:
            self._report(problem)
        if not problems:
            self._local.clear(everything=True)

    def _check(self, snapshot: Snapshot) -> None:
        if self._queue.closed:
            raise CheckpointError("The checkpoint store is closed.", "Open a new one.")
        for role in snapshot.tensors:
            if problem := role_problem(role):
                raise CheckpointError(problem, "Use lower-case letters, digits and _.")
        with self._change:
            unknown = [role for role in snapshot.carried if role not in self._latest or role in snapshot.tensors]
        if unknown:
            raise CheckpointError(
                f"{', '.join(unknown)} cannot be carried over: no earlier checkpoint has it, or it is saved as well.",
                "Save it in full.",
            )

    # ------------------------------------------------------------------------------------ background copy

    def _pause_s(self, failed: bool) -> float | None:
        if failed:
            return self._retry_s
        return None if self._room is None else _LOOK_S

    def _deliver(self, job: Job) -> FastSDError | None:
        """Put one generation on the mount; failures are reported and returned, never raised."""
        try:
            self._discard_dropped()
            self._make_room(job)
            self._put(job)
        except (DriveError, VerificationFailed, CheckpointError) as err:
            self._report_once(
                type(err).__name__,
                f"Checkpoint {describe(job.name)} is not in {self.folder} yet: {err.problem} "
                f"The training continues, and it will be tried again. {err.hint}",
            )
            return err
        except Exception as err:  # a thread that died would let the training go on unsaved in silence
            logger.exception("Copying checkpoint %s failed.", job.name)
            self._report_once(repr(err), f"Checkpoint {describe(job.name)} could not be copied: {err!r}.")
            return CheckpointError(f"{err!r}.", "Report this.")
        if self._reported - {"local", "prune"}:
            self._report(f"Checkpoint {describe(job.name)} is in {self.folder}: copying works again.")
        self._reported.clear()
        if self._room is not None:
            self._room.saved()
        self._prune()
        self._look()
        self._local.free(wanted=self._wanted(), is_there=self._shelf.was_put)
        return None

    def _look_around(self) -> None:
        with contextlib.suppress(DriveError):
            if len(list_generations(self.folder)) > self._shelf.keep_last:
                self._prune()
        self._look()

    def _look(self) -> None:
        """Look how much is free on a Drive with a trash, and say so when it turns out to give nothing back."""
        if self._room is None:
            return
        with self._pruning:
            self._room.look()
        if self._room.gives_back is False and not self._told_kept:
            self._told_kept = True
            self._report(
                "Emptied checkpoints have not freed their space on this Drive: from now on every checkpoint "
                "ever written counts, and what does not fit stays on this machine. Empty the trash to free some space "
                "(drive.google.com/drive/trash)."
            )

    def _prune(self) -> None:
        try:
            with self._pruning:
                self._shelf.prune(busy={job.name for job in self._queue.jobs()}, wanted=self._wanted())
        except DriveError as err:
            self._report_once("prune", f"Old checkpoints could not be removed: {err.problem} {err.hint}")

    def _make_room(self, job: Job) -> None:
        """On a Drive with a trash, refuse what there is not surely room for, beside what must come later."""
        if self._room is None:
            return
        self._prune()  # one that was too young to go after the last save may be old enough now
        self._look()
        needed = sum(entry.bytes for entry in job.files if self._shelf.find(entry) is None)
        self._room.check(needed, job.spare_bytes)

    def _put(self, job: Job) -> None:
        if (self.folder / job.name / MANIFEST).exists():
            # An earlier attempt got as far as the manifest and was then found not to be whole. Nothing is ever
            # overwritten, so it gets a name of its own.
            job.name = generation_name(*require_name(job.name))
        manifest = partial(job.manifest, self.timeline)
        files = self._shelf.put(job.name, job.files, local=self._local.find, manifest=manifest)
        with self._change:
            for entry in files:
                newest = self._latest.get(entry.role)
                if newest is not None and newest.sha256 == entry.sha256:
                    self._latest[entry.role] = entry

    def _discard_dropped(self) -> None:
        for job in self._queue.take_dropped():
            logger.info("Checkpoint %s is superseded.", describe(job.name))
            try:
                self._shelf.discard(job.name, wanted=self._wanted())
            except DriveError as err:  # pruned with the others later
                logger.debug("Checkpoint %s could not be removed: %s", job.name, err)

    def _wanted(self) -> set[str]:
        with self._change:
            waiting = [job.files for job in self._queue.jobs()]
            return {entry.sha256 for files in (self._latest.values(), *waiting) for entry in files}

    def _report_once(self, kind: str, sentence: str) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            self._report(sentence)
