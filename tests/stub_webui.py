# ruff: noqa: T201
"""A web UI's process as its launcher sees it: log lines, a port, signals. The lines are those of AUTOMATIC1111 v1.10.1.

Run by the stub installation of test_webui.py as `python -u launch.py ...`; the file `mood` beside it says what happens.
"""

import http.server
import sys
import threading
import time
from pathlib import Path

words = sys.argv[1:]
mood = Path(__file__).with_name("mood").read_text().strip()
port = int(words[words.index("--port") + 1])
print(f"Launching Web UI with arguments: {' '.join(words)}", flush=True)


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if early.is_set():
            # As AUTOMATIC1111 does: a request before it is ready ends it.
            print("RuntimeError: Cannot add middleware after an application has started", flush=True)
            import os

            os._exit(1)
        body = b"page" if self.path != "/internal/ping" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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
