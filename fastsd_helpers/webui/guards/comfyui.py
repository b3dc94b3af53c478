"""The guard of ComfyUI: names in prompts and requests stay in its folders, no model is written, no address fetched.

ComfyUI checks most of this by itself by now; what is here holds for its custom nodes too, and when a check is lost.
"""

import contextvars
import json
import os
import sys
import tempfile
from typing import Any
from urllib.parse import unquote

import lost
import pictures  # noqa: F401  # only wanted formats are decoded
from frame import Refused, before, inside, patch, run, setting

__all__: list[str] = []

# What can hold a model, or be run: neither uploaded nor written by a prompt.
_MODELS = {".ckpt", ".safetensors", ".sft", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".gguf", ".onnx", ".pickle", ".npy"}
_CODE = {".py", ".pyc", ".pyd", ".so", ".sh", ".pth", ".dll", ".exe", ".egg", ".yaml", ".toml"}
# Demuxers that read one file and no other: HLS, DASH, concat and image2 name further ones by path and by address.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,asf,ogg,wav,w64,aiff,flac,mp3,aac,ac3,eac3,caf,amr,au,"
    "gif,apng,png_pipe,jpeg_pipe,webp_pipe,ivf,m4v,h264,hevc,obu,av1,opus"
)
# Nodes that only write models, datasets or train them, so that they are refused before hours of work.
_CLOSED_NODES = {
    *("CheckpointSave", "CLIPSave", "ImageOnlyCheckpointSave", "LoraSave", "ModelSave", "SaveLoRA", "SaveLoRANode"),
    *("SaveTrainingDataset", "TrainLoraNode", "VAESave"),
}
_CLOSED_CATEGORIES = ("api node", "partner/", "model/training", "training")

_in_prompt: contextvars.ContextVar[bool] = contextvars.ContextVar("fastsd_in_prompt", default=False)


def _admin() -> bool:
    return bool(setting("admin"))


def _plain(text: str) -> str:
    for _ in range(8):
        decoded = unquote(text)
        if decoded == text:
            return text
        text = decoded
    raise Refused("a name that is encoded more than eight times")


def _leaves(name: Any) -> bool:
    """Whether a name says that it goes elsewhere: up, from the root, to a home, to an address."""
    if not isinstance(name, str):
        return True
    text = _plain(name).replace("\\", "/")
    return "\0" in text or text.startswith(("/", "~")) or text[1:2] == ":" or ".." in text.split("/")


def _suffix(path: Any) -> str:
    return os.path.splitext(os.fspath(path))[1].lower().rstrip(". ") if isinstance(path, (str, os.PathLike)) else ""


def _folders() -> list[str]:
    """Where visitors' files are."""
    paths = sys.modules["folder_paths"]
    return [
        paths.get_input_directory(),
        paths.get_output_directory(),
        paths.get_temp_directory(),
        paths.get_user_directory(),
    ]


def _model_folders() -> list[str]:
    named = sys.modules["folder_paths"].folder_names_and_paths
    return [folder for folders, _ in list(named.values()) for folder in folders]


# ------------------------------------------------------------------------------------------------ names in a prompt


@patch("folder_paths", "get_annotated_filepath", "name default_dir=")
def _(original: Any) -> Any:
    def get_annotated_filepath(name: str, default_dir: str | None = None) -> str:
        path = original(name, default_dir)
        roots = _folders()[:3] if default_dir is None else [default_dir]
        if not isinstance(name, str) or "\0" in name or not inside(path, roots):
            raise Refused("a file outside the folders for input, output and temporary files")
        return path

    return get_annotated_filepath


@patch("folder_paths", "exists_annotated_filepath", "name")
def _(original: Any) -> Any:
    def exists_annotated_filepath(name: str) -> bool:
        try:
            sys.modules["folder_paths"].get_annotated_filepath(name)
        except (ValueError, Refused):
            return False
        return original(name)

    return exists_annotated_filepath


@patch("folder_paths", "get_full_path", "folder_name filename")
def _(original: Any) -> Any:
    def get_full_path(folder_name: str, filename: str) -> str | None:
        # Links in the folders of models are their owner's: a visitor cannot make any. So the name is looked at.
        if _leaves(filename):
            return None
        path = original(folder_name, filename)
        if path is None and _in_prompt.get():
            lost.require_there(folder_name, filename)
        return path

    return get_full_path


