"""Things to do beside the training, each behind a button of its own: describe photos, a dry run, inspect, convert.

"Run all" only shows them: they take minutes, or a file that somebody has to name first.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastsd_helpers.background import Background, command_of, local_folder
from fastsd_helpers.captions.prompts import DEFAULT_CAPTIONER
from fastsd_helpers.checkpoints.converter import ConvertConfig
from fastsd_helpers.checkpoints.inspector import InspectConfig
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted, SettingsError
from fastsd_helpers.files import size_in_words
from fastsd_helpers.forms.widgets.form import Form, show_form
from fastsd_helpers.forms.widgets.view import View, draw_notice, load_widgets, make_button, make_frame
from fastsd_helpers.forms.widgets.work_view import WorkView, wait_for
from fastsd_helpers.options import check, option, words_of
from fastsd_helpers.sessions import Session

__all__ = [
    "CaptionerConfig",
    "CommandTool",
    "ConvertFileConfig",
    "InspectFileConfig",
    "ToolView",
    "show_captioner",
    "show_converter",
    "show_dry_run",
    "show_inspector",
]

_DONE = re.compile(r"\b(\d+)(?: of \d+)? lines, ")
_LOG_LINES = 100


@dataclass(frozen=True)
class CaptionerConfig:
    """Which model describes the photos."""

    captioner: str = option(DEFAULT_CAPTIONER, help="Hub id or folder of a BLIP captioning model")

    def __post_init__(self) -> None:
        check(self)


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
        form: its settings, drawn above it.
    """

    def __init__(self, words: str, busy: str, *, form: Form[Any] | None = None) -> None:
        self._form, self._busy = form, busy
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

    @abstractmethod
    def _do(self) -> Iterable[str]:
        """Do it; returns what came out, a sentence a line."""


class CommandTool(ToolView):
    """A tool that is a command of ours in a process of its own: a bar and Stop are there while it works.

    Args:
        words, busy, form: see ToolView. work: the work in a sentence, as "The evaluation".
    """

    def __init__(self, words: str, busy: str, *, form: Form[Any], work: str) -> None:
        super().__init__(words, busy, form=form)
        self._name = work

    def _do(self) -> Iterable[str]:
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

    @abstractmethod
    def _command(self) -> tuple[Sequence[str], str, Path, int]:
        """The words after `fastsd`, the model that is opened, a path that stands for this work, how many to do."""

    @abstractmethod
    def _told(self, answer: Mapping[str, Any]) -> Iterable[str]:
        """The command's answer, a sentence a line."""


def show_captioner(session: Session) -> ToolView:
    """Offer to have the photos described that have no caption of their own; a cell's last line displays it."""
    return _Captioner(session)


class _Captioner(ToolView):
    def __init__(self, session: Session) -> None:
        self._session = session
        form = show_form(CaptionerConfig, restore=session)
        super().__init__("Caption the photos", "The model is loaded and captions the photos…", form=form)

    def _do(self) -> list[str]:
        from fastsd_helpers.dreambooth.dataset.captioning import caption_pictures, prompt_rows

        assert self._form is not None
        written = set(caption_pictures(self._session, model=self._form.config().captioner))
        if not written:
            return ["Every photo has a caption of its own already: nothing was changed."]
        return [
            f"{len(written)} captions were written; cell 3d shows them and lets you change them. The exact prompts:",
            *(f"{row.image}: {row.prompt}" for row in prompt_rows(self._session)),
        ]


def show_dry_run(settings: Form[DreamBoothConfig], session: Session) -> ToolView:
    """Offer a dry run with the settings that a form shows when the button is pressed; nothing is trained."""
    return _DryRun(settings, session)


class _DryRun(ToolView):
    def __init__(self, settings: Form[DreamBoothConfig], session: Session) -> None:
        self._settings, self._session = settings, session
        super().__init__("Dry run", "The model is loaded and a few steps are timed; this may take a minute…")

    def _do(self) -> list[str]:
        from fastsd_helpers.dreambooth.running import engine

        plan = engine.plan(self._settings.config(), self._session, rehearse=True)
        return [*plan.lines(), "Nothing was trained."]


def show_inspector(session: Session) -> ToolView:
    """Offer to look into a model file; a cell's last line displays it."""
    return _Inspector(session)


class _Inspector(ToolView):
    def __init__(self, session: Session) -> None:
        self._session = session
        super().__init__("Inspect it", "Reading the file…", form=show_form(InspectFileConfig))

    def _do(self) -> list[str]:
        from fastsd_helpers.checkpoints.inspector import inspect

        assert self._form is not None
        config = self._form.config()
        path = Path(config.file.strip()).expanduser() if config.file.strip() else self._session.finished_model()
        found = inspect(path, hashes=config.hashes, scan=config.scan)
        formats = ", ".join(f"{name} {size_in_words(count)}" for name, count in found.dtypes.items())
        lines = [
            f"{found.path.name}: {found.what}, {size_in_words(found.bytes)}",
            f"{found.parameters / 1e6:,.1f} million parameters in {found.tensors:,} tensors ({formats})",
            f"SHA-256 {found.sha256}; AUTOMATIC1111 shows {found.short_hash}" if found.sha256 else "",
            *(f"{len(names)} tensors {what}: {', '.join(names[:5])}" for names, what in (
                (found.missing, "are missing"), (found.unexpected, "are not of this layout")) if names),
            *(f"{problem.what}: {problem.effect}" for problem in found.problems),
            *found.advice,
        ]  # fmt: skip
        return [*filter(None, lines), *([] if found.problems else ["No problems found."])]


def show_converter(session: Session) -> ToolView:
    """Offer to convert a model file or folder; a cell's last line displays it."""
    return _Converter(session)


class _Converter(CommandTool):
    def __init__(self, session: Session) -> None:
        self._session, self._verify = session, False
        super().__init__("Convert", "Converting…", form=show_form(ConvertFileConfig), work="The conversion")

    def _command(self) -> tuple[list[str], str, Path, int]:
        assert self._form is not None
        config = self._form.config()
        source, target = config.source.strip(), config.target.strip()
        empty = [name for name, value in (("source", source), ("target", target)) if not value]
        if empty:
            raise SettingsError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty.", "Type it above.")
        self._verify = config.verify
        paths = [str(Path(name).expanduser().absolute()) for name in (source, target)]
        added = [f"--merge={lora.strip()}" for lora in config.merge.split(",") if lora.strip()]
        own = {item.name for item in fields(ConvertConfig)}
        return ["convert", *paths, *added, *words_of(config, own)], source, Path(paths[1]), 0

    def _told(self, answer: Mapping[str, Any]) -> list[str]:
        checked = "Written and read back" if self._verify else "Written"
        size = size_in_words(answer["bytes"])
        return [f"{checked}: {answer['path']} ({size}, {answer['family']}, {answer['dtype']})", *answer["notes"]]
