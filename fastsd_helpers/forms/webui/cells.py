"""What the web UI notebook's cells call: where things are kept, the installation, models, starting and sharing."""

import dataclasses
from pathlib import Path
from typing import Any

from fastsd_helpers.device import describe_device
from fastsd_helpers.drive import mount_drive, sessions_root
from fastsd_helpers.errors import (
    DependencyMissing,
    DiskFull,
    FastSDError,
    InstallError,
    Interrupted,
    WebUIError,
    WebUINotInstalled,
)
from fastsd_helpers.forms.playground import offer_playground
from fastsd_helpers.forms.webui.forms import StoreConfig, settled
from fastsd_helpers.forms.webui.shared_state import NotebookUI
from fastsd_helpers.forms.webui.views import LinkView, StartView
from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.page_view import PageView
from fastsd_helpers.options import to_values
from fastsd_helpers.playground import Page, PlaygroundConfig
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import in_notebook, logger, where
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui import (
    ControlNetConfig,
    InstallConfig,
    LaunchConfig,
    ModelsConfig,
    find_places,
    find_ui,
    install_webui,
    launch,
    place_controlnets,
    place_models,
    share,
    share_in_background,
    stop,
)
from fastsd_helpers.webui.placing.model_files import BASE_KINDS
from fastsd_helpers.webui.running.attached import note_run, read_note

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

_known: "dict[Path, NotebookUI]" = {}  # by store, the one opened last at the end
# What a start that is asked for again may differ in, without the web UI being started anew.
_NOT_COMPARED = ("wait_s", "restart")


def open_store(config: StoreConfig) -> NotebookUI:
    """Find the folder of models, images and settings; in Colab Google Drive is mounted for it unless switched off.

    Args:
        config: what the form shows, as its `config()` gives it.

    Returns:
        The notebook's web UI, which the cells below take.

    Raises:
        SettingsError: these are the settings of another form.
        DriveError: Drive was not mounted.
    """
    require(config, StoreConfig)
    store: Path | None = Path(config.store).expanduser() if config.store else None
    if store is None and config.google_drive and where() == "colab" and in_notebook():
        mount_drive(shared_drive=config.shared_drive or None)
        # Beside the sessions' folder, where the previous notebook had it.
        store = sessions_root(shared_drive=config.shared_drive).parents[1] / "sd" / "stable-diffusion-webui"
    place = find_places(find_ui("a1111"), store=store).store
    # Run again in the same notebook it is the same one, with what other cells have settled.
    webui = _known.pop(place, None) or _next_to(NotebookUI(place))
    _known[place] = webui
    webui.without_gpu = config.without_gpu
    logger.info("Data directory (models, images, settings): %s", webui.store)
    running = webui.look()
    if running is not None:
        began_with = (read_note(running).get("start") or {}).get("store", str(webui.store))
        elsewhere = (
            "" if began_with == str(webui.store) else f" with the folder {began_with}, until cell 6b restarts it"
        )
        logger.info("%s is already running, on port %d of this machine%s.", running.ui.title, running.port, elsewhere)
    return webui


def _next_to(webui: NotebookUI) -> NotebookUI:
    """A folder chosen later in the same kernel: the web UI that cell 3b has installed serves it too."""
    if _known and "InstallConfig" not in webui.record["forms"]:
        before = list(_known.values())[-1]
        webui.ui, webui.program, webui.problem = before.ui, before.program, before.problem
    return webui


def install_ui(config: InstallConfig, webui: NotebookUI) -> None:
    """Install the web UI, or bring it up to date; the reason is said where that cannot be done here.

    The notebook then goes on with the playground instead, so nothing is raised for a missing GPU or network.

    Args:
        config: what the form shows, as its `config()` gives it.
        webui: the notebook's web UI, as `open_store` gives it.

    Raises:
        SettingsError: these are the settings of another form, or one of them is wrong.
    """
    require(config, InstallConfig)
    webui.ui, webui.program, webui.problem = find_ui(config.ui), config.folder, None
    if describe_device().kind != "cuda" and not webui.without_gpu:
        webui.problem = WebUIError(
            f"There is no GPU here: {webui.ui.title} takes minutes per image without one, seconds with one.",
            "Select one (Colab: Runtime > Change runtime type) and run all cells; or tick 'without gpu' in cell 2a, "
            "then run cells 2b and 3b.",
        )
    else:
        try:
            install_webui(settled(config, webui))
        except (WebUIError, InstallError, DependencyMissing, DiskFull) as err:
            webui.problem = err
    if webui.problem is not None:
        logger.warning("%s is not installed. %s", webui.ui.title, webui.problem)
        logger.info("The cells below offer the playground instead, which generates images with the built-in model.")


def fetch_models(config: ModelsConfig, webui: NotebookUI) -> None:
    """Put the chosen models where the web UI finds them; the base model is the one it starts with.

    Args:
        config: what the form shows, as its `config()` gives it.
        webui: the notebook's web UI, as `open_store` gives it.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `webui.place_models` raises.
    """
    require(config, ModelsConfig)
    if webui.left_out():
        return
    placed = place_models(config, webui.ui, webui.places)
    base = next((model for model in placed if model.kind in BASE_KINDS), None)
    webui.model, webui.family = (str(base.path.resolve()), base.family) if base else ("", None)


