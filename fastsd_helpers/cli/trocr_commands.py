"""The commands `fastsd trocr ...`: read, evaluate, embed, fine-tune, quantize and share a recognition model."""

import argparse
import dataclasses
import functools
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsd_helpers import background, files, processes
from fastsd_helpers.cli.answers import Answer, now_and_then, pairs, plain, section, table
from fastsd_helpers.cli.flags import command, command_group, given_values
from fastsd_helpers.cli.sharing import link_settings
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.exports import formats
from fastsd_helpers.trocr.ground_truth.labels import texts_of
from fastsd_helpers.trocr.language.ngram import learn_characters
from fastsd_helpers.trocr.pages import inputs
from fastsd_helpers.trocr.reading import attention, cluster, dataset, embeddings, folder, rows, serve, transcription
from fastsd_helpers.trocr.reading.processes import Division, read_divided, read_into_session
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.reading.results import is_remote, parse_place
from fastsd_helpers.trocr.reading.serve import ServeConfig
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.reading.settings import ReadConfig
from fastsd_helpers.trocr.teaching import evaluation, finetuning, hub_upload, progress, quantization, report
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig
from fastsd_helpers.trocr.teaching.hub_upload import ReaderUploadConfig
from fastsd_helpers.trocr.teaching.language import LanguageGain, choose_weights
from fastsd_helpers.wording import size_in_words

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the group `trocr` to the parser."""
    group = command_group(commands, "trocr")
    command(group, "read", read, ReadConfig)
    command(group, "evaluate", evaluate, ReadConfig)
    command(group, "embed", embed)
    command(group, "finetune", finetune, FineTuneConfig)
    command(group, "language", language)
    command(group, "quantize", quantize)
    command(group, "upload", upload, ReaderUploadConfig)
    command(group, "serve", share, ServeConfig)


def _open_reader(chosen: argparse.Namespace) -> Any:
    given = given_values(chosen, ReadConfig)
    ReadConfig(**given)  # names every bad setting before a model is looked for
    return Reader(chosen.model, **given)


def _progress(what: str = "lines") -> Callable[..., None]:
    began = time.monotonic()

    def tell(done: int, of: int | None = None) -> None:
        per_second = done / (time.monotonic() - began)
        logger.info("%d%s %s, %.1f per second", done, f" of {of}" if of else "", what, per_second)

    return now_and_then(tell)


def read(chosen: argparse.Namespace) -> Answer:
    chosen.out = parse_place(chosen.out) if chosen.out else None
    if chosen.engine == "ray" or is_remote(chosen.out):
        return _transcribe_on_ray(chosen)
    if chosen.address or chosen.workers or chosen.cores:
        raise SettingsError("--address, --workers and --cores are for workers.", "Add --engine ray, or leave them out.")
    parts = Division(chosen.words, chosen.out, chosen.model, chosen.processes, folder.parse_shard(chosen.shard))
    _least_confidence(chosen)
    if chosen.session:
        return _read_into_session(chosen, parts)
    only = Path(chosen.images[0]).expanduser() if len(chosen.images) == 1 else None
    into = chosen.out if chosen.out is not None and _is_folder(chosen.out, chosen.format) else None
    source = only if only is not None and only.is_dir() and into is not None else None
    if into is not None and not _is_row_run(chosen.format, source, into):
        return _transcribe(chosen, parts)
    if source is None and (chosen.shard or (chosen.processes or 1) > 1):
        flag = "--shard" if chosen.shard else "--processes"
        raise SettingsError(f"{flag} needs an output folder.", "Name a folder with --out, and --format.")
    if chosen.attention and (chosen.pages or source is not None):
        raise SettingsError(
            "--attention is for images of single lines.", "Leave out --pages, or give --out a file's name."
        )
    format = chosen.format or (chosen.out.suffix.lstrip(".").lower() if chosen.out else "") or "jsonl"
    known = ", .".join(folder.FORMATS)
    if format not in folder.FORMATS:
        raise SettingsError(
            f"--out ends in .{format}." if not chosen.format else f"--format {format} writes into a folder.",
            f"Choose one of .{known}, or name a folder with --out and add --format.",
        )
    if chosen.out and source is None:
        if chosen.out.is_dir():
            raise SettingsError(f"{chosen.out} is a folder.", f"Give --out a name that ends in .{known}.")
        files.check_writable(chosen.out.absolute().parent)
    if source is not None:
        return _read_folder(chosen, parts, source, format)
    reader = _open_reader(chosen)
    began = time.monotonic()
    data: dict[str, Any]
    lines, unsure = _read_all(reader, chosen)
    seconds = time.monotonic() - began
    drawn = _draw_attention(reader, chosen.images, chosen.attention) if chosen.attention else []
    read_rows = [line.as_row() for line in lines]
    data = {"lines": read_rows, "seconds": seconds, "reader": reader.checkpoint.folder.name, "unsure": unsure}
    if chosen.out:
        least = chosen.least_confidence if format == "txt" else 0.0
        shown = [row | {"text": ""} if row["confidence"] < least else row for row in read_rows]
        files.write_atomic(chosen.out, folder.rows_to_bytes(shown, format))
        data |= {"path": chosen.out, "sha256": files.sha256_of(chosen.out)}
    if drawn:
        data["attention"] = drawn
    least = chosen.least_confidence
    texts = [f"[{line.problem}]" if line.problem else line.text if line.confidence >= least else "" for line in lines]
    return Answer(data, [*([f"Written: {chosen.out}"] if chosen.out else texts), *_unsure(unsure, least)])


def _read_into_session(chosen: argparse.Namespace, parts: Division) -> Answer:
    if chosen.out or chosen.format or chosen.shard or chosen.attention:
        raise SettingsError("--out, --format, --shard and --attention do not go with --session.", "Leave them out.")
    session = ReadingSession(chosen.session)
    how: dict[str, Any] = {"pages": _pages(chosen), "order": chosen.order, "progress": _progress()}
    into = dataclasses.replace(parts, out=session.folder)
    read_into_session(session, chosen.images, into, functools.partial(_open_reader, chosen), **how)
    text, rows_read = session.folder / "text.txt", session.lines()
    unread = sum(line.read.problem is not None for line in rows_read)
    data = {"path": text, "sha256": files.sha256_of(text), "lines": len(rows_read) - unread, "problems": unread}
    return Answer(data, [f"Written: {text}", *pairs({name: data[name] for name in ("lines", "problems")})])


def _read_folder(chosen: argparse.Namespace, parts: Division, source: Path, format: str) -> Answer:
    began = time.monotonic()

    def work(shard: tuple[int, int], tell: Callable[..., None]) -> folder.BulkResult:
        return folder.read_folder(
            _open_reader(chosen), source, chosen.out, shard=shard, format=format, pages=_pages(chosen),
            order=chosen.order, progress=tell,
        )  # fmt: skip

    shares = functools.partial(folder.count_parts, source, chosen.out)
    done = read_divided(parts, shares, work, folder.add_results, _progress())
    data = done if isinstance(done, dict) else {**plain(done), "path": done.path or chosen.out}
    whole = data["path"] if Path(data["path"]).is_file() else None
    data |= {"seconds": time.monotonic() - began, "sha256": files.sha256_of(Path(whole)) if whole else None}
    told = f"All shards read: {whole}" if whole else "Other shards are still missing."
    return Answer(data, [told, *pairs({name: data[name] for name in ("pictures", "read_now", "problems")})])


def _least_confidence(chosen: argparse.Namespace) -> float:
    least: float = chosen.least_confidence
    if not 0 <= least <= 1:
        raise SettingsError(f"--least-confidence is {least}.", "Give a number from 0 to 1.")
    return least


def _pages(chosen: argparse.Namespace) -> str:
    return {True: "pages", False: "lines", None: "auto"}[chosen.pages]


def _is_folder(out: Path, format: str | None) -> bool:
    """Whether --out names a folder: it has no ending, or is one and more than today's one file is asked for."""
    several = format is not None and ("," in format or format in (*formats.PER_PAGE, "pdf"))
    return not out.suffix or (out.is_dir() and (several or format is None)) or several


