"""The segments of a run: what it was begun with, and what each "train N more steps" added to it.

A segment has settings, photos, captions and a schedule of its own, and begins with the weights of the one before and a
new optimizer. Its number is part of the key of its randomness. Version 0.1 knew one segment and a list `more_steps` of
what was added to its last stage: those steps keep the key, the schedule and the optimizer they were begun with.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd_helpers.wording import label_of

__all__ = ["STAGE_NAMES", "Leg", "Segment", "legs_of", "read_segments", "segments_in", "steps_in_words"]

STAGE_NAMES = ("text_encoder", "unet")  # in the order in which a segment trains them


@dataclass(frozen=True)
class Segment:
    """One part of a run that was begun by one command.

    steps: stage -> optimizer steps. settings: with nothing left open. given: what the user had chosen.
    pictures: [sha256, prompt] of each, those held out last. more: steps that version 0.1 added to the last stage.
    judged_since: number of the segment since which the held-out losses are of the same images and noise.
    """

    steps: dict[str, int]
    settings: dict[str, Any]
    pictures: list[list[str]]
    given: dict[str, Any] = field(default_factory=dict)
    more: tuple[int, ...] = ()
    judged_since: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any], pictures: list[list[str]], **rest: Any) -> "Segment":
        """The segment that these settings make."""
        steps = {stage: settings[f"{stage}_steps"] for stage in STAGE_NAMES if settings.get(f"{stage}_steps")}
        return cls(steps, dict(settings), pictures, **rest)

    @property
    def parts(self) -> int:
        """Forward passes whose gradients make one optimizer step, of all processes together; versions before had one.

        They are what the run began with, however many processes go on with it.
        """
        return self.accumulation * int(self.settings.get("processes") or 1)

    @property
    def accumulation(self) -> int:
        """How many of them each process made when it began."""
        return int(self.settings.get("accumulation", 1))

    def to_record(self) -> dict[str, Any]:
        """As a checkpoint and session.json hold it."""
        return {
            "settings": self.settings,
            "pictures": self.pictures,
            "given": self.given,
            "more": list(self.more),
            "judged_since": self.judged_since,
        }


@dataclass(frozen=True)
class Leg:
    """The steps of one stage in one segment.

    parts: each with a schedule of its own. before: steps of the stage in earlier segments. offset: steps of all stages
    before this leg.
    """

    segment: int
    stage: str
    parts: tuple[int, ...]
    before: int
    offset: int

    @property
    def steps(self) -> int:
        """How many there are."""
        return sum(self.parts)

    @property
    def end(self) -> int:
        """The stage's steps when this leg is done."""
        return self.before + self.steps

    @property
    def key(self) -> str:
        """What its randomness is drawn with, beside seed and step; no other leg of a run has it."""
        return f"{self.stage}+{self.segment}" if self.segment else self.stage


def legs_of(segments: Iterable[Segment]) -> list[Leg]:
    """The legs of a run in the order in which they are trained."""
    legs: list[Leg] = []
    before = dict.fromkeys(STAGE_NAMES, 0)
    offset = 0
    for number, segment in enumerate(segments):
        stages = [stage for stage in STAGE_NAMES if segment.steps.get(stage)]
        for stage in stages:
            added = segment.more if stage == stages[-1] else ()
            leg = Leg(number, stage, (segment.steps[stage], *added), before[stage], offset)
            legs.append(leg)
            before[stage], offset = leg.end, offset + leg.steps
    return legs


def read_segments(checkpoint: Mapping[str, Any] | None, session: Mapping[str, Any], run: int) -> list[Segment]:
    """The segments that a run has begun; empty when it has no checkpoint yet.

    Args:
        checkpoint: the record of its newest checkpoint.
        session: the session's record, which also knows of a segment that was cut before its first checkpoint.
        run: the run's number; what the session says of another run does not count.
    """
    if checkpoint is None:
        return []
    found = segments_in(checkpoint)
    known = segments_in(session) if session.get("run") == run else []
    if len(known) > len(found):
        return [*found, *known[len(found) :]]
    own_more = tuple(session.get("more_steps") or ()) if session.get("run") == run and "segments" not in session else ()
    if len(found) == 1 and len(own_more) > len(found[0].more):
        found = [Segment(**{**vars(found[0]), "more": own_more})]
    return found


def segments_in(record: Mapping[str, Any]) -> list[Segment]:
    """The segments that a checkpoint's or a session's record tells of; of version 0.1 those of a checkpoint alone."""
    if "segments" in record:
        return [
            Segment.of(
                each["settings"],
                each["pictures"],
                given=each["given"],
                more=tuple(each["more"]),
                judged_since=each["judged_since"],
            )
            for each in record["segments"]
        ]
    if "pictures" not in record:
        return []
    return [Segment.of(record["settings"], record["pictures"], more=tuple(record.get("more_steps") or ()))]


def steps_in_words(leg: Leg, step: int, total: int) -> str:
    """Where a run stands after `step` steps of a leg's stage: "unet step 22 of 200, after step 122 of 300"."""
    where = f"{label_of(leg.stage)} step {step} of {leg.end}"
    done = leg.offset + step - leg.before
    return where if (done, total) == (step, leg.end) else f"{where}, after step {done} of {total}"
