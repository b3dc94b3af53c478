"""The training run: two stages, one loop, checkpoints that survive, and a verified file at the end.

Stage 1 trains the text encoder alone, through the frozen U-Net. Stage 2 trains the U-Net alone, on cached latents and
cached text embeddings. What is trained, on what, and towards which target is in `stages.py`; this file is the order of
events: find the newest whole checkpoint, step, save, stop when asked, finish.
"""

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth import finish, rehearsal
from fastsd_helpers.dreambooth.base_model import BaseModel
from fastsd_helpers.dreambooth.best import BEST, find_best
from fastsd_helpers.dreambooth.curves import BoardLog, plot_losses
from fastsd_helpers.dreambooth.dataset import PreparedImage, load_dataset, recorded_images
from fastsd_helpers.dreambooth.live import scratch_folder
from fastsd_helpers.dreambooth.optimizers import lr_factor_in_legs
from fastsd_helpers.dreambooth.outlook import counts_of
from fastsd_helpers.dreambooth.plan import Plan, Standing, plan_run
from fastsd_helpers.dreambooth.prior import ClassDrawing
from fastsd_helpers.dreambooth.progress import Progress, Report, log_progress
from fastsd_helpers.dreambooth.resume import CheckpointStore, Generation, Snapshot
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, choose_base_model, given_values, resolve_settings
from fastsd_helpers.dreambooth.stages import STAGES, Stage, Studio, open_stage
from fastsd_helpers.dreambooth.stopping import stop_signals
from fastsd_helpers.errors import Interrupted, ModelNotFound, SessionBusy, SettingsError, TrainingFailed
from fastsd_helpers.files import check_writable
from fastsd_helpers.options import from_values, to_values
from fastsd_helpers.registry import check_resolution
from fastsd_helpers.runtime import describe_device, fault_point, make_cpu_sums_repeatable, name_arithmetic, versions
from fastsd_helpers.sessions import Session

__all__ = ["TrainResult", "plan", "train"]

