"""The group `fastsd dreambooth`: each command calls one function of the library and says what came of it."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsd_helpers import drive, files, sessions
from fastsd_helpers.captions.prompts import DEFAULT_CAPTIONER
from fastsd_helpers.cli.answers import Answer, open_session, pairs, plain, section, table
from fastsd_helpers.cli.flags import command, command_group, given_values
from fastsd_helpers.dreambooth.dataset import captioning, preparing
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.results import hub_upload, learned
from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig
from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig
from fastsd_helpers.dreambooth.running import engine, out_of_memory
from fastsd_helpers.dreambooth.running.live import Journal
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.files import bytes_in
from fastsd_helpers.processes import LOST, rank_here, watched_over
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.folders import children
from fastsd_helpers.wording import label_of, size_in_words

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the group `dreambooth` to the parser."""
    group = command_group(commands, "dreambooth")
    command(group, "new", new_session)
    command(group, "list", list_sessions)
    command(group, "show", show_session)
    command(group, "prepare", prepare, PrepareConfig)
    command(group, "train", train, DreamBoothConfig)
    command(group, "sample", sample, SampleConfig)
    command(group, "export", export, ExportConfig)
    command(group, "delete", delete)
    command(group, "import", import_session)
    command(group, "caption", caption)
    command(group, "upload", upload, UploadConfig)


def new_session(chosen: argparse.Namespace) -> Answer:
    session = Session.create(chosen.session, root=chosen.root)
    lines = [
        f"Created the session {session.name} in {session.folder}",
        f"Next: fastsd dreambooth prepare {session.name} --images FOLDER",
    ]
    return Answer({"session": session.name, "path": session.folder}, lines)


def list_sessions(chosen: argparse.Namespace) -> Answer:
    root, found = drive.sessions_root(chosen.root), sessions.list_sessions(chosen.root)
    data = {"path": root, "sessions": found}
    if not found:
        return Answer(data, [f"No sessions in {root}.", "Create one: fastsd dreambooth new NAME"])
    rows = [
        [
            item.name,
            _progress(item.stage, item.step, item.steps),
            str(item.images),
            size_in_words(item.bytes),
            item.problem or "",
        ]
        for item in found
    ]
    return Answer(data, table(["SESSION", "PROGRESS", "PICTURES", "SIZE", ""], rows))


def _progress(stage: str | None, step: int, steps: int) -> str:
    return f"{label_of(stage)} {step} of {steps}" if stage else "not trained"


def show_session(chosen: argparse.Namespace) -> Answer:
    session = open_session(chosen)
    summary = next(item for item in sessions.list_sessions(session.folder.parent) if item.folder == session.folder)
    kept = [(path.name, bytes_in(path)) for path in children(session.checkpoints)]
    # The model card and its image lie beside them.
    models = (path for path in session.exports.glob("[!.]*") if path.suffix in (".safetensors", ".ckpt"))
    exported = [(path, path.stat().st_size) for path in sorted(models)]
    record = session.record
    data = {
        "session": session.name,
        "path": session.folder,
        "bytes": summary.bytes,
        "images": summary.images,
        "progress": record["progress"],
        "base_model": record["base_model"],
        "settings": record["settings"],
        "checkpoints": [{"name": name, "bytes": size} for name, size in kept],
        "exports": [{"path": path, "bytes": size} for path, size in exported],
        "notices": session.notices,
    }
    lines = [
        f"Session {session.name} in {session.folder}",
        *pairs(
            {
                "size": size_in_words(summary.bytes),
                "pictures": summary.images,
                "progress": _progress(summary.stage, summary.step, summary.steps),
                "base_model": record["base_model"].get("ref"),
            }
        ),
        *section("Settings", pairs(record["settings"])),
        *section("Checkpoints", [f"  {name}  {size_in_words(size)}" for name, size in kept]),
        *section("Finished models", [f"  {path}  {size_in_words(size)}" for path, size in exported]),
    ]
    return Answer(data, lines)


def prepare(chosen: argparse.Namespace) -> Answer:
    config = PrepareConfig(**given_values(chosen, PrepareConfig))
    session = open_session(chosen)
    result = preparing.prepare(config, session)
    data = {"session": session.name, "path": session.folder, **plain(result)}
    return Answer(data, [*result.lines(), f"Next: fastsd dreambooth train {session.name}"])


def train(chosen: argparse.Namespace) -> Answer:
    # Made first, so that every bad setting is named before a folder or a model is looked for.
    config = DreamBoothConfig(**given_values(chosen, DreamBoothConfig))
    session = open_session(chosen)
    if chosen.dry_run:
        more = {"more_steps": chosen.more_steps, "more_text_encoder_steps": chosen.more_text_encoder_steps}
        plan = engine.plan(config, session, restart=chosen.restart, rehearse=True, **more)
        return Answer(
            {"session": session.name, "path": session.folder, **plain(plan)}, [*plan.lines(), "Nothing was trained."]
        )
    # Whoever watches from a notebook reads what the journal notes.
    with out_of_memory.explain_shortage(session), _quiet_beside_the_first():
        result = engine.train(
            config,
            session,
            restart=chosen.restart,
            take_over=chosen.take_over,
            more_steps=chosen.more_steps,
            more_text_encoder_steps=chosen.more_text_encoder_steps,
            report=Journal(session),
        )
    lines = [
        f"Finished: {result.path}",
        *pairs(
            {
                "before and after": result.grid,
                "loss plot": result.loss_plot,
                "model card": result.model_card,
                "held-out loss": f"{result.loss_before:.4f} before, {result.loss_after:.4f} after",
                "steps": f"{result.steps}, {result.first_step} of them before" if result.first_step else result.steps,
                "seconds": round(result.seconds),
                "sha256": result.sha256,
            }
        ),
    ]
    return Answer({"session": session.name, **plain(result)}, lines)