@patch("folder_paths", "get_save_image_path", "filename_prefix output_dir image_width= image_height=")
def _(original: Any) -> Any:
    def get_save_image_path(
        filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
    ) -> tuple[str, str, int, str, str]:
        prefix = os.path.normpath(str(filename_prefix))
        if _leaves(prefix) and not inside(os.path.join(output_dir, prefix), [output_dir]):
            raise Refused("an image is saved in the folder for output")
        folder = os.path.join(output_dir, os.path.dirname(prefix))
        if os.path.realpath(folder) != os.path.realpath(output_dir) and not inside(folder, [output_dir]):
            raise Refused("an image is saved in the folder for output")
        return original(filename_prefix, output_dir, image_width, image_height)

    return get_save_image_path


@patch("execution", "validate_prompt", "prompt_id prompt partial_execution_list")
def _(original: Any) -> Any:
    async def validate_prompt(prompt_id: Any, prompt: Any, partial_execution_list: Any) -> Any:
        for key, node in prompt.items() if isinstance(prompt, dict) and not _admin() else ():
            name = node.get("class_type") if isinstance(node, dict) else None
            if isinstance(name, str) and _closed(name):
                said = f"{name} is not for use through a link: it writes models, trains or asks another service"
                error = {"type": "fastsd_guard", "message": said, "details": f"Node #{key}", "extra_info": {}}
                return (False, error, [], {})
        found = await original(prompt_id, prompt, partial_execution_list)
        if not found[0]:
            lost.with_advice(found[3], _MODELS)
        return found

    return validate_prompt


def _closed(name: str) -> bool:
    node = sys.modules["nodes"].NODE_CLASS_MAPPINGS.get(name)
    category = str(getattr(node, "CATEGORY", "")).lower()
    return name in _CLOSED_NODES or bool(getattr(node, "API_NODE", False)) or category.startswith(_CLOSED_CATEGORIES)


# --------------------------------------------------------------------------------------- files that a prompt touches


@patch("execution", "PromptExecutor.execute", "self prompt prompt_id extra_data= execute_outputs=")
def _(original: Any) -> Any:
    def execute(self: Any, prompt: Any, prompt_id: Any, extra_data: Any = None, execute_outputs: Any = ()) -> Any:
        token = _in_prompt.set(True)
        try:
            return original(self, prompt, prompt_id, {} if extra_data is None else extra_data, execute_outputs)
        finally:
            _in_prompt.reset(token)

    return execute


_HOME = os.path.expanduser("~")
_CACHES = [os.path.join(_HOME, name) for name in (".cache", ".triton", ".config/matplotlib", ".nv", ".u2net")]
_CACHES += [os.environ[name] for name in ("HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR") if os.environ.get(name)]
_SYSTEM = [
    "/usr",
    "/lib",
    "/lib64",
    "/opt",
    "/sys",
    "/dev",
    "/etc/fonts",
    "/etc/ssl",
    "/etc/ld.so.cache",
    "/run/opengl",
]
_PROC = {"environ", "mem", "cwd", "root", "fd", "cmdline", "maps", "auxv", "map_files"}
_LOOKS = {"open": 1, "os.listdir": 1, "os.scandir": 1, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1}
_LOOKS |= {"os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.move": 2, "shutil.copyfile": 2, "shutil.rmtree": 1}


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    count = _LOOKS.get(event)
    if count is None or not _in_prompt.get() or _admin():
        return
    writes = event not in ("os.listdir", "os.scandir")
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else False
        writes = writes or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
    for place in arguments[:count]:
        if isinstance(place, bytes):
            place = os.fsdecode(place)
        if isinstance(place, str) and not _may(place, writes):
            raise Refused(f"a prompt {'writes' if writes else 'reads'} a file that is none of its own")


def _may(place: str, writes: bool) -> bool:
    token = _in_prompt.set(False)  # what is asked here is none of the prompt's business
    try:
        path = os.path.abspath(place)
        cached = os.path.basename(os.path.dirname(path)) == "__pycache__"
        own = [*_folders(), tempfile.gettempdir(), *_CACHES]
        if path in ("/dev/null", "/dev/shm") or path.startswith("/dev/shm/"):
            return True
        if writes:
            if cached:
                return inside(path, [sys.prefix, os.getcwd(), *_model_folders()])
            return _suffix(path) not in _CODE - _MODELS and _within(path, [*own, *_model_folders()])
        if path.startswith("/proc/"):
            return not _PROC & set(os.path.realpath(path).split("/")) | (_PROC & set(path.split("/")))
        code = [os.getcwd(), sys.prefix, sys.base_prefix, *(part for part in sys.path if part and part != os.sep)]
        if _within(path, [*own, *code, *_model_folders(), *_SYSTEM]):
            return True
        # A model that its owner linked into one of these folders.
        return any(path.startswith(os.path.abspath(folder) + os.sep) for folder in _model_folders())
    finally:
        _in_prompt.reset(token)


def _within(path: str, folders: list[str]) -> bool:
    return inside(path, folders) or os.path.realpath(path) in {os.path.realpath(folder) for folder in folders}


