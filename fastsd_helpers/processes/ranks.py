"""The processes of one training on several GPUs, as `accelerate launch` starts them, and what they tell each other.

Each has a number, its rank; the first has 0 and does what is done once: it decides, writes and speaks. With one process
nothing here imports a package. What is summed is summed in one order, whoever has worked out which part of it: so that
the same parts give the same bits with any number of processes.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.processes.identity import LocalProcess

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOST",
    "OWN_THREADS",
    "PLACE",
    "Ranks",
    "count_gpus",
    "rank_here",
    "take_own_gpu",
    "take_place",
    "watched_over",
    "world_here",
]

Found = TypeVar("Found")

PLACE = "FASTSD_RANKS"  # names the folder of the process that watches over these
OWN_THREADS = "FASTSD_OWN_THREADS"  # the number of threads is that of a process alone
LOST = "Another process of this run has ended"
# Whoever works out its part of a step waits so long for the others; who waits for the first one's own work, such as the
# saving of a checkpoint on a slow mount, waits as long as that lives.
_STEP_S = 1800
_LIFE_S = 7 * 86400
_LOOK_EVERY_S = 0.2
_CHUNK = 2**23  # values that are exchanged at a time: 32 MB of each process


def world_here() -> int:
    """How many processes were started together with this one; 1 where it was started alone."""
    words = os.environ.get("WORLD_SIZE", "")
    return max(1, int(words)) if words.isdecimal() and "RANK" in os.environ else 1


def rank_here() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if world_here() > 1 else 0


def count_gpus() -> int:
    """How many CUDA GPUs there are for processes of one each; 0 without one, and without torch."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def take_own_gpu() -> None:
    """Compute on the GPU that is this process's among those that were started together on this machine."""
    if world_here() > 1 and (gpus := count_gpus()):
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)


def watched_over() -> Path | None:
    """The folder in which a process that watches over this one leaves its word and finds the answer; None alone."""
    place = os.environ.get(PLACE)
    return Path(place) if place and world_here() > 1 else None