def _is_row_run(format: str | None, source: Path | None, out: Path) -> bool:
    """Whether rows go into one lines.jsonl of a folder, or, where such a run was begun, into lines.<format>."""
    return (source is None and format is None) or format == "jsonl" or (
        source is not None and (format is None or (format in folder.FORMATS and folder.is_begun(out)))
    )  # fmt: skip


def _unsure(count: int, least: float) -> list[str]:
    return [f"{count} lines are less sure than {least:g}: their text is left out of txt and pdf."] if count else []


def _read_all(reader: Any, chosen: argparse.Namespace) -> tuple[list[Any], int]:
    """The lines of all inputs, pages taken apart, and how many are too unsure."""
    lines = []
    tell = _progress()
    for found in rows.read_items(reader, inputs.gather(chosen.images), _pages(chosen), order=chosen.order):
        lines += found
        tell(len(lines))
    return lines, sum(bool(line.text) and line.confidence < chosen.least_confidence for line in lines)


def _transcribe(chosen: argparse.Namespace, parts: Division) -> Answer:
    if chosen.attention:
        raise SettingsError("--attention is for images of single lines.", "Give --out a file's name.")
    wanted = formats.parse_formats(chosen.format or "txt")
    formats.require_formats(wanted)
    config = transcription.TranscribeConfig(wanted, _pages(chosen), chosen.order, chosen.least_confidence)
    began = time.monotonic()
    what: tuple[list[str], Path, transcription.TranscribeConfig] = (chosen.images, chosen.out, config)

    def work(shard: tuple[int, int], tell: Callable[..., None]) -> transcription.Transcribed:
        joined = processes.watched_over() is not None  # after shards that the user starts nobody joins them
        return transcription.transcribe(_open_reader(chosen), *what, shard=shard, joined=joined, progress=tell)

    add = functools.partial(transcription.join_pages, *what)
    shares = functools.partial(transcription.count_shares, chosen.images, chosen.out)
    done = read_divided(parts, shares, work, add, _progress("pages"))
    if isinstance(done, dict):
        known = {item.name for item in dataclasses.fields(transcription.Transcribed)}
        done = transcription.Transcribed(chosen.out, **{name: done[name] for name in known & done.keys()})
    return _transcribed(done, chosen.out, chosen.least_confidence, time.monotonic() - began)


