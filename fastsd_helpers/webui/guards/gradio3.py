"""Gradio 3.41: files named by path, addresses fetched, and the routes that serve files."""

from typing import Any

from frame import Refused, patch, setting
from places import may_be_served, may_be_shown, plain_path, uploaded

__all__: list[str] = []

# Always closed: they show passwords of the command line, or fetch for the caller.
_CLOSED = ("/proxy=", "/sdapi/v1/cmd-flags", "/internal/sysinfo", "/internal/sysinfo-download")
# For the owner alone.
_ADMIN = ("/internal/profile-startup", "/sdapi/v1/server-", "/sdapi/v1/train", "/sdapi/v1/create", "/docs", "/redoc")


def look(value: Any, depth: int = 0) -> None:
    """Refuse a payload that names a file which is neither uploaded nor a picture made here, at any depth."""
    if depth > 50:
        raise Refused("this request is nested too deeply")
    if isinstance(value, dict):
        for key in ("name", "path"):
            named = value.get(key)
            if isinstance(named, str) and (value.get("is_file") or key == "path") and not may_be_shown(named):
                raise Refused("only uploaded files can be named")
        for inner in value.values():
            look(inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            look(inner, depth + 1)


def _only_uploads(value: Any) -> None:
    if isinstance(value, dict) and value.get("is_file") and not uploaded(value.get("name")):
        raise Refused("only uploaded files can be named")
    for inner in value if isinstance(value, (list, tuple)) else ():
        _only_uploads(inner)


@patch("gradio.blocks", "Blocks.preprocess_data", "self fn_index inputs state")
def _(original: Any) -> Any:
    def preprocess_data(self: Any, fn_index: int, inputs: list[Any], state: Any) -> Any:
        look(inputs)
        return original(self, fn_index, inputs, state)

    return preprocess_data


def _guard_component(module: str, name: str) -> None:
    @patch(f"gradio.components.{module}", f"{name}.preprocess", "self x")
    def _(original: Any) -> Any:
        def preprocess(self: Any, x: Any) -> Any:
            _only_uploads(x)
            return original(self, x)

        return preprocess


for _module, _name in (
    ("file", "File"),
    ("upload_button", "UploadButton"),
    ("audio", "Audio"),
    ("video", "Video"),
    ("model3d", "Model3D"),
    ("timeseries", "Timeseries"),
):
    _guard_component(_module, _name)


@patch("gradio.components.base", "IOComponent.download_temp_copy_if_needed", "self url")
def _(original: Any) -> Any:
    def download_temp_copy_if_needed(self: Any, url: str) -> str:
        raise Refused("no address is fetched")

    return download_temp_copy_if_needed


@patch("gradio.components.base", "IOComponent.hash_url", "url chunk_num_blocks=")
def _(original: Any) -> Any:
    def hash_url(url: str, chunk_num_blocks: int = 128) -> str:
        raise Refused("no address is fetched")

    return hash_url


@patch("gradio.utils", "validate_url", "possible_url")
def _(original: Any) -> Any:
    # It asks the address itself, from this machine; a page needs no redirect to one.
    return lambda possible_url: False


@patch("gradio.routes", "App.create_app", "blocks app_kwargs=")
def _(original: Any) -> Any:
    def create_app(blocks: Any, app_kwargs: Any = None) -> Any:
        app = original(blocks, app_kwargs)
        app.add_middleware(ClosedPaths)
        return app

    return create_app


class ClosedPaths:
    """ASGI middleware: 403 for paths that no visitor needs, and for files outside the served folders."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not allowed(scope.get("path", "")):
            body = b'{"detail":"fastsd guard: closed"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send)


def allowed(path: str) -> bool:
    """Whether a request's path may go on to the web UI."""
    path = plain_path(path)
    for prefix in ("/file=", "/file/"):
        if path.startswith(prefix):
            return may_be_served(path[len(prefix) :])
    words = path.lower().rstrip("/") or "/"
    closed = _CLOSED if setting("admin") else (*_CLOSED, *_ADMIN)
    return not any(
        words == row or (row[-1] in "=-" and words.startswith(row)) or words.startswith(row + "/") for row in closed
    )