logger = logging.getLogger("fastsd_helpers")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run made."""

    path: Path  # the finished .safetensors, read back and verified
    sha256: str
    grid: Path  # before and after, same seeds
    loss_plot: Path
    model_card: Path
    loss_before: float  # held-out loss of the base model
    loss_after: float
    first_step: int  # steps that were already done when this call began
    steps: int
    seconds: float
    best_checkpoint: str | None = None  # its name, when an earlier one has a lower held-out loss than the end


def train(
    config: DreamBoothConfig,
    session: Session,
    *,
    restart: bool = False,
    take_over: bool = False,
    more_steps: int = 0,
    report: Report | None = None,
) -> TrainResult:
    """Train the session's subject, or go on with a run that was cut, and finish with a verified checkpoint file.

    Writes into the session's folder: checkpoints/, samples/, logs/, exports/ and session.json.

    Args:
        config: settings; what is left alone follows the model, the device, or the run that is resumed.
        session: with prepared pictures.
        restart: begin at step 0 although there is an unfinished or finished run; that run's file is kept.
        take_over: use the session although another machine's run seems to hold it.
        more_steps: after the end of a finished run, go on with this many steps more; they have a learning rate
            schedule of their own, and a file of their own comes out.
        report: called in this thread after every step.

    Raises:
        SettingsError, DatasetError, ModelError, SessionBusy, DriveError: before any step is made.
        Interrupted: Ctrl-C or SIGTERM; everything up to the last finished step is saved.
        TrainingFailed: the loss is no longer a number; the checkpoints before are intact.
    """
    started = time.monotonic()
    make_cpu_sums_repeatable()
    check_writable(session.folder)
    report = report or log_progress
    with (
        session.lock(take_over=take_over) as lock,
        stop_signals() as stop,
        _open_store(session, report, restart=restart) as store,
    ):
        return _Run(config, session, store, report, more_steps=more_steps).go(stop, lock, started)


def plan(config: DreamBoothConfig, session: Session, *, restart: bool = False, rehearse: bool = False) -> Plan:
    """Say what `train` would do, without doing it: steps, bytes, and what had to be chosen.

    Args:
        config, session, restart: as for `train`.
        rehearse: also compute the memory and time a few steps, which loads the model and may take a minute.
    """
    with _open_store(session, log_progress, restart=restart) as store:
        run = _Run(config, session, store, log_progress)
        if not rehearse:
            return run.plan
        left = {stage.name: run.steps_left(stage) for stage in run.stages}
        return rehearsal.rehearse(run.plan, run.studio, left, [image.prompt for image in run.dataset.train])


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
    """One call of `train`: settings and studio, opened in the order in which they can fail."""

    def __init__(
        self,
        config: DreamBoothConfig,
        session: Session,
        store: CheckpointStore,
        report: Report,
        *,
        more_steps: int = 0,
    ) -> None:
        self.session, self.store, self._report = session, store, report
        record = session.record
        self.number = int(store.timeline)
        self.generation: Generation | None
        self.generation, passed_over = self.store.newest()
        for sentence in passed_over:
            self.say(sentence)

        saved = self.generation.record["settings"] if self.generation else None
        given = given_values(config)
        if saved is None and record.get("run") == self.number:
            # Cut before its first checkpoint: nothing is lost by other settings, but what was chosen still holds.
            config = from_values(DreamBoothConfig, (record.get("given") or {}) | given)
            given = given_values(config)
        self.given = given
        ref = given.get("base_model") or (saved or {}).get("base_model") or "auto"
        self.device = describe_device()
        ref, reason = choose_base_model(ref, self.device, demo_pictures=bool(record["dataset"].get("demo")))
        self.base = self._fetch_base(ref, moved=bool(saved) and "base_model" not in given)
        finish.require_exportable(self.base)
        config = replace(config, base_model=ref)
        if self.generation and self.base.sha256() == self.generation.record["base_model"]["sha256"]:
            saved = {**saved, "base_model": ref}  # the same weights in another place are the same model
        photos = sum(not item["held_out"] for item in recorded_images(session))
        self.config, reasons = resolve_settings(config, self.base.spec, self.device, saved=saved, photos=photos)
        reasons = [reason, *reasons, *check_resolution(self.base.spec, self.config.resolution)]
        self.dataset = load_dataset(session, instance_prompt=self.config.instance_prompt)
        self._check_same_start()

        self.studio = Studio(self.base, self.config, self.device)
        self.stages = [stage for stage in STAGES if getattr(self.config, f"{stage.name}_steps") > 0]
        self.more = self._recorded_more_steps()
        if more_steps:
            self._lengthen(more_steps)
        self.plan = plan_run(
            self.config,
            {stage.name: self._steps_of(stage) for stage in self.stages},
            {stage.name: self.studio.trained_count_of(stage.name) for stage in self.stages},
            finish.export_bytes(self.base, self.studio),
            session.folder,
            standing=self._standing(),
        )
        self.config = self.plan.config
        self.store.keep(self.config.keep_last)
        for line in [*filter(None, reasons), *self.plan.lines()]:
            self.say(line)
        self.board = BoardLog(store.scratch / "board", session.logs / "tensorboard")
        self.history: dict[str, Any] = {}
        self.seconds_per_step = dict(record.get("seconds_per_step") or {})
        self.held_out: list[list] = []
        self.best: dict[str, Any] | None = None
        self.arithmetics = [name_arithmetic(self.device)]

    @staticmethod
    def _fetch_base(ref: str, *, moved: bool) -> BaseModel:
        try:
            return BaseModel.fetch(ref)
        except ModelNotFound as err:
            if not moved:
                raise
            hint = "If it lies elsewhere now, say where with --base-model: the same weights are the same model."
            raise ModelNotFound(err.problem, f"{hint} {err.hint}") from err

    def _standing(self) -> Standing:
        """What bears on the plan beside the settings."""
        counts = counts_of(self.base.spec, self.base.folder)
        return Standing(
            done={stage.name: self._finished_steps(stage) for stage in self.stages},
            held_bytes=self.store.held_bytes,
            gives_back=self.store.gives_back,
            seconds_per_step=self.session.record.get("seconds_per_step") or {},
            lora=counts.lora(self.config.lora_rank) if counts else {},
        )

    def say(self, message: str) -> None:
        """Tell the user one sentence."""
        self._report(Progress(message=message))

    def _legs_of(self, stage: Stage) -> list[int]:
        """The stage's steps, and those that were added to the last stage after the run was finished."""
        own = [getattr(self.config, f"{stage.name}_steps")]
        return own + self.more if stage is self.stages[-1] else own

    def _steps_of(self, stage: Stage) -> int:
        return sum(self._legs_of(stage))

    def _recorded_more_steps(self) -> list[int]:
        saved = self.generation.record.get("more_steps", []) if self.generation else []
        record = self.session.record
        # The session knows of steps that were added and cut before their first checkpoint.
        recorded = record.get("more_steps", []) if record.get("run") == self.number and self.generation else []
        return max(saved, recorded, key=len)

    def _lengthen(self, more_steps: int) -> None:
        done = sum(self._finished_steps(stage) for stage in self.stages)
        steps = sum(self._steps_of(stage) for stage in self.stages)
        if done == steps:
            self.more = [*self.more, more_steps]
        elif self.more[-1:] != [more_steps]:  # the same command again, after a cut, goes on with what it began
            raise SettingsError(
                f"more_steps (--more-steps) goes on after the end of a run, but this one is at step {done} of {steps}.",
                "Train without it first: that goes on with the run.",
            )

    def _check_same_start(self) -> None:
        """A resumed run must see the same weights and pictures as before, or it is another run."""
        self.start = {
            "base_model": {"ref": self.base.ref, "sha256": self.base.sha256()},
            "pictures": [[image.sha256, image.prompt] for image in (*self.dataset.train, *self.dataset.held_out)],
        }
        if self.generation is None:
            return
        begun = self.generation.record
        same = {
            "base model": begun["base_model"]["sha256"] == self.start["base_model"]["sha256"],
            "pictures or captions": begun["pictures"] == self.start["pictures"],
        }
        for name in (name for name, is_same in same.items() if not is_same):
            raise SettingsError(
                f"The {name} changed since this session's run was begun.",
                "Put them back to go on with it, or start from step 0 with --restart; nothing saved is lost.",
            )

    # ------------------------------------------------------------------------------------------- the order of events

    def go(self, stop: threading.Event, lock: Any, started: float) -> TrainResult:
        """Run the stages that are left, then make the file."""
        first_step = self._where_it_stands()
        if first_step == self.plan.steps:
            done = finish.finished_result(self.session, self.number, more=len(self.more))
            if done is not None:
                self.session.save(base_model=self.start["base_model"])  # which may have moved
                self.say(
                    "This run is finished already; --more-steps N goes on with it, --restart trains again from step 0."
                )
                return TrainResult(**done, first_step=first_step, steps=self.plan.steps, seconds=0.0)
        self.session.save(
            run=self.number,
            more_steps=self.more,
            given=self.given,
            settings=to_values(self.config),
            base_model=self.start["base_model"],
            seed=self.config.seed,
            prompts=sorted({image.prompt for image in self.dataset.train}),
            versions=versions(),
        )
        self.studio.fill_caches(self.dataset, self._class_images(stop))
        for stage in self.stages:
            done = self._finished_steps(stage)
            if done < self._steps_of(stage):
                self._train_stage(stage, done, stop, lock)
        for problem in self.store.flush_for(self.plan.export_bytes, stopped=stop.is_set):
            self.say(problem)
        self.session.save_if_possible(**self._learned_of_drive())
        fault_point("finish.begin")
        result = finish.finish_run(
            self.session,
            self.base,
            self.studio,
            self.config,
            history=self.history,
            held_out=self.held_out,
            run=self.number,
            more=len(self.more),
            say=self.say,
        )
        if result["loss_after"] >= result["loss_before"]:
            self.say("The held-out loss did not fall: look at the samples, and try fewer steps or a lower rate.")
        return TrainResult(
            **result,
            first_step=first_step,
            steps=self.plan.steps,
            seconds=time.monotonic() - started,
            best_checkpoint=self._offer_best(result["loss_after"]),
        )

    def _class_images(self, stop: threading.Event) -> tuple[PreparedImage, ...]:
        config, studio = self.config, self.studio
        if not config.class_prompts:
            return ()
        drawing = ClassDrawing(
            self.session.class_images,
            self.base,
            config.class_prompts,
            count=config.class_images,
            size=config.resolution,
            seed=config.seed,
            guidance=config.class_guidance,
        )
        return drawing.fill(
            device=studio.device,
            autocast=studio.autocast,
            prepare=studio.prepare,
            say=self.say,
            stopped=stop.is_set,
        )

    def _offer_best(self, loss_after: float) -> str | None:
        """Say so when an earlier checkpoint was better; the user's eye decides, not the loss."""
        best = find_best(self.store.folder, self.store.timeline)
        if best is None or best.loss is None or best.loss >= loss_after:
            return None
        self.say(
            f"The held-out loss was lower at {best.stage} step {best.step}: {best.loss:.4f}, {loss_after:.4f} at the "
            f"end. To have that model: fastsd dreambooth export {self.session.name} --checkpoint {BEST}"
        )
        return BEST if best.role == BEST else best.generation.name

    def _finished_steps(self, stage: Stage) -> int:
        if self.generation is None:
            return 0
        names = [each.name for each in STAGES]
        reached = names.index(self.generation.stage)
        if names.index(stage.name) < reached:
            return self._steps_of(stage)
        return self.generation.step if stage.name == self.generation.stage else 0

    def steps_left(self, stage: Stage) -> int:
        """Steps of a stage that are still to be made."""
        return self._steps_of(stage) - self._finished_steps(stage)

    def _where_it_stands(self) -> int:
        """Load what finished stages trained; returns the number of steps that are done."""
        steps = sum(self._finished_steps(stage) for stage in self.stages)
        if self.generation is not None:
            self.history = self.generation.load("history")
            self.held_out = self.generation.record["held_out"]
            self.best = self.generation.record.get("best")
            for stage in self.stages:
                if self._finished_steps(stage) == self._steps_of(stage):
                    self.studio.trained[stage.name] = self.generation.load(stage.name)
            self.say(f"Going on after step {steps} of {self.plan.steps}.")
            before = self.generation.record.get("arithmetics", [])
            self.arithmetics = list(dict.fromkeys([*before, *self.arithmetics]))
            promised = self.device.kind == "cpu" or self.config.deterministic
            if promised and len(self.arithmetics) > 1 and steps < self.plan.steps:
                was, now = "; ".join(self.arithmetics[:-1]), self.arithmetics[-1]
                self.say(f"Begun on {was}, now on {now}: close to a run without a stop, but not bit for bit.")
        return steps

    def _train_stage(self, stage: Stage, done: int, stop: threading.Event, lock: Any) -> None:
        """The training loop."""
        import torch

        config, legs, steps = self.config, self._legs_of(stage), self._steps_of(stage)
        job = open_stage(stage, self.studio, self.generation if done else None)
        losses = self.history.get(stage.name, torch.zeros(0)).tolist()[:done]
        offset = sum(self._steps_of(each) for each in self.stages[: self.stages.index(stage)])
        if not self.held_out:
            self._judge(job, offset)
        began = time.monotonic()
        for step in range(done, steps):
            if stop.is_set() or lock.lost:
                self._stop(stage, job, step, losses, lost=lock.lost)
            lr = getattr(config, f"{stage.name}_lr") * lr_factor_in_legs(config.lr_scheduler, step, legs)
            loss = job.take_step(step, lr)
            if loss != loss or loss == float("inf"):
                self._give_up(stage, step)
            losses.append(loss)
            self.history[stage.name] = torch.tensor(losses)
            finished, last = step + 1, step + 1 == steps
            self.seconds_per_step[stage.name] = (time.monotonic() - began) / (finished - done)
            seconds_left = self.seconds_per_step[stage.name] * (steps - finished)
            self._report(Progress(stage.name, finished, steps, loss, seconds_left))
            self.board.add(f"loss/{stage.name}", loss, offset + finished)
            self.board.add(f"lr/{stage.name}", lr, offset + finished)
            fault_point(f"step.{stage.name}")
            to_sample = bool(config.sample_every) and finished % config.sample_every == 0
            to_save = last or (bool(config.save_every) and finished % config.save_every == 0)
            judged = self._judge(job, offset + finished) if to_sample or to_save else None
            if to_sample:
                finish.draw_sample(self.session, self.studio, job, finished)
            if to_save:
                self._save(stage, job, finished, judged)
        self.studio.keep(stage, job)

    def _judge(self, job: Any, position: int) -> float:
        loss = job.held_out_loss()
        self.held_out.append([position, loss])
        self.board.add("loss/held_out", loss, position)
        return loss

    def _save(self, stage: Stage, job: Any, step: int, judged: float | None = None) -> None:
        """Write a checkpoint; whatever goes wrong on the mount is said, and training goes on."""
        tensors, rest = job.state()
        carried = []
        if stage.name == "unet" and self.studio.trained["text_encoder"] is not None:
            if self.store.can_carry("text_encoder"):
                carried.append("text_encoder")
            else:
                tensors["text_encoder"] = self.studio.trained["text_encoder"]
        if self.config.keep_best and stage is self.stages[-1]:
            if judged is not None and (self.best is None or judged < self.best["loss"]):
                self.best = {"stage": stage.name, "step": step, "loss": judged}
                tensors[BEST] = tensors[stage.name]  # the same bytes: the mount gets them once
            elif self.best is not None and self.store.can_carry(BEST):
                carried.append(BEST)
            else:
                self.best = None
        record = {
            **self.start,
            "settings": to_values(self.config),
            "held_out": self.held_out,
            "seed": self.config.seed,
            "prompts": self.studio.prompts,
            "dataset": self.session.record["dataset"],
            "versions": versions(),
            "arithmetics": self.arithmetics,
            "steps": self._steps_of(stage),
            "run": self.number,
            "more_steps": self.more,
            "loss": judged,
            "best": self.best,
            **rest,
        }
        last = step == self._steps_of(stage)
        spare_bytes = self.plan.spare_bytes(stage.name, last=last, gives_back=self.store.gives_back)
        tensors["history"] = self.history
        self.store.save(Snapshot(stage.name, step, tensors, record, carried=tuple(carried), spare_bytes=spare_bytes))
        problem = self.session.save_if_possible(
            progress={"stage": stage.name, "step": step, "steps": self._steps_of(stage)},
            checkpoints=self.store.generations(),
            seconds_per_step=self.seconds_per_step,
            **self._learned_of_drive(),
        )
        if problem:
            self.say(problem)
        with contextlib.suppress(OSError):  # the plot is drawn again at the next checkpoint
            self.board.hand_over()
            plot_losses(self.history, self.held_out, self.session.logs / "loss.png", label=self.studio.held_out_label)

    def _learned_of_drive(self) -> dict[str, bool]:
        known = self.store.gives_back
        return {} if known is None else {"drive_gives_back": known}

    def _stop(self, stage: Stage, job: Any, step: int, losses: list[float], *, lost: bool) -> None:
        if lost:
            raise SessionBusy(
                "Another run took this session over.",
                "This one stopped; the other run goes on from the last checkpoint.",
            )
        if step and losses:
            self._save(stage, job, step)
        problems = self.store.flush()
        for problem in problems:
            self.say(problem)
        where = f"{stage.name} step {step} of {self._steps_of(stage)}"
        raise Interrupted(
            f"Stopped at {where}; " + ("not everything could be saved." if problems else "everything is saved."),
            "Train again with the same session to go on.",
        )

    def _give_up(self, stage: Stage, step: int) -> None:
        self.store.flush()
        raise TrainingFailed(
            f"The loss is no longer a number at {stage.name} step {step + 1}.",
            f"Use a lower learning rate (--{stage.name.replace('_', '-')}-lr) or precision fp32, with --restart; "
            "checkpoints from before are intact.",
        )
