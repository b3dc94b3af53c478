"""Seconds of a step and of its parts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Seconds of parts of a step; a GPU is waited for at both ends of each part, in both loops alike."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.parts: dict[str, float] = dict.fromkeys(("vae", "text", "optimizer"), 0.0)

    def now(self) -> float:
        """Seconds of a clock that only runs on, when everything asked of the GPU is done."""
        if self._kind == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """Forget the warm-up."""
        self.parts = dict.fromkeys(self.parts, 0.0)
        self._began = self.now()

    def stop(self) -> float:
        """Seconds since `start`."""
        return self.now() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside to a part."""
        began = self.now()
        yield
        self.parts[name] += self.now() - began
