"""Where a web UI lives: its code and environment on this machine's disk, models and images where they are kept."""

from dataclasses import dataclass, field
from pathlib import Path

from fastsd_helpers.drive import delivers_late, sessions_root
from fastsd_helpers.errors import WebUIError
from fastsd_helpers.files import file_errors
from fastsd_helpers.runtime import where
from fastsd_helpers.webui.catalog import WebUI

__all__ = ["Places", "find_places", "link", "model_folder", "prepare_places", "require_folder", "store_folder"]

# Where the previous notebook kept its own: models, images and settings there are used as they are.
_STORE = Path("sd", "stable-diffusion-webui")


@dataclass(frozen=True)
class Places:
    """The folders of one web UI."""

    ui: str
    root: Path  # everything on this machine's disk
    store: Path  # models, images, settings: on Drive or here
    environment: Path = field(init=False)  # its own Python environment
    python: Path = field(init=False)  # the interpreter of it
    code: Path = field(init=False)  # its source code
    data: Path = field(init=False)  # its data folder: links to the store, and extensions, which are code
    models: Path = field(init=False)  # its models folder: a local tree of links, since Drive cannot hold links
    extensions: Path = field(init=False)  # its folder of extensions, on this machine
    switched_off: Path = field(init=False)  # extensions that are here and not run
    kept_extensions: Path = field(init=False)  # what the store keeps of the owner's extensions
    run: Path = field(init=False)  # state of a running one, and its login; readable for this user alone
    logs: Path = field(init=False)  # of installations and runs
    installed: Path = field(init=False)  # the record of a finished installation

    def __post_init__(self) -> None:
        env, data = self.root / "env", self.root / "data"
        below = {"environment": env, "python": env / "bin" / "python", "data": data, "models": data / "models"}
        below["extensions"] = data / ("custom_nodes" if self.ui == "comfyui" else "extensions")
        below |= {"switched_off": data / "extensions-off", "installed": self.root / "installed.json"}
        below |= {name: self.root / name for name in ("code", "run", "logs")}
        below["kept_extensions"] = self.store / "extensions-kept" / self.ui
        for name, path in below.items():
            object.__setattr__(self, name, path)  # the class is frozen


def find_places(ui: WebUI, *, folder: Path | str | None = None, store: Path | str | None = None) -> Places:
    """Choose the folders of a web UI; nothing is created.

    Args:
        ui: the web UI, as `find_ui` gives it.
        folder: for code and environments; `/content/fastsd` in Colab, else `.cache/fastsd/webui` in the home folder,
            and `fastsd/webui` there for AUTOMATIC1111.
        store: for models, images and settings; the folder of the previous notebook on a mounted Drive, else
            `sd/stable-diffusion-webui` in the current directory.

    Returns:
        The folders, which may not be there yet.

    Raises:
        WebUIError: `folder` is on Drive, which is far too slow for an environment, or begins with a dot where the
            web UI could then not serve its own page.
    """
    if folder:
        root = Path(folder).expanduser().absolute()
    elif where() == "colab":
        root = Path("/content/fastsd")
    else:
        root = Path.home() / ("fastsd" if ui.hides_dotted else ".cache/fastsd") / "webui"
    dotted = next((part for part in root.parts if part.startswith(".")), None)
    if ui.hides_dotted and dotted:
        raise WebUIError(
            f"{ui.title} cannot be in {root}: it serves nothing, not even the scripts of its own page, below a folder "
            f"whose name begins with a dot ({dotted}).",
            "Choose another folder with --folder.",
        )
    if delivers_late(root):
        raise WebUIError(
            f"{root} is on Google Drive or another network mount, which is far too slow for a program's code.",
            "Leave the folder empty; models and images go to Drive through the data directory.",
        )
    # The sessions' root knows whether a Drive is mounted: My Drive/Fast-Dreambooth/Sessions.
    kept = Path(store).expanduser().absolute() if store else sessions_root().parents[1] / _STORE
    return Places(ui.key, root / ui.key, kept)


def prepare_places(places: Places, ui: WebUI) -> None:
    """Make the folders, and link the store's own into what the UI takes for its data folder.

    Raises:
        DriveError: a folder cannot be made.
    """
    with file_errors(places.root, "write to"):
        for folder in (places.code.parent, places.data, places.logs, places.models):
            folder.mkdir(parents=True, exist_ok=True)
        if ui.key == "comfyui":
            (places.data / "custom_nodes").mkdir(exist_ok=True)  # it ends when this folder is missing
        places.run.mkdir(mode=0o700, exist_ok=True)
        places.run.chmod(0o700)
    with file_errors(places.store, "write to"):
        (places.store / "outputs").mkdir(parents=True, exist_ok=True)
        link(places.data / "outputs", places.store / "outputs")
        for name in ("input", "user") if ui.key == "comfyui" else ():
            (places.store / "comfyui" / name).mkdir(parents=True, exist_ok=True)
            link(places.data / name, places.store / "comfyui" / name)
        for kind, name in ui.folders:
            kept = _kept(places, kind, name)
            kept.mkdir(parents=True, exist_ok=True)
            local = model_folder(places, ui, kind)
            local.mkdir(parents=True, exist_ok=True)
            link(local / "store", kept)


def model_folder(places: Places, ui: WebUI, kind: str) -> Path:
    """The local folder in which the UI looks for models of a kind (checkpoint, lora, vae, embedding, controlnet, ...).

    Raises:
        WebUIError: the UI has no such models.
    """
    name = require_folder(ui, kind)
    return places.data / name if kind == "embedding" and ui.key != "comfyui" else places.models / name


def require_folder(ui: WebUI, kind: str) -> str:
    """The UI's own name of its folder for models of a kind; raises WebUIError when it has none."""
    name = dict(ui.folders).get(kind)
    if name is None:
        kinds = ", ".join(dict(ui.folders))
        raise WebUIError(f"{ui.title} has no folder for models of the kind '{kind}'.", f"It has {kinds}.")
    return name


def store_folder(places: Places, ui: WebUI, kind: str) -> Path:
    """Where models of a kind are kept for good: of this store, whichever one the web UI was started with last."""
    linked = model_folder(places, ui, kind) / "store"
    own = linked.is_dir() and not linked.is_symlink()  # a folder that its owner made, and no start replaces
    return (linked if own else _kept(places, kind, dict(ui.folders)[kind])).resolve()


def _kept(places: Places, kind: str, name: str) -> Path:
    # AUTOMATIC1111 keeps embeddings beside models, not in them.
    return places.store / name if kind == "embedding" else places.store / "models" / name


def link(at: Path, target: Path) -> None:
    """Make `at` a link to `target`; an older link is replaced, a real file or folder is left alone."""
    if at.is_symlink():
        if at.readlink() == target:
            return
        at.unlink()
    if not at.exists():
        at.symlink_to(target)
