"""Before training: how many steps and bytes a run will take, how often it can save, and what that leaves at risk.

What bounds the saving differs by place. On a disk of this machine a deleted checkpoint is gone. On Google Drive the
trash counts, so old checkpoints are emptied before they are removed (see `drive.remove_emptied`), and then the kept
ones, the one on its way and the finished file bound the room. Where emptying is known to give nothing back, and on
other mounts that deliver late, every checkpoint ever written counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from fastsd_helpers.dreambooth.settings import DreamBoothConfig, PlannedConfig
from fastsd_helpers.dreambooth.training.optimizers import state_bytes, weight_bytes
from fastsd_helpers.drive import delivers_late, keeps_trash
from fastsd_helpers.files import check_room, free_bytes
from fastsd_helpers.wording import label_of

__all__ = ["Plan", "Standing", "generation_sizes", "plan_run"]

_MEMORY_PARTS = {
    "weights": "weights",
    "learning": "optimizer state",
    "step": "forward pass and gradients",
    "own": "libraries",
}
_SAVES_WANTED = 5  # a stage
_MARGIN = 256 * 2**20
_ROOM_HINT = "Free some space (empty the trash too, it counts on Google Drive), or keep the session elsewhere (--root)."


@dataclass(frozen=True)
class Standing:
    """What is known of a run and its Drive when it is planned.

    Attributes:
        done: stage -> steps that are made already.
        held_bytes: what this run's checkpoints take in the folder now.
        gives_back: whether emptied files give their room back on this Drive; None while that is not known.
        seconds_per_step: stage -> measured, in this session's earlier steps.
        lora: stage -> number of values a LoRA would train instead, for comparison.
    """

    done: Mapping[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    gives_back: bool | None = None
    seconds_per_step: Mapping[str, float] = field(default_factory=dict)
    lora: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a run will do; `lines()` says it in words."""

    config: PlannedConfig  # with save_every, keep_last and sample_every decided
    steps: int
    generation_bytes: dict[str, int]  # stage -> bytes of one checkpoint
    export_bytes: int
    written_bytes: int  # everything the run writes, deleted checkpoints included
    free_bytes: int
    reasons: tuple[str, ...]
    memory_bytes: dict[str, int] = field(default_factory=dict)  # stage -> peak, computed
    memory_parts: dict[str, dict[str, int]] = field(default_factory=dict)  # stage -> what it is made of
    seconds_per_step: dict[str, float] = field(default_factory=dict)  # stage -> measured on this machine
    minutes: float | None = None  # of all steps that are left
    lost_steps: dict[str, int] = field(default_factory=dict)  # stage -> steps lost at worst when the machine goes
    peak_bytes: int = 0  # taken at a time at most, what is there already included
    lora_line: str = ""  # what training a LoRA instead would cost
    room_for_one: bool = True  # for the last checkpoint of each stage, beside the finished file
    bounded: bool = True  # what is kept and the one on its way have room together
    fits: bool = True  # and the finished file beside them
    buckets: tuple[dict[str, Any], ...] = ()  # which image is trained at which size, and what of it is cut off
    bucket_lines: tuple[str, ...] = ()  # the same in words, where there is something to say
    notes: tuple[str, ...] = ()  # which settings were filled in and why, and advice; `lines()` leaves them out

    @property
    def finish_bytes(self) -> int:
        """What the end of the run writes: the finished file, and what comes with it."""
        return self.export_bytes + _beside(self.export_bytes)

    def lines(self) -> list[str]:
        """The plan, one sentence a line."""
        sizes = ", ".join(
            f"{_gb(size)} in the {label_of(stage)} stage" for stage, size in self.generation_bytes.items()
        )
        return [
            *self.bucket_lines,
            f"{self.steps} steps; a checkpoint takes {sizes}; the finished file {_gb(self.export_bytes)}.",
            f"The run writes {_gb(self.written_bytes)} in all, and takes at most {_gb(self.peak_bytes)} at a time; "
            f"{_gb(self.free_bytes)} are free.",
            *self._cost(),
            *self.reasons,
            *self.saving_lines(),
        ]

    def saving_lines(self) -> list[str]:
        """What is lost at worst when the machine goes, and what a LoRA would cost instead."""
        return [line for line in (self._lost_line(), self.lora_line) if line]

    def _lost_line(self) -> str:
        at_risk = {stage: steps for stage, steps in self.lost_steps.items() if steps}
        if not at_risk:
            return ""
        parts = []
        for stage, steps in at_risk.items():
            seconds = self.seconds_per_step.get(stage)
            minutes = f" (about {_minutes(steps * seconds)})" if seconds else ""
            parts.append(f"{_steps(steps, one='1 step')} of the {label_of(stage)} stage{minutes}")
        return f"If the machine is lost, at most {' or '.join(parts)} of training must be repeated."

    def spare_bytes(self, stage: str, *, last: bool, gives_back: bool | None) -> int:
        """Bytes that a checkpoint must leave free on Drive, for what has to come after it.

        Args:
            stage: its stage.
            last: whether it is the stage's last one.
            gives_back: whether emptied ones are known to give their room back; if not, every one counts.
        """
        if gives_back and (self.bounded or last):
            # Where all have no room together, the finished file takes the place of an older one.
            return _MARGIN + (0 if self.room_for_one and not self.fits else self.export_bytes)
        names = list(self.generation_bytes)
        begin = names.index(stage) if stage in names else 0
        ends = names[begin + (1 if last else 0) :]
        return sum(self.generation_bytes[name] for name in ends) + self.export_bytes + _MARGIN

    def _cost(self) -> list[str]:
        lines = []
        for stage, parts in self.memory_parts.items():
            made_of = ", ".join(f"{_MEMORY_PARTS[name]} {_gb(size)}" for name, size in parts.items() if size)
            lines.append(f"Estimated memory of the {label_of(stage)} stage: {_gb(sum(parts.values()))} ({made_of}).")
        if self.minutes is not None:
            steps = ", ".join(
                f"{seconds:.2g} s per {label_of(stage)} step" for stage, seconds in self.seconds_per_step.items()
            )
            measured = f" (measured here: {steps})" if steps else ""
            lines.append(
                f"About {_minutes(60 * self.minutes)} of training are left{measured}, without sample images and saving."
            )
        return lines


