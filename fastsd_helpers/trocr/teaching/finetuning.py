"""Fine-tune a model on a new handwriting or script with transformers' Seq2SeqTrainer.

Interrupted at any moment, it resumes.

What the well-known recipes get wrong is fixed here: labels begin without a start token (TrOCR was trained so), are
padded to the longest of their batch, no rule forbids repeated words, the best model is the one with the lowest CER, and
lines of one group (a writer, a page, neighbours on a single page) are never on both sides of the split.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DependencyMissing, DiskFull, Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.files import check_writable, file_errors, free_bytes, new_folder, write_atomic
from fastsd_helpers.options import to_values
from fastsd_helpers.processes import Ranks, require_share, watched_over, world_here
from fastsd_helpers.runtime import load_peft, logger
from fastsd_helpers.trocr.ground_truth.labels import texts_of
from fastsd_helpers.trocr.model.checkpoint import (
    PICTURES,
    WORDS,
    Checkpoint,
    copy_files,
    open_checkpoint,
    quiet_transformers,
)
from fastsd_helpers.trocr.model.vocabulary import measure_coverage, prepare_vocabulary
from fastsd_helpers.trocr.reading.dataset import LineSet
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.teaching.checkpoints import last_whole_checkpoint
from fastsd_helpers.trocr.teaching.evaluation import Evaluation, evaluate, evaluation_from
from fastsd_helpers.trocr.teaching.hub_upload import card_head
from fastsd_helpers.trocr.teaching.language import LanguageGain, keep_language
from fastsd_helpers.trocr.teaching.processes import (
    SETTINGS,
    begun_parts,
    choose_processes,
    finetune_words,
    launch_finetune,
    open_ranks,
)
from fastsd_helpers.trocr.teaching.progress import TeachingProgress, TeachingReport
from fastsd_helpers.trocr.teaching.schedule import FineTuneConfig, Schedule, choose_schedule, split_lines
from fastsd_helpers.trocr.teaching.trainer import StoppedHere, make_trainer
from fastsd_helpers.trocr.teaching.training_lines import TrainingLines, drop_unfitting, drop_unreadable

__all__ = [
    "FineTuneConfig",
    "FineTuneResult",
    "Schedule",
    "choose_schedule",
    "finetune",
    "finished_result",
    "split_lines",
]

_RESULT = "result.json"
_LEAST_FREE_BYTES = 64_000_000  # with less, a failed write is taken for a full disk
_LORA_LAYERS = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value|fc1|fc2|dense)"


@dataclass(frozen=True)
class FineTuneResult:
    """The folder of the fine-tuned model, and the error rates on held-out lines before, meanwhile and after."""

    path: Path
    cer_before: float
    cer_after: float
    before: Evaluation
    after: Evaluation
    steps: int
    first_step: int
    seconds: float
    train_lines: int
    held_out_lines: int
    added_letters: str
    curve: tuple[tuple[int, float], ...]  # (step, CER on the held-out lines) of every measurement
    language: tuple[dict[str, Any], ...] = ()  # what a language model of the texts is worth: LanguageGain, as values


def finetune(
    config: FineTuneConfig,
    data: Any,
    out: Path,
    *,
    model: str | Path,
    held_out: Any = None,
    restart: bool = False,
    texts: Sequence[Path] = (),
    report: TeachingReport = lambda _progress: None,
    stop: threading.Event | None = None,
) -> FineTuneResult:
    """Fine-tune a model and write it to `out/model`; called again after a stop, go on from the last whole checkpoint.

    Called again after the end, it gives the same result and does nothing; the checkpoints are removed at the end. With
    more than one GPU, or with `processes`, lines that are named by paths are learned by other processes, which this one
    starts and watches over; where this process was started together with others, by those.

    Args:
        config: what learns, epochs, rates, batch size.
        data: lines with their text; see `labels.read_lines`.
        out: folder for checkpoints/, model/ and settings.json.
        model: recognition model: key, folder or Hub id to begin with.
        held_out: lines to measure on; left alone, a part of `data` by writer or page.
        restart: forget what `out` holds of an earlier run.
        texts: files with more text, of the kind that is to be read, for the language model.
        report: called at every stage, step and measurement.
        stop: once it is set, the step under way is finished and saved, and the run ends with Interrupted.

    Returns:
        `path` of the model's folder, steps, seconds, and on the held-out lines `cer_before` and `cer_after` (0 to 1 and
        above).

    Raises:
        Interrupted: it was asked to stop.
        DatasetError: what was given cannot be used.
        ModelError: what was given cannot be used.
        SettingsError: `out` holds a run with other settings, or `texts` are given and no language model is wanted.
        TrainingFailed: the numbers broke down.
    """
    began = time.monotonic()
    if texts and not config.language:
        raise SettingsError(
            "--text is for the language model, and --no-language leaves that out.", "Leave out one of the two."
        )
    count, why = choose_processes(config, out, by_paths=_are_paths(data, held_out), restart=restart)
    if why and not watched_over():
        logger.info("%s", why)
        report(TeachingProgress(message=why))
    if count > world_here():
        words = finetune_words(config, data, out, model=model, held_out=held_out, restart=restart, texts=texts)
        launch_finetune(count, words, out, model=str(model), report=report, stop=stop)
        if (made := finished_result(out)) is None:
            raise TrainingFailed(f"The fine-tuning has ended without a result in {out}.", "Run it again to resume.")
        return made
    with open_ranks(report, stop) as (ranks, tell):
        with ranks.in_turn():
            checkpoint = _open_learner(config, model, out)
        if earlier := ranks.share(lambda: not restart and _is_earlier(out)):
            config = dataclasses.replace(config, normal_form="none")
        sets = split_lines(config, data, held_out)
        train_set, held_set = (drop_unreadable(lines).in_form(config.normal_form) for lines in sets)
        check = functools.partial(_check_settings, out, config, str(model), train_set, held_set, restart, ranks.size)
        # All that follows is counted in the parts of a step, by however many processes they are worked out.
        config = dataclasses.replace(config, accumulation=ranks.share(check), processes=None)
        if (finished := ranks.share(lambda: finished_result(out))) is not None:
            logger.info("This run is already finished: %s", finished.path)
            if texts:
                logger.warning("--text is not used, for the run has ended: name another --out, or add --restart.")
            return finished
        more_text = texts_of(texts) if texts else []  # what is wrong with them is said before anything is learned
        before = _evaluate_before(checkpoint.folder, held_set, config, tell, stop, ranks)
        trainer, tokenizer, added = _make_learner(
            config, checkpoint, train_set, held_set, out, tell, stop, ranks, earlier
        )
        first_step = _learn(trainer, out, stop, ranks)

        def finish() -> FineTuneResult:
            target = out / "model"
            with quiet_transformers(), _named_failures(out):
                _write_model(trainer.model, tokenizer, checkpoint, target, config)
            tell(TeachingProgress("after", steps := trainer.state.global_step, steps))
            after = _evaluate(target, held_set, config, stop)
            result = FineTuneResult(
                target.absolute(), before.scores.cer.rate, after.scores.cer.rate, before, after, steps, first_step,
                seconds=time.monotonic() - began,
                train_lines=len(train_set.lines),
                held_out_lines=len(held_set.lines),
                added_letters="".join(added),
                curve=tuple((row["step"], row["eval_cer"]) for row in trainer.state.log_history if "eval_cer" in row),
                language=_keep_language(target, train_set, held_set, more_text, config, stop),
            )  # fmt: skip
            if result.cer_after > result.cer_before:
                logger.warning("The CER is higher than before: use more lines, or a lower learning rate.")
            _write_card(result, config, str(model), train_set, held_set)
            _write_result(result, out)
            return result

        return ranks.share(finish)


def _are_paths(*sources: Any) -> bool:
    """Whether other processes can read these lines."""
    return all(source is None or isinstance(source, (str, Path)) for source in sources)


def _keep_language(
    folder: Path,
    train: LineSet,
    held: LineSet,
    texts: Sequence[str],
    config: FineTuneConfig,
    stop: threading.Event | None,
) -> tuple[dict[str, Any], ...]:
    if not config.language:
        return ()
    reading: dict[str, Any] = {"precision": "fp32" if config.precision == "fp32" else "auto"}
    gains = keep_language(
        folder, train, held, texts=texts, normal_form=config.normal_form, progress=_stopper(stop), **reading
    )
    for gain in gains:
        logger.info("Language model, %s", gain.in_words())
    return tuple(dataclasses.asdict(gain) for gain in gains)


def _write_result(made: FineTuneResult, out: Path) -> None:
    kept = {name: value for name, value in dataclasses.asdict(made).items() if name != "path"}
    write_atomic(out / _RESULT, json.dumps(kept, ensure_ascii=False).encode())
    # Three times the size of the model, and of no use any more.
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _open_learner(config: FineTuneConfig, model: str | Path, out: Path) -> Checkpoint:
    """Open the model to begin with; one that cannot learn, or that the run would delete, is refused."""
    _require_packages(config)
    checkpoint = open_checkpoint(model, precision="fp32")
    if checkpoint.model is None:
        raise SettingsError(
            f"{checkpoint.folder.name} is an int8 model, which cannot be trained.", "Name the model it was made from."
        )
    folder = checkpoint.folder.resolve()
    for name in ("model", "checkpoints"):  # its own to write
        if folder.is_relative_to((out / name).resolve()):
            raise SettingsError(
                f"The model to start from, {folder}, is in the run's own folder, where it would be overwritten.",
                "Name another folder for the run.",
            )
    return checkpoint


def _make_learner(
    config: FineTuneConfig,
    checkpoint: Checkpoint,
    train: LineSet,
    held: LineSet,
    out: Path,
    report: TeachingReport,
    stop: threading.Event | None,
    ranks: Ranks,
    earlier: bool = False,
) -> tuple[Any, Any, list[str]]:
    """The trainer of this run, the tokenizer, and the letters that were added to it.

    A run that an earlier version began (`earlier`) goes on with the lines it began with, too long ones cut.
    """
    network, tokenizer, limits = checkpoint.model, checkpoint.tokenizer, checkpoint.limits
    texts = [line.text for line in train.lines]
    coverage = measure_coverage(tokenizer, texts)
    if coverage.advice != "keep" and config.vocabulary == "keep":
        logger.warning("The tokenizer takes %.2f tokens per character: %s. Consider vocabulary=%s.",
                       coverage.tokens_per_character, coverage.reason, coverage.advice)  # fmt: skip
    tokenizer, added = prepare_vocabulary(network, tokenizer, texts, config.vocabulary)
    end = tokenizer.eos_token_id if config.vocabulary == "replace" else limits.eos[0]
    start = end if config.vocabulary == "replace" else limits.start
    longest = min(network.config.decoder.max_position_embeddings, 512)
    if not earlier:
        train = drop_unfitting(train, tokenizer, longest, config)
    _set_generation(network, tokenizer, start, end, train, longest)
    network = _choose_what_learns(network, config)
    train_lines = TrainingLines(train, checkpoint, tokenizer, start, end, longest, config)
    held_lines = TrainingLines(held, checkpoint, tokenizer, start, end, longest, None)
    schedule = choose_schedule(config, len(train_lines), sum(weight.numel() for weight in network.parameters()))
    train_lines.config = dataclasses.replace(config, token_noise=schedule.token_noise)
    if schedule.reason:
        logger.info("%s", schedule.reason)
    trainer = make_trainer(
        config, schedule, network, tokenizer, train_lines, held_lines, out, report=report, stop=stop, ranks=ranks
    )
    return trainer, tokenizer, added


def _learn(trainer: Any, out: Path, stop: threading.Event | None, ranks: Ranks) -> int:
    """Train, from the last whole checkpoint on; returns the step it began with."""
    resume = ranks.share(lambda: last_whole_checkpoint(out / "checkpoints"))
    first_step = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    if resume:
        logger.info("Resuming from step %d of %d.", first_step, trainer.planned_steps)
    if ranks.any(stop is not None and stop.is_set()):
        raise _interrupted(first_step, 0)
    with quiet_transformers(), _named_failures(out):
        try:
            trainer.learn(resume)
        except StoppedHere as err:
            raise _interrupted(err.step, err.steps) from err
    return first_step


def _interrupted(step: int, steps: int) -> Interrupted:
    where = f"at step {step} of {steps}" if steps else f"before step {step + 1}"
    return Interrupted(
        f"The fine-tuning was stopped {where}; everything up to there is saved.", "Run it again to resume."
    )


def finished_result(out: Path) -> FineTuneResult | None:
    """What a run that ended wrote down; None when there is none, or its model is gone."""
    target = out / "model"
    if not (out / _RESULT).is_file() or not (target / "config.json").is_file():
        return None
    kept = json.loads((out / _RESULT).read_text(encoding="utf-8"))
    before, after = (evaluation_from(kept.pop(name)) for name in ("before", "after"))
    curve = tuple((step, rate) for step, rate in kept.pop("curve"))
    language = tuple(kept.pop("language", ()))
    return FineTuneResult(path=target.absolute(), before=before, after=after, curve=curve, language=language, **kept)


def _require_packages(config: FineTuneConfig) -> None:
    import importlib.util

    needed = ["transformers", "accelerate", "jiwer", *(["peft"] if config.method == "lora" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyMissing(f"Fine-tuning needs {' and '.join(missing)}.", "Run: fastsd install trocr")


def _is_earlier(out: Path) -> bool:
    """Whether a run of a version that knew no Unicode form lies here; its texts stay as they are."""
    path = out / SETTINGS
    return path.is_file() and "normal_form" not in json.loads(path.read_text(encoding="utf-8"))


def _check_settings(
    out: Path, config: FineTuneConfig, model: str, train: LineSet, held: LineSet, restart: bool, processes: int = 1
) -> int:
    """Write down what a run is begun with, or compare with that; returns the parts of its steps."""
    check_writable(out)
    names = [[line.name, line.text] for line in (*train.lines, *held.lines)]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    # The processes may change within a run, what they share may not.
    values = {name: value for name, value in to_values(config).items() if name != "processes"}
    begun = None if restart else begun_parts(out)
    parts = begun or config.accumulation * processes
    wanted = {**values, "parts": parts, "model": model, "lines": len(names), "lines_sha256": digest}
    require_share(parts, processes)
    path = out / SETTINGS
    if restart:
        for name in ("checkpoints", "model"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / _RESULT).unlink(missing_ok=True)
    elif path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        # What earlier versions did not ask.
        found = {"normal_form": "none", "language": wanted["language"], "parts": parts} | kept
        changed = sorted(name for name in wanted if found.get(name) != wanted[name])
        if changed:
            told = ", ".join(f"{name} was {found.get(name)!r} and is {wanted[name]!r}" for name in changed)
            raise SettingsError(
                f"{out} holds a run with other settings: {told}.", "Use the earlier ones, another folder, or --restart."
            )
        if "normal_form" not in kept:
            return parts  # begun by an earlier version, it stays what it is
    write_atomic(path, json.dumps(wanted, indent=1).encode())
    return parts


def _stopper(stop: threading.Event | None) -> Callable[[int], None]:
    """What ends the reading of lines once `stop` is set."""

    def look(_done: int) -> None:
        if stop is not None and stop.is_set():
            raise Interrupted(
                "The fine-tuning was stopped while the held-out lines were read; what was learned before is saved.",
                "Run it again to resume.",
            )

    return look


def _evaluate(model: Path, held: LineSet, config: FineTuneConfig, stop: threading.Event | None) -> Evaluation:
    reader = Reader(model, precision="fp32" if config.precision == "fp32" else "auto", batch_size=config.batch_size)
    return evaluate(reader, held, normal_form=config.normal_form, progress=_stopper(stop))


def _evaluate_before(
    model: Path,
    held: LineSet,
    config: FineTuneConfig,
    report: TeachingReport,
    stop: threading.Event | None,
    ranks: Ranks,
) -> Evaluation:
    import torch
    import transformers

    transformers.set_seed(config.seed)  # of everything that comes, the new weights too
    report(TeachingProgress("before"))
    before = ranks.share(lambda: _evaluate(model, held, config, stop))
    torch.set_rng_state(ranks.share(torch.get_rng_state))
    return before


def _set_generation(network: Any, tokenizer: Any, start: int, end: int, lines: LineSet, longest: int) -> None:
    import transformers

    pad = tokenizer.pad_token_id
    network.config.decoder_start_token_id, network.config.eos_token_id, network.config.pad_token_id = start, end, pad
    lengths = [len(tokenizer.encode(line.text, add_special_tokens=False)) + 1 for line in lines.lines]
    # Half as long again as the longest line seen: a limit that is not a cut, but ends a loop.
    most = min(longest, max(16, math.ceil(1.5 * max(lengths))))
    network.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, pad_token_id=pad, use_cache=True, max_new_tokens=most
    )


def _choose_what_learns(network: Any, config: FineTuneConfig) -> Any:
    if config.method == "decoder":
        network.encoder.requires_grad_(False)
    elif config.method == "freeze":
        encoder = network.encoder
        layers = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
        encoder.embeddings.requires_grad_(False)
        for layer in layers[: config.frozen_layers]:
            layer.requires_grad_(False)
    elif config.method == "lora":
        peft = load_peft("The method lora", "Run: fastsd install trocr")
        settings = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules=_LORA_LAYERS,
            # New letters have no use as adapters: their vectors are trained themselves.
            modules_to_save=["embed_tokens", "output_projection"] if config.vocabulary != "keep" else None,
        )
        network = peft.get_peft_model(network, settings)
    return network


@contextlib.contextmanager
def _named_failures(out: Path) -> Iterator[None]:
    """Say what a full disk and a full GPU are; both come out of other packages in types of their own."""
    import torch
    from safetensors import SafetensorError

    try:
        with file_errors(out, "write to"):
            yield
    except torch.cuda.OutOfMemoryError as err:
        raise TrainingFailed(
            "The GPU's memory is too small for this training.",
            "Halve --batch-size and double --accumulation, or add --gradient-checkpointing; a run resumes only with "
            "the settings it was started with, so add --restart.",
        ) from err
    except (RuntimeError, SafetensorError) as err:
        if free_bytes(out) < _LEAST_FREE_BYTES:
            raise DiskFull(
                f"{out} could not be written: the disk is full.", "Free some space, and run it again."
            ) from err
        raise


def _write_model(network: Any, tokenizer: Any, checkpoint: Checkpoint, target: Path, config: FineTuneConfig) -> None:
    """Write the finished model beside its place, then move it there: a folder is whole or it is not there."""
    if config.method == "lora":
        network = network.merge_and_unload()
    with new_folder(target) as fresh:
        network.save_pretrained(fresh)
        if config.vocabulary == "keep":
            copy_files(checkpoint.folder, WORDS, fresh)
        else:
            tokenizer.save_pretrained(fresh)
        copy_files(checkpoint.folder, PICTURES, fresh)


def _relation(train: LineSet, held: LineSet) -> str:
    known = {(line.name, line.text) for line in train.lines}
    learned = any((line.name, line.text) in known for line in held.lines)
    return "that it was trained on (none were held out)" if learned else "that were held out"


def _write_card(made: FineTuneResult, config: FineTuneConfig, model: str, train: LineSet, held: LineSet) -> None:
    rows = "\n".join(f"| {name} | {value} |" for name, value in to_values(config).items())
    after = made.after.scores
    text = f"""{card_head(model)}# A handwriting recognition model, fine-tuned from {Path(model).name}

Character error rate on {len(held.lines)} lines {_relation(train, held)}: {100 * made.cer_before:.2f} % before,
**{100 * made.cer_after:.2f} %** after ({100 * after.cer.low:.2f} to {100 * after.cer.high:.2f} %,
95 % of bootstrap samples). Word error rate after: {100 * after.wer.rate:.2f} %. Learned from
{len(train.lines)} lines.
{"".join(f"{chr(10)}With its language model, {LanguageGain(**gain).in_words()}." for gain in made.language)}

| setting | value |
|---|---|
{rows}

Lines are read with `fastsd trocr read IMAGE --model FOLDER`, or with transformers' VisionEncoderDecoderModel.
"""
    write_atomic(made.path / "README.md", text.encode())
