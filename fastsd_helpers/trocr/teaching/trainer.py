"""The trainer of a reader: transformers' Seq2SeqTrainer, with the lines as it takes them."""

import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.device import Device, describe_device
from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.processes import Ranks
from fastsd_helpers.runtime import fault_point, logger
from fastsd_helpers.trocr.teaching.checkpoints import copy_weights
from fastsd_helpers.trocr.teaching.progress import TeachingProgress, TeachingReport
from fastsd_helpers.trocr.teaching.training_lines import TrainingLines

if TYPE_CHECKING:
    import threading

    from fastsd_helpers.trocr.teaching.schedule import FineTuneConfig, Schedule

__all__ = ["StoppedHere", "make_trainer"]

_MOST_MEASUREMENTS = 10


class StoppedHere(Exception):
    """The run was asked to stop, and is saved at this step."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(step, steps)
        self.step, self.steps = step, steps


def _choose_precision(device: Device) -> str:
    """The sums' format where it is left to us; weights and optimizer stay in fp32.

    The demo model on a CPU with bf16 in hardware, batches of 16: 0.32 s a step, and 0.60 s in fp32; errors alike.
    """
    if device.kind in ("cuda", "cpu") and device.has_bf16:
        return "bf16"
    return "fp16" if device.kind == "cuda" else "fp32"


def _arguments(config: "FineTuneConfig", schedule: "Schedule", lines: int, out: Path, ranks: Ranks) -> tuple[Any, int]:
    """The trainer's settings, and how many steps they are."""
    from transformers import Seq2SeqTrainingArguments

    device = describe_device()
    precision = config.precision if config.precision != "auto" else _choose_precision(device)
    steps_an_epoch = math.ceil(math.ceil(lines / config.batch_size) / config.accumulation)
    steps = max(1, math.ceil(steps_an_epoch * schedule.epochs))
    # A measurement reads every held-out line and writes the model three times over, with its optimizer.
    every = config.measure_every or max(steps_an_epoch, math.ceil(steps / _MOST_MEASUREMENTS))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.lr,
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_strategy="no",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="cer",
        greater_is_better=False,
        average_tokens_across_devices=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        dataloader_num_workers=0,
        use_cpu=device.kind == "cpu",
    )

    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process is DataParallel, which fails with these models
    if ranks.size > 1:
        arguments.distributed_state = None  # each process counts batches and steps as one that is alone
    return arguments, steps


def _make_watcher(
    config: "FineTuneConfig", train: TrainingLines, report: TeachingReport, stop: "threading.Event | None", ranks: Ranks
) -> Any:
    """The callback that tells of the run, and asks whether to stop."""
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            self.began, self.first, self.stops = time.monotonic(), state.global_step, False
            for row in state.log_history:  # measured before the run was stopped
                if "eval_cer" in row:
                    report(TeachingProgress("teaching", row["step"], state.max_steps, cer=row["eval_cer"]))
            report(TeachingProgress("teaching", state.global_step, state.max_steps))

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            train.epoch = int(state.epoch or 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            done = state.global_step - self.first
            left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            report(TeachingProgress("teaching", state.global_step, state.max_steps, left))
            self.stops = ranks.any(stop is not None and stop.is_set())
            if state.global_step >= state.max_steps:  # the end is measured too, wherever it falls
                control.should_evaluate = control.should_save = True
            elif self.stops:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            fault_point("trocr.checkpoint")
            ranks.wait()
            if self.stops and state.global_step < state.max_steps:
                raise StoppedHere(state.global_step, state.max_steps)

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_rest: Any
        ) -> None:
            logger.info("Step %d of %d: CER %.2f %%", state.global_step, state.max_steps, 100 * metrics["eval_cer"])
            report(TeachingProgress("teaching", state.global_step, state.max_steps, cer=metrics["eval_cer"]))
            # transformers takes a loss that is not a number for the mean of the others; the weights tell.
            if not all(torch.isfinite(weight).all() for weight in model.parameters()):
                raise TrainingFailed(
                    "The weights are no longer numbers.",
                    "Lower --lr, or train with --precision fp32, and start again with --restart.",
                )
            if config.patience and _without_a_better(state) >= config.patience:
                control.should_training_stop = True

    return Watcher()


