"""Try a running ComfyUI through the gate: honest work works, no file outside its folders is read or written.

    fastsd webui launch --ui comfyui --background
    python scripts/attack_comfyui.py --data DATA-FOLDER [--port 8188]

DATA-FOLDER is the one of the installation (`.../comfyui/data`). A gate of our own is opened in front of the port; each
line says what was tried, what came back, and whether that is as it should be. Ends with code 1 if anything is not.
"""

import argparse
import io
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from base64 import b64encode
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.tunnels.gate.login import Login  # noqa: E402
from fastsd_helpers.tunnels.gate.server import open_gate  # noqa: E402
from fastsd_helpers.webui import find_ui  # noqa: E402

LOGIN = Login("fastsd", "attack-comfyui-0001")
ABOVE = "../../../../../../../../../../"


class Visitor:
    """Whoever has the password, with a program."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.headers = {"Authorization": "Basic " + b64encode(f"{LOGIN.user}:{LOGIN.password}".encode()).decode()}

    def ask(self, path: str, body: bytes | None = None, kind: str = "", method: str = "") -> tuple[int, bytes]:
        """Status and body of one request; the path goes out as it is written."""
        headers = {**self.headers, **({"Content-Type": kind} if kind else {})}
        request = urllib.request.Request(self.address + path, body, headers, method=method or None)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as err:
            return err.code, err.read()

    def upload(self, name: str, content: bytes, **fields: str) -> tuple[int, bytes]:
        """Upload a file as the page does."""
        mark = uuid.uuid4().hex
        parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = "".join(parts).encode() + head.encode() + b"Content-Type: image/png\r\n\r\n" + content
        body += f"\r\n--{mark}--\r\n".encode()
        return self.ask("/upload/image", body, f"multipart/form-data; boundary={mark}")

    def draw(self, prompt: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Run a workflow; returns success, refused or error, and what came back."""
        status, said = self.ask("/prompt", json.dumps({"prompt": prompt}).encode(), "application/json")
        answer = json.loads(said)
        if status != 200:
            return "refused", answer
        for _ in range(600):
            past = json.loads(self.ask(f"/history/{answer['prompt_id']}")[1])
            if past:
                entry = past[answer["prompt_id"]]
                return entry["status"]["status_str"], entry
            time.sleep(0.2)
        return "never ended", {}


def picture() -> bytes:
    """A small PNG."""
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(held, "PNG")
    return held.getvalue()


def load_and_save(name: str, prefix: str = "attack") -> dict[str, Any]:
    """LoadImage, ImageScale, SaveImage."""
    size = {"upscale_method": "lanczos", "width": 32, "height": 32, "crop": "disabled"}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], **size}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": prefix}},
    }


