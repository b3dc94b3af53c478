"""The trainer of a reader: transformers' Seq2SeqTrainer, with the lines as it takes them."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.device import Device, describe_device
from fastsd_helpers.errors import DatasetError, TrainingFailed
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import fault_point
from fastsd_helpers.trocr.model.checkpoint import Checkpoint, load_weights
from fastsd_helpers.trocr.pages.inputs import gather
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet
from fastsd_helpers.trocr.teaching.augment import change_line
from fastsd_helpers.trocr.teaching.progress import TeachingProgress, TeachingReport

if TYPE_CHECKING:
    import threading

    from fastsd_helpers.trocr.teaching.schedule import FineTuneConfig, Schedule

__all__ = ["StoppedHere", "TrainingLines", "label_ids", "last_whole_checkpoint", "make_trainer"]

logger = logging.getLogger("fastsd_helpers")

_MOST_MEASUREMENTS = 10


def label_ids(tokenizer: Any, text: str, end: int, longest: int) -> list[int]:
    """A line's tokens as TrOCR was trained on them: no start token, the end at the end."""
    return [*tokenizer.encode(text, add_special_tokens=False)[: longest - 1], end]


class StoppedHere(Exception):
    """The run was asked to stop, and is saved at this step."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(step, steps)
        self.step, self.steps = step, steps


class TrainingLines:
    """The lines as the trainer takes them; what is changed in one is a function of (seed, epoch, line)."""

    def __init__(
        self,
        lines: LineSet,
        checkpoint: Checkpoint,
        tokenizer: Any,
        start: int,
        end: int,
        longest: int,
        config: "FineTuneConfig | None",
    ) -> None:
        self.start, self.pad = start, tokenizer.pad_token_id
        self.pixels, self.epoch, self.config = checkpoint.pixels, 0, config
        self.lines: list[LabelledLine] = []
        self.labels = []
        for line in lines.lines:
            if config is None or line.text:
                self.lines.append(line)
                self.labels.append(label_ids(tokenizer, line.text, end, longest))
        self._tokens = sorted({token for labels in self.labels for token in labels} - {end})
        if not self.lines:
            raise DatasetError("No line is left to train on.", "Give more lines with their text.")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, place: int) -> dict[str, Any]:
        import numpy as np

        item = next(iter(gather([self.lines[place].picture])))
        if item.picture is None:
            raise DatasetError(f"{self.lines[place].name}: {item.problem}", "Leave this line out of the table.")
        picture = item.picture
        if self.config is not None and self.config.augment:
            picture = change_line(picture, np.random.default_rng((self.config.seed, self.epoch, place)))
        return {"pixels": self.pixels.resize(picture), "labels": self.labels[place], "before": self._before(place)}

    def _before(self, place: int) -> list[int]:
        """What was "written before" each token of a line, some of it exchanged for other tokens of these lines.

        Few lines are soon known by heart, and then nothing is looked up in the image any more. Source: word dropout,
        Bowman et al. 2016 (arXiv 1511.06349), with other words in the place of an unknown one.
        """
        import numpy as np

        before = [self.start, *self.labels[place][:-1]]
        if self.config is not None and self.config.token_noise and self._tokens:
            chance = np.random.default_rng((self.config.seed, self.epoch, place, 1))
            for at in np.flatnonzero(chance.random(len(before)) < self.config.token_noise):
                if at:
                    before[at] = self._tokens[int(chance.integers(len(self._tokens)))]
        return before

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Put rows into one batch: labels are as long as the longest of them, -100 where there is none."""
        import torch

        longest = max(len(row["labels"]) for row in rows)
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
        before = torch.tensor([row["before"] + [self.pad] * (longest - len(row["before"])) for row in rows])
        pixels = self.pixels.batch([row["pixels"] for row in rows])
        return {"pixel_values": pixels, "decoder_input_ids": before, "labels": labels}


def _choose_precision(device: Device) -> str:
    """The sums' format where it is left to us; weights and optimizer stay in fp32.

    The demo model on a CPU with bf16 in hardware, batches of 16: 0.32 s a step, and 0.60 s in fp32; errors alike.
    """
    if device.kind in ("cuda", "cpu") and device.has_bf16:
        return "bf16"
    return "fp16" if device.kind == "cuda" else "fp32"


