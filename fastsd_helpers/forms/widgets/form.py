"""A form drawn from a settings class: nothing in a notebook repeats a name, a default or a limit."""

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fastsd_helpers.dreambooth.running.saving_outlook import saving_outlook
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, SettingsError
from fastsd_helpers.forms import desk
from fastsd_helpers.forms.widgets.choice import Choice
from fastsd_helpers.forms.widgets.fields import Field, known_choice
from fastsd_helpers.forms.widgets.model_choice import ModelChoice
from fastsd_helpers.forms.widgets.view import View, draw_notice, load_widgets, make_frame
from fastsd_helpers.options import Option, from_values, options_of, to_values
from fastsd_helpers.registry import TRAINABLE_FAMILIES, models
from fastsd_helpers.runtime import logger, secret
from fastsd_helpers.sessions import Session
from fastsd_helpers.uploads import HubUpload
from fastsd_helpers.wording import label_of

__all__ = ["Form", "Remembering", "is_named", "require", "show_form"]

Config = TypeVar("Config")


class Remembering(Protocol):
    """What a form keeps its entries in: a session, a reading session, a web UI's place."""

    @property
    def folder(self) -> Path | None:
        """Where it lies; None for what belongs to no session."""

    @property
    def record(self) -> dict[str, Any]:
        """What is kept; the entries of forms are under `forms`."""

    def save_if_possible(self, **changes: Any) -> object:
        """Keep changes to the record; what cannot be written costs nobody the form."""


def show_form(
    settings: type[Config], *, restore: Remembering | None = None, given: Mapping[str, Any] | None = None
) -> "Form[Config]":
    """Make the form of a settings class; the last line of a cell displays it.

    Drawn anew it shows what was typed into it before, then what the session has kept, then the defaults.

    Args:
        settings: a frozen dataclass whose fields are made with `option`.
        restore: show what was last entered for this session, and keep what is entered now in it.
        given: values to start with; what was last entered wins over them.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.

    Raises:
        SettingsError: `given` names a setting that does not exist, or a value that it cannot have.
    """
    return Form(settings, session=restore, given=given)


def require(config: Any, expected: type) -> None:
    """Check that a cell got the settings it works with; in copies of earlier notebooks all forms are called `form`.

    Raises:
        SettingsError: they belong to another cell.
    """
    if not isinstance(config, expected):
        raise SettingsError(
            f"This cell got the form of {desk.cell_of(type(config))} ({type(config).__name__}), and it needs the one "
            f"of {desk.cell_of(expected)} ({expected.__name__}).",
            f"Run {desk.cell_of(expected)} first, then this one.",
        )


def is_named(config: HubUpload) -> bool:
    """Whether the form of an upload has a name; without one nothing is uploaded, which is said."""
    if not config.repo:
        logger.info("Nothing was uploaded: give a name in `repo` above to upload the model.")
    return bool(config.repo)