def take_place() -> None:
    """Answer, from now on, where the process that watches over this one looks; before PyTorch is loaded."""
    place = watched_over()
    if place is None:
        return
    answer = os.open(place / f"{rank_here()}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(answer, sys.stdout.fileno())
    os.close(answer)
    if os.environ.pop(OWN_THREADS, None):
        # The launcher sets one thread. Their number decides how sums are rounded: as many as in a process alone.
        os.environ.pop("OMP_NUM_THREADS", None)


class Ranks:
    """The processes of one training, seen from one of them; made by `open`.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, slow: Any = None) -> None:
        self.rank, self.size, self._slow = rank, size, slow

    @classmethod
    @contextlib.contextmanager
    def open(cls, stop: threading.Event) -> "Iterator[Ranks]":
        """Meet the others; with one process nothing happens.

        Args:
            stop: set when the process that watches over these asks them to stop.

        Yields:
            This process as one of them.

        Raises:
            TrainingFailed: they cannot reach each other.
        """
        if world_here() == 1:
            yield cls()
            return
        import torch.distributed
        from accelerate import PartialState

        if place := watched_over():
            _heed(place, stop)
        # The number of threads decides how sums are rounded: it stays what it is in a process alone.
        threads = torch.get_num_threads()
        with _together():
            state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=_STEP_S))
            torch.set_num_threads(threads)
            slow = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=_LIFE_S))
        own = cls(state.process_index, state.num_processes, slow)
        yield own
        own.wait()  # nobody leaves while another still needs it
        torch.distributed.destroy_process_group()
        PartialState._reset_state()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all of them are here, however long one of them takes."""
        if self.size > 1:
            import torch.distributed

            with _together():
                torch.distributed.barrier(group=self._slow)

    def wait_for_the_end(self) -> None:
        """Wait until another one has ended: the first one still saves and says what there is to say."""
        with contextlib.suppress(TrainingFailed):
            self.wait()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the block be done by one process after the other, as the loading of a model that fills the memory."""
        for _ in range(self.rank):
            self.wait()
        yield
        for _ in range(self.size - self.rank if self.size > 1 else 0):
            self.wait()

    def any(self, flag: bool) -> bool:
        """Whether one of them says so: all of them get the same answer.

        Args:
            flag: what this one says.
        """
        return any(self.gather(flag))

    def gather(self, value: Found) -> list[Found]:
        """What each of them has, in the order of their numbers.

        Args:
            value: of this one; any object that can be pickled.
        """
        if self.size == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.size
        with _together():
            torch.distributed.all_gather_object(found, value, group=self._slow)
        return found

    def share(self, make: Callable[[], Found]) -> Found:
        """What the first one makes; the others wait for it, and get a copy.

        Args:
            make: called in the first one alone.
        """
        if self.size == 1:
            return make()
        import torch.distributed

        held: list[Any] = [make() if self.is_first else None]
        with _together():
            torch.distributed.broadcast_object_list(held, src=0, group=self._slow)
        return held[0]

    def divide(self, items: Sequence[Any], work: Callable[[Any], Found]) -> list[Found]:
        """What `work` makes of each item, in their order; with n processes each does every n-th of them.

        Args:
            items: the same in all of them.
            work: called with an item.
        """
        if self.size == 1:
            return [work(item) for item in items]
        own = [work(item) for item in items[self.rank :: self.size]]
        shares = self.gather(own)
        return [shares[index % self.size][index // self.size] for index in range(len(items))]

    def add_in_order(self, sums: "list[torch.Tensor | None]", own: "list[torch.Tensor | None]") -> None:
        """Add to each sum what the first process has, then what the second has, and so on, the same bits everywhere.

        Args:
            sums: None before the first addition; filled.
            own: what this process adds; None where there is nothing, in all of them alike. It is used up.
        """
        places = [index for index, tensor in enumerate(own) if tensor is not None]
        chunk: list[int] = []
        for index in places:
            if chunk and sum(own[each].numel() for each in [*chunk, index]) > _CHUNK:  # type: ignore[union-attr]
                self._add_chunk(sums, own, chunk)
                chunk = []
            chunk.append(index)
        if chunk:
            self._add_chunk(sums, own, chunk)

    def _add_chunk(self, sums: "list[torch.Tensor | None]", own: "list[torch.Tensor | None]", chunk: list[int]) -> None:
        import torch
        from accelerate.utils import gather

        tensors = [tensor for index in chunk if (tensor := own[index]) is not None]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _together():
            rows = gather(flat).view(self.size, -1)
        for row in rows:
            for index, part, tensor in zip(chunk, row.split([t.numel() for t in tensors]), tensors, strict=True):
                total = sums[index]
                if total is None:  # kept in place of what was added: no more memory, and the same order in it
                    sums[index] = tensor.copy_(part.view_as(tensor))
                else:
                    total.add_(part.view_as(tensor))


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What the processes do together fails in each of them when one has ended."""
    try:
        yield
    except (RuntimeError, ConnectionError, TimeoutError) as err:
        if type(err).__name__ == "OutOfMemoryError":
            raise
        raise TrainingFailed(
            f"{LOST}: {str(err).splitlines()[0] if str(err) else type(err).__name__}.",
            "What was saved is kept: run it again to resume.",
        ) from err


def _heed(place: Path, stop: threading.Event) -> None:
    """Pass on the word of the process that watches over this one, and end with it."""
    watcher = LocalProcess.of(int((place / "watcher").read_text(encoding="ascii")))

    def look() -> None:
        while True:
            if (place / "stop").exists():
                stop.set()
            if not watcher.is_alive() or not place.exists():
                # Nobody would tell how this ends, and another run may begin: as with a machine that is gone.
                os.kill(os.getpid(), signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
            time.sleep(_LOOK_EVERY_S)

    threading.Thread(target=look, name="ranks-watch", daemon=True).start()
