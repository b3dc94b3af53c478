"""What the cells of the web UI notebook hand on to each other."""

import logging
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.tunnels import Tunnel
from fastsd_helpers.webui import Places, RunningUI, WebUI, find_places, find_ui

__all__ = ["NotebookUI"]

logger = logging.getLogger("fastsd_helpers")


class NotebookUI:
    """What the cells of the notebook hand on to each other.

    Attributes:
        store: folder of models, pictures and settings.
        without_gpu: whether to go on without a GPU.
        ui: the web UI that was installed, AUTOMATIC1111 until then.
        folder: of the program, as the installation's form had it.
        model: the base model to start with; "" leaves it to the web UI.
        family: of that model, where it is known.
        problem: why no web UI runs here; None while nothing stands against it.
        running: the web UI, once it was started.
        link: its public link, once it was shared.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.without_gpu = store, False
        self.ui: WebUI = find_ui("a1111")
        self.folder = ""
        self.model = ""
        self.family: str | None = None
        self.problem: FastSDError | None = None
        self.running: RunningUI | None = None
        self.link: Tunnel | None = None

    @property
    def places(self) -> Places:
        """The folders of the web UI."""
        return find_places(self.ui, folder=self.folder or None, store=self.store)

    def known(self, settings: type) -> dict[str, Any]:
        """What earlier cells have settled, for the fields of that name in the form of a settings class."""
        values = {"store": str(self.store), "ui": self.ui.key, "folder": self.folder, "model": self.model}
        return {name: values[name] for name in values if name in settings.__dataclass_fields__}

    def left_out(self) -> bool:
        """Say why a cell does nothing, where no web UI can run; False where one can."""
        if self.problem is not None:
            logger.info("Nothing is done here: %s", self.problem.problem)
        return self.problem is not None
