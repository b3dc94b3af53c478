"""Things to do beside the training, each behind a button of its own: describe photos, a dry run, inspect, convert.

"Run all" only shows them: they take minutes, or a file that somebody has to name first.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastsd_helpers import checkpoints
from fastsd_helpers.background import Background, command_of, local_folder
from fastsd_helpers.captions.prompts import DEFAULT_CAPTIONER
from fastsd_helpers.checkpoints.converter import ConvertConfig
from fastsd_helpers.checkpoints.inspector import InspectConfig
from fastsd_helpers.dreambooth.dataset import captioning
from fastsd_helpers.dreambooth.running import engine
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted, SettingsError
from fastsd_helpers.forms.widgets.form import Form, show_form
from fastsd_helpers.forms.widgets.view import View, draw_notice, load_widgets, make_button, make_frame
from fastsd_helpers.forms.widgets.work_view import WorkView, wait_for
from fastsd_helpers.options import Checked, option, words_of
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import count_in_words, list_some, size_in_words

__all__ = [
    "CaptionerConfig",
    "CommandTool",
    "ConvertFileConfig",
    "InspectFileConfig",
    "ToolView",
    "inspected",
    "show_captioner",
    "show_converter",
    "show_dry_run",
    "show_inspector",
]

_DONE = re.compile(r"\b(\d+)(?: of \d+)? lines, ")
_LOG_LINES = 100


@dataclass(frozen=True)
class CaptionerConfig(Checked):
    """Which model describes the photos."""

    captioner: str = option(DEFAULT_CAPTIONER, help="Hub id or folder of a BLIP captioning model")


@dataclass(frozen=True)
class _File:
    file: str = option("", help="model file: .safetensors or .ckpt; empty: this session's finished model")


@dataclass(frozen=True)
class InspectFileConfig(InspectConfig, _File):
    """Which file to look into, and how closely."""


@dataclass(frozen=True)
class _Files:
    source: str = option("", help="source: a Diffusers folder, a .safetensors or .ckpt file, or a LoRA")
    target: str = option(
        "", help="destination: a name that ends in .safetensors or .ckpt for a single file, else a folder"
    )
    merge: str = option(
        "", help="LoRA to merge into the model's weights: FILE or FILE:0.7 (weight), several separated by commas"
    )


@dataclass(frozen=True)
class ConvertFileConfig(ConvertConfig, _Files):
    """What to convert, and how."""


class ToolView(View):
    """A form with a button; what came out is said below it.

    Args:
        words: what the button says.
        busy: what is said while it works.
        do: does it; gives what came out, a sentence a line.
        form: its settings, drawn above it.
    """

    def __init__(
        self, words: str, busy: str, do: Callable[[], Iterable[str]], *, form: Form[Any] | None = None
    ) -> None:
        self._busy, self._do, self._form = busy, do, form
        self._button = make_button(words, icon="play")
        self._button.on_click(lambda _button: self.go())
        self._message, self._work = load_widgets().HTML(), load_widgets().VBox()
        self.box = make_frame(*([form.box] if form is not None else []), self._button, self._work, self._message)

    def go(self) -> None:
        """Do it, and say what came out or what is wrong."""
        self._button.disabled = True
        self._say(self._busy)
        try:
            lines = list(self._do())
        except (KeyboardInterrupt, Interrupted):
            self._say("Stopped; nothing was written or replaced. Press the button again to start again.", "warn")
        except FastSDError as err:
            self._say_error(err)
        else:
            self._message.value = draw_notice("\n".join(lines))
        finally:
            self._button.disabled = False


class CommandTool(ToolView):
    """A tool that is a command of ours in a process of its own: a bar and Stop are there while it works.

    Args:
        words: see ToolView.
        busy: see ToolView.
        form: see ToolView.
        work: the work in a sentence, as "The evaluation".
        command: the words after `fastsd`, the model that is opened, a path that stands for this work, how many to do.
        told: the command's answer, a sentence a line.
    """

    def __init__(
        self,
        words: str,
        busy: str,
        work: str,
        form: Form[Any],
        command: Callable[[], tuple[Sequence[str], str, Path, int]],
        told: Callable[[Mapping[str, Any]], Iterable[str]],
    ) -> None:
        super().__init__(words, busy, self._run, form=form)
        self._name, self._command, self._told = work, command, told

    def _run(self) -> Iterable[str]:
        words, model, place, count = self._command()
        view = WorkView(self._busy, f"progress: {self._button.description}", saves="Cancels it; nothing is replaced.")
        self._message.value, self._work.children = "", [view.box]
        try:
            folder = local_folder(place)
            child = Background.find(folder) or Background.start(command_of(words), folder, model=model)

            def show() -> None:
                said = child.log_lines(_LOG_LINES)
                done = [int(found[1]) for line in said if (found := _DONE.search(line))]
                view.show(self._busy, done[-1] if done else 0, count, messages=said)

            return self._told(wait_for(child, view, show, self._name))
        finally:
            self._work.children = []


def show_captioner(session: Session) -> ToolView:
    """Offer to have the photos described that have no caption of their own; a cell's last line displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    form = show_form(CaptionerConfig, restore=session)

    def describe() -> list[str]:
        written = set(captioning.caption_pictures(session, model=form.config().captioner))
        if not written:
            return ["Every photo has a caption of its own already: nothing was changed."]
        return [
            f"{len(written)} captions were written; cell 3d shows them and lets you change them. The exact prompts:",
            *(f"{row.image}: {row.prompt}" for row in captioning.prompt_rows(session)),
        ]

    return ToolView("Caption the photos", "The model is loaded and captions the photos…", describe, form=form)