def _no_model(path: Any) -> None:
    name = getattr(path, "name", path)
    if not _admin() and _in_prompt.get() and _suffix(name) in _MODELS:
        raise Refused("no model is written through a link")


@before("comfy.utils", "save_torch_file", "sd ckpt metadata=")
def _(sd: Any, ckpt: Any, metadata: Any = None) -> None:
    _no_model(ckpt)


@before("safetensors.torch", "save_file", "tensors filename metadata=")
def _(tensors: Any, filename: Any, metadata: Any = None) -> None:
    _no_model(filename)


@before("torch", "save", None)
def _(obj: Any, f: Any, *_more: Any, **_named: Any) -> None:
    _no_model(f)


@patch("av", "open", None)
def _(original: Any) -> Any:
    def open(file: Any, mode: Any = None, *more: Any, **named: Any) -> Any:
        path = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
        if path is not None and _in_prompt.get() and not _admin():
            if not os.path.isabs(path) or ".." in path.split(os.sep):
                raise Refused("a film is named by its whole path, not by an address")
            if not _may(path, (mode or "r") != "r"):
                raise Refused("a prompt reads a film that is none of its own")
        if (mode or "r") == "r" and len(more) < 3:
            named["container_options"] = {**(named.get("container_options") or {}), "format_whitelist": _CONTAINERS}
        return original(file, mode, *more, **named)

    return open


# ------------------------------------------------------------------------------------------------ names in a request


@patch("app.user_manager", "UserManager.get_request_user_filepath", "self request file type= create_dir=")
def _(original: Any) -> Any:
    def get_request_user_filepath(
        self: Any, request: Any, file: Any, type: str = "userdata", create_dir: bool = True
    ) -> Any:
        if file is not None and _leaves(file):
            return None
        path = original(self, request, file, type=type, create_dir=create_dir)
        return path if path is None or inside(path, [sys.modules["folder_paths"].get_user_directory()]) else None

    return get_request_user_filepath


@patch("server", "PromptServer.add_routes", "self")
def _(original: Any) -> Any:
    def add_routes(self: Any) -> Any:
        from aiohttp import web

        @web.middleware
        async def look(request: Any, handler: Any) -> Any:
            try:
                await _look_at(request)
            except (Refused, ValueError, TypeError, AttributeError, KeyError) as err:
                text = str(err) if isinstance(err, Refused) else "fastsd guard: this request is not understood"
                return web.json_response({"error": text}, status=403)
            try:
                return await handler(request)
            except OSError as err:
                if isinstance(err, Refused) or not lost.gone():
                    raise
                return web.json_response({"error": lost.STORE}, status=503)

        self.app.middlewares.append(look)
        return original(self)

    return add_routes


async def _look_at(request: Any) -> None:
    path = _plain(request.path)
    path = path.removeprefix("/api")
    for name in [*request.query.values(), *request.match_info.values()]:
        if _leaves(name) and ("/" in name or "\\" in name or ".." in name) and not inside(_plain(name), _folders()):
            raise Refused("a name outside the folders of this web UI")
    query = request.query
    if path == "/view" and not query.get("filename", "").startswith("blake3:"):
        _stays(query.get("filename", ""), query.get("subfolder", ""), query.get("type", "output"))
    if path.startswith("/upload/") and request.method == "POST":
        post = await request.post()
        kind = post.get("type") or "input"
        if kind not in ("input", "temp") and not _admin():
            raise Refused("uploads are for the folder of inputs")
        name = getattr(post.get("image"), "filename", None)
        if name:
            _stays(name, post.get("subfolder") or "", kind)
            if _suffix(name) in _MODELS | _CODE and not _admin():
                raise Refused("neither models nor programs are uploaded")
        if "original_ref" in post:
            source = json.loads(post["original_ref"])
            _stays(source["filename"], source.get("subfolder") or "", source.get("type") or "output")
    if path.startswith("/assets") and request.method not in ("GET", "HEAD", "OPTIONS") and not _admin():
        raise Refused("the store of assets is not changed through a link")


def _stays(name: str, subfolder: str, kind: str) -> None:
    paths = sys.modules["folder_paths"]
    plain, folder = paths.annotated_filepath(name)
    folder = folder or paths.get_directory_by_type(kind)
    if folder is None or _leaves(plain) or _leaves(subfolder):
        raise Refused("a name outside the folders of this web UI")
    # /view takes the last part of the name alone, an upload the whole.
    if not all(inside(os.path.join(folder, subfolder, part), [folder]) for part in (plain, os.path.basename(plain))):
        raise Refused("a link out of the folders of this web UI")


if __name__ == "__main__":
    sys.addaudithook(_look)
    run()