def fetch_controlnets(config: ControlNetConfig, webui: NotebookUI) -> None:
    """Fetch the chosen ControlNets for the base model that was chosen before.

    Args:
        config: what the form shows, as its `config()` gives it.
        webui: the notebook's web UI, as `open_store` gives it.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `webui.place_controlnet` raises.
    """
    require(config, ControlNetConfig)
    if not webui.left_out():
        place_controlnets(config, webui.ui, webui.places, family=webui.family)


# ----------------------------------------------------------------------------------------------- starting


def start_ui(config: LaunchConfig, webui: NotebookUI) -> PageView[Page] | None:
    """Start the web UI and wait until it answers, its last lines in view.

    One that runs with these very settings goes on, whichever kernel has started it; one with others is started anew.
    Where no web UI can run, the playground is offered instead: the value is its view, with a button that opens it.

    Args:
        config: what the form shows, as its `config()` gives it.
        webui: the notebook's web UI, as `open_store` gives it.

    Returns:
        None, or the playground's view where no web UI can run.

    Raises:
        SettingsError: these are the settings of another form.
        Interrupted: the cell was stopped; nothing runs.
        FastSDError: what `webui.launch` raises.
    """
    require(config, LaunchConfig)
    if webui.problem is not None:
        logger.warning("No web UI is started. %s", webui.problem)
        return offer_playground(PlaygroundConfig(), "")
    config = settled(config, webui)
    asked = _asked(config, webui)
    if _goes_on(config, asked, webui):
        return None
    _end(webui, config)
    view = StartView(f"{find_ui(config.ui).title} is starting; the first start takes a minute or two.")
    view.display()
    try:
        webui.running = launch(config, show=view.line)
    except KeyboardInterrupt as err:
        view.end("Stopped: nothing is running.", good=False)
        raise Interrupted("The start was interrupted, and its process was stopped.", "Run the cell again.") from err
    except WebUINotInstalled as err:
        view.end(err.problem, good=False)
        raise WebUINotInstalled(err.problem, "Run cell 3b, which installs it, then this one.") from err
    except FastSDError as err:
        view.end(err.problem, good=False)
        raise
    webui.ui = webui.running.ui
    note_run(webui.running, start=asked)
    running = webui.running
    waits = "its model is loading" if running.ui.loaded else "its model is loaded with the first image"
    model = {True: "its model is loaded", False: "but it refused the model: see above", None: waits}
    how = f"{running.ui.title} answers after {running.seconds:.0f} s; {model[running.model_loaded]}."
    view.end(how, good=running.model_loaded is not False)
    return None


def _asked(config: LaunchConfig, webui: NotebookUI) -> dict[str, Any]:
    """What a start is asked with, in JSON: the settings, and the code that is installed."""
    values = {name: value for name, value in to_values(config).items() if name not in _NOT_COMPARED}
    return values | {"commits": read_object(webui.places.installed).get("commits", {})}


def _goes_on(config: LaunchConfig, asked: dict[str, Any], webui: NotebookUI) -> bool:
    """Leave a web UI running that was started with the same settings, and say so."""
    running = webui.look()
    if running is None or config.password not in (None, "", running.login.password):
        return False
    if read_note(running).get("start") != asked:
        return False
    logger.info(
        "%s is already running with these settings, on port %d of this machine%s. Section 8 stops it.",
        running.ui.title,
        running.port,
        f", and its link is open: {webui.link.url}" if webui.link is not None else "",
    )
    return True


def _end(webui: NotebookUI, config: LaunchConfig) -> None:
    running = webui.look()
    if running is not None:
        logger.info("%s, which is running with other settings, is stopped first.", running.ui.title)
        running.stop()
    elif stop(config.ui, folder=config.folder or None, store=config.store or None):
        # Its login is not known here, so it could not be shared.
        logger.info("A web UI left by an earlier run was stopped.")
    webui.forget()


# ------------------------------------------------------------------------------------------------ sharing


def share_ui(config: TunnelConfig, webui: NotebookUI) -> LinkView | None:
    """Give the running web UI a link behind a login, and show link, user, password and expiry to copy.

    The link is held by a process of its own, so it outlives this kernel, and is shown again when it was made with the
    same settings. In Colab, `kind` colab makes a link that opens for this notebook's user alone.

    Args:
        config: what the form shows, as its `config()` gives it.
        webui: the notebook's web UI, as `open_store` gives it.

    Returns:
        The view with the link, or None where no web UI can run.

    Raises:
        SettingsError: these are the settings of another form.
        WebUIError: it does not run.
        TunnelError: no service gave a link; what each one said is in the sentence.
    """
    require(config, TunnelConfig)
    if webui.left_out():
        return None
    running = webui.look()
    if running is None:
        problem = webui.running.problem() if webui.running is not None else None
        raise problem or WebUIError("The web UI is not running.", "Run cell 6b, which starts it.")
    view, asked = LinkView(), to_values(config)
    if webui.link is not None and read_note(running).get("link") == asked:
        logger.info("The link opened before is still open.")
    else:
        if webui.link is not None:
            webui.link.close()
            webui.link = None
        # The link asks for the web UI's own user and password, set where it was started.
        wanted = dataclasses.replace(config, user=running.login.user, password=running.login.password)
        alone = config.kind == "colab"  # only this kernel can ask Colab for it
        webui.link = share(running, wanted, on_change=view.show) if alone else share_in_background(running, wanted)
        note_run(running, link=asked)
    view.show(webui.link)
    view.follow(webui)
    return view