def _transcribe_on_ray(chosen: argparse.Namespace) -> Answer:
    if chosen.engine != "ray":
        raise SettingsError(f"{chosen.out} is no folder of this machine.", "Add --engine ray, or mount it.")
    if chosen.out is None or (not is_remote(chosen.out) and not _is_folder(chosen.out, chosen.format)):
        raise SettingsError("--engine ray writes into a folder.", "Name one with --out, and --format.")
    if chosen.shard or chosen.attention or chosen.processes:
        raise SettingsError("--shard, --processes and --attention do not go with --engine ray.", "Leave them out.")
    given = given_values(chosen, ReadConfig)
    ReadConfig(**given)
    config = transcription.TranscribeConfig(
        formats.parse_formats(chosen.format or "txt"), _pages(chosen), chosen.order, _least_confidence(chosen)
    )
    where = cluster.ClusterConfig(chosen.address, chosen.workers or 0, chosen.cores or 0)
    began = time.monotonic()
    result = cluster.transcribe_on_ray(
        chosen.model, given, chosen.images, chosen.out, config, where, progress=_progress("pages")
    )
    return _transcribed(result, chosen.out, chosen.least_confidence, time.monotonic() - began)


def _transcribed(result: transcription.Transcribed, out: Any, least: float, seconds: float) -> Answer:
    counts = {name: getattr(result, name) for name in ("inputs", "pages", "lines", "read_now", "read_before", "unsure")}
    data = {**counts, "problems": result.problems, "files": result.files, "path": out}
    told = {**counts, "problems": len(result.problems), "files": len(result.files)}
    return Answer(data | {"seconds": seconds}, [f"Written: {out}", *pairs(told), *_unsure(result.unsure, least)])


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


def evaluate(chosen: argparse.Namespace) -> Answer:
    if chosen.report:
        files.check_writable(chosen.report.absolute().parent)
    lines = None if chosen.align else dataset.read_lines(chosen.data)
    reader = _open_reader(chosen)
    lines = lines or dataset.align_lines(reader, chosen.data, chosen.align)
    began = time.monotonic()
    result = evaluation.evaluate(reader, lines, normal_form=chosen.normal_form, progress=_progress())
    seconds = time.monotonic() - began
    told: dict[str, Any] = {name: f"{_percent(score.rate)} ({_percent(score.low)} to {_percent(score.high)})"
            for name, score in (("CER", result.scores.cer), ("WER", result.scores.wer),
                                ("CER normalised", result.scores.cer_normalised),
                                ("WER normalised", result.scores.wer_normalised))}  # fmt: skip
    told |= {"exact lines": _percent(result.scores.exact), "lines": result.scores.lines}
    told |= {"left out": len(result.left_out), "looped": result.looped, "cut": result.cut}
    worst = [f"  {row['name']}: {row['text']!r} read as {row['read']!r}" for row in result.worst[:5]]
    data = {**result.summary(), **plain(result), "data": lines.report(), "seconds": seconds}
    confused = [f"  {row['truth']!r} read as {row['read']!r}: {row['count']}" for row in result.confusions[:5]]
    told_of = [*section("Lines with the most errors", worst), *section("Most frequent confusions", confused)]
    if chosen.report:
        title = f"{Path(chosen.data).name}, read with {reader.checkpoint.folder.name}"
        data["path"] = report.write_report(chosen.report, result, lines, title=title)
        told_of.append(f"Written: {chosen.report}")
    return Answer(data, [*pairs(told), *told_of])


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def embed(chosen: argparse.Namespace) -> Answer:
    reader = Reader(chosen.model)
    result = embeddings.write_embeddings(reader, chosen.images, chosen.out, pool=chosen.pool, progress=_progress())
    told = {"shape": " x ".join(map(str, result.shape)), "size": size_in_words(result.path.stat().st_size)}
    return Answer(plain(result), [f"Written: {result.path}", *pairs({**told, "left out": len(result.left_out)})])


