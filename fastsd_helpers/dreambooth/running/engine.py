"""The training run: two stages, one loop, checkpoints that survive, and a verified file at the end.

Stage 1 trains the text encoder alone, through the frozen U-Net. Stage 2 trains the U-Net alone, on cached latents and
cached text embeddings. What is trained, on what, and towards which target is in `stages.py`, what a run may be gone on
with in `beginning.py`; this file is the order of events: step, save, stop when asked, finish.
"""

import contextlib
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastsd_helpers.device import name_arithmetic
from fastsd_helpers.dreambooth.dataset.advice import advise
from fastsd_helpers.dreambooth.dataset.buckets import bucket_info, bucket_lines
from fastsd_helpers.dreambooth.prior.own_class_images import ClassImages
from fastsd_helpers.dreambooth.results import finishing, learned
from fastsd_helpers.dreambooth.results.best_checkpoint import BEST, offer_best
from fastsd_helpers.dreambooth.results.curves import BoardLog, plot_losses
from fastsd_helpers.dreambooth.results.finishing import TrainResult
from fastsd_helpers.dreambooth.results.image_budget import PictureBudget
from fastsd_helpers.dreambooth.resume import CheckpointStore, Snapshot
from fastsd_helpers.dreambooth.running import dry_run
from fastsd_helpers.dreambooth.running.fitting import fit_into_memory
from fastsd_helpers.dreambooth.running.following import (
    Brief,
    due_after,
    follow,
    load_learned,
    rate_at,
    weakest_device,
)
from fastsd_helpers.dreambooth.running.forecast import Plan, Standing, plan_run
from fastsd_helpers.dreambooth.running.launching import launch, model_named, reporter, train_words
from fastsd_helpers.dreambooth.running.live import Progress, Report, log_progress, scratch_folder
from fastsd_helpers.dreambooth.running.processes import Processes, choose_processes
from fastsd_helpers.dreambooth.running.published_speed import published_lines
from fastsd_helpers.dreambooth.running.saving_outlook import counts_of
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.training.beginning import MoreSteps, Start, find_start
from fastsd_helpers.dreambooth.training.lora import trained_count_of
from fastsd_helpers.dreambooth.training.segments import Leg, steps_in_words
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage
from fastsd_helpers.errors import Interrupted, SessionBusy, TrainingFailed
from fastsd_helpers.options import to_values
from fastsd_helpers.processes import Ranks, stop_signals, watched_over, world_here
from fastsd_helpers.runtime import choose_waiting, fault_point, make_cpu_sums_repeatable, quick_imports, versions
from fastsd_helpers.sessions import Session

__all__ = ["TrainResult", "plan", "train"]


def train(
    config: DreamBoothConfig,
    session: Session,
    *,
    restart: bool = False,
    take_over: bool = False,
    more_steps: int = 0,
    more_text_encoder_steps: int = 0,
    report: Report | None = None,
) -> TrainResult:
    """Train the session's subject, or go on with a run that was cut, and finish with a verified checkpoint file.

    With more than one GPU, or with `processes`, it is done by other processes, which this one starts and watches over;
    where this process was started together with others (`accelerate launch`), by those.

    Writes into the session's folder: checkpoints/, samples/, logs/, exports/ and session.json.

    Args:
        config: settings; what is left alone follows the model, the device, or the run that is resumed.
        session: with prepared images.
        restart: begin at step 0 although there is an unfinished or finished run; that run's file is kept.
        take_over: use the session although another machine's run seems to hold it.
        more_steps: after the end of a finished run, go on with this many steps of the U-Net more (of the text encoder
            where the run trains that alone). They are a segment of their own: with the settings given now, the images
            and captions as they are now, and a file of their own. The same call after a cut goes on with it.
        more_text_encoder_steps: the same for the text encoder; with both it comes first.
        report: called in this thread after every step.

    Returns:
        The finished file with its `sha256`, grid, plot and card, the held-out loss before and after, and the steps.

    Raises:
        SettingsError: what was given is not what the run was begun with, or may not change within a run.
        DatasetError: nothing is prepared; before any step is made, as the next two.
        ModelError: the base model cannot be had, or trained so.
        DriveError: the session cannot be read or written.
        SessionBusy: another run holds it.
        Interrupted: Ctrl-C or SIGTERM; everything up to the last finished step is saved.
        TrainingFailed: the loss is no longer a number; the checkpoints before are intact.
    """
    started = time.monotonic()
    make_cpu_sums_repeatable()
    waiting = choose_waiting()
    session.require_writable()
    report = report or log_progress
    more = MoreSteps(more_steps, more_text_encoder_steps)
    processes = choose_processes(config, session, restart=restart, more=bool(more))
    if processes.count > world_here():
        words = train_words(config, session, restart=restart, more=more)
        with session.lock(take_over=take_over) as lock, stop_signals() as stop:
            report(Progress(message=processes.reason))
            model = model_named(config, session)
            return launch(processes.count, words, session, report, model=model, stop=stop, lock=lock)
    with stop_signals() as stop, Ranks.open(stop) as ranks:
        if not ranks.is_first:
            return follow(ranks, session, stop)
        report = reporter(report)
        held_above = contextlib.nullcontext(SimpleNamespace(lost=False))  # by the process that watches over this one
        own_lock: Any = held_above if watched_over() else session.lock(take_over=take_over)
        with own_lock as held, _open_store(session, report, restart=restart) as store:
            run = _Run(config, session, store, report, more=more, processes=processes, ranks=ranks)
            if waiting:
                run.say(waiting)
            return ranks.share(lambda: run.go(stop, held, started))


