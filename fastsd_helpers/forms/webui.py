"""What the web UI notebook's cells call: where things are kept, the installation, models, starting and sharing."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.drive import mount_drive, sessions_root
from fastsd_helpers.errors import (
    DependencyMissing,
    DiskFull,
    FastSDError,
    InstallError,
    Interrupted,
    WebUIError,
)
from fastsd_helpers.forms.form import require
from fastsd_helpers.forms.notebook_ui import NotebookUI
from fastsd_helpers.forms.playing import PlayView, offer_playground
from fastsd_helpers.forms.webui_views import LinkView, StartView
from fastsd_helpers.options import check, option
from fastsd_helpers.playground import PlaygroundConfig
from fastsd_helpers.runtime import describe_device, in_notebook, where
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui import (
    ControlNetConfig,
    InstallConfig,
    InstallResult,
    LaunchConfig,
    ModelsConfig,
    PlacedModel,
    RunningUI,
    find_places,
    find_ui,
    install_webui,
    launch,
    place_controlnets,
    place_models,
    share,
    stop,
)

__all__ = [
    "NotebookUI",
    "StoreConfig",
    "fetch_controlnets",
    "fetch_models",
    "install_ui",
    "open_store",
    "share_ui",
    "start_ui",
]

logger = logging.getLogger("fastsd_helpers")

_known: "dict[Path, NotebookUI]" = {}  # by store


@dataclass(frozen=True)
class StoreConfig:
    """Where models, pictures and settings are kept, and on which machine the web UI may run."""

    google_drive: bool = option(
        True, help="keep them on your Google Drive, where they outlast this machine (Colab only)"
    )
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)
    store: str = option("", help="another folder; empty: sd/stable-diffusion-webui", advanced=True)
    without_gpu: bool = option(False, help="go on without a GPU too: a picture then takes minutes", advanced=True)

    def __post_init__(self) -> None:
        check(self)


def open_store(config: StoreConfig) -> NotebookUI:
    """Find the folder of models, pictures and settings; in Colab Google Drive is mounted for it unless switched off.

    Raises:
        SettingsError: these are the settings of another form. DriveError: Drive was not mounted.
    """
    require(config, StoreConfig)
    store: Path | None = Path(config.store).expanduser() if config.store else None
    if store is None and config.google_drive and where() == "colab" and in_notebook():
        mount_drive(shared_drive=config.shared_drive or None)
        # Beside the sessions' folder, where the previous notebook had it.
        store = sessions_root(shared_drive=config.shared_drive).parents[1] / "sd" / "stable-diffusion-webui"
    place = find_places(find_ui("a1111"), store=store).store
    # Run again in the same notebook it is the same one: what it has started can still be stopped.
    webui = _known.setdefault(place, NotebookUI(place))
    webui.without_gpu = config.without_gpu
    logger.info("Models, pictures and settings are kept in %s", webui.store)
    return webui


def install_ui(config: InstallConfig, webui: NotebookUI) -> InstallResult | None:
    """Install the web UI, or bring it up to date; None, with the reason, where that cannot be done here.

    The notebook then goes on with the playground instead, so nothing is raised for a missing GPU or network.

    Raises:
        SettingsError: these are the settings of another form, or one of them is wrong.
    """
    require(config, InstallConfig)
    webui.ui, webui.folder, webui.problem = find_ui(config.ui), config.folder, None
    if config.store:
        webui.store = Path(config.store).expanduser().absolute()
    if describe_device().kind != "cuda" and not webui.without_gpu:
        webui.problem = WebUIError(
            f"There is no GPU here, on which {webui.ui.title} needs seconds for a picture instead of minutes.",
            "Switch one on (Colab: Runtime > Change runtime type) and run all cells, or tick `without gpu` above.",
        )
    else:
        try:
            return install_webui(config)
        except (WebUIError, InstallError, DependencyMissing, DiskFull) as err:
            webui.problem = err
    logger.warning("%s is not installed. %s", webui.ui.title, webui.problem)
    logger.info("The cells below offer the playground instead, which draws with the built-in model.")
    return None


def fetch_models(config: ModelsConfig, webui: NotebookUI) -> list[PlacedModel]:
    """Put the chosen models where the web UI finds them; the base model is the one it starts with.

    Raises:
        SettingsError: these are the settings of another form. And what `webui.place_models` raises.
    """
    require(config, ModelsConfig)
    if webui.left_out():
        return []
    placed = place_models(config, webui.ui, webui.places)
    base = next((model for model in placed if model.kind == "checkpoint"), None)
    webui.model, webui.family = (str(base.path.resolve()), base.family) if base else ("", None)
    return placed


def fetch_controlnets(config: ControlNetConfig, webui: NotebookUI) -> list[PlacedModel]:
    """Fetch the chosen ControlNets for the base model that was chosen before.

    Raises:
        SettingsError: these are the settings of another form. And what `webui.place_controlnet` raises.
    """
    require(config, ControlNetConfig)
    if webui.left_out():
        return []
    return place_controlnets(config, webui.ui, webui.places, family=webui.family)


def start_ui(config: LaunchConfig, webui: NotebookUI) -> PlayView | None:
    """Start the web UI and wait until it answers, its last lines in view; one that runs already is started anew.

    Where no web UI can run, the playground is offered instead: the value is its view, with a button that opens it.

    Raises:
        SettingsError: these are the settings of another form. Interrupted: the cell was stopped; nothing runs.
        And what `webui.launch` raises.
    """
    require(config, LaunchConfig)
    if webui.problem is not None:
        logger.warning("No web UI is started. %s", webui.problem)
        return offer_playground(PlaygroundConfig(), "")
    # Its login is known to the kernel that started it alone: one of an earlier kernel is ended too.
    _end(webui, config)
    view = StartView(f"{find_ui(config.ui).title} is starting; the first start takes a minute or two.")
    view.display()
    try:
        webui.running = launch(config, show=view.line)
    except KeyboardInterrupt as err:
        view.end("Stopped: nothing is running.", good=False)
        raise Interrupted("The start was interrupted, and what ran was ended.", "Run the cell again.") from err
    except FastSDError as err:
        view.end(err.problem, good=False)
        raise
    webui.ui = webui.running.ui
    view.end(_how_it_went(webui.running), good=webui.running.model_loaded is not False)
    return None


def _how_it_went(running: RunningUI) -> str:
    model = {True: "its model is loaded", False: "but it refused the model: see above", None: "its model is loading"}
    return f"{running.ui.title} answers after {running.seconds:.0f} s; {model[running.model_loaded]}."


def _end(webui: NotebookUI, config: LaunchConfig) -> None:
    if webui.running is not None:
        webui.running.stop()
        webui.running = webui.link = None
    elif stop(config.ui, folder=config.folder or None, store=config.store or None):
        logger.info("The web UI that an earlier run of this notebook had left was ended.")


def share_ui(config: TunnelConfig, webui: NotebookUI) -> LinkView | None:
    """Give the running web UI a link behind a login, and show link, user, password and expiry to copy.

    In Colab, `kind` colab makes a link that opens for this notebook's user alone. A link that was made before closes.

    Raises:
        SettingsError: these are the settings of another form. WebUIError: it does not run. TunnelError: no service
        gave a link; what each one said is in the sentence.
    """
    require(config, TunnelConfig)
    if webui.left_out():
        return None
    running = webui.running
    if running is None or not running.alive():
        problem = running.problem() if running is not None else None
        raise problem or WebUIError("The web UI does not run.", "Run the cell that starts it first.")
    if webui.link is not None:
        webui.link.close()
    view = LinkView()
    webui.link = share(running, _with_same_login(config, running), on_change=view.show)
    view.show(webui.link)
    return view


def _with_same_login(config: TunnelConfig, running: RunningUI) -> TunnelConfig:
    # The link asks for the web UI's own user and password, set where it was started.
    return dataclasses.replace(config, user=running.login.user, password=running.login.password)
