"""How many images a run draws of itself, and how finely: on a processor never more than a quarter of its training.

A training step of one row passes the U-Net forward once and backward, which is about three forward passes; an image
passes it twice for each denoising step. So the time of the steps tells the images' before they are drawn.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fastsd_helpers.dreambooth.settings import DreamBoothConfig

__all__ = ["FULL", "Drawing", "PictureBudget", "Teller"]

_FORWARDS_A_STEP = 3.0
_FORWARDS_A_DECODED = 4.0  # the VAE, once an image
# Of the training's time; together under a quarter, with what loading the networks takes.
_FOR_SAMPLES = 0.08
_FOR_BEFORE_AND_AFTER = 0.12
_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Drawing:
    """How a grid is drawn."""

    pictures: int  # in a row
    steps: int  # denoising steps


FULL = Drawing(4, 25)
# From the best to the cheapest. Two prompts at least: with two subjects both are seen.
_CHOICES = (FULL, Drawing(4, 15), Drawing(2, 15), Drawing(2, 10), Drawing(2, 6), Drawing(2, 4))


class PictureBudget:
    """What may be drawn, by the time that the training takes.

    Args:
        config: of the run.
        on_cpu: elsewhere drawing is quick, and everything is drawn in full.
        steps: optimizer steps of this call, over which the images' time is counted.
        grids: how many grids of samples are drawn on the way.
    """

    def __init__(self, config: DreamBoothConfig, *, on_cpu: bool, steps: int, grids: int) -> None:
        self._on_cpu, self._steps, self._grids = on_cpu, steps, max(1, grids)
        rows = (config.batch_size or 1) * (2 if config.class_prompts else 1)
        self._rows_a_step = rows * config.accumulation
        self._times: list[float] = []

    def note_step(self, seconds: float) -> None:
        """Note how long one optimizer step took."""
        self._times.append(seconds)

    def sample(self) -> Drawing | None:
        """How a grid of samples is drawn; None where even the cheapest takes too long."""
        return self._choose(_FOR_SAMPLES / self._grids, rows=1)

    def before_and_after(self) -> Drawing:
        """How the two rows are drawn; at the least, where nothing fits, as cheaply as tells something."""
        return self._choose(_FOR_BEFORE_AND_AFTER, rows=2) or _CHOICES[-1]

    def _choose(self, share: float, *, rows: int) -> Drawing | None:
        if not self._on_cpu:
            return FULL
        if not self._times:  # nothing was trained in this call: the images are all there is to wait for
            return _CHOICES[2]
        # The first step of a process takes longer: it finds its kernels.
        times = sorted(self._times)
        step_s = times[(len(times) - 1) // 2]
        forward_s = step_s / (_FORWARDS_A_STEP * self._rows_a_step)
        budget_s = share * step_s * self._steps
        for choice in _CHOICES:
            forwards = choice.pictures * (2 * choice.steps + _FORWARDS_A_DECODED)
            if rows * forwards * forward_s <= budget_s:
                return choice
        return None


class Teller:
    """Says how far the drawing is, from ten seconds on, and not more often than every ten."""

    def __init__(self, say: Callable[[str], None], what: str, steps: int) -> None:
        self._say, self._what, self._steps = say, what, steps
        self._done = 0
        self._last = time.monotonic()

    def __call__(self) -> None:
        """One denoising step is done."""
        self._done += 1
        if time.monotonic() - self._last >= _TELL_EVERY_S:
            self._last = time.monotonic()
            self._say(f"Generating {self._what}: {100 * self._done // self._steps} % ...")
