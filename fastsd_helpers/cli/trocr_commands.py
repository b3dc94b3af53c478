"""The commands `fastsd trocr ...`: read, evaluate, embed, fine-tune, quantize and share a recognition model."""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsd_helpers import background, files, processes
from fastsd_helpers.cli.answers import Answer, now_and_then, pairs, plain, section, table
from fastsd_helpers.cli.flags import add_flags, command, given_values, subcommands
from fastsd_helpers.cli.sharing import add_link_flags, link_settings
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.files import size_in_words
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages import inputs, page_reader
from fastsd_helpers.trocr.reading import attention, dataset, embeddings, folder, serve
from fastsd_helpers.trocr.reading.reader import ReadConfig, Reader
from fastsd_helpers.trocr.reading.serve import ServeConfig
from fastsd_helpers.trocr.teaching import evaluation, finetuning, progress, quantization
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig

__all__ = ["DEFAULT_READER", "add_trocr"]

DEFAULT_READER = "trocr-base-handwritten"


def add_trocr(commands: Any) -> None:
    """Add the group `trocr` to the parser."""
    group = subcommands(
        commands.add_parser("trocr", help="handwritten text recognition (TrOCR): read, fine-tune, evaluate, quantize")
    )
    reading = command(group, "read", read, "read images of lines or pages, folders of them, PDFs or links")
    reading.add_argument("images", metavar="IMAGE", nargs="+", help="image, folder, PDF or link")
    reading.add_argument("--out", metavar="PATH", type=Path, help="output file; for an input folder, an output folder")
    reading.add_argument(
        "--format", choices=("txt", "json", "csv", "jsonl"), help="output format (default: from the ending of --out)"
    )
    reading.add_argument(
        "--pages", action="store_true", help="the images are whole pages: find their lines first (segmentation)"
    )
    reading.add_argument(
        "--attention",
        metavar="DIR",
        type=Path,
        help="also write heat maps of the cross-attention: where the model looked for each character",
    )
    reading.add_argument("--shard", metavar="I/N", help="read shard I of N of a folder (run all N with the same --out)")
    _add_model(reading)
    add_flags(reading, ReadConfig)
    judging = command(group, "evaluate", evaluate, "evaluate a model on ground truth: CER and WER")
    judging.add_argument("data", metavar="DATA", help="ground truth: folder or table of lines with their text")
    _add_model(judging)
    add_flags(judging, ReadConfig)
    embedding = command(group, "embed", embed, "embeddings: write the encoder's vectors of lines to a file")
    embedding.add_argument("images", metavar="IMAGE", nargs="+", help="image, folder, PDF or link")
    embedding.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder for the embeddings")
    embedding.add_argument(
        "--pool",
        choices=("none", "mean", "columns"),
        default="mean",
        help="pooling: one embedding per line (mean), per column of patches, or per patch token (none) (default: mean)",
    )
    _add_model(embedding)
    _add_making(group)


def _add_making(group: Any) -> None:
    tuning = command(
        group, "finetune", finetune, "fine-tune a model on a handwriting or a script, or resume an interrupted run"
    )
    tuning.add_argument("data", metavar="DATA", help="ground truth: folder or table of lines with their text")
    tuning.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the run and its result")
    tuning.add_argument("--held-out-data", metavar="DATA", help="validation set (default: a share of DATA)")
    tuning.add_argument("--restart", action="store_true", help="start again from step 0, discarding the run in --out")
    _add_model(tuning)
    add_flags(tuning, FineTuneConfig)
    shrinking = command(
        group, "quantize", quantize, "quantize a model to int8 for the CPU and measure the accuracy loss"
    )
    shrinking.add_argument("model", metavar="MODEL", help="recognition model: key, folder or Hub id")
    shrinking.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    shrinking.add_argument(
        "--evaluate", metavar="DATA", required=True, help="ground truth to evaluate on: lines with their text"
    )
    shrinking.add_argument(
        "--calibrate",
        metavar="DIR",
        help="calibration set for int8 activations (static quantization): other lines than those of --evaluate",
    )
    shrinking.add_argument("--overwrite", action="store_true", help="replace OUT")
    sharing = command(group, "serve", share, "web page that reads lines and pages, with a login")
    _add_model(sharing)
    add_flags(sharing, ServeConfig)
    add_link_flags(sharing)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_READER, help=f"recognition model: key, folder or Hub id (default: {DEFAULT_READER})"
    )


