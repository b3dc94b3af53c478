"""What a call of `train` begins or goes on with: the run's segments, settings, base model and images.

Everything that may not change within a run is refused here, by session.json and the checkpoints alone where that is
possible, and before a network is loaded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.device import Device
from fastsd_helpers.dreambooth.dataset.prepared import Dataset, load_dataset, recorded_images, what_changed
from fastsd_helpers.dreambooth.presets import choose_base_model
from fastsd_helpers.dreambooth.resume import Generation
from fastsd_helpers.dreambooth.settings import (
    DreamBoothConfig,
    Given,
    ResolvedConfig,
    given_values,
    refuse_changes,
    resolve_settings,
    settings_for_more,
)
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES, Leg, Segment, legs_of, read_segments, segments_in
from fastsd_helpers.errors import ModelNotFound, SettingsError
from fastsd_helpers.options import from_values, to_values
from fastsd_helpers.processes import require_share
from fastsd_helpers.registry import check_resolution, models
from fastsd_helpers.sessions import Session

__all__ = ["MoreSteps", "Start", "find_base", "find_start"]


Fit = Callable[..., tuple[ResolvedConfig, list[str]]]

_DISTILLED = re.compile(r"turbo|lightning|(?<![a-z])lcm(?![a-z])|hyper[-_]?sd|dmd2", re.IGNORECASE)


@dataclass(frozen=True)
class MoreSteps:
    """How many steps are asked for after the end of a run; nothing with both 0."""

    last: int = 0  # of the U-Net, or of the text encoder where the run trains that alone
    text_encoder: int = 0

    def __bool__(self) -> bool:
        return bool(self.last or self.text_encoder)

    def as_steps(self, first: Segment) -> Given:
        """The steps of the segment that this makes."""
        if not first.steps.get("unet") and not self.text_encoder:
            return {"unet_steps": 0, "text_encoder_steps": self.last}
        return {"unet_steps": self.last, "text_encoder_steps": self.text_encoder}


@dataclass(frozen=True)
class Start:
    """What a call begins or goes on with."""

    config: ResolvedConfig  # of the newest segment; save_every, keep_last and sample_every may be open
    base: BaseModel
    base_model: dict[str, str]  # ref and sha256, as it is recorded
    dataset: Dataset
    segments: list[Segment]
    legs: list[Leg]
    open_legs: list[tuple[Leg, int]]  # legs that are left, with the steps of each that are made
    reached: int  # the segment that the newest checkpoint is of
    reasons: list[str]

    @property
    def own_legs(self) -> list[Leg]:
        """Those of the newest segment."""
        return [leg for leg in self.legs if leg.segment == len(self.segments) - 1]

    @property
    def parts(self) -> int:
        """Forward passes of one optimizer step."""
        return self.segments[-1].parts

    def is_first_judged(self, leg: Leg) -> bool:
        """Whether a leg begins what its held-out losses are compared with: a run, or other images or noise."""
        return leg == next(each for each in self.legs if each.segment == self.segments[-1].judged_since)

    def judged_from(self, held_out: list[list]) -> int:
        """Index of the first held-out loss that can be compared with the newest one."""
        first = next(leg for leg in self.legs if leg.segment == self.segments[-1].judged_since)
        # Of the two at that position the second is of the new pictures.
        return max(index for index, row in enumerate(held_out) if row[0] == first.offset)

    @property
    def steps(self) -> int:
        """Of all segments."""
        return sum(leg.steps for leg in self.legs)

    @property
    def steps_done(self) -> int:
        """Of them, those that are made."""
        return self.steps - sum(leg.steps - done for leg, done in self.open_legs)

    @property
    def times_lengthened(self) -> int:
        """How often the run was gone on with after its end, which its files are named after."""
        return len(self.segments) - 1 + len(self.segments[0].more)


def find_start(
    config: DreamBoothConfig,
    session: Session,
    device: Device,
    *,
    run: int,
    generation: Generation | None,
    more: MoreSteps,
    processes: int,
    fit: Fit,
) -> Start:
    """Find out what is begun or gone on with.

    Args:
        config: what the user gave.
        session: the open session.
        device: where it is trained.
        run: its number.
        generation: its newest whole checkpoint.
        more: steps asked for after its end.
        processes: that share each step.
        fit: chooses what the memory decides: (model, settings) -> (settings, reasons).

    Raises:
        SettingsError: it does not fit into the memory; or something else than what the run was begun with was given,
            or has changed.
        DatasetError: as `load_dataset` and `BaseModel.fetch`.
        ModelError: as `load_dataset` and `BaseModel.fetch`.
    """
    segments = read_segments(generation.record if generation else None, session.record, run)
    if not segments:
        return _begin(config, session, device, run=run, more=more, processes=processes, fit=fit)
    assert generation is not None
    given = given_values(config)
    saved_segments = len(segments_in(generation.record))
    if more and len(segments) > saved_segments:
        # Cut before its first checkpoint: it is begun anew, and what was chosen for it still holds.
        given = segments[-1].given | given
        segments = segments[:saved_segments]
    open_legs = _open_legs(legs_of(segments), generation)
    begins = bool(more) and _begins_another(more, segments, open_legs, session, run)
    begun_steps, last = {f"{stage}_steps": segments[0].steps.get(stage, 0) for stage in STAGE_NAMES}, segments[-1]
    if begins:
        steps = more.as_steps(segments[0])
        config, reasons = settings_for_more(
            _without(given, "processes"), last.settings, steps=steps, begun_steps=begun_steps, begun_given=last.given
        )
        require_share(last.parts // last.accumulation * config.accumulation, processes)
    else:
        require_share(last.parts, processes)
        refuse_changes(_without(given, "base_model"), last.settings, begun_steps=begun_steps, finished=not open_legs)
    predicts = last.settings.get("prediction_type", "auto"), last.settings.get("zsnr")
    base = find_base(generation, session, given.get("base_model"), predicts=predicts)
    # The same weights in another place are the same model.
    if begins:
        config, chosen = resolve_settings(replace(config, base_model=base.ref), base.spec, device)
        reasons += chosen
    else:
        own = from_values(DreamBoothConfig, _without(given, "processes", *begun_steps) | {"base_model": base.ref})
        config, reasons = resolve_settings(own, base.spec, device, saved=last.settings | {"base_model": base.ref})
    if open_legs or begins:
        config, chosen = fit(base, config, given=given, begun=not begins)
        reasons += chosen
    reasons += _check_resolutions(base, config)
    dataset = load_dataset(session, instance_prompt=config.instance_prompt)
    if begins:
        segments = [*segments, _next_segment(config, _pictures_of(dataset), given, segments)]
        open_legs = [(leg, 0) for leg in legs_of(segments) if leg.segment == len(segments) - 1]
    else:
        _refuse_other_pictures(dataset, last, finished=not open_legs or len(segments) > saved_segments)
        if given.keys() - last.given.keys():
            segments = [*segments[:-1], replace(last, given=last.given | given)]
    return _start(config, base, dataset, segments, reasons, open_legs, _segment_of(generation))


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _refuse_other_pictures(dataset: Dataset, segment: Segment, *, finished: bool) -> None:
    if _pictures_of(dataset) != segment.pictures:
        when = "" if finished else " after its end"
        raise SettingsError(
            "The images or captions changed since this session's run was started: "
            f"{what_changed(segment.pictures, dataset)}.",
            f"Restore them to resume the run; to continue training with the new ones, add --more-steps N{when}; "
            "or start again from step 0 with --restart; nothing saved is lost.",
        )


def _begin(
    config: DreamBoothConfig, session: Session, device: Device, *, run: int, more: MoreSteps, processes: int, fit: Fit
) -> Start:
    record, given = session.record, given_values(config)
    begun = processes
    if record.get("run") == run:
        # Cut before its first checkpoint: nothing is lost by other settings, but what was chosen still holds.
        config = from_values(DreamBoothConfig, (record.get("given") or {}) | given)
        given = given_values(config)
        before = int((record.get("settings") or {}).get("processes") or 1)
        begun = processes if config.accumulation * before % processes else before
    if more:
        known = [getattr(config, f"{stage}_steps") for stage in STAGE_NAMES]
        raise _not_at_its_end(f"0{'' if None in known else f' of {sum(known)}'}", "")
    ref = given.get("base_model", "auto")
    ref, reason = choose_base_model(ref, device, demo_pictures=bool(record["dataset"].get("demo")))
    base = BaseModel.fetch(ref).predicting(config.prediction_type, config.zsnr)
    photos = sum(not item["held_out"] for item in recorded_images(session))
    named = from_values(DreamBoothConfig, {**to_values(config), "base_model": ref, "processes": begun}, given=given)
    config, reasons = resolve_settings(named, base.spec, device, photos=photos)
    checked = _check_resolutions(base, config)
    config, chosen = fit(base, config, given=given)
    reasons = [reason, *reasons, *chosen, *checked, _distilled_line(ref)]
    dataset = load_dataset(session, instance_prompt=config.instance_prompt)
    segments = [Segment.of(to_values(config), _pictures_of(dataset), given=given)]
    return _start(config, base, dataset, segments, reasons, [(leg, 0) for leg in legs_of(segments)], 0)


def _check_resolutions(base: BaseModel, config: ResolvedConfig) -> list[str]:
    for px in config.training_resolutions:
        check_resolution(base.spec, px, setting="resolutions" if config.resolutions else "resolution")
    return check_resolution(base.spec, config.resolution)


def _distilled_line(ref: str) -> str:
    """What is to be said of a model whose name says that it was distilled to a few steps; nothing of others."""
    name = Path(ref).name
    if not _DISTILLED.search(name):
        return ""
    return (
        f"{name} sounds like a model that was distilled to a few steps: training makes it need more of them again. "
        "Train on the model it was made from, and use the LoRA with this one."
    )


def _start(
    config: ResolvedConfig,
    base: BaseModel,
    dataset: Dataset,
    segments: list[Segment],
    reasons: list[str],
    open_legs: list[tuple[Leg, int]],
    reached: int,
) -> Start:
    recorded = {"ref": base.ref, "sha256": base.sha256()}
    reasons = [reason for reason in reasons if reason]
    return Start(config, base, recorded, dataset, segments, legs_of(segments), open_legs, reached, reasons)


def _not_at_its_end(where: str, then: str) -> SettingsError:
    return SettingsError(
        f"more_steps (--more-steps) continues a finished run, but this one is at step {where}.",
        f"Train without it first{then}.",
    )


def _pictures_of(dataset: Dataset) -> list[list[str]]:
    return [[image.sha256, image.prompt] for image in (*dataset.train, *dataset.held_out)]


def _segment_of(generation: Generation) -> int:
    return int(generation.record.get("segment", 0))


def _open_legs(legs: list[Leg], generation: Generation) -> list[tuple[Leg, int]]:
    """The legs that are not done, each with the steps of it that are."""
    where = (_segment_of(generation), generation.stage)
    reached = next(index for index, leg in enumerate(legs) if (leg.segment, leg.stage) == where)
    leg = legs[reached]
    left = [(leg, generation.step - leg.before)] if generation.step < leg.end else []
    return [*left, *((later, 0) for later in legs[reached + 1 :])]


def _begins_another(
    more: MoreSteps, segments: list[Segment], open_legs: list[tuple[Leg, int]], session: Session, run: int
) -> bool:
    """Whether this begins a new segment; False when it is the command again that began the newest one.

    Raises:
        SettingsError: the run is not at its end.
    """
    first, newest = segments[0], segments[-1]
    if len(segments) > 1:
        wanted = {stage: more.as_steps(first)[f"{stage}_steps"] for stage in STAGE_NAMES}
        same = {stage: newest.steps.get(stage, 0) for stage in STAGE_NAMES} == wanted
    else:
        same = bool(first.more) and first.more[-1] == more.last and not more.text_encoder
    if not open_legs:
        # All steps are made, but a cut may have come before the file was written.
        result = session.record.get("result") or {}
        times = len(segments) - 1 + len(first.more)
        return not same or (result.get("run"), result.get("more", 0)) == (run, times)
    if not same:
        legs = legs_of(segments)
        steps = sum(leg.steps for leg in legs)
        done = steps - sum(leg.steps - made for leg, made in open_legs)
        raise _not_at_its_end(f"{done} of {steps}", ": that resumes the run")
    return False


def _next_segment(
    config: DreamBoothConfig, pictures: list[list[str]], given: Given, segments: list[Segment]
) -> Segment:
    before = segments[-1]
    # A held-out loss is of these: where one of them is another, it is compared from here on.
    comparable = pictures == before.pictures and all(
        getattr(config, name) == before.settings.get(name) for name in ("seed", "resolution", "resolutions")
    )
    since = before.judged_since if comparable else len(segments)
    return Segment.of(to_values(config), pictures, given=before.given | given, judged_since=since)


# ------------------------------------------------------------------------------------------------ the base model


def find_base(
    generation: Generation, session: Session, ref: str | None = None, *, predicts: tuple[str, bool | None]
) -> BaseModel:
    """The base model that a checkpoint was learned on, wherever it lies now; the session remembers a new place.

    Args:
        generation: the checkpoint.
        session: where the checkpoint is.
        ref: where it is said to be; nothing for where it was last.
        predicts: the run's settings prediction_type and zsnr.

    Raises:
        ModelNotFound: it is not there; says what is sought and how to point to it.
        SettingsError: what is there has other weights, or says that it predicts something else.
    """
    known, sha256 = _known_places(session, generation), generation.record["base_model"]["sha256"]
    if not ref or ref in ("auto", *known):
        ref = ref if ref in known else known[0]
        base = _fetch_again(ref, sha256)
        if base.sha256() != sha256:
            raise SettingsError(
                "The base model changed since this session's run was started.",
                f"Restore what was at {ref} (weights {sha256[:12]}...) or specify with --base-model where it is now; "
                "or start again from step 0 with --restart; nothing saved is lost.",
            )
    else:
        keys = {spec.key for spec in models()}
        if ref in keys and known[-1] in keys:  # they are different models, and nothing need be fetched to tell
            raise _other_model(known[0], ref)
        base = BaseModel.fetch(ref)
        if base.sha256() != sha256:
            raise _other_model(known[0], ref)
    base = base.predicting(*predicts, begun=True)  # before its place is remembered: another one may suit the run
    if base.ref != known[0]:
        session.save_if_possible(base_model={"ref": base.ref, "sha256": sha256})
    return base


def _known_places(session: Session, generation: Generation) -> list[str]:
    """Where the run's model was, the newest place first."""
    begun = generation.record["base_model"]
    now: dict[str, Any] = session.record.get("base_model") or {}
    newer = [now["ref"]] if now.get("sha256") == begun["sha256"] else []
    return [*newer, begun["ref"]]


def _fetch_again(ref: str, sha256: str) -> BaseModel:
    try:
        return BaseModel.fetch(ref)
    except ModelNotFound as err:
        raise ModelNotFound(
            f"The base model of this session is no longer at {ref} (its weights have the hash {sha256[:12]}...). "
            f"{err.problem}",
            "If it is elsewhere now, specify where with --base-model: the same weights are the same model.",
        ) from err


def _other_model(was: str, ref: str) -> SettingsError:
    return SettingsError(
        f"This session's run was started with other settings: base_model was {was!r} and is now {ref!r}, which has "
        "other weights.",
        "Leave out base_model to resume the run, or start again from step 0 with --restart.",
    )
