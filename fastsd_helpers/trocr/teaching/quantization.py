"""Make an int8 model for the CPU, and say honestly what it costs: size, speed, errors, agreement, before and after."""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastsd_helpers import demo
from fastsd_helpers.errors import DatasetError, SettingsError
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.model_lookup import GRAPHS
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
from fastsd_helpers.trocr.model.openvino_engine import require_packages, write_graphs
from fastsd_helpers.trocr.pages.inputs import gather
from fastsd_helpers.trocr.reading.dataset import LineSet, read_lines
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.teaching.evaluation import judge, measured_lines
from fastsd_helpers.trocr.teaching.hub_upload import card_head
from fastsd_helpers.trocr.teaching.metrics import line_errors

__all__ = ["QuantizeResult", "Trial", "choose_trial", "quantize"]

_CALIBRATION_LINES = 128
_SAME = 0.002  # below a fifth of a point of difference the faster one is taken
_FEW = 30  # lines; with fewer, speed and agreement are measured on built-in ones too
_BUILT_IN = 24


@dataclass(frozen=True)
class Trial:
    """One way to hold the numbers: bytes on disk, lines per second here, errors, and how often the text is the same."""

    method: str
    bytes: int
    lines_per_second: float
    cer: float
    cer_low: float
    cer_high: float
    wer: float
    same_text: float  # part of the lines with the same text as in fp32, built-in lines included where there are few
    differs: float = 0.0  # characters that differ from what fp32 reads there, of all it reads


@dataclass(frozen=True)
class QuantizeResult:
    """The folder that was written, which method it has and why, and every trial: fp32 first.

    Nothing is written, `path` is None and `method` is fp32 where every int8 copy reads slower and worse.
    """

    path: Path | None
    method: str
    trials: tuple[Trial, ...]
    calibration_lines: int
    evaluation_lines: int
    sha256: str | None  # of the decoder's graph
    why: str = ""
    built_in_lines: int = 0  # on which speed and agreement were measured too