def _open_reader(chosen: argparse.Namespace) -> Any:
    given = given_values(chosen, ReadConfig)
    ReadConfig(**given)  # names every bad setting before a model is looked for
    return Reader(chosen.model, **given)


def _progress() -> Callable[..., None]:
    began = time.monotonic()

    def tell(done: int, of: int | None = None) -> None:
        per_second = done / (time.monotonic() - began)
        logger.info("%d%s lines, %.1f per second", done, f" of {of}" if of else "", per_second)

    return now_and_then(tell)


def read(chosen: argparse.Namespace) -> Answer:
    shard = folder.parse_shard(chosen.shard)
    only = Path(chosen.images[0]).expanduser() if len(chosen.images) == 1 else None
    source = only if only is not None and only.is_dir() and chosen.out is not None and not chosen.out.suffix else None
    whole_folder = source is not None
    if chosen.pages and whole_folder:
        raise SettingsError("--pages writes one file.", "Give --out a name that ends in .json, .csv or .txt.")
    if chosen.shard and not whole_folder:
        raise SettingsError(
            "--shard needs one input folder and an output folder.", "Give one input folder, and --out with another."
        )
    if chosen.attention and (chosen.pages or whole_folder):
        raise SettingsError(
            "--attention is for images of single lines.", "Leave out --pages, or give --out a file's name."
        )
    format = chosen.format or (chosen.out.suffix.lstrip(".").lower() if chosen.out else "") or "jsonl"
    known = ", .".join(folder.FORMATS)
    if format not in folder.FORMATS:
        raise SettingsError(f"--out ends in .{format}.", f"Choose one of .{known}, or add --format.")
    if chosen.out and not whole_folder:
        if chosen.out.is_dir():
            raise SettingsError(f"{chosen.out} is a folder.", f"Give --out a name that ends in .{known}.")
        files.check_writable(chosen.out.absolute().parent)
    reader = _open_reader(chosen)
    began = time.monotonic()
    data: dict[str, Any]
    if source is not None:
        result = folder.read_folder(reader, source, chosen.out, shard=shard, format=format, progress=_progress())
        seconds = time.monotonic() - began
        data = {**plain(result), "path": result.path or chosen.out, "seconds": seconds}
        data["sha256"] = files.sha256_of(result.path) if result.path else None
        told = f"All shards read: {result.path}" if result.path else "Other shards are still missing."
        return Answer(data, [told, *pairs({name: data[name] for name in ("pictures", "read_now", "problems")})])
    if chosen.pages:
        pages = list(page_reader.read_pages(reader, chosen.images))
        lines = [line for page in pages for line in (page.lines or _as_line(page))]
    else:
        lines = reader.read(chosen.images, progress=_progress())
    seconds = time.monotonic() - began
    drawn = _draw_attention(reader, chosen.images, chosen.attention) if chosen.attention else []
    rows = [line.as_row() for line in lines]
    data = {"lines": rows, "seconds": seconds, "reader": reader.checkpoint.folder.name}
    if chosen.out:
        files.write_atomic(chosen.out, folder.rows_to_bytes(rows, format))
        data |= {"path": chosen.out, "sha256": files.sha256_of(chosen.out)}
    if drawn:
        data["attention"] = drawn
    texts = [f"{line.text}" if not line.problem else f"[{line.problem}]" for line in lines]
    return Answer(data, [f"Written: {chosen.out}"] if chosen.out else texts)


def _draw_attention(reader: Any, images: list[str], folder: Path) -> list[Path]:
    """Draw where the model looked, an image a line; returns them in the lines' order."""
    files.check_writable(folder)
    drawn = []
    for place, item in enumerate(inputs.gather(images), 1):
        if item.picture is None:
            continue
        sheet = io.BytesIO()
        attention.draw_attention(item.picture, attention.find_attention(reader, item.picture)).save(sheet, "PNG")
        drawn.append(folder / f"{place:04d}-{Path(item.name).stem}.png")
        files.write_atomic(drawn[-1], sheet.getvalue())
    return drawn