def show_dry_run(settings: Form[DreamBoothConfig], session: Session) -> ToolView:
    """Offer a dry run with the settings that a form shows when the button is pressed; nothing is trained.

    Args:
        settings: the form of the training.
        session: the session, as `open_session` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """

    def rehearse() -> list[str]:
        found = engine.plan(settings.config(), session, rehearse=True)
        return [*found.notes, *found.lines(), "Nothing was trained."]

    return ToolView("Dry run", "The model is loaded and a few steps are timed; this may take a minute…", rehearse)


def inspected(path: Path, *, hashes: bool, scan: bool) -> list[str]:
    """What a model file is and what is wrong with it, a sentence a line; raises what `checkpoints.inspect` raises."""
    found = checkpoints.inspect(path, hashes=hashes, scan=scan)
    formats = ", ".join(f"{name} {size_in_words(count)}" for name, count in found.dtypes.items())
    lines = [
        f"{path.name}: {found.what}, {size_in_words(found.bytes)}, {count_in_words(found.parameters)} parameters in "
        f"{found.tensors:,} tensors ({formats})."
    ]
    if found.prediction_source:
        lines.append(f"It predicts {found.prediction or 'an unknown quantity'}: {found.prediction_source}.")
    if found.sha256:
        lines.append(f"Its hash: {found.short_hash} in AUTOMATIC1111, SHA-256 {found.sha256}.")
    lines += [f"⚠ {problem.what}: {problem.effect}" for problem in found.problems] or ["No problems were found."]
    lines += found.advice
    rest = (("Missing", found.missing), ("Not of this layout", found.unexpected))
    return lines + [f"{words}: {list_some(names, 5)}." for words, names in rest if names]


def show_inspector(session: Session) -> ToolView:
    """Offer to look into a model file; a cell's last line displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    form = show_form(InspectFileConfig)

    def look() -> list[str]:
        config = form.config()
        path = Path(config.file.strip()).expanduser() if config.file.strip() else session.finished_model()
        return inspected(path, hashes=config.hashes, scan=config.scan)

    return ToolView("Inspect it", "Reading the file…", look, form=form)


def show_converter(session: Session) -> ToolView:
    """Offer to convert a model file or folder; a cell's last line displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    form = show_form(ConvertFileConfig)
    verified = False

    def command() -> tuple[list[str], str, Path, int]:
        nonlocal verified
        config = form.config()
        source, target = config.source.strip(), config.target.strip()
        empty = [name for name, value in (("source", source), ("target", target)) if not value]
        if empty:
            raise SettingsError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty.", "Type it above.")
        verified = config.verify
        paths = [str(Path(name).expanduser().absolute()) for name in (source, target)]
        added = [f"--merge={lora.strip()}" for lora in config.merge.split(",") if lora.strip()]
        own = {item.name for item in fields(ConvertConfig)}
        return ["convert", *paths, *added, *words_of(config, own)], source, Path(paths[1]), 0

    def told(answer: Mapping[str, Any]) -> list[str]:
        checked = "Written and read back" if verified else "Written"
        size = size_in_words(answer["bytes"])
        return [f"{checked}: {answer['path']} ({size}, {answer['family']}, {answer['dtype']})", *answer["notes"]]

    return CommandTool("Convert", "Converting…", "The conversion", form, command, told)