def finetune(chosen: argparse.Namespace) -> Answer:
    config = FineTuneConfig(**given_values(chosen, FineTuneConfig))
    data: Any = chosen.data
    if chosen.align:
        data, pages = chosen.out / "aligned.jsonl", data
        dataset.align_lines(Reader(chosen.model), pages, chosen.align, keep=data)
    with processes.stop_signals() as stop:  # whoever watches from a notebook reads what is noted
        result = finetuning.finetune(
            config, data, chosen.out, model=chosen.model, held_out=chosen.held_out_data, restart=chosen.restart,
            texts=chosen.text or (), stop=stop,
            report=progress.note_progress(background.local_folder(chosen.out) / progress.JOURNAL),
        )  # fmt: skip
    told = {
        "CER": f"{_percent(result.cer_before)} before, {_percent(result.cer_after)} after",
        "lines": f"{result.train_lines} for training, {result.held_out_lines} for validation",
        "steps": progress.steps_in_words(result.steps, result.curve),
    }
    for gain in (LanguageGain(**values) for values in result.language):
        name, _colon, figures = gain.in_words().partition(": ")
        told[f"language model, {name}"] = figures
    weights = sorted(result.path.glob("*.safetensors"))
    data = {**plain(result), "sha256": files.sha256_of(weights[0]) if weights else None}
    return Answer(data, [f"Finished: {result.path}", *pairs(told)])


def language(chosen: argparse.Namespace) -> Answer:
    files.check_writable(chosen.out.absolute().parent)
    if chosen.out.is_dir():
        raise SettingsError(f"{chosen.out} is a folder.", "Give --out a file's name that ends in .safetensors.")
    model = learn_characters(texts_of(chosen.text), order=chosen.order)
    told = {"characters": model.about["characters"], "n-grams": len(model.keys), "order": model.order}
    gains: tuple[LanguageGain, ...] = ()
    if chosen.evaluate:
        model, gains = choose_weights(
            Reader(chosen.model), model, dataset.read_lines(chosen.evaluate), progress=_progress()
        )
    told |= {name: figures for name, _colon, figures in (gain.in_words().partition(": ") for gain in gains)}
    helps = not chosen.evaluate or any(gain.weight for gain in gains)
    if helps:
        model.save(chosen.out)
    data = {**told, "gains": [plain(gain) for gain in gains], "path": chosen.out if helps else None}
    data["sha256"] = files.sha256_of(chosen.out) if helps else None
    line = f"Written: {chosen.out}" if helps else "Nothing was written: it does not lower the CER of these lines."
    return Answer(data, [line, *pairs(told)])


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


def upload(chosen: argparse.Namespace) -> Answer:
    result = hub_upload.upload(ReaderUploadConfig(**given_values(chosen, ReaderUploadConfig)), chosen.model)
    lines = [f"Uploaded and compared: {result.url}",
             *pairs({"private": result.private, "files": result.files, "sha256": result.sha256})]  # fmt: skip
    return Answer({"model": chosen.model, "path": result.url, **plain(result)}, lines)


def share(chosen: argparse.Namespace) -> Answer:
    config = ServeConfig(**given_values(chosen, ServeConfig))
    link = link_settings(chosen, config.share)
    serve.require_servable(config, link)  # before a model is loaded for it
    with serve.serve(Reader(chosen.model), config, tunnel=link) as served:
        # The only place where the password is ever shown; the log never has it.
        print(json.dumps(served.about()) if chosen.json else served.block(), file=sys.stderr, flush=True)
        served.wait()
    return Answer({"url": served.url}, [])