class Form(View, Generic[Config]):
    """Widgets for every setting of a class; `config()` turns what they show into the settings object.

    Attributes:
        settings: the class.
        folder: of the session that it belongs to, or None.
        typed: names of the settings that were entered in it, or in the form of its class before it.
    """

    def __init__(
        self,
        settings: type[Config],
        *,
        session: Remembering | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self._session = session
        options = options_of(settings)
        # The form that chooses the session is there before any is open; every other one is for the one that is open.
        chooses = any(item.name == "session_name" for item in options)
        here = session if session is not None or chooses else desk.session_here()
        self.folder = here.folder if here is not None else None
        self._fields = {item.name: Field(item, choice=_choice(item, here)) for item in options}
        self.typed: set[str] = set()
        self._message, self._outlook = load_widgets().HTML(), load_widgets().HTML()
        if chooses and (choice := self._fields["session_name"].choice) is not None:
            choice.write(choice.first())  # the one used last, as the list was when it was drawn
        self.update(**(given or {}))
        self._restore()
        # Shown from the first moment, for the user to see: as good as typed.
        self._brought = frozenset(self.typed)
        self.typed.clear()
        self._take_typed(desk.last_form(settings, self.folder))
        self.box = self._draw()
        for name, field in self._fields.items():
            field.watch(functools.partial(self._on_change, name))
        self._show_defaults()
        self._show_outlook()
        desk.keep_form(self)

    def values(self) -> dict[str, Any]:
        """What the widgets show, without secrets; None means "left alone". Nothing is checked."""
        return {name: field.read() for name, field in self._fields.items() if not field.option.secret}

    def config(self) -> Config:
        """Build the settings; saves what was entered in the session, so that it is there next time.

        Returns:
            An instance of the settings class.

        Raises:
            SettingsError: one or more fields are wrong; all of them are named. Or the form belongs to another session
                than the one that is open.
        """
        desk.require_open(self.settings, self.folder)
        secrets = {
            name: secret(name.upper(), prompt=functools.partial(getattr, field.widget, "value"))
            for name, field in self._fields.items()
            if field.option.secret
        }
        try:
            config = from_values(self.settings, self.values() | secrets, given=self._given())
        except SettingsError as err:
            self._show_problems(err)
            raise
        self._show_problems(None)
        self._save(config)
        return config

    def _given(self) -> set[str]:
        """The settings that were entered, now or in an earlier visit, and those that differ from their defaults."""
        values = self.values()
        differ = {name for name, field in self._fields.items() if values.get(name) != field.option.default}
        alone = {name for name, field in self._fields.items() if field.alone}
        return (differ | self.typed | self._brought) - alone

    def update(self, **values: Any) -> None:
        """Show other values, as if they had been typed in: numbers out of range are named by `config()`.

        Args:
            **values: settings by name; None leaves one to the defaults.

        Raises:
            SettingsError: a name that does not exist, or a value that the widget cannot show.
        """
        unknown = sorted(set(values) - set(self._fields))
        if unknown:
            raise SettingsError(
                f"Unknown setting {', '.join(unknown)}.", f"Settings of this form: {', '.join(sorted(self._fields))}."
            )
        for name, value in values.items():
            self._fields[name].write(value)
            self.typed.add(name)

    def _restore(self) -> None:
        saved = self._session.record.get("forms", {}).get(self.settings.__name__, {}) if self._session else {}
        given_up = []
        # Earlier versions kept every setting, whether it had been entered or not: there only values tell.
        told = not saved.keys() >= {name for name, field in self._fields.items() if not field.option.secret}
        entered = set(self.typed)
        for name, value in saved.items():
            field = self._fields.get(name)
            if not told and field is not None and field.option.follows and value == field.option.default:
                continue
            try:
                self.update(**{name: value})
            except SettingsError:
                # Saved by another version of this library; it must not cost the user the other values.
                given_up.append(f"{name} = {value!r}")
        self.typed = self.typed if told else entered
        if given_up:
            self._say(f"Saved by another version and not used: {', '.join(given_up)}.", "bad")

    def _take_typed(self, before: "Form[Any] | None") -> None:
        """Show what was entered in the form that this one replaces, also what is wrong in it."""
        if before is None:
            return
        for name in sorted(before.typed & self._fields.keys()):
            with contextlib.suppress(SettingsError):  # a list that has changed meanwhile
                self.update(**{name: before._fields[name].widget.value})

    def _draw(self) -> Any:
        widgets = load_widgets()
        plain = [field.row for field in self._fields.values() if not field.option.advanced]
        folded = [field.row for field in self._fields.values() if field.option.advanced]
        parts = [widgets.VBox(plain), self._outlook, self._message]
        self._more = widgets.Accordion([widgets.VBox(folded)], selected_index=None)
        if folded:
            self._more.set_title(0, "More settings")
            parts.append(self._more)
        return make_frame(*parts, label=(self.settings.__doc__ or "").strip().splitlines()[0].rstrip("."))

    def _on_change(self, name: str) -> None:
        self.typed.add(name)
        try:
            # Secrets are not looked up here: Colab would ask for permission at every key stroke.
            config = self.settings(**{name: field.read() for name, field in self._fields.items()})
        except FastSDError as err:
            self._show_problems(err)
        else:
            self._save(config)
            self._show_problems(None)
        self._show_defaults()
        self._show_outlook()

    def _show_outlook(self) -> None:
        """Say how often a training with these settings saves, what a cut costs at worst, and what a LoRA would."""
        if self.settings is not DreamBoothConfig or not isinstance(self._session, Session):
            return
        lines = []
        with contextlib.suppress(FastSDError, OSError):  # said at the fields, or when the training begins
            config = from_values(DreamBoothConfig, self.values(), given=self._given())
            lines = saving_outlook(config, self._session)
        self._outlook.value = draw_notice("\n".join(lines))

    def _show_problems(self, err: FastSDError | None) -> None:
        """Say each problem once, at its field; only what belongs to no field stands at the end of the form."""
        said: Mapping[str, str] = getattr(err, "fields", {})
        at_field = {name: text for name, text in said.items() if name in self._fields}
        for name, field in self._fields.items():
            field.complain(at_field.get(name, ""))
        if any(self._fields[name].option.advanced for name in at_field):
            self._more.selected_index = 0
        self._say(said.get("", "") if at_field else err.problem if err is not None else "", "bad")

    def _save(self, config: Config) -> None:
        if self._session is None:
            return
        saved = self._session.record.get("forms", {})
        given = self._given()
        values = {name: value for name, value in to_values(config).items() if name in given}
        entered = saved | {self.settings.__name__: values}
        if entered != saved:
            # A full Drive must not stop somebody from filling in a form; the session's log says what happened.
            self._session.save_if_possible(forms=entered)

    def _show_defaults(self) -> None:
        spec = next((spec for spec in models() if spec.key == self.values().get("base_model")), None)
        defaults = spec.defaults if spec is not None else {}
        base = self._fields.get("base_model")
        if base is not None and isinstance(base.choice, ModelChoice):
            method = self._fields.get("method")
            brings = defaults.get("method") if method is not None and method.alone else None
            base.choice.set_use(str(brings or self.values().get("method", "full")))
        for name, field in self._fields.items():
            follows = field.option.optional or field.alone
            field.suggest(f"{spec.key}: {defaults[name]}" if spec is not None and name in defaults and follows else "")


def _choice(option: Option, session: Remembering | None) -> Choice | None:
    """The list of known values of a setting that has one; None for every other setting."""
    if option.name == "base_model":
        auto = "what suits this machine and the photos"
        return ModelChoice(families=TRAINABLE_FAMILIES, use="full", auto=auto, label=label_of(option.name))
    return known_choice(option, session) if option.known else None
