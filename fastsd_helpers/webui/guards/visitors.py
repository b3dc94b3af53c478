"""What every version of Gradio closes for visitors: payloads that name files, and paths of requests."""

from typing import Any

from frame import Refused, setting
from places import may_be_served, may_be_shown, plain_path

__all__ = ["allowed", "close_paths", "look", "no_fetch"]

# Always closed: they show passwords of the command line, or fetch for the caller.
_CLOSED = ("/proxy=", "/sdapi/v1/cmd-flags", "/internal/sysinfo", "/internal/sysinfo-download")
# For the owner alone.
_ADMIN = ("/internal/profile-startup", "/sdapi/v1/server-", "/sdapi/v1/train", "/sdapi/v1/create", "/docs", "/redoc")


def look(value: Any, depth: int = 0) -> None:
    """Refuse a payload that names a file which is neither uploaded nor an image made here, at any depth."""
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


def no_fetch(*_arguments: Any, **_named: Any) -> None:
    """Refuse a function that would fetch an address for a visitor."""
    raise Refused("no address is fetched")


def close_paths(create_app: Any) -> Any:
    """Let the function that makes Gradio's app put the closed paths before it."""

    def create(*arguments: Any, **named: Any) -> Any:
        app = create_app(*arguments, **named)
        app.add_middleware(_ClosedPaths)
        return app

    return create


class _ClosedPaths:
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
