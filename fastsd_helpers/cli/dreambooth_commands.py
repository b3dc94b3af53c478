"""The group `fastsd dreambooth`, and its commands around the training: import, captions, upload."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsd_helpers.cli.answers import Answer, open_session, pairs, plain, table
from fastsd_helpers.cli.commands import (
    delete,
    export,
    list_sessions,
    new_session,
    prepare,
    sample,
    show_session,
    train,
)
from fastsd_helpers.cli.flags import add_flags, add_root, command, given_values, subcommands
from fastsd_helpers.errors import SettingsError

__all__ = ["add_dreambooth", "caption", "import_session", "upload"]


def add_dreambooth(commands: Any) -> None:
    """Add the group `dreambooth` to the parser."""
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig

    group = subcommands(
        commands.add_parser("dreambooth", help="DreamBooth: fine-tune Stable Diffusion on a subject from 5-30 photos")
    )
    _session_command(group, "new", new_session, "create a session: the folder that keeps everything about one subject")
    listing = command(group, "list", list_sessions, "list the sessions with progress and disk usage")
    add_root(listing)
    _session_command(group, "show", show_session, "show a session: progress, settings, images, checkpoints")
    preparing = _session_command(group, "prepare", prepare, "prepare the dataset: read, check and crop the photos")
    add_flags(preparing, PrepareConfig)
    training = _session_command(group, "train", train, "train, or resume an interrupted run")
    add_flags(training, DreamBoothConfig)
    training.add_argument("--restart", action="store_true", help="start again from step 0; settings may differ")
    training.add_argument(
        "--take-over", action="store_true", help="break the lock of a session that another machine still seems to use"
    )
    training.add_argument(
        "--more-steps",
        metavar="N",
        type=_count,
        default=0,
        help="after a finished run, train N more steps (1 or more), with the settings given "
        "now and the photos and captions as they are now",
    )
    training.add_argument(
        "--more-text-encoder-steps",
        metavar="N",
        type=_count,
        default=0,
        help="the same for the text encoder, N steps (1 or more) before those of --more-steps",
    )
    about = (
        "show the plan without training: steps, minutes, bytes, memory, chosen settings; times a few steps and "
        "discards them"
    )
    training.add_argument("--dry-run", action="store_true", help=about)
    _add_results(group)
    _add_rest(group)


def _add_results(group: Any) -> None:
    from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig

    sampling = _session_command(group, "sample", sample, "generate images with a session's latest checkpoint")
    add_flags(sampling, SampleConfig)
    exporting = _session_command(group, "export", export, "export a session's checkpoint to a single model file")
    add_flags(exporting, ExportConfig)


def _add_rest(group: Any) -> None:
    from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig

    deleting = _session_command(group, "delete", delete, "delete a session, or one of its checkpoints, after asking")
    deleting.add_argument("--checkpoint", metavar="NAME", help="delete only this checkpoint (`show` lists them)")
    deleting.add_argument("--yes", action="store_true", help="do not ask")
    about = "import a session of the old fast-DreamBooth notebook, or somebody else's folder"
    importing = _session_command(group, "import", import_session, about)
    importing.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        type=Path,
        help="source folder, which is only read; default: the folder of that name among the sessions",
    )
    about = "show and edit the captions: the exact prompt of every image"
    captioning = _session_command(group, "caption", caption, about)
    captioning.add_argument("--set", metavar="FILE=WORDS", action="append", default=[], help="caption of one image")
    captioning.add_argument(
        "--auto", action="store_true", help="caption the images that have no caption of their own with a BLIP model"
    )
    captioning.add_argument(
        "--captioner", metavar="MODEL", default="", help="Hub id or folder of the BLIP model for --auto"
    )
    captioning.add_argument(
        "--clear",
        metavar="FILE",
        action="append",
        default=[],
        help="remove the caption: the words of the file name are the prompt again",
    )
    about = "upload a finished model to the Hugging Face Hub, private unless --no-private (needs HF_TOKEN)"
    uploading = _session_command(group, "upload", upload, about)
    add_flags(uploading, UploadConfig)


def _count(word: str) -> int:
    """A whole number from 1; argparse says what is wrong with another word."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of 1 or more")
    return int(word)


def _session_command(
    group: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str
) -> argparse.ArgumentParser:
    parser = command(group, name, run, help)
    parser.add_argument("session", metavar="SESSION", help="name of the session")
    add_root(parser)
    return parser


def import_session(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth import SESSION [--from DIR]`."""
    from fastsd_helpers.sessions import import_session

    result = import_session(chosen.session, source=chosen.source, root=chosen.root)
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
    """Run `fastsd dreambooth caption SESSION [--set FILE=WORDS ...] [--clear FILE ...]`."""
    from fastsd_helpers.dreambooth.dataset.captioning import find_picture, prompt_rows, set_caption

    session = open_session(chosen)
    changes = [_file_and_words(text) for text in chosen.set] + [(name, None) for name in chosen.clear]
    for name, _words in changes:  # all of them are looked up before the first one is written
        find_picture(session, name)
    for name, words in changes:
        set_caption(session, name, words)
    written = []
    if chosen.auto or chosen.captioner:
        from fastsd_helpers.captions.prompts import DEFAULT_CAPTIONER
        from fastsd_helpers.dreambooth.dataset.captioning import caption_pictures

        written = caption_pictures(session, model=chosen.captioner or DEFAULT_CAPTIONER)
    rows = prompt_rows(session)
    changed = len(changes) + len(written)
    data = {"session": session.name, "path": session.captions, "changed": changed, "prompts": plain(rows)}
    cells = [
        [row.image, row.prompt, "-" if row.tokens is None else str(row.tokens), _remarks(row.held_out, row.truncated)]
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


def _remarks(held_out: bool, truncated: bool) -> str:
    return ", ".join(["held out"] * held_out + ["truncated"] * truncated)


def upload(chosen: argparse.Namespace) -> Answer:
    """Run `fastsd dreambooth upload SESSION --repo NAME`."""
    from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig, upload

    config = UploadConfig(**given_values(chosen, UploadConfig))
    result = upload(config, open_session(chosen))
    lines = [
        f"Uploaded and compared: {result.url}",
        *pairs({"private": result.private, "files": result.files, "sha256": result.sha256}),
    ]
    return Answer({"session": chosen.session, "path": result.url, **plain(result)}, lines)
