"""What AUTOMATIC1111 and the Forges have in common: settings, administration, folders named, addresses fetched."""

import os
import re
from typing import Any

from frame import Refused, before, inside, missing, only_near, patch, prove, setting
from places import DATA, OUTPUTS, PICTURES, STORE, UPLOADS

__all__ = ["closed_unless_admin", "honest"]

_ready = False

# Settings whose value is a name that the web UI looks up in a list of its own.
_NAMES = {"sd_model_checkpoint", "sd_vae", "sd_hypernetwork", "sd_checkpoint_hash", "sd_lora", "forge_preset"}
_NAMES_BEGIN = ("forge_checkpoint_", "forge_unet_storage_dtype")
# Lists of files of models, which Forge keeps with their folders.
_MODELS_BEGIN = "forge_additional_modules"
_FORMATS = {"samples_format": PICTURES, "grid_format": PICTURES}
# Numbers and switches that are no matter of taste: what is fetched, cached, deleted, run, or where.
_NEVER = re.compile(
    r"(^|_)(dir|path|folder|url|api|temp|useragent|extensions?|cache|restore|theme|themes|limit|reloading|download"
    r"|requests?|autolaunch|launch|stdout|tracebacks?|console)(_|$)"
)


def honest(options: Any, key: str, value: Any) -> bool:
    """Whether a visitor may give a setting this value: numbers, switches, choices; no path, address, code or text."""
    info = options.data_labels.get(key)
    if info is None:
        return False
    if key in _NAMES or key.startswith(_NAMES_BEGIN):
        return isinstance(value, str) or value is None
    if key.startswith(_MODELS_BEGIN):
        values = value if isinstance(value, (list, tuple)) else [value]
        folders = [os.path.join(DATA, "models"), os.path.join(STORE, "models")]
        return all(isinstance(part, str) and ("/" not in part or inside(part, folders)) for part in values)
    if key in _FORMATS:
        return f".{value}".lower() in _FORMATS[key]
    if (info.section and info.section[0] is None) or _NEVER.search(key):
        return False
    if isinstance(info.default, (bool, int, float)) and isinstance(value, (bool, int, float)):
        return True
    arguments = info.component_args
    arguments = arguments() if callable(arguments) else arguments or {}
    choices = [part for choice in arguments.get("choices") or () for part in _parts(choice)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(choices) and all(part in choices for part in values)


def _parts(choice: Any) -> list[Any]:
    return list(choice) if isinstance(choice, (list, tuple)) else [choice]


@patch("modules.options", "Options.__setattr__", "self key value")
def _(original: Any) -> Any:
    def __setattr__(self: Any, key: str, value: Any) -> None:
        labels = vars(self).get("data_labels") or {}
        data = vars(self).get("data") or {}
        if _ready and not setting("admin") and (key in labels or key in data):
            if key in data and data[key] == value:
                return
            if not honest(self, key, value):
                # The kind of error that its callers take for "this one cannot be changed".
                raise RuntimeError(f"fastsd guard: '{key}' is not changed through a link")
        original(self, key, value)

    return __setattr__


def closed_unless_admin(module: str, name: str, parameters: str | None, what: str, **more: bool) -> None:
    """Register a patch: the function refuses unless the owner opened administration for this start."""

    @before(module, name, parameters, **more)
    def _(*_arguments: Any, **_named: Any) -> None:
        if _ready and not setting("admin"):
            raise Refused(f"{what} is closed for visitors of a link; its owner can start with allow_admin")


for _row in (
    ("modules.ui_extensions", "check_access", "", "managing extensions"),
    ("modules.ui_extensions", "save_config_state", "name", "managing extensions"),
    ("modules.ui_loadsave", "UiLoadsave.ui_apply", "self *values", "writing the page's defaults"),
    ("modules.restart", "restart_program", "", "restarting"),
    ("modules.restart", "stop_program", "", "stopping"),
    ("modules.shared_state", "State.request_restart", "self", "restarting"),
    ("modules.config_states", "restore_webui_config", "config", "managing extensions"),
    ("modules.config_states", "restore_extension_config", "config", "managing extensions"),
    ("modules.extensions", "Extension.fetch_and_reset_hard", None, "managing extensions"),
    ("modules.extensions", "Extension.check_updates", "self", "managing extensions"),
):
    closed_unless_admin(*_row)


@before("modules.ui_extensions", "refresh_available_extensions", None)
def _(url: str, *_more: Any) -> None:
    if not setting("admin"):
        raise Refused("the list of extensions is closed for visitors of a link")
    if not str(url).startswith("https://"):
        raise Refused("the list of extensions is fetched by https only")


@patch("modules.extras", "run_modelmerger", None)
def _(original: Any) -> Any:
    import inspect

    names = list(inspect.signature(original).parameters)
    if "custom_name" not in names:
        missing("run_modelmerger", "modules.extras", "has no custom_name")

    def run_modelmerger(*arguments: Any, **named: Any) -> Any:
        if not setting("admin"):
            raise Refused("merging checkpoints is closed for visitors of a link")
        bound = inspect.signature(original).bind(*arguments, **named)
        bound.arguments["custom_name"] = os.path.basename(str(bound.arguments.get("custom_name") or ""))
        return original(*bound.args, **bound.kwargs)

    return run_modelmerger


def _no_folders(module: str, name: str, parameters: str | None, wanted: tuple[str, ...], **more: bool) -> None:
    """Register a patch: these arguments, which are folders of the machine, stay empty unless in admin mode."""

    @patch(module, name, parameters, **more)
    def _(original: Any) -> Any:
        import inspect

        signature = inspect.signature(original)
        for word in wanted:
            if word not in signature.parameters:
                missing(name, module, f"has no {word}")

        def without_folders(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named)
            given = [bound.arguments.get(word) for word in wanted]
            if not setting("admin") and any(
                isinstance(value, (str, os.PathLike)) and str(value).strip() for value in given
            ):
                raise Refused("folders of this machine are not named through a link")
            return original(*arguments, **named)

        return without_folders


_no_folders(
    "modules.img2img",
    "process_batch",
    "p input output_dir inpaint_mask_dir args to_scale= scale_by= use_png_info= png_info_props= png_info_dir=",
    ("input", "output_dir", "inpaint_mask_dir", "png_info_dir"),
    wrapped=True,  # ControlNet's batches
)
_no_folders(
    "modules.img2img",
    "img2img",
    None,
    tuple(f"img2img_batch_{word}" for word in ("input_dir", "output_dir", "inpaint_mask_dir", "png_info_dir")),
)
_no_folders(
    "modules.postprocessing",
    "run_postprocessing",
    None,
    ("image_folder", "input_dir", "output_dir"),
)


def _known(path: Any) -> bool:
    return inside(path, [os.getcwd(), DATA, STORE, UPLOADS, *OUTPUTS])


def _only_known(folder: Any) -> None:
    if _ready and not setting("admin") and not _known(os.path.join(str(folder), "x")):
        raise Refused("folders of this machine are not named through a link")


@before("modules.util", "listfiles", "dirname")
def _(dirname: Any) -> None:
    _only_known(dirname)


@before("modules.util", "walk_files", "path allowed_extensions=")
def _(path: Any, allowed_extensions: Any = None) -> None:
    _only_known(path)


def _may_be_written(path: Any) -> bool:
    folders = [*OUTPUTS, UPLOADS]
    # A card's preview lies beside its model.
    if os.path.splitext(str(path))[1].lower() in PICTURES:
        folders += [os.path.join(DATA, "models"), os.path.join(DATA, "embeddings"), os.path.join(STORE, "models")]
        folders += [os.path.join(STORE, "embeddings")]
    return inside(path, folders)


@before("modules.images", "save_image", None)
def _(image: Any, path: Any, basename: Any, *more: Any, **named: Any) -> None:
    if setting("admin"):
        return
    extension = str(named.get("extension", more[2] if len(more) > 2 else "png"))
    if not _may_be_written(os.path.join(str(path), "x.png")) or f".{extension}".lower() not in PICTURES:
        raise Refused("images are written to the outputs only")
    words = [basename, named.get("forced_filename"), named.get("suffix")]
    if any(isinstance(word, str) and ("/" in word or "\\" in word or "\0" in word) for word in words):
        raise Refused("an image's name holds no path")


@before("modules.images", "save_image_with_geninfo", None)
def _(image: Any, geninfo: Any, filename: Any, *_more: Any, **_named: Any) -> None:
    if _ready and not setting("admin") and not _may_be_written(filename):
        raise Refused("images are written to the outputs only")


@before("modules.ui_extra_networks", "fetch_file", "filename=")
def _(filename: str = "") -> None:
    from fastapi.exceptions import HTTPException

    # Its own check compares the text of the path, and ".." is text to it. The models folder holds links.
    if ".." in re.split(r"[/\\]", filename) or "\0" in filename or not inside(filename, [DATA, STORE, os.getcwd()]):
        raise HTTPException(status_code=403, detail="File not allowed")


@before("modules.api.api", "decode_base64_to_image", "encoding", late=True)
def _(encoding: Any) -> None:
    from fastapi.exceptions import HTTPException

    if not isinstance(encoding, str):
        raise HTTPException(status_code=422, detail="An image is text in base64.")
    if not encoding.startswith("data:image/") and re.search(r"[^A-Za-z0-9+/=\s_-]", encoding[:200]):
        raise HTTPException(status_code=403, detail="An image is sent as base64; no address is fetched.")


@patch("modules.api.api", "verify_url", "url", late=True)
def _(original: Any) -> Any:
    return lambda url: False


@patch("modules.script_callbacks", "app_started_callback", "demo app")
def _(original: Any) -> Any:
    def app_started_callback(demo: Any, app: Any) -> Any:
        global _ready
        result = original(demo, app)
        from modules import shared
        from modules.shared_cmd_options import cmd_opts

        folders = {str(value) for key, value in shared.opts.data.items() if key.startswith("outdir_") and value}
        OUTPUTS.extend(sorted(os.path.abspath(folder) for folder in folders))
        prove(late=True)
        if not _ready and not setting("admin"):
            only_near(lambda: cmd_opts.port or 7860)
        _ready = True
        return result

    return app_started_callback