@contextlib.contextmanager
def _quiet_beside_the_first() -> Iterator[None]:
    """Of several processes that train together the first one speaks; the others end without a word when it stops."""
    if rank_here() == 0:
        yield
        return
    logger.setLevel(logging.WARNING)
    try:
        yield
    except Interrupted:
        sys.exit(0)
    except TrainingFailed as err:
        if err.problem.startswith(LOST) and watched_over() is None:
            sys.exit(0)  # who has ended is known to the one that started them
        raise
    if watched_over() is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def sample(chosen: argparse.Namespace) -> Answer:
    config = SampleConfig(**given_values(chosen, SampleConfig))
    session = open_session(chosen)
    result = learned.sample(config, session)
    lines = [f"Generated after {label_of(result.stage)} step {result.step}: {result.path}"]
    return Answer({"session": session.name, **plain(result), "sha256": files.sha256_of(result.path)}, lines)


def export(chosen: argparse.Namespace) -> Answer:
    config = ExportConfig(**given_values(chosen, ExportConfig))
    session = open_session(chosen)
    result = learned.export(config, session)
    facts = {
        "size": size_in_words(result.bytes),
        "from": f"{label_of(result.stage)} step {result.step}",
        "sha256": result.sha256,
    }
    lines = [
        f"Written and read back: {result.path}",
        *pairs(facts),
    ]
    return Answer({"session": session.name, **plain(result)}, lines)


def delete(chosen: argparse.Namespace) -> Answer:
    session = open_session(chosen)
    what, folder = f"the session {session.name}{_with_photos(session.folder)}", session.folder
    if chosen.checkpoint:
        what, folder = f"the checkpoint {chosen.checkpoint} of {session.name}", session.checkpoints / chosen.checkpoint
        if folder not in children(session.checkpoints):
            sessions.delete_checkpoint(session, chosen.checkpoint)  # says which ones there are
    question = f"Delete {what} ({size_in_words(bytes_in(folder))})?"
    if not chosen.yes and not _agreed(question, folder):
        data = {"session": session.name, "path": folder, "deleted": False, "bytes": 0}
        return Answer(data, ["Nothing was deleted."])
    if chosen.checkpoint:
        freed = sessions.delete_checkpoint(session, chosen.checkpoint)
    else:
        freed = sessions.delete_session(session.name, root=chosen.root)
    note = sessions.room_note(session.folder.parent, checkpoint=chosen.checkpoint)
    lines = [f"Deleted {what}: {size_in_words(freed)}.", *filter(None, [note])]
    return Answer({"session": session.name, "path": folder, "deleted": True, "bytes": freed}, lines)


def _with_photos(folder: Path) -> str:
    """What of a person's own goes with a session, which may be nowhere else."""
    given = sum(path.is_file() for name in ("uploads", "originals") for path in (folder / name).rglob("[!.]*"))
    return f" with {given} of your photos and captions in it" if given else ""


def _agreed(question: str, folder: Path) -> bool:
    if not sys.stdin.isatty():
        raise SettingsError(
            f"{question} There is no terminal to ask for confirmation, so nothing was deleted.",
            "Add --yes to delete it.",
        )
    print(f"{question}\n  {folder}\nThis cannot be undone. [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def import_session(chosen: argparse.Namespace) -> Answer:
    result = sessions.import_session(chosen.session, source=chosen.source, root=chosen.root)
    data = {
        "session": result.session.name,
        "path": result.session.folder,
        "pictures": result.pictures,
        "captions": result.captions,
        "checkpoint": result.checkpoint,
        "notes": result.notes,
    }
    return Answer(data, [*result.lines(), f"Next: fastsd dreambooth prepare {result.session.name}"])


def caption(chosen: argparse.Namespace) -> Answer:
    session = open_session(chosen)
    changes = [_file_and_words(text) for text in chosen.set] + [(name, None) for name in chosen.clear]
    for name, _words in changes:  # all of them are looked up before the first one is written
        captioning.find_picture(session, name)
    for name, words in changes:
        captioning.set_caption(session, name, words)
    written = []
    if chosen.auto or chosen.captioner:
        written = captioning.caption_pictures(session, model=chosen.captioner or DEFAULT_CAPTIONER)
    rows = captioning.prompt_rows(session)
    changed = len(changes) + len(written)
    data = {"session": session.name, "path": session.captions, "changed": changed, "prompts": plain(rows)}
    cells = [
        [
            row.image,
            row.prompt,
            "-" if row.tokens is None else str(row.tokens),
            ", ".join(["held out"] * row.held_out + ["truncated"] * row.truncated),
        ]
        for row in rows
    ]
    return Answer(data, table(["PICTURE", "EXACT PROMPT", "TOKENS", ""], cells))


def _file_and_words(text: str) -> tuple[str, str]:
    name, equals, words = text.partition("=")
    if not equals or not name or not words.strip():
        raise SettingsError(
            f"--set is {text!r}; it must be FILE=WORDS.", "Write for example: --set 'dog (1).png=zib dog on a beach'"
        )
    return name, words


def upload(chosen: argparse.Namespace) -> Answer:
    config = UploadConfig(**given_values(chosen, UploadConfig))
    result = hub_upload.upload(config, open_session(chosen))
    lines = [
        f"Uploaded and compared: {result.url}",
        *pairs({"private": result.private, "files": result.files, "sha256": result.sha256}),
    ]
    return Answer({"session": chosen.session, "path": result.url, **plain(result)}, lines)
