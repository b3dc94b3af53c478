"""Before training: how many steps and bytes a run will take, and how often it can afford to save."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.drive import delivers_late
from fastsd_helpers.files import check_room, free_bytes

__all__ = ["Plan", "plan_run"]

_SAVES_WANTED = 5  # a stage
_MARGIN = 256 * 2**20


@dataclass(frozen=True)
class Plan:
    """What a run will do; `lines()` says it in words."""

    config: DreamBoothConfig  # with save_every, keep_last and sample_every decided
    steps: int
    generation_bytes: dict[str, int]  # stage -> bytes of one checkpoint
    export_bytes: int
    written_bytes: int  # everything the run writes, deleted checkpoints included
    free_bytes: int
    reasons: tuple[str, ...]
    memory_bytes: dict[str, int] = field(default_factory=dict)  # stage -> peak, computed
    seconds_per_step: dict[str, float] = field(default_factory=dict)  # stage -> measured on this machine
    minutes: float | None = None  # of all steps that are left

    def lines(self) -> list[str]:
        """The plan, one sentence a line."""
        sizes = ", ".join(f"{_gb(size)} in the {stage} stage" for stage, size in self.generation_bytes.items())
        return [
            f"{self.steps} steps; a checkpoint takes {sizes}; the finished file {_gb(self.export_bytes)}.",
            f"The run writes {_gb(self.written_bytes)} in all; {_gb(self.free_bytes)} are free.",
            *self._cost(),
            *self.reasons,
        ]

    def _cost(self) -> list[str]:
        lines = []
        if self.memory_bytes:
            sizes = ", ".join(f"{_gb(size)} in the {stage} stage" for stage, size in self.memory_bytes.items())
            lines.append(f"Memory, computed: {sizes}.")
        if self.minutes is not None:
            steps = ", ".join(f"{seconds:.2g} s a {stage} step" for stage, seconds in self.seconds_per_step.items())
            measured = f" (measured here: {steps})" if steps else ""
            lines.append(
                f"About {self.minutes:.1f} minutes of training are left{measured}; pictures and saving not counted."
            )
        return lines


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _steps(count: int) -> str:
    return f"{count} steps" if count > 1 else "step"


def plan_run(
    config: DreamBoothConfig, stages: dict[str, int], parameters: dict[str, int], export_bytes: int, folder: Path
) -> Plan:
    """Decide what the user left alone about saving, from the bytes it costs and the bytes there are.

    Args:
        config: settings with the steps decided.
        stages: stage -> optimizer steps, in order.
        parameters: stage -> number of trained values.
        export_bytes: size of the finished file.
        folder: where checkpoints go; on Drive deleted ones count until the trash is emptied.

    Raises:
        DiskFull: not even the finished file fits.
    """
    state_bytes = 2 if config.optimizer == "adamw8bit" else 8  # two moments: of one byte, or of float32
    # With ema the raw weights are saved beside the averaged ones.
    weight_bytes = 8 if config.ema else 4
    sizes = {stage: parameters[stage] * (weight_bytes + state_bytes) for stage in stages}
    if config.keep_best and stages:
        last = list(stages)[-1]
        sizes[last] += 4 * parameters[last]
    free = free_bytes(folder)
    room = free - export_bytes - _MARGIN
    hint = "Free some space (empty the trash too, it counts on Google Drive), or put the session elsewhere (--root)."
    check_room(folder, export_bytes, "the finished file", spare=2**20, hint=hint)
    largest = max(sizes.values(), default=0)
    on_drive = delivers_late(folder)
    reasons = []
    keep_last = config.keep_last
    if keep_last is None:
        keep_last = 2
        if largest * 3 > room:  # the new one is whole before an old one goes
            keep_last = 1
            reasons.append(
                f"Only one checkpoint is kept: two and a third need {_gb(3 * largest)}, there are {_gb(max(0, room))}. "
                "If the newest is damaged by the mount there is no older one."
            )
    save_every = config.save_every
    if save_every is None:
        save_every, reason = _choose_save_every(stages, sizes, room, on_drive, keep_last)
        reasons.append(reason)
    sample_every = config.sample_every
    if sample_every is None:
        sample_every = max(1, max(stages.values(), default=4) // 4)
    saves = {stage: 1 + ((steps - 1) // save_every if save_every else 0) for stage, steps in stages.items()}
    return Plan(
        config=replace(config, save_every=save_every, keep_last=keep_last, sample_every=sample_every),
        steps=sum(stages.values()),
        generation_bytes=sizes,
        export_bytes=export_bytes,
        written_bytes=export_bytes + sum(sizes[stage] * count for stage, count in saves.items()),
        free_bytes=free,
        reasons=tuple(reasons),
    )


def _choose_save_every(
    stages: dict[str, int], sizes: dict[str, int], room: int, on_drive: bool, keep_last: int
) -> tuple[int, str]:
    longest = max(stages.values(), default=1)
    wanted = max(1, -(-longest // _SAVES_WANTED))
    if not on_drive:
        if (keep_last + 1) * max(sizes.values(), default=0) > room:
            return 0, "No checkpoints between the stages' ends: there is no room for a second one beside the first."
        return wanted, f"A checkpoint every {_steps(wanted)}."
    # On Drive the trash counts: all checkpoints ever written must fit.
    for every in sorted({wanted, *(-(-longest // count) for count in range(_SAVES_WANTED, 0, -1)), longest}):
        total = sum(sizes[stage] * (1 + (steps - 1) // every) for stage, steps in stages.items())
        if total <= room:
            return every, f"A checkpoint every {_steps(every)}: {_gb(total)} in all, deleted ones count on Drive."
    return 0, (
        "Checkpoints only at the end of each stage: deleted ones count on Drive until its trash is emptied, "
        "and there is no room for more."
    )
