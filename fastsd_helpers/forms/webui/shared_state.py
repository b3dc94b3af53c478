"""What the cells of the web UI notebook hand on to each other, and what it remembers for the next visit."""

import json
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DriveError, FastSDError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels import Tunnel
from fastsd_helpers.webui import (
    AttachedUI,
    Places,
    RunningUI,
    WebUI,
    find_link,
    find_places,
    find_running,
    find_ui,
    uis,
)
from fastsd_helpers.webui.running.background import BackgroundLink

__all__ = ["NotebookUI"]

_RECORD = "fastsd-notebook.json"  # in the store, so that it comes along to another machine


class NotebookUI:
    """What the cells of the notebook hand on to each other; for a form it is what a session is elsewhere.

    Attributes:
        store: folder of models, images and settings; `folder` is the same one, for forms.
        without_gpu: whether to go on without a GPU.
        ui: the web UI that was installed; that of the last visit until then, and AUTOMATIC1111 at first.
        program: folder of the program, as the installation's form had it.
        model: the base model to start with; "" leaves it to the web UI.
        family: of that model, where it is known.
        problem: why no web UI runs here; None while nothing stands against it.
        running: the web UI, once it was started or found.
        link: its public link, once it was shared or found.
        record: what was entered in the forms, kept in the store.
    """

    def __init__(self, store: Path) -> None:
        self.store = self.folder = store
        self.without_gpu = False
        self.record: dict[str, Any] = self._load()
        entered = self.record["forms"].get("InstallConfig")
        entered = entered if isinstance(entered, dict) else {}
        keys = [ui.key for ui in uis()]
        chosen = entered.get("ui")
        self.ui: WebUI = find_ui(chosen if chosen in keys else "a1111")
        self.program = str(entered.get("folder") or "")
        self.model = ""
        self.family: str | None = None
        self.problem: FastSDError | None = None
        self.running: RunningUI | AttachedUI | None = None
        self.link: Tunnel | BackgroundLink | None = None

    @property
    def name(self) -> str:
        """The store's name, for sentences."""
        return self.store.name

    @property
    def places(self) -> Places:
        """The folders of the web UI."""
        return find_places(self.ui, folder=self.program or None, store=self.store)

    def look(self) -> "RunningUI | AttachedUI | None":
        """The web UI that runs: this kernel's own, or one that an earlier kernel, notebook or terminal has started."""
        for ui in [self.ui.key, *(other.key for other in uis() if other.key != self.ui.key)]:
            if self.running is None or not self.running.alive():
                found = find_running(ui, folder=self.program or None, store=str(self.store))
                self.running, self.link = (found, None) if found else (self.running, self.link)
        if self.running is not None and self.link is None:
            self.link = find_link(self.running)
        if self.link is not None and self.link.closed:
            self.link = None
        return self.running if self.running is not None and self.running.alive() else None

    def forget(self) -> None:
        """Note that nothing runs any more."""
        self.running = self.link = None

    def left_out(self) -> bool:
        """Say why a cell does nothing, where no web UI can run; False where one can.

        Returns:
            True when the cell has nothing to do.
        """
        if self.problem is not None:
            logger.info("Nothing is done here: %s", self.problem.problem)
        return self.problem is not None

    def save_if_possible(self, **changes: Any) -> None:
        """Keep what was entered, so that it is there next time; a store that cannot be written costs nobody a form.

        Args:
            **changes: names and values, as JSON has them.
        """
        self.record |= changes
        try:
            with file_errors(self.store, "write to"):
                self.store.mkdir(parents=True, exist_ok=True)
            write_atomic(self.store / _RECORD, json.dumps(self.record, indent=1, ensure_ascii=False).encode())
        except DriveError as err:
            logger.debug("The form's values could not be saved: %s", err)

    def _load(self) -> dict[str, Any]:
        record = read_object(self.store / _RECORD)  # none yet, or half synced: the forms then start anew
        return record if isinstance(record.get("forms"), dict) else {"forms": {}}
