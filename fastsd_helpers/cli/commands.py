"""The commands: each calls one function of the library and says what came of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fastsd_helpers.cli.answers import Answer, open_session, pairs, plain, section, table
from fastsd_helpers.cli.flags import given_values
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.files import bytes_in, size_in_words

__all__ = [
    "delete",
    "export",
    "list_sessions",
    "new_session",
    "prepare",
    "run_demo",
    "sample",
    "show_session",
    "train",
]


def run_demo(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd demo`."""
    from fastsd_helpers.story import run_demo

    return _result(run_demo(chosen.out))


def _result(result: Any) -> Answer:
    data = plain(result)
    return Answer(data, pairs(data))


def new_session(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth new SESSION`."""
    from fastsd_helpers.sessions import Session

    session = Session.create(chosen.session, root=chosen.root)
    lines = [
        f"Created the session {session.name} in {session.folder}",
        f"Next: fastsd dreambooth prepare {session.name} --images FOLDER",
    ]
    return Answer({"session": session.name, "path": session.folder}, lines)


def list_sessions(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth list`."""
    from fastsd_helpers.drive import sessions_root
    from fastsd_helpers.sessions import list_sessions

    root, found = sessions_root(chosen.root), list_sessions(chosen.root)
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
    return f"{stage} {step} of {steps}" if stage else "not trained"


def show_session(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth show SESSION`."""
    from fastsd_helpers.sessions import list_sessions

    session = open_session(chosen)
    summary = next(item for item in list_sessions(session.folder.parent) if item.folder == session.folder)
    kept = [(path.name, bytes_in(path)) for path in _folders_in(session.checkpoints)]
    exported = [(path, path.stat().st_size) for path in _models_in(session.exports)]
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


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _models_in(folder: Path) -> list[Path]:
    # The model card and its image lie beside them.
    models = (".safetensors", ".ckpt")
    return sorted(path for path in folder.glob("*") if path.suffix in models and not path.name.startswith("."))


def prepare(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth prepare SESSION --images DIR`."""
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare

    config = PrepareConfig(**given_values(chosen, PrepareConfig))
    session = open_session(chosen)
    result = prepare(config, session)
    data = {"session": session.name, "path": session.folder, **plain(result)}
    return Answer(data, [*result.lines(), f"Next: fastsd dreambooth train {session.name}"])


def train(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth train SESSION`."""
    from fastsd_helpers.dreambooth.running.live import Journal
    from fastsd_helpers.dreambooth.running.out_of_memory import explain_shortage
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig

    # Made first, so that every bad setting is named before a folder or a model is looked for.
    config = DreamBoothConfig(**given_values(chosen, DreamBoothConfig))
    session = open_session(chosen)
    from fastsd_helpers.dreambooth.running import engine

    if chosen.dry_run:
        more = {"more_steps": chosen.more_steps, "more_text_encoder_steps": chosen.more_text_encoder_steps}
        plan = engine.plan(config, session, restart=chosen.restart, rehearse=True, **more)
        return Answer(
            {"session": session.name, "path": session.folder, **plain(plan)}, [*plan.lines(), "Nothing was trained."]
        )
    # Whoever watches from a notebook reads what the journal notes.
    with explain_shortage(session):
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


def sample(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth sample SESSION [--prompt TEXT]`."""
    from fastsd_helpers.dreambooth.results.learned import SampleConfig, sample
    from fastsd_helpers.files import sha256_of

    config = SampleConfig(**given_values(chosen, SampleConfig))
    session = open_session(chosen)
    result = sample(config, session)
    lines = [f"Generated after {result.stage} step {result.step}: {result.path}"]
    return Answer({"session": session.name, **plain(result), "sha256": sha256_of(result.path)}, lines)


def export(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth export SESSION`."""
    from fastsd_helpers.dreambooth.results.learned import ExportConfig, export

    config = ExportConfig(**given_values(chosen, ExportConfig))
    session = open_session(chosen)
    result = export(config, session)
    facts = {"size": size_in_words(result.bytes), "from": f"{result.stage} step {result.step}", "sha256": result.sha256}
    lines = [
        f"Written and read back: {result.path}",
        *pairs(facts),
    ]
    return Answer({"session": session.name, **plain(result)}, lines)


def delete(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth delete SESSION [--checkpoint NAME]`; on a terminal it asks first."""
    from fastsd_helpers.sessions import delete_checkpoint, delete_session, room_note

    session = open_session(chosen)
    what, folder = f"the session {session.name}{_with_photos(session.folder)}", session.folder
    if chosen.checkpoint:
        what, folder = f"the checkpoint {chosen.checkpoint} of {session.name}", session.checkpoints / chosen.checkpoint
        if folder not in _folders_in(session.checkpoints):
            delete_checkpoint(session, chosen.checkpoint)  # says which ones there are
    question = f"Delete {what} ({size_in_words(bytes_in(folder))})?"
    if not chosen.yes and not _agreed(question, folder):
        data = {"session": session.name, "path": folder, "deleted": False, "bytes": 0}
        return Answer(data, ["Nothing was deleted."])
    if chosen.checkpoint:
        freed = delete_checkpoint(session, chosen.checkpoint)
    else:
        freed = delete_session(session.name, root=chosen.root)
    note = room_note(session.folder.parent, checkpoint=chosen.checkpoint)
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