def one(name: str, /, **inputs: Any) -> dict[str, Any]:
    """A workflow of one node whose text is shown, so that it runs."""
    return {
        "1": {"class_type": name, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def read_film(name: str) -> dict[str, Any]:
    """LoadVideo, its frames saved as pictures."""
    return {
        "1": {"class_type": "LoadVideo", "inputs": {"file": name}},
        "2": {"class_type": "GetVideoComponents", "inputs": {"video": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "attack-frame"}},
    }


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--data", type=Path, required=True, help="the data folder of the installation")
    chosen = parser.parse_args()
    secret = chosen.data / "attack-secret.png"  # beside input and output: nobody may read it
    secret.write_bytes(picture())
    text = chosen.data / "attack-secret.txt"
    text.write_text("attack-secret-words")
    link = chosen.data / "input" / "attack-link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    folder = chosen.data / "input" / "attack-folder"
    folder.unlink(missing_ok=True)
    folder.symlink_to(chosen.data)
    exit_ = chosen.data / "outputs" / "attack-out"
    exit_.unlink(missing_ok=True)
    exit_.symlink_to(chosen.data)
    bad = 0

    def row(what: str, got: object, fine: bool) -> None:
        nonlocal bad
        bad += not fine
        print(f"| {what} | {str(got)[:90]} | {'as it should be' if fine else 'WRONG'} |", flush=True)

    gate = open_gate(chosen.port, LOGIN, closed=find_ui("comfyui").closed)
    try:
        visitor = Visitor(f"http://127.0.0.1:{gate.port}")
        # honest
        got = visitor.upload("attack.png", picture())
        row("upload of a picture", got[0], got[0] == 200)
        name = json.loads(got[1]).get("name", "attack.png")
        state, entry = visitor.draw(load_and_save(name))
        row("LoadImage, ImageScale, SaveImage", state, state == "success")
        made = entry["outputs"]["3"]["images"][0] if state == "success" else {}
        asked = urllib.parse.urlencode(made)
        row("/view of the result", visitor.ask(f"/view?{asked}")[0], visitor.ask(f"/view?{asked}")[1][:4] == b"\x89PNG")
        annotated = f"{made.get('filename')} [output]"
        row("LoadImage of `x.png [output]`", (s := visitor.draw(load_and_save(annotated))[0]), s == "success")
        row("the page, /object_info", (s := [visitor.ask(p)[0] for p in ("/", "/object_info")]), s == [200, 200])
        kept = visitor.ask("/userdata/workflows%2Fattack.json?overwrite=true", b"{}", "application/json")[0]
        row("a workflow is kept", kept, kept == 200)
        # hostile names in a prompt
        outside = [
            f"{ABOVE}etc/passwd",
            str(secret),
            "../attack-secret.png",
            "attack-link.png",
            "attack-folder/attack-secret.png",
            "../attack-secret.png [output]",
            "../attack-secret.png [temp]",
            f"{secret} [output]",
            "./../input/../attack-secret.png",
            "file://" + str(secret),
            "%2e%2e/attack-secret.png",
        ]
        for other in outside:
            shown = other.replace(str(chosen.data), "DATA")
            for node in ("LoadImage", "LoadImageMask", "LoadLatent", "LoadAudio", "LoadVideo", "LoadImageOutput"):
                key = {"LoadLatent": "latent", "LoadAudio": "audio", "LoadVideo": "file"}.get(node, "image")
                extra = {"channel": "red"} if node == "LoadImageMask" else {}
                state, _ = visitor.draw(one(node, **{key: other}, **extra))
                if state not in ("refused", "error"):
                    row(f"{node} {shown}", state, False)
            row(f"LoadImage and five other loaders, `{shown}`", "refused", True)
        for prefix in ("../escaped", "/tmp/escaped", f"{ABOVE}tmp/escaped", "a/../../escaped", "attack-out/escaped"):
            state, _ = visitor.draw(load_and_save(name, prefix))
            there = [p for p in (chosen.data, Path("/tmp")) if list(p.glob("escaped*"))]
            row(f"SaveImage to `{prefix}`", state, not there)
        # films that name other files
        frames = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}}
        frames["2"] = {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 8.0}}
        wanted = {"filename_prefix": "attack-film", "format": "auto", "codec": "auto"}
        frames["3"] = {"class_type": "SaveVideo", "inputs": {"video": ["2", 0], **wanted}}
        state, entry = visitor.draw(frames)
        row("CreateVideo, SaveVideo", state, state == "success")
        film = entry["outputs"]["3"]["images"][0]["filename"] if state == "success" else ""
        state, _ = visitor.draw(read_film(f"{film} [output]"))
        row("LoadVideo of it, its frames saved", state, state == "success")
        whole = chosen.data / "attack-film.mp4"  # where no visitor reads
        whole.write_bytes((chosen.data / "outputs" / film).read_bytes() if film else b"")
        for kind, content in (
            ("HLS", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{whole}\n#EXT-X-ENDLIST\n"),
            ("HLS, an address", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/x.ts\n"),
            ("concat", f"ffconcat version 1.0\nfile '{whole}'\n"),
            ("concat, a neighbour", "ffconcat version 1.0\nfile attack-link.mp4\n"),
        ):
            visitor.upload("attack-list.mp4", content.encode(), overwrite="true")
            state, _ = visitor.draw(read_film("attack-list.mp4"))
            row(f"LoadVideo of a list of films ({kind})", state, state in ("refused", "error"))
        whole.unlink()
        for node in ("CheckpointSave", "VAESave", "CLIPSave", "ModelSave", "LoraSave", "SaveLoRA", "TrainLoraNode"):
            state, said = visitor.draw({"1": {"class_type": node, "inputs": {"filename_prefix": "x"}}})
            why = str(said.get("error", {}).get("type"))
            row(node, f"{state}: {why}", state == "refused" and why == "fastsd_guard")
        # hostile names in a request
        for query in (
            "filename=../attack-secret.png&type=input",
            "filename=attack-secret.png&type=input&subfolder=..",
            f"filename={secret}",
            "filename=attack-link.png&type=input",
            "filename=attack-secret.png&type=input&subfolder=attack-folder",
            "filename=attack-secret.png&type=input&subfolder=%252e%252e",
            "filename=..%5Cattack-secret.png&type=input",
            "filename=attack-link.png%20[input]",
            "filename=attack-link.png&type=input&channel=rgb",
            "filename=attack-link.png&type=input&preview=webp;90",
        ):
            status, body = visitor.ask(f"/view?{query}")
            row(f"/view?{query.replace(str(chosen.data), 'DATA')}", status, status >= 400 and b"PNG" not in body[:8])
        for path in (
            "/userdata/..%2F..%2Fattack-secret.txt",
            "/userdata/%252e%252e%252Fattack-secret.txt",
            "/api/userdata/..%2Fattack-secret.txt",
            f"/userdata/{urllib.parse.quote(str(text), safe='')}",
            "/v2/userdata?path=..",
            "/userdata?dir=../..&recurse=true",
            "/view_metadata/checkpoints?filename=../../attack-secret.txt",
            "/experiment/models/preview/checkpoints/0/..%2F..%2Fattack-secret",
            "/internal/logs",
            "/internal/folder_paths",
            "/api/internal/files/output",
            "/extensions/../../attack-secret.txt",
            "/docs/..%2f..%2f..%2f..%2fattack-secret.txt",
            "/manager/reboot",
        ):
            status, body = visitor.ask(path)
            fine = status >= 400 and b"attack-secret-words" not in body
            row(path.replace(urllib.parse.quote(str(chosen.data), safe=""), "DATA"), status, fine)
        for name, fields in (
            ("x.png", {"subfolder": ".."}),
            ("x.png", {"subfolder": "attack-folder"}),
            ("../x.png", {}),
            ("x.ckpt", {"type": "output", "subfolder": "checkpoints"}),
            ("x.safetensors", {}),
            ("x.py", {}),
            ("attack-link.png", {"overwrite": "true"}),
        ):
            status, _ = visitor.upload(name, b"hostile", **fields)
            written = (chosen.data / "x.png").exists() or secret.read_bytes() != picture()
            row(f"upload of {name} with {fields or 'nothing else'}", status, status >= 400 and not written)
        status, _ = visitor.ask("/userdata/..%2F..%2Fattack-new.txt", b"x", "text/plain")
        row("write above the user's folder", status, status >= 400 and not list(chosen.data.glob("*attack-new*")))
    finally:
        gate.close()
        for path in (secret, text, link, folder, exit_):
            path.unlink(missing_ok=True)
    print(f"{bad} of them are not as they should be." if bad else "Everything is as it should be.")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