def _trainer_class(
    config: "FineTuneConfig", train: TrainingLines, held: TrainingLines, rate_of: Any, out: Path, ranks: Ranks
) -> type:
    from transformers import Seq2SeqTrainer, TrainerState

    class Trainer(Seq2SeqTrainer):
        """transformers' own, but for three things.

        A step's batches are its parts: of n processes each works out every n-th of them, and they are summed in the
        parts' order, so that any number of processes makes the bits of one. What is drawn is a function of step and
        part. And transformers 5 writes a ViT's weights under their old names, and its trainer reads them back by the
        new ones, without a word where none fits: the encoder stays as it was, at a resume and when the best model is
        taken.
        """

        control: Any
        _part = 0
        _sums: "list[Any] | None" = None

        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader() if ranks.size == 1 else _all_batches(config, train)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **rest: Any) -> Any:
            import torch

            part, ends = self._part, self.accelerator.sync_gradients
            self._part = 0 if ends else part + 1
            torch.manual_seed(config.seed * 1_000_003 + self.state.global_step * config.accumulation + part)
            if ranks.size == 1:
                return super().training_step(model, inputs, num_items_in_batch, **rest)
            loss = torch.zeros((), device=self.args.device)
            if part % ranks.size == ranks.rank:
                batch = train.batch(inputs["places"].tolist())
                loss = super().training_step(model, batch, num_items_in_batch, **rest)
            if ends or part % ranks.size == ranks.size - 1:
                self._add_round(part % ranks.size + 1, ends)
            return loss

        def _add_round(self, parts: int, ends: bool) -> None:
            """Add up the gradients of so many parts, of a process each; at the end of a step they take their place."""
            import torch

            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            own = [weight.grad for weight in weights]
            if parts < ranks.size:  # the last step of an epoch: for some processes there is no batch
                has = ranks.share(lambda: [grad is not None for grad in own])
                if ranks.rank >= parts:
                    own = [
                        torch.zeros_like(weight) if there else None for weight, there in zip(weights, has, strict=True)
                    ]
            sums = self._sums = self._sums or [None] * len(weights)
            ranks.add_in_order(sums, own)
            for weight, total in zip(weights, sums, strict=True):
                weight.grad = total if ends else None
            if ends:
                self._sums = None

        def evaluate(self, *_given: Any, **_named: Any) -> dict[str, float]:
            """The CER on the held-out lines, whose batches the processes divide."""
            self.model.eval()
            places = range(len(held))
            batches = [places[first : first + config.batch_size] for first in places[:: config.batch_size]]
            read = [text for texts in ranks.divide(batches, self._read) for text in texts]
            metrics = {"eval_cer": rate_of(read)}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _read(self, places: Any) -> list[list[int]]:
            import torch

            pixels = held.batch(list(places))["pixel_values"].to(self.args.device)
            with torch.no_grad():
                return self.model.generate(pixel_values=pixels).tolist()

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            if ranks.is_first:
                super()._save_checkpoint(*given, **named)

        def learn(self, resume: Path | None) -> None:
            """Train, from a checkpoint where there is one, and take the best weights.

            A run that was stopped after it had ended, for want of anything better, has only the best left to take:
            `train` would go on from there.
            """
            if resume is not None and config.patience:
                state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
                if _without_a_better(state) >= config.patience:
                    self.state = state
                    self._load_best_model()
                    return
            self.train(resume_from_checkpoint=str(resume) if resume else None)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if config.method == "lora":
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                copy_weights(resume_from_checkpoint, model or self.model)

        def _load_best_model(self) -> None:
            if not self.state.best_model_checkpoint:
                return
            # What is written down is where it lay, and a run may have been moved since.
            best = out / "checkpoints" / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best)
            if config.method == "lora":
                super()._load_best_model()
            else:
                copy_weights(str(best), self.model)

    return Trainer


def make_trainer(
    config: "FineTuneConfig",
    schedule: "Schedule",
    network: Any,
    tokenizer: Any,
    train: TrainingLines,
    held: TrainingLines,
    out: Path,
    *,
    report: TeachingReport = lambda _progress: None,
    stop: "threading.Event | None" = None,
    ranks: Ranks | None = None,
) -> Any:
    """Make the Seq2SeqTrainer that teaches `network` the lines of `train` and measures on those of `held`.

    Checkpoints go to `out/checkpoints`, the two newest and the best; progress goes to the log and to `report`. Once
    `stop` is set, the step under way is finished and saved, and `learn` ends with StoppedHere. `ranks` are the
    processes that share each step; `accumulation` is then that of a process alone.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback

    from fastsd_helpers.trocr.teaching.metrics import line_errors

    ranks = ranks or Ranks()
    arguments, steps = _arguments(config, schedule, len(train), out, ranks)

    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """The mean over all tokens of a step, in whatever batches and processes they are.

        The model's own loss is the mean of one batch, and the trainer, which takes it for this one, would neither
        divide it by the batches of a step nor spare it a factor for the processes.
        """
        scores = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        total = torch.nn.functional.cross_entropy(
            scores.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    def rate_of(read: list[list[int]]) -> float:
        pairs = []
        # Against the texts themselves: what the tokenizer loses of them is an error too.
        for ids, line in zip(read, held.lines, strict=True):
            pairs.append(line_errors(line.text, tokenizer.decode(ids, skip_special_tokens=True)))
        return sum(edits for edits, _count in pairs) / max(1, sum(count for _edits, count in pairs))

    trainer = _trainer_class(config, train, held, rate_of, out, ranks)(
        model=network,
        args=arguments,
        train_dataset=train,
        eval_dataset=held,
        data_collator=train.collate,
        compute_loss_func=loss_of,
        callbacks=[_make_watcher(config, train, report, stop, ranks)],
    )
    if ranks.size > 1:
        # Prepared as for evaluation: with the arithmetic that was chosen, and without DDP.
        trainer.accelerator.prepare_model = functools.partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    trainer.remove_callback(PrinterCallback)
    trainer.planned_steps = steps
    return trainer


def _all_batches(config: "FineTuneConfig", train: TrainingLines) -> Any:
    """The batches of every process, in the order that transformers' trainer gives them to one that is alone."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    places: Any = range(len(train))
    named = DataLoader(places, batch_size=config.batch_size, shuffle=True, collate_fn=train.name_batch)
    return prepare_data_loader(
        named, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=config.seed
    )


def _without_a_better(state: Any) -> int:
    """How many measurements there have been since the best one.

    Counted from the log, which is part of a checkpoint: transformers' own EarlyStoppingCallback begins at 0 again with
    every resume.
    """
    rates = [row["eval_cer"] for row in state.log_history if "eval_cer" in row]
    return len(rates) - 1 - rates.index(min(rates)) if rates else 0
