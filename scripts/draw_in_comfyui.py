"""Queue a workflow that `fastsd` wrote for ComfyUI through the gate, and keep the picture; a stranger gets nowhere.

    fastsd webui launch --ui comfyui --model MODEL --background [--share ...]
    python scripts/draw_in_comfyui.py WORKFLOW.json --out DRAWN.png [--port 8188 | --link URL --password PASSWORD]

WORKFLOW.json is the one for the API, in `comfyui/api-workflows` of the store. With --port a gate of our own is opened
in front of that port; with --link it is asked through the link that `launch --share` printed. Paths that ComfyUI's page
uses are first asked for without a password, its WebSocket too. Ends with 1 when a stranger gets in or nothing is drawn.
"""

import argparse
import base64
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attack_comfyui import LOGIN, Visitor

from fastsd_helpers.tunnels.gate.login import Login
from fastsd_helpers.tunnels.gate.server import open_gate
from fastsd_helpers.webui import find_ui

ASKED = (
    *("/", "/ws?clientId=stranger", "/system_stats", "/object_info", "/object_info/KSampler", "/prompt", "/queue"),
    *("/history", "/view?filename=fastsd_00001_.png", "/userdata?dir=workflows", "/settings", "/models", "/extensions"),
    *("/embeddings", "/features", "/api/system_stats", "/api/object_info", "/api/settings", "/templates/index.json"),
)
SENT = ("/prompt", "/upload/image", "/upload/mask", "/queue", "/interrupt", "/free", "/history", "/api/prompt")


def main() -> int:
    """Ask as a stranger, then draw with the password; 0 when both went as they should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where the picture goes")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--link", help="address of a link that is open already")
    parser.add_argument("--user", default=LOGIN.user)
    parser.add_argument("--password", default=LOGIN.password)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an input, in every node with it"
    )
    options = parser.parse_args()
    login = Login(options.user, options.password)
    if options.link:
        return run(options, options.link.rstrip("/"), login)
    with open_gate(options.port, login, closed=find_ui("comfyui").closed) as gate:
        return run(options, f"http://127.0.0.1:{gate.port}", login)


def run(options: argparse.Namespace, address: str, login: Login) -> int:
    """Both parts, told line by line."""
    told = [(f"GET {path}", asked(address, path, None)) for path in ASKED]
    told += [(f"POST {path}", asked(address, path, b"{}")) for path in SENT]
    told += [("WebSocket /ws", websocket(address, {})), ("WebSocket /api/ws", websocket(address, {}, "/api/ws"))]
    for what, status in told:
        print(f"a stranger: {what}: {status}")
    open_to_all = [what for what, status in told if status != 401]
    visitor = Visitor(address)
    words = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
    visitor.headers = {"Authorization": f"Basic {words}"}
    print(f"with the password: GET /system_stats: {visitor.ask('/system_stats')[0]}")
    print(f"with the password: WebSocket /ws: {websocket(address, visitor.headers)}")
    workflow = json.loads(options.workflow.read_text(encoding="utf-8"))
    begun = time.monotonic()
    how, entry = visitor.draw(changed(workflow, dict(item.split("=", 1) for item in options.set)))
    print(f"{options.workflow.name}: {how}, {time.monotonic() - begun:.1f} s")
    if how != "success":
        print(json.dumps(entry)[:4000])
        return 1
    image = next(image for node in entry["outputs"].values() for image in node.get("images", ()))
    status, content = visitor.ask(
        f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
    )
    options.out.write_bytes(content)
    print(f"{image['filename']}: {status}, {len(content)} bytes, in {options.out}")
    print("open to strangers: " + (", ".join(open_to_all) or "nothing"))
    return 1 if open_to_all or status != 200 else 0


def asked(address: str, path: str, body: bytes | None) -> int:
    """Status of a request without a password."""
    headers = {"Content-Type": "application/json"} if body else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as err:
        return err.code


def websocket(address: str, headers: dict[str, str], path: str = "/ws") -> int:
    """Status of the answer to a handshake: 101 when the connection is taken."""
    place = urlsplit(address)
    lines = [f"GET {path}?clientId=draw HTTP/1.1", f"Host: {place.netloc}", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {base64.b64encode(b'sixteen bytes ok').decode()}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection((place.hostname, place.port or 80), timeout=60) as one:
        one.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(one.makefile("rb").readline().split()[1])


def changed(workflow: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """The workflow with other values where a node has an input of that name; a link to another node stays."""
    for node in workflow.values():
        for name, value in values.items():
            now = node["inputs"].get(name)
            if now is not None and not isinstance(now, list) and now != "":
                node["inputs"][name] = type(now)(value)
    return workflow


if __name__ == "__main__":
    sys.exit(main())