def _as_line(page: Any) -> list[Any]:
    """A page without lines as one line that says why."""
    return [Line("", 0.0, name=page.name, problem=page.problem or f"{page.name} has no lines.")]


def evaluate(chosen: argparse.Namespace) -> Answer:
    lines = dataset.read_lines(chosen.data)
    reader = _open_reader(chosen)
    began = time.monotonic()
    result = evaluation.evaluate(reader, lines, progress=_progress())
    seconds = time.monotonic() - began
    told: dict[str, Any] = {name: f"{_percent(score.rate)} ({_percent(score.low)} to {_percent(score.high)})"
            for name, score in (("CER", result.scores.cer), ("WER", result.scores.wer),
                                ("CER normalised", result.scores.cer_normalised),
                                ("WER normalised", result.scores.wer_normalised))}  # fmt: skip
    told |= {"exact lines": _percent(result.scores.exact), "lines": result.scores.lines}
    told |= {"left out": len(result.left_out), "looped": result.looped, "cut": result.cut}
    worst = [f"  {row['name']}: {row['text']!r} read as {row['read']!r}" for row in result.worst[:5]]
    data = {**plain(result), "data": lines.report(), "seconds": seconds}
    return Answer(data, [*pairs(told), *section("Lines with the most errors", worst)])


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def embed(chosen: argparse.Namespace) -> Answer:
    reader = Reader(chosen.model)
    result = embeddings.write_embeddings(reader, chosen.images, chosen.out, pool=chosen.pool, progress=_progress())
    told = {"shape": " x ".join(map(str, result.shape)), "size": size_in_words(result.path.stat().st_size)}
    return Answer(plain(result), [f"Written: {result.path}", *pairs({**told, "left out": len(result.left_out)})])


def finetune(chosen: argparse.Namespace) -> Answer:
    config = FineTuneConfig(**given_values(chosen, FineTuneConfig))
    # Whoever watches from a notebook reads what is noted.
    # Processes that train together must not end at different steps: there a signal ends them at once, as any program.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    with processes.stop_signals() if alone else contextlib.nullcontext() as stop:
        result = finetuning.finetune(
            config, chosen.data, chosen.out, model=chosen.model, held_out=chosen.held_out_data, restart=chosen.restart,
            report=progress.note_progress(background.local_folder(chosen.out) / progress.JOURNAL), stop=stop,
        )  # fmt: skip
    told = {
        "CER": f"{_percent(result.cer_before)} before, {_percent(result.cer_after)} after",
        "lines": f"{result.train_lines} for training, {result.held_out_lines} for validation",
        "steps": result.steps,
    }
    weights = sorted(result.path.glob("*.safetensors"))
    data = {**plain(result), "sha256": files.sha256_of(weights[0]) if weights else None}
    return Answer(data, [f"Finished: {result.path}", *pairs(told)])


def quantize(chosen: argparse.Namespace) -> Answer:
    result = quantization.quantize(
        chosen.model, chosen.out, evaluate_on=chosen.evaluate, calibrate_on=chosen.calibrate, overwrite=chosen.overwrite
    )
    rows = [
        [trial.method, size_in_words(trial.bytes), f"{trial.lines_per_second:.2f}", _percent(trial.cer),
         _percent(trial.same_text)]
        for trial in result.trials
    ]  # fmt: skip
    head = ["NUMBERS", "SIZE", "LINES/S", "CER", "SAME TEXT"]
    told = f"Written ({result.method}): {result.path}" if result.path else "Nothing was written."
    return Answer(plain(result), [told, result.why, *table(head, rows)])


def share(chosen: argparse.Namespace) -> Answer:
    config = ServeConfig(**given_values(chosen, ServeConfig))
    link = link_settings(chosen, config.share)
    serve.require_servable(config, link)  # before a model is loaded for it
    with serve.serve(Reader(chosen.model), config, tunnel=link) as served:
        # The only place where the password is ever shown; the log never has it.
        print(json.dumps(served.about()) if chosen.json else served.block(), file=sys.stderr, flush=True)
        served.wait()
    return Answer({"url": served.url}, [])
