"""The DreamBooth commands around the training: import a session, see and change captions, upload the result."""

import argparse

from fastsd_helpers.cli.answers import Answer, open_session, pairs, plain, table
from fastsd_helpers.cli.flags import given_values
from fastsd_helpers.errors import SettingsError

__all__ = ["caption", "import_session", "upload"]


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
    from fastsd_helpers.dreambooth.captioning import find_picture, prompt_rows, set_caption

    session = open_session(chosen)
    changes = [_file_and_words(text) for text in chosen.set] + [(name, None) for name in chosen.clear]
    for name, _words in changes:  # all of them are looked up before the first one is written
        find_picture(session, name)
    for name, words in changes:
        set_caption(session, name, words)
    written = []
    if chosen.auto or chosen.captioner:
        from fastsd_helpers.captions import DEFAULT_CAPTIONER
        from fastsd_helpers.dreambooth.auto_captions import caption_pictures

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
    from fastsd_helpers.dreambooth.upload import UploadConfig, upload

    config = UploadConfig(**given_values(chosen, UploadConfig))
    result = upload(config, open_session(chosen))
    lines = [
        f"Uploaded and compared: {result.url}",
        *pairs({"private": result.private, "files": result.files, "sha256": result.sha256}),
    ]
    return Answer({"session": chosen.session, "path": result.url, **plain(result)}, lines)