def _arguments(config: "FineTuneConfig", schedule: "Schedule", lines: int, out: Path) -> tuple[Any, int]:
    """The trainer's settings, and how many steps they are."""
    from transformers import Seq2SeqTrainingArguments

    device = describe_device()
    precision = config.precision if config.precision != "auto" else _choose_precision(device)
    # What `accelerate launch` and `torchrun` set; each process takes batches of its own.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(lines / config.batch_size / processes)
    steps_an_epoch = math.ceil(batches / config.accumulation)
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
        logging_steps=max(1, steps // 20),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="cer",
        greater_is_better=False,
        predict_with_generate=True,
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
        # Several GPUs in one process is DataParallel, which fails with these models; processes are for that.
        logger.info("One of %d GPUs is used. For all of them: accelerate launch -m fastsd_helpers trocr finetune ...",
                    arguments.n_gpu)  # fmt: skip
        arguments._n_gpu = 1
    return arguments, steps


def _make_watcher(
    config: "FineTuneConfig", train: TrainingLines, report: TeachingReport, stop: "threading.Event | None"
) -> Any:
    """The callback that tells of the run, asks whether to stop, and makes what is drawn a function of the step."""
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            self.began, self.first = time.monotonic(), state.global_step
            for row in state.log_history:  # measured before the run was stopped
                if "eval_cer" in row:
                    report(TeachingProgress("teaching", row["step"], state.max_steps, cer=row["eval_cer"]))
            report(TeachingProgress("teaching", state.global_step, state.max_steps))

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            train.epoch = int(state.epoch or 0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            # Dropout as a function of (seed, step, process): a run that goes on would draw other numbers else.
            step = state.global_step * args.world_size + args.process_index
            torch.manual_seed(config.seed * 1_000_003 + step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            done = state.global_step - self.first
            left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            report(TeachingProgress("teaching", state.global_step, state.max_steps, left))
            if state.global_step >= state.max_steps:  # the end is measured too, wherever it falls
                control.should_evaluate = control.should_save = True
            elif stop is not None and stop.is_set():
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            fault_point("trocr.checkpoint")
            if stop is not None and stop.is_set() and state.global_step < state.max_steps:
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


def _trainer_class(config: "FineTuneConfig", out: Path) -> type:
    from transformers import Seq2SeqTrainer, TrainerState

    class Trainer(Seq2SeqTrainer):
        """transformers 5 writes a ViT's weights under their old names, and its trainer reads them back by the new ones,
        without a word where none fits: the encoder stays as it was, at a resume and when the best model is taken.
        """

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
                _copy_weights(resume_from_checkpoint, model or self.model)

        def _load_best_model(self) -> None:
            if not self.state.best_model_checkpoint:
                return
            # What is written down is where it lay, and a run may have been moved since.
            best = out / "checkpoints" / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best)
            if config.method == "lora":
                super()._load_best_model()
            else:
                _copy_weights(str(best), self.model)

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
) -> Any:
    """Make the Seq2SeqTrainer that teaches `network` the lines of `train` and measures on those of `held`.

    Checkpoints go to `out/checkpoints`, the two newest and the best; progress goes to the log and to `report`. Once
    `stop` is set, the step under way is finished and saved, and `learn` ends with StoppedHere.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback

    from fastsd_helpers.trocr.teaching.metrics import line_errors

    arguments, steps = _arguments(config, schedule, len(train), out)

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

    def measure(predicted: Any) -> dict[str, float]:
        pairs = []
        # Against the texts themselves: what the tokenizer loses of them is an error too.
        for ids, line in zip(predicted.predictions, held.lines, strict=True):
            read = tokenizer.decode([token for token in ids if token >= 0], skip_special_tokens=True)
            pairs.append(line_errors(line.text, read))
        return {"cer": sum(edits for edits, _count in pairs) / max(1, sum(count for _edits, count in pairs))}

    trainer = _trainer_class(config, out)(
        model=network,
        args=arguments,
        train_dataset=train,
        eval_dataset=held,
        data_collator=train.collate,
        compute_loss_func=loss_of,
        compute_metrics=measure,
        callbacks=[_make_watcher(config, train, report, stop)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.planned_steps = steps
    return trainer


def _without_a_better(state: Any) -> int:
    """How many measurements there have been since the best one.

    Counted from the log, which is part of a checkpoint: transformers' own EarlyStoppingCallback begins at 0 again with
    every resume.
    """
    rates = [row["eval_cer"] for row in state.log_history if "eval_cer" in row]
    return len(rates) - 1 - rates.index(min(rates)) if rates else 0


def _copy_weights(folder: str, model: Any) -> None:
    """Give `model` the weights of a checkpoint, every one of them, as from_pretrained understands their names."""
    fresh, missing = load_weights(folder)
    if missing:
        raise TrainingFailed(f"{folder} lacks weights: {', '.join(missing[:3])}.", "Start again with --restart.")
    model.load_state_dict(fresh.state_dict())


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of which every part is there; one that a kill cut short is passed over."""
    if not folder.is_dir():
        return None
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
    found = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.rsplit("-", 1)[1])):
        weights = [*path.glob("*.safetensors")]
        if weights and all((path / name).is_file() for name in needed) and _opens(path, weights):
            return path
        logger.warning("%s is incomplete and was skipped.", path.name)
    return None


# What transformers' trainer opens when it resumes.
_RESUMED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


def _opens(path: Path, weights: list[Path]) -> bool:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        require_inert([path, *(path / name for name in _RESUMED if (path / name).is_file())])
        torch.load(path / "optimizer.pt", weights_only=True, map_location="meta")
        for file in weights:
            with safe_open(str(file), framework="pt"):
                pass
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError):
        return False
    return True