def quantize(
    model: str | Path, out: Path, *, evaluate_on: Any, calibrate_on: Any = None, overwrite: bool = False
) -> QuantizeResult:
    """Write an int8 copy of a model that opens like any model; the better of the methods tried.

    Args:
        model: recognition model: key, folder or Hub id.
        out: the folder to write.
        evaluate_on: ground truth to evaluate on: lines with their text.
        calibrate_on: lines (their text is not used), or a table of them, for the static method; left alone, only
            dynamic is tried.
        overwrite: replace `out`.

    Returns:
        `path`, `sha256`, the method taken, and of each method tried its bytes, CER, WER and lines a second.

    Raises:
        SettingsError: `out` is there already, and not to be replaced or no int8 model, or holds the model itself.
        DatasetError: an image is in both sets.
        DependencyMissing: openvino or nncf is not installed.
    """
    _require_replaceable(out, overwrite)
    measured = measured_lines(evaluate_on)
    calibration = _calibration_pictures(calibrate_on, measured) if calibrate_on is not None else []
    checkpoint = open_checkpoint(model, precision="fp32", device="cpu")
    if checkpoint.model is None:
        raise SettingsError(f"{checkpoint.folder.name} is int8 already.", "Name the model it was made from.")
    if checkpoint.folder.resolve().is_relative_to(out.resolve()):
        raise SettingsError(f"{out} holds the model itself.", "Name another folder.")
    require_packages()
    work = out.with_name(f".{out.name}.trials")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        more = _built_in_lines() if len(measured.lines) < _FEW else []
        if more:
            told = "%d lines are few to measure on, so speed and agreement are measured on %d built-in ones too."
            logger.info(told, len(measured.lines), len(more))
        texts, *trials = _try(checkpoint.folder, "fp32", measured, more, None)
        for method in ("dynamic", *["static"] * bool(calibration)):
            resized = [checkpoint.pixels.resize(picture) for picture in calibration]
            # One line a batch: ranges are measured per image, and a calibration set fits no memory as one.
            batches = [checkpoint.pixels.batch([values]) for values in resized] if method == "static" else None
            write_graphs(checkpoint, work / method, method=method, batches=batches)
            trials.append(_try(work / method, method, measured, more, texts)[1])
        chosen, why = choose_trial(trials)
        logger.info("%s", why)
        if chosen.method != "fp32":
            folder = work / chosen.method
            _write_report(folder, trials, chosen, why, len(calibration), measured, str(model))
            _put_in_place(folder, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    written = chosen.method != "fp32"
    path, sha256 = (out.absolute(), sha256_of(out / "openvino" / "decoder.bin")) if written else (None, None)
    return QuantizeResult(
        path, chosen.method, tuple(trials), len(calibration), len(measured.lines), sha256, why, len(more)
    )


def _require_replaceable(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise SettingsError(f"{out} is there already.", "Name another folder, or add --overwrite.")
    if out.exists() and not (out.is_dir() and ((out / GRAPHS / "about.json").is_file() or not any(out.iterdir()))):
        raise SettingsError(f"{out} is not an int8 model, so it is not replaced.", "Name another folder.")


def _put_in_place(folder: Path, out: Path) -> None:
    aside = out.with_name(f".{out.name}.before")
    if out.exists():  # a kill between the two renames leaves the old one aside
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    folder.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def choose_trial(trials: list[Trial]) -> tuple[Trial, str]:
    """Choose by reliability, then speed: (the trial, why it and no other in words).

    Reliable is what makes few errors and reads as the full model does: few lines say little about the errors, and
    agreement says more. A copy that is slower than the full model and less reliable too is of no use.
    """
    full, *copies = trials
    less = "less reliable (CER plus changed lines)"
    worse = [trial for trial in copies if trial.lines_per_second < full.lines_per_second and _loss(trial) > _loss(full)]
    useful = [trial for trial in copies if trial not in worse]
    told = [f"{trial.method} is slower than fp32 and {less}: {_in_words(trial, full)}" for trial in worse]
    if not useful:
        return full, f"fp32 stays, for no copy is worth having: {'; '.join(told)}."
    least = min(map(_loss, useful))
    chosen = max((trial for trial in useful if _loss(trial) <= least + _SAME), key=lambda trial: trial.lines_per_second)
    for trial in useful:
        if trial is not chosen and _loss(trial) > least + _SAME:
            told.append(f"{trial.method} is {less}: {_in_words(trial, full)}")
        elif trial is not chosen:
            told.append(f"{trial.method} is as reliable and slower: {_in_words(trial, full)}")
    return chosen, f"{'; '.join([f'{chosen.method} is taken: {_in_words(chosen, full)}', *told])}."


def _loss(trial: Trial) -> float:
    return trial.cer + trial.differs


def _in_words(trial: Trial, full: Trial) -> str:
    speed = trial.lines_per_second / full.lines_per_second
    return (
        f"{100 * trial.cer:.1f} % CER (fp32: {100 * full.cer:.1f} %), the same text as fp32 in "
        f"{100 * trial.same_text:.0f} % of the lines, {speed:.1f} times its speed"
    )


def _built_in_lines() -> list[Path]:
    folder = Path(demo.__file__).parent / "reader_samples"
    return [line.picture for line in read_lines(folder).lines][:_BUILT_IN] if folder.is_dir() else []


def _calibration_pictures(calibrate_on: Any, measured: LineSet) -> list[Any]:
    """Open the calibration images, and refuse a set that has an image of the evaluation in it."""

    def mark(picture: Any) -> str:
        return hashlib.sha256(picture.tobytes() + str(picture.size).encode()).hexdigest()

    kept_apart = {mark(item.picture): line.name for line in measured.lines
                  for item in gather([line.picture]) if item.picture is not None}  # fmt: skip
    if isinstance(calibrate_on, (str, Path)) and Path(calibrate_on).suffix.lower() in (".csv", ".tsv", ".jsonl"):
        calibrate_on = [line.picture for line in read_lines(calibrate_on).lines]
    pictures = []
    for item in islice((item for item in gather(calibrate_on) if item.picture is not None), _CALIBRATION_LINES):
        same = kept_apart.get(mark(item.picture))
        if same is not None:
            raise DatasetError(
                f"{item.name} is in the calibration set and, as {same}, in the evaluation set.",
                "Keep them apart: measured on what it was fitted to, int8 looks better than it is.",
            )
        pictures.append(item.picture)
    if not pictures:
        raise DatasetError("The calibration set has no image that can be used.", "Give a folder of images.")
    return pictures


def _try(
    folder: Path, method: str, measured: LineSet, more: list[Path], texts: list[str] | None
) -> tuple[list[str], Trial]:
    reader = Reader(folder, precision="fp32" if method == "fp32" else "int8", device="cpu")
    pictures = [line.picture for line in measured.lines] + more
    reader.read(pictures[: reader.batch_size])  # the first batch pays for buffers
    began = time.perf_counter()
    lines = reader.read(pictures)
    seconds = time.perf_counter() - began
    read, found = [line.text for line in lines], judge(measured, lines[: len(measured.lines)])
    parts = [folder / "openvino"] if method != "fp32" else [folder]
    endings = (".bin", ".safetensors", ".xml")
    size = sum(path.stat().st_size for part in parts for path in part.iterdir() if path.name.endswith(endings))
    full = texts or read
    same = sum(a == b for a, b in zip(read, full, strict=True)) / len(read)
    # Changes of letters against those of both texts, so that one that writes ten times as much is not ten times worse.
    changes = sum(line_errors(truth, text)[0] for truth, text in zip(full, read, strict=True))
    letters = max(1, sum(map(len, full)), sum(map(len, read)))
    cer = found.scores.cer
    trial = Trial(
        method, size, len(read) / seconds, cer.rate, cer.low, cer.high, found.scores.wer.rate, same, changes / letters
    )
    logger.info(
        "%s: CER %.2f %%, %.2f lines per second, %.1f MB", method, 100 * cer.rate, len(read) / seconds, size / 1e6
    )
    return read, trial


def _write_report(
    folder: Path, trials: list[Trial], chosen: Trial, why: str, calibration: int, measured: LineSet, name: str
) -> None:
    rows = "\n".join(
        f"| {trial.method} | {trial.bytes / 1e6:.1f} MB | {trial.lines_per_second:.2f} | {100 * trial.cer:.2f} % "
        f"({100 * trial.cer_low:.2f} to {100 * trial.cer_high:.2f}) | {100 * trial.wer:.2f} % "
        f"| {100 * trial.same_text:.1f} % |"
        for trial in trials
    )
    text = f"""{card_head(name)}# {Path(name).name}, int8 ({chosen.method})

{why[:1].upper()}{why[1:]}

Measured on {len(measured.lines)} lines that were not used for calibration ({calibration} others were).

| numbers | size | lines per second | CER | WER | same text as fp32 |
|---|---|---|---|---|---|
{rows}

Read with `fastsd trocr read IMAGE --model FOLDER`. It needs the package openvino and a CPU.
"""
    write_atomic(folder / "README.md", text.encode())
    about = {"trials": [trial.__dict__ for trial in trials], "chosen": chosen.method, "why": why}
    write_atomic(folder / "quantization.json", json.dumps(about, indent=1).encode())