def _beside(export_bytes: int) -> int:
    """Room for what is written with a finished file: images, the card, the record."""
    return min(_MARGIN // 2, max(2**20, export_bytes // 16))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _steps(count: int, *, one: str = "step") -> str:
    return f"{count} steps" if count > 1 else one


def _minutes(seconds: float) -> str:
    if seconds < 1.5:
        return "1 second"
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def generation_sizes(config: DreamBoothConfig, stages: Mapping[str, int], parameters: Mapping[str, int]) -> dict:
    """Bytes of one checkpoint, by stage; `parameters` is stage -> number of trained values."""
    # With ema the raw weights are saved beside the averaged ones.
    weights = 8 if config.ema else weight_bytes(config)
    sizes = {stage: parameters[stage] * (weights + state_bytes(config.optimizer)) for stage in stages}
    if config.keep_best and stages:
        last = list(stages)[-1]
        sizes[last] += weight_bytes(config) * parameters[last]
    return sizes


def plan_run(
    config: DreamBoothConfig,
    stages: dict[str, int],
    parameters: dict[str, int],
    export_bytes: int,
    folder: Path,
    *,
    standing: Standing | None = None,
) -> Plan:
    """Decide what the user left alone about saving, from the bytes it costs and the bytes there are.

    Args:
        config: settings with the steps decided.
        stages: stage -> optimizer steps, in order.
        parameters: stage -> number of trained values.
        export_bytes: size of the finished file.
        folder: where checkpoints go.
        standing: what is known of the run so far; left alone, it begins on a Drive nothing is known of.

    Raises:
        DiskFull: not even the finished file fits.
    """
    standing = standing or Standing()
    check_room(folder, export_bytes, "the finished file", spare=_beside(export_bytes), hint=_ROOM_HINT)
    sizes = generation_sizes(config, stages, parameters)
    # The earlier stage's weights lie once beside the later one's checkpoints.
    carried = weight_bytes(config) * parameters.get("text_encoder", 0) if len(stages) > 1 else 0
    needs = _needs_of(folder, stages, sizes, carried, export_bytes, standing)
    reasons: list[str] = []
    # Where deleted ones count, keeping fewer would make no room.
    keep_last = config.keep_last or (2 if needs.fits(2) or (needs.all_count and not needs.emptied) else 1)
    save_every = config.save_every
    if save_every is None:
        save_every, reason = _choose_save_every(needs, keep_last)
        reasons.append(reason)
    elif not needs.has_room_for_one:
        reasons.append(_no_room_line(needs, save_every or max(stages.values(), default=1)))
    if config.keep_last is None and keep_last == 1 and needs.has_room_for_one and save_every:
        reasons.append(_one_kept_line(needs))
    sample_every = config.sample_every
    if sample_every is None:
        sample_every = max(1, max(stages.values(), default=4) // 4)
    decided = replace(config, save_every=save_every, keep_last=keep_last, sample_every=sample_every)
    written = sum(sizes[stage] for stage, _step in needs.saves(save_every))
    return Plan(
        config=cast(PlannedConfig, decided),
        steps=sum(stages.values()),
        generation_bytes=sizes,
        export_bytes=export_bytes,
        written_bytes=export_bytes + written,
        free_bytes=needs.free,
        reasons=tuple(reasons),
        seconds_per_step=dict(standing.seconds_per_step),
        lost_steps=_lost_steps(needs, save_every),
        peak_bytes=needs.peak(keep_last, written),
        lora_line=_compare_lora(config, needs, standing.lora),
        room_for_one=needs.has_room_for_one,
        bounded=needs.bounded(keep_last),
        fits=needs.fits(keep_last),
    )


def _one_kept_line(needs: "_Needs") -> str:
    return (
        f"Only one checkpoint is kept: keeping two takes {_gb(needs.needed(2))} while the third is not yet synced, "
        f"and there are {_gb(max(0, needs.room))}. If the latest is damaged there is no older one."
    )


def _needs_of(
    folder: Path, stages: dict[str, int], sizes: dict[str, int], carried: int, export_bytes: int, standing: Standing
) -> "_Needs":
    return _Needs(
        stages=stages,
        done={stage: min(standing.done.get(stage, 0), steps) for stage, steps in stages.items()},
        sizes=sizes,
        carried=carried,
        export=export_bytes,
        free=free_bytes(folder),
        held=standing.held_bytes,
        emptied=keeps_trash(folder) and standing.gives_back is not False,
        trusted=bool(standing.gives_back),
        all_count=delivers_late(folder),
    )


@dataclass(frozen=True)
class _Needs:
    """What a run needs, and the room there is for it."""

    stages: Mapping[str, int]
    done: Mapping[str, int]
    sizes: dict[str, int]
    carried: int
    export: int
    free: int
    held: int
    emptied: bool  # old checkpoints are emptied on a Drive, and it is not known that this gives nothing back
    trusted: bool  # that it does is known
    all_count: bool  # deleted files count, unless they are emptied

    @property
    def largest(self) -> int:
        return max(self.sizes.values(), default=0)

    @property
    def room(self) -> int:
        """For checkpoints, beside the finished file; what this run's own take comes free again."""
        back = self.held if self.emptied or not self.all_count else 0
        return self.free + back - self.export - _MARGIN

    @property
    def has_room_for_one(self) -> bool:
        """Whether the ends of all stages can be saved beside the finished file."""
        ends = self.sizes.values() if self.all_count and not self.emptied else [self.largest + self.carried]
        return sum(ends) <= self.room

    def needed(self, keep_last: int) -> int:
        """Bytes of the checkpoints that are kept and the one on its way."""
        return (keep_last + 1) * self.largest + self.carried

    def fits(self, keep_last: int) -> bool:
        """Whether the kept ones, the one on its way and the finished file have room at the same time."""
        return self.needed(keep_last) <= self.room

    def fits_in_turn(self) -> bool:
        """Whether one kept and the one on its way have room, and the finished file once the older one is gone."""
        room = self.room + self.export
        return self.emptied and self.needed(1) <= room and self.largest + self.carried + self.export <= room

    def bounded(self, keep_last: int) -> bool:
        """Whether any number of checkpoints can be made, one after the other."""
        return self.fits(keep_last) or (keep_last == 1 and self.fits_in_turn())

    def saves(self, every: int) -> list[tuple[str, int]]:
        """The checkpoints that are still to be written, as (stage, step)."""
        return [
            (stage, step)
            for stage, steps in self.stages.items()
            for step in range(self.done[stage] + 1, steps + 1)
            if step == steps or (every and step % every == 0)
        ]

    def goes_through(self, every: int, keep_last: int) -> bool:
        """Whether no checkpoint has to wait before an emptied one has shown that its room comes back."""
        if self.trusted:
            return True
        left, there = self.free - self.export - _MARGIN, 1 if self.held else 0
        saves = self.saves(every)
        for number, (stage, _step) in enumerate(saves):
            later = {name for name, _ in saves[number + 1 :]}
            left -= self.sizes[stage]
            if left < sum(self.sizes[name] for name in later):
                return False
            there += 1
            if there > keep_last:
                return True
        return True

    def peak(self, keep_last: int, written: int) -> int:
        """Bytes that are taken at the same time at most, by the checkpoints and the finished file."""
        if self.all_count and not self.emptied:
            return self.held + written + self.export
        together = min(self.needed(keep_last), self.held + written)
        return together + (self.export if self.fits(keep_last) else 0)


def _choose_save_every(needs: _Needs, keep_last: int) -> tuple[int, str]:
    longest = max(needs.stages.values(), default=1)
    wanted = max(1, -(-longest // _SAVES_WANTED))
    if not needs.has_room_for_one:
        return 0, _no_room_line(needs, wanted)
    bounded = needs.bounded(keep_last)
    if not needs.all_count:
        if bounded:
            return wanted, f"A checkpoint every {_steps(wanted)}."
        return 0, (
            "Checkpoints only at the end of each stage: there is no space for a second one next to "
            f"the first; with {_gb(needs.needed(1) - needs.room)} more it is one every {_steps(wanted)}."
        )
    if needs.emptied and bounded and needs.goes_through(wanted, keep_last):
        return wanted, (
            f"A checkpoint every {_steps(wanted)}; old ones are emptied before they are deleted, so they take "
            f"no space in Drive's trash and they take at most {_gb(needs.needed(keep_last))}."
        )
    # The trash counts, or may: all checkpoints ever written must fit.
    total = 0
    for every in sorted({wanted, *(-(-longest // count) for count in range(_SAVES_WANTED, 0, -1)), longest}):
        total = sum(needs.sizes[stage] for stage, _step in needs.saves(every))
        if total <= needs.free - needs.export - _MARGIN:
            why = "deleted ones count on Drive" + (
                " until it is known that emptied ones free their space" if needs.emptied else ""
            )
            return every, f"A checkpoint every {_steps(every)}: {_gb(total)} in all, {why}."
    short = total - needs.free + needs.export + _MARGIN
    return 0, (
        "Checkpoints only at the end of each stage: deleted ones count on Drive until its trash is emptied, "
        f"and there is no space for more; {_gb(short)} more are needed for one between."
    )


def _no_room_line(needs: _Needs, wanted: int) -> str:
    """No checkpoint of the whole run fits beside its file: what that means, and what would help."""
    stage = max(needs.sizes, key=lambda name: needs.sizes[name], default="")
    one = needs.largest + needs.carried if needs.emptied or not needs.all_count else sum(needs.sizes.values())
    return (
        f"There is no space for a checkpoint of the {label_of(stage)} stage: it takes {_gb(needs.largest)}, and in "
        f"addition to the finished file {_gb(max(0, needs.room))} are free. If the machine is lost, all training of "
        f"that stage is lost. With {_gb(one - needs.room)} more there is one at the end of each stage, with "
        f"{_gb(needs.needed(1) - needs.room)} more one every {_steps(wanted)}: free that much (empty the trash too), "
        "choose a folder elsewhere (--root), or train a LoRA (--method lora)."
    )


def _lost_steps(needs: _Needs, every: int) -> dict[str, int]:
    lost = {}
    for stage, steps in needs.stages.items():
        left = steps - needs.done[stage]
        if left:
            lost[stage] = min(every, steps) if every else left
    return lost


def _compare_lora(config: DreamBoothConfig, needs: _Needs, lora: Mapping[str, int]) -> str:
    if config.method != "full" or not all(stage in lora for stage in needs.stages):
        return ""
    small = max(generation_sizes(config, needs.stages, lora).values(), default=0)
    longest = max(needs.stages.values(), default=1)
    every = max(1, -(-longest // _SAVES_WANTED))
    return (
        f"A LoRA instead (--method lora): {_gb(small)} a checkpoint, one every {_steps(every)}, "
        f"a file of {_gb(2 * sum(lora[stage] for stage in needs.stages))}."
    )