def plan(
    config: DreamBoothConfig,
    session: Session,
    *,
    restart: bool = False,
    more_steps: int = 0,
    more_text_encoder_steps: int = 0,
    rehearse: bool = False,
) -> Plan:
    """What `train`, given the same, would do: steps, bytes, and what had to be chosen; nothing of it is done.

    Args:
        config: settings, as for `train`.
        session: with prepared images.
        restart: as if the run began at step 0.
        more_steps: as for `train`.
        more_text_encoder_steps: as for `train`.
        rehearse: also compute the memory and time a few steps, which loads the model and may take a minute.
    """
    choose_waiting()
    more = MoreSteps(more_steps, more_text_encoder_steps)
    processes = choose_processes(config, session, restart=restart, more=bool(more))
    with _open_store(session, log_progress, restart=restart) as store:
        run = _Run(config, session, store, log_progress, more=more, processes=processes)
        if not rehearse:
            return run.plan
        prompts = [image.prompt for image in run.start.dataset.train]
        return dry_run.rehearse(run.plan, run.context, run.steps_left(), prompts)


def _open_store(session: Session, report: Report, *, restart: bool) -> CheckpointStore:
    """The session's checkpoints; each run that was started over is a timeline of its own."""
    number = int(session.record.get("run", 1))
    if restart and "run" in session.record:
        number += 1
    return CheckpointStore(
        session.checkpoints,
        scratch=scratch_folder(session),
        report=lambda sentence: report(Progress(message=sentence)),
        timeline=str(number),
        gives_back=session.record.get("drive_gives_back"),
    )


