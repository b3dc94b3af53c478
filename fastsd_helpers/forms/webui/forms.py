"""The forms of the web UI notebook: what one cell has settled is asked for in no other, and what was typed stays."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastsd_helpers.errors import DriveError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.forms.widgets.form import Form
from fastsd_helpers.options import Checked, option
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui import InstallConfig, LaunchConfig, find_places, find_ui

if TYPE_CHECKING:
    from fastsd_helpers.forms.webui.shared_state import NotebookUI

__all__ = ["StoreConfig", "UIForm", "settled", "show_store_form", "show_ui_form"]

Config = TypeVar("Config")

# Fields that an earlier cell has settled: the folder in 2b, the web UI and its program in 3b, its login in 6a.
_SETTLED: dict[type, tuple[str, ...]] = {
    InstallConfig: ("store",),
    LaunchConfig: ("store", "ui", "folder"),
    TunnelConfig: ("user", "password"),
}


@dataclass(frozen=True)
class StoreConfig(Checked):
    """Where models, images and settings are kept, and on which machine the web UI may run."""

    google_drive: bool = option(
        True, help="keep them on your Google Drive, where they survive a disconnect (Colab only)"
    )
    without_gpu: bool = option(False, help="continue without a GPU: an image then takes minutes")
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)
    store: str = option("", help="another data directory; empty: sd/stable-diffusion-webui", advanced=True)


class _LastStore:
    """What was entered in the form of the store, by the folder the notebook lies in; kept on this machine."""

    folder = None

    def __init__(self) -> None:
        self._file = find_places(find_ui("a1111")).root.parent / "stores.json"
        self.record: dict[str, Any] = {"forms": self._read().get(str(Path.cwd()), {})}

    def save_if_possible(self, **changes: Any) -> None:
        """Keep what was entered; a machine that cannot keep it costs nobody a form."""
        self.record |= changes
        try:
            with file_errors(self._file.parent, "write to"):
                self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file, json.dumps(self._read() | {str(Path.cwd()): self.record["forms"]}).encode())
        except DriveError:
            return

    def _read(self) -> dict[str, Any]:
        return {name: forms for name, forms in read_object(self._file).items() if isinstance(forms, dict)}


def show_store_form(settings: type[Config] = StoreConfig) -> "Form[Config]":  # type: ignore[assignment]
    """Make the form of the store; it shows what was entered last from this folder, after a restart too.

    Args:
        settings: the settings class.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.
    """
    return Form(settings, session=_LastStore())


def show_ui_form(settings: type[Config], webui: "NotebookUI") -> "UIForm[Config]":
    """Make a form of the web UI notebook; a cell's last line displays it.

    It shows what was typed before, on an earlier visit too, and not what other cells have settled.

    Args:
        settings: a settings class of the web UI.
        webui: the notebook's web UI, as `open_store` gives it.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.

    Raises:
        SettingsError: a value of the last visit that the form cannot show is left out, not raised.
    """
    return UIForm(settings, webui)


class UIForm(Form[Config]):
    """Settings without the fields that an earlier cell has settled: these follow that cell, whenever it is run."""

    def __init__(self, settings: type[Config], webui: "NotebookUI") -> None:
        self._webui, self._of = webui, settings
        super().__init__(settings, session=webui)
        self.update(**_settled_values(settings, webui))

    def config(self) -> Config:
        """Build the settings, with what is settled by now.

        Returns:
            An instance of the settings class.
        """
        self.update(**_settled_values(self._of, self._webui))
        return super().config()

    def _draw(self) -> Any:
        for name in _SETTLED.get(self._of, ()):
            self._fields[name].row.layout.display = "none"
        return super()._draw()


def settled(config: Config, webui: "NotebookUI") -> Config:
    """The settings with what earlier cells have settled; no model named means the one that cell 4b has placed."""
    values = _settled_values(type(config), webui)
    if isinstance(config, LaunchConfig) and not config.model:
        values["model"] = webui.model
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _settled_values(settings: type, webui: "NotebookUI") -> dict[str, str]:
    values = {"store": str(webui.store), "ui": webui.ui.key, "folder": webui.program, "user": "fastsd", "password": ""}
    return {name: values[name] for name in _SETTLED.get(settings, ())}
