# ruff: noqa: T201
"""A web UI's process as its launcher sees it: log lines, a port, signals. The lines are those of AUTOMATIC1111 v1.10.1.

Its page asks for Gradio's cookie, with the login of the file that `--gradio-auth-path` names, and its API for HTTP
basic authentication where `api_auth` of its options is set, as AUTOMATIC1111's own do; those modules it writes itself.

Run by the stub installation of test_webui.py as `python -u launch.py ...`; the file `mood` beside it says what happens.
"""

import base64
import http.server
import json
import secrets
import sys
import threading
import time
import urllib.parse
from pathlib import Path

MODULES = {
    "__init__": "",
    "api/__init__": "",
    "shared_cmd_options": """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--api", action="store_true")
for flag in ("--api-auth", "--gradio-auth", "--gradio-auth-path"):
    parser.add_argument(flag, type=str, default=None)
cmd_opts, _ = parser.parse_known_args()
""",
    "api/api": """
from modules.shared_cmd_options import cmd_opts
class Api:
    def get_cmd_flags(self):
        return vars(cmd_opts)
""",
}
for name, text in MODULES.items():
    file = Path(__file__).with_name("modules") / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

from modules.api.api import Api  # noqa: E402
from modules.shared_cmd_options import cmd_opts  # noqa: E402

words = sys.argv[1:]
mood = Path(__file__).with_name("mood").read_text().strip()
port = int(words[words.index("--port") + 1])
print("fatal: No names found, cannot describe anything.", flush=True)
print(f"Launching Web UI with arguments: {' '.join(words)}", flush=True)
print("Warning: caught exception 'Found no NVIDIA driver on your system.', memory monitor disabled", flush=True)


login = Path(words[words.index("--gradio-auth-path") + 1]).read_text(encoding="utf-8").strip()
user, _, password = login.partition(":")
tokens = set()  # of visitors who logged in at the page; a restarted UI knows none of before


class Site(http.server.BaseHTTPRequestHandler):
    def answer(self, status, what, **headers):
        body = json.dumps(what).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def api(self, sent=None):
        if "--api" not in words:
            return self.answer(404, {"detail": "Not Found"})
        basic = "Basic " + base64.b64encode(str(cmd_opts.api_auth).encode()).decode()
        if cmd_opts.api_auth and self.headers.get("Authorization") != basic:
            return self.answer(401, {"detail": "Incorrect username or password"}, WWW_Authenticate="Basic")
        if self.path.startswith("/sdapi/v1/cmd-flags"):
            return self.answer(200, Api().get_cmd_flags())
        if self.path.startswith("/sdapi/v1/options"):
            return self.answer(200, {"sd_model_checkpoint": "small.safetensors"})
        return self.answer(200, {"images": [base64.b64encode(b"a picture").decode()], "parameters": sent})

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/sdapi/"):
            return self.api(json.loads(sent or b"null"))
        form = dict(urllib.parse.parse_qsl(sent.decode()))
        if self.path != "/login" or (form.get("username"), form.get("password")) != (user, password):
            return self.answer(400, {"detail": "Incorrect credentials."})
        tokens.add(token := secrets.token_urlsafe(16))
        return self.answer(200, {"success": True}, Set_Cookie=f"access-token={token}; HttpOnly; Path=/")

    def do_GET(self):
        if self.path.startswith("/sdapi/"):
            return self.api()
        if self.path == "/config":
            cookies = dict(part.strip().split("=", 1) for part in self.headers.get("Cookie", "=").split(";"))
            known = cookies.get("access-token") in tokens
            told = {"version": "3.41.2"} if known else {"detail": "Not authenticated"}
            return self.answer(200 if known else 401, told)
        if early.is_set():
            # As AUTOMATIC1111 does: a request before it is ready ends it.
            print("RuntimeError: Cannot add middleware after an application has started", flush=True)
            import os

            os._exit(1)
        return self.answer(200, {} if self.path == "/internal/ping" else "page")

    def log_message(self, *_):
        pass


early = threading.Event()
if mood == "dies":
    print("ModuleNotFoundError: No module named 'pytorch_lightning'", flush=True)
    sys.exit(1)
if mood == "ram":
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
if mood == "mute":
    time.sleep(600)
early.set()
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Site)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"Running on local URL:  http://127.0.0.1:{port}", flush=True)
print("To create a public link, set `share=True` in `launch()`.", flush=True)
if mood == "url then death":
    print("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", flush=True)
    sys.exit(1)
time.sleep(0.5)
early.clear()
print("Startup time: 11.3s (import torch: 6.0s).", flush=True)
if mood == "refuses":
    print("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", flush=True)
    print("Stable diffusion model failed to load", flush=True)
else:
    print("Model loaded in 3.1s (load weights from disk: 0.4s).", flush=True)
if mood == "dies later":
    time.sleep(1)
    sys.exit(7)
if mood == "stubborn":
    import signal
    import subprocess

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", words[-1]])
time.sleep(600)