class _Run:
    """One call of `train`: settings and context, opened in the order in which they can fail."""

    @quick_imports()  # the first run of a process imports all that trains
    def __init__(
        self,
        config: DreamBoothConfig,
        session: Session,
        store: CheckpointStore,
        report: Report,
        *,
        more: MoreSteps,
        processes: Processes,
        ranks: Ranks | None = None,
    ) -> None:
        self.session, self.store, self._report, self.ranks = session, store, report, ranks or Ranks()
        self.number = int(store.timeline)
        self.generation, passed_over = self.store.newest()
        for sentence in passed_over:
            self.say(sentence)
        self.device, differing = weakest_device(self.ranks, 1 if ranks else processes.count)
        if differing:
            self.say(differing)
        self.start: Start = find_start(
            config,
            session,
            self.device,
            run=self.number,
            generation=self.generation,
            more=more,
            processes=processes.count,
            fit=partial(fit_into_memory, device=self.device),
        )
        learned.require_exportable(self.start.base)
        parts = self.start.parts if ranks else self.start.parts // processes.count  # a plan is of one GPU
        self.context = TrainingContext(self.start.base, self.start.config, self.device, ranks=ranks, parts=parts)
        self.seconds_per_step: dict[str, float] = dict(session.record.get("seconds_per_step") or {})
        # What is planned is the newest segment: those before it are done.
        stages = {leg.stage: leg.steps for leg in self.start.own_legs}
        counts = {stage: trained_count_of(self.start.base, self.start.config, stage) for stage in stages}
        self.plan = plan_run(
            self.start.config,
            stages,
            counts,
            learned.export_bytes(self.start.base, self.start.config, {leg.stage for leg in self.start.legs}, counts),
            session.folder,
            standing=self._standing(stages),
        )
        self.config = self.plan.config
        self.store.keep(self.config.keep_last)
        tokens = {
            "tokenizer": next(iter(self.context.tokenizers.values())),
            "most_tokens": self.context.family.most_tokens,
        }
        px, prompt = max(self.config.training_resolutions), self.config.instance_prompt
        advice = advise(session, self.start.dataset, resolution=px, instance_prompt=prompt, **tokens)
        self.class_images = ClassImages(session, self.context, self.start.dataset.train)
        advice += self.class_images.check()
        self._sort()
        if processes.reason and not watched_over():
            self.plan = replace(self.plan, reasons=(processes.reason, *self.plan.reasons))
        left = self.steps_left()
        advice += published_lines(self.device.name, self.context.family, self.config, left.get("unet", 0))
        self.plan = replace(self.plan, notes=(*self.start.reasons, *advice))
        for line in [*self.plan.notes, *self.plan.lines()]:
            self.say(line)
        self.board = BoardLog(store.scratch / "board", session.logs / "tensorboard")
        self.history: dict[str, Any] = {}
        self.held_out: list[list] = []
        self.best: dict[str, Any] | None = None
        self.arithmetics = [name_arithmetic(self.device)]
        self.versions = versions()  # read once: that takes as long as a small step, and every checkpoint notes them
        self._saved: Any = None  # stage and step of the newest checkpoint of this call
        every = self.config.sample_every
        grids = sum(steps // every for steps in left.values()) if every else 0
        self.budget = PictureBudget(
            self.config, on_cpu=self.device.kind == "cpu", steps=sum(left.values()), grids=grids
        )
        asked = bool(self.start.segments[-1].given.get("sample_every"))
        self.samples = finishing.Samples(session, self.context, self.budget, asked=asked, say=self.say)

    def _standing(self, stages: dict[str, int]) -> Standing:
        """What bears on the plan beside the settings."""
        config, base, left = self.start.config, self.start.base, self.steps_left()
        counts = counts_of(base.spec, base.folder, targets=config.lora_targets)
        return Standing(
            done={stage: steps - left.get(stage, 0) for stage, steps in stages.items()},
            held_bytes=self.store.held_bytes,
            gives_back=self.store.gives_back,
            seconds_per_step=self.seconds_per_step,
            lora=counts.lora(config.lora_rank) if counts else {},
        )

    def _sort(self) -> None:
        """Sort the images into buckets; the plan says which goes where where that is not plain."""
        dataset, sort = self.start.dataset, self.context.sort
        train, held_out = sort(dataset.train), sort(dataset.held_out)
        self.context.bucket_info = bucket_info(train)
        records = [bucket.to_record() for bucket in train], [bucket.to_record(held_out=True) for bucket in held_out]
        lines = bucket_lines(train, held_out, batch_size=self.config.batch_size)
        self.plan = replace(self.plan, buckets=(*records[0], *records[1]), bucket_lines=tuple(lines))

    def say(self, message: str, **rest: Any) -> None:
        """Tell the user one sentence."""
        self._report(Progress(message=message, **rest))

    def steps_left(self) -> dict[str, int]:
        """Stage -> steps that are still to be made."""
        left: dict[str, int] = {}
        for leg, done in self.start.open_legs:
            left[leg.stage] = left.get(leg.stage, 0) + leg.steps - done
        return left

    # ------------------------------------------------------------------------------------------- the order of events

    def go(self, stop: threading.Event, lock: Any, started: float) -> TrainResult:
        """Run the legs that are left, then make the file."""
        start = self.start
        self._where_it_stands()
        there = None
        if not start.open_legs:
            there = finishing.finished_result(self.session, self.number, more=start.times_lengthened)
        self.ranks.share(lambda: Brief(start, self.config, self.generation, self.device, finished=there is not None))
        if there is not None:
            self.session.save(base_model=start.base_model)  # which may have moved
            self.say("This run is already finished; --more-steps N continues it, --restart trains again from step 0.")
            return TrainResult(**there, first_step=start.steps_done, steps=start.steps, seconds=0.0)
        segments = [segment.to_record() for segment in start.segments]
        self.session.save(
            run=self.number,
            segments=segments,
            more_steps=segments[0]["more"],
            given=start.segments[-1].given,
            settings=to_values(self.config),
            base_model=start.base_model,
            seed=self.config.seed,
            prompts=sorted({image.prompt for image in start.dataset.train}),
            versions=self.versions,
        )
        fault_point("segment.recorded")
        pictures = self.class_images.fill(say=self.say, stopped=stop.is_set)
        self.context.fill_caches(start.dataset, pictures, stopped=stop.is_set)
        for leg, done in start.open_legs:
            self._train_leg(leg, done, stop, lock)
        for problem in self.store.flush_for(self.plan.finish_bytes, stopped=stop.is_set):
            self.say(problem)
        self.session.save_if_possible(**self._learned_of_drive())
        finishing.require_room(self.store, self.plan.finish_bytes)
        fault_point("finish.begin")
        result = finishing.finish_run(
            self.session,
            start.base,
            self.context,
            self.config,
            history=self._losses_by_leg(),
            held_out=self.held_out,
            judged_from=start.judged_from(self.held_out),
            drawing=self.budget.before_and_after(),
            run=self.number,
            more=start.times_lengthened,
            say=self.say,
            stopped=stop.is_set,
        )
        if result["loss_after"] >= result["loss_before"]:
            self.say("The held-out loss did not fall: check the samples, try fewer steps or a lower learning rate.")
        return TrainResult(
            **result,
            first_step=start.steps_done,
            steps=start.steps,
            seconds=time.monotonic() - started,
            best_checkpoint=offer_best(self.session, self.store, result["loss_after"], self.say),
        )

    def _where_it_stands(self) -> None:
        """Load what was trained before this call, and say how far it is."""
        start, generation = self.start, self.generation
        if generation is None:
            return
        self.history = generation.load("history")
        self.held_out = generation.record["held_out"]
        self.best = generation.record.get("best") if start.segments[-1].judged_since <= start.reached else None
        load_learned(self.context, start, generation)
        curve = {stage: losses.tolist() for stage, losses in self.history.items()}
        self.say(f"Resuming after step {start.steps_done} of {start.steps}.", history=curve)
        before = generation.record.get("arithmetics", [])
        self.arithmetics = list(dict.fromkeys([*before, *self.arithmetics]))
        if (self.device.kind == "cpu" or self.config.deterministic) and len(self.arithmetics) > 1 and start.open_legs:
            was, now = "; ".join(self.arithmetics[:-1]), self.arithmetics[-1]
            self.say(f"Started on {was}, resumed on {now}: close to an uninterrupted run, but not bit-identical.")

    def _train_leg(self, leg: Leg, done: int, stop: threading.Event, lock: Any) -> None:
        """The training loop; `done` steps of the leg are made already."""
        import torch

        config, asked = self.config, lambda: stop.is_set() or lock.lost
        trainer = open_stage(leg.stage, self.context, self.generation if done else None, key=leg.key, before=leg.before)
        losses = self.history.get(leg.stage, torch.zeros(0)).tolist()[: leg.before + done]
        if not done and self.start.is_first_judged(leg):
            self._judge(trainer, leg.offset)
        if done and self.generation and self.generation.record.get("samples_owed"):
            self.samples.draw(trainer, leg.before + done, asked)
        self.ranks.wait()
        began = time.monotonic()
        for own in range(done, leg.steps):
            step = leg.before + own
            if self.ranks.any(asked()):
                self._stop(leg, trainer, step, losses, lost=lock.lost)
            lr = rate_at(config, leg, own)
            step_began = time.monotonic()
            loss = trainer.take_step(step, lr)
            self.budget.note_step(time.monotonic() - step_began)
            if loss != loss or loss == float("inf"):
                self._give_up(leg, step)
            losses.append(loss)
            self.history[leg.stage] = torch.tensor(losses)
            finished, position = own + 1, leg.offset + own + 1
            self.seconds_per_step[leg.stage] = (time.monotonic() - began) / (finished - done)
            seconds_left = self.seconds_per_step[leg.stage] * (leg.steps - finished)
            self._report(Progress(leg.stage, step + 1, leg.end, loss, seconds_left))
            self.board.add(f"loss/{leg.stage}", loss, position)
            self.board.add(f"lr/{leg.stage}", lr, position)
            fault_point(f"step.{leg.stage}")
            to_sample, to_save = due_after(config, leg, finished)
            judged = self._judge(trainer, position) if to_sample or to_save else None
            if to_sample:
                self.samples.draw(trainer, step + 1, asked)
            if to_save:
                self._save(leg, trainer, step + 1, judged)
            if to_sample or to_save:
                self.ranks.wait()
        self.context.keep(trainer)

    def _losses_by_leg(self) -> dict[str, Any]:
        """The losses in the order in which they came: "unet", and "unet 2" of the second segment."""
        parts = {}
        for leg in self.start.legs:
            losses = self.history.get(leg.stage)
            if losses is not None:
                name = f"{leg.stage} {leg.segment + 1}" if leg.segment else leg.stage
                parts[name] = losses[leg.before : leg.end]
        return parts

    def _judge(self, trainer: Any, position: int) -> float:
        loss = trainer.held_out_loss()
        self.held_out.append([position, loss])
        self.board.add("loss/held_out", loss, position)
        return loss

    def _save(self, leg: Leg, trainer: Any, step: int, judged: float | None = None) -> None:
        """Write a checkpoint; whatever goes wrong on the mount is said, and training goes on."""
        start = self.start
        tensors, rest = trainer.state()
        carried = []
        for stage, weights in self.context.trained.items():
            if stage == leg.stage or weights is None:
                continue
            if self.store.can_carry(stage):
                carried.append(stage)
            else:
                tensors[stage] = weights
        if self.config.keep_best and leg == start.legs[-1]:
            if judged is not None and (self.best is None or judged < self.best["loss"]):
                self.best = {"stage": leg.stage, "step": step, "loss": judged}
                tensors[BEST] = tensors[leg.stage]  # the same bytes: the mount gets them once
            elif self.best is not None and self.store.can_carry(BEST):
                carried.append(BEST)
            else:
                self.best = None
        record = {
            "base_model": start.base_model,
            "pictures": start.segments[-1].pictures,
            "settings": to_values(self.config),
            "segments": [segment.to_record() for segment in start.segments],
            "segment": leg.segment,
            "judged_since": start.segments[-1].judged_since,
            "held_out": self.held_out,
            "seed": self.config.seed,
            "prompts": self.context.prompts,
            "dataset": self.session.record["dataset"],
            "versions": self.versions,
            "arithmetics": self.arithmetics,
            "steps": leg.end,
            "run": self.number,
            "more_steps": list(start.segments[0].more),
            "loss": judged,
            "best": self.best,
            "samples_owed": self.samples.owed,
            "bucket_info": self.context.bucket_info,
            **rest,
        }
        spare_bytes = self.plan.spare_bytes(leg.stage, last=step == leg.end, gives_back=self.store.gives_back)
        tensors["history"] = self.history
        snapshot = Snapshot(leg.stage, step, tensors, record, carried=tuple(carried), spare_bytes=spare_bytes)
        self._saved = self.store.save(snapshot) and (leg.stage, step)
        if problem := self.session.save_if_possible(
            progress={"stage": leg.stage, "step": step, "steps": leg.end},
            checkpoints=self.store.generations(),
            seconds_per_step=self.seconds_per_step,
            **self._learned_of_drive(),
        ):
            self.say(problem)
        with contextlib.suppress(OSError):  # the plot is drawn again at the next checkpoint
            self.board.hand_over()
            path, label = self.session.logs / "loss.png", self.context.held_out_label
            plot_losses(self._losses_by_leg(), self.held_out, path, label=label)

    def _learned_of_drive(self) -> dict[str, bool]:
        known = self.store.gives_back
        return {} if known is None else {"drive_gives_back": known}

    def _stop(self, leg: Leg, trainer: Any, step: int, losses: list[float], *, lost: bool) -> None:
        if lost:
            raise SessionBusy(
                "Another run has broken this session's lock.",
                "This run stopped; the other one resumes from the last checkpoint.",
            )
        if step > leg.before and losses and self._saved != (leg.stage, step):
            self._save(leg, trainer, step)
        problems = self.store.flush()
        for problem in problems:
            self.say(problem)
        where = steps_in_words(leg, step, self.start.steps)
        raise Interrupted(
            f"Stopped at {where}; " + ("not everything could be saved." if problems else "everything is saved."),
            "Train again with the same session to resume.",
        )

    def _give_up(self, leg: Leg, step: int) -> None:
        self.store.flush()
        raise TrainingFailed(
            f"The loss became NaN or Inf at {leg.stage.replace('_', ' ')} step {step + 1}.",
            f"Use a lower learning rate (--{leg.stage.replace('_', '-')}-lr) or precision fp32, with --restart; "
            "checkpoints from before are intact.",
        )
