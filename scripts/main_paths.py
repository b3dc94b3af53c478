"""The main uses of every set, with pictures from outside the package: run it with the Python of an image.

    python scripts/main_paths.py WORK                  # every path, each in a process of its own
    python scripts/main_paths.py WORK --only trocr     # those of one set
    python scripts/main_paths.py WORK --path read-auto # one path, in this process

Nothing is imported here that a path could find imported already: what it needs, it has to import itself. It needs no
network: the Hub is tests/hub_server.py on this machine. The last line of the output is a JSON list of what ran.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS: dict[str, tuple[str, Callable[[Path], None]]] = {}  # name -> (set, what it does), in this order
_SIDE = 64
_SMALL = ("--resolution", str(_SIDE), "--batch-size", "1", "--sample-every", "0")


def path_of(name: str, set_name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Mark a function as a path of a set."""

    def mark(work: Callable[[Path], None]) -> Callable[[Path], None]:
        PATHS[name] = (set_name, work)
        return work

    return mark


def fastsd(*words: str | Path, expect: int = 0) -> None:
    """Run a command as `fastsd` would, in this process; another exit status than expected is an error."""
    from fastsd_helpers.cli import main

    code = main([str(word) for word in words])
    if code != expect:
        raise RuntimeError(f"fastsd {words[0]} {words[1]} ended with {code}")


def require(condition: object, what: str) -> None:
    """What has to hold after a path."""
    if not condition:
        raise RuntimeError(f"{what} is not so")


@path_of("pictures", "dreambooth")
def make_pictures(work: Path) -> None:
    """Pictures as people have them: a PNG, a JPEG and a HEIC of a thing, lines, a page, a PDF."""
    import pillow_heif
    from PIL import Image, ImageDraw

    import fastsd_helpers

    pillow_heif.register_heif_opener()
    photos, lines, pages = (work / name for name in ("photos", "lines", "pages"))
    for folder in (photos, lines, pages):
        folder.mkdir(parents=True, exist_ok=True)
    for place, ending in enumerate(("png", "jpg", "heic", "jpeg")):
        photo = Image.new("RGB", (300 + 40 * place, 260), (200, 220, 60 * place))
        ImageDraw.Draw(photo).ellipse((60 + 20 * place, 40, 220, 230), fill=(180, 30, 40))
        photo.save(photos / f"zib mug ({place + 1}).{ending}")
    samples = Path(fastsd_helpers.__file__).parent / "demo" / "reader_samples"
    found = [Image.open(samples / f"line-{number:02}.png").convert("RGB") for number in range(1, 5)]
    rows = ["file_name,text"]
    texts = (samples / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    for place, line in enumerate(found):
        name = f"scan {place}.{('png', 'jpg', 'heic', 'png')[place]}"
        line.save(lines / name)
        rows.append(f"{name},{texts[place].split(',')[1]}")
    (lines / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    page = Image.new("RGB", (max(line.width for line in found) + 160, 900), "white")
    for place, line in enumerate(found):
        page.paste(line, (80, 90 + 200 * place))
    page.save(pages / "page.png")
    page.save(pages / "page.heic")
    page.save(pages / "letter.pdf", resolution=100)


@path_of("prepare", "dreambooth")
def prepare(work: Path) -> None:
    """Photos from outside: read, checked, cropped, with their prompts."""
    root = work / "Sessions"
    fastsd("dreambooth", "new", "mug", "--root", root)
    fastsd("dreambooth", "prepare", "mug", "--root", root, "--images", work / "photos", "--size", _SIDE)
    fastsd("dreambooth", "caption", "mug", "--root", root)
    record = json.loads((root / "mug" / "session.json").read_text(encoding="utf-8"))
    require(len(record["dataset"]["images"]) == 4, "that every photo is prepared, the HEIC too")


@path_of("train", "dreambooth")
def train(work: Path) -> None:
    """A full training of a few steps, then what can be done with it."""
    few = [*_SMALL, "--unet-steps", "2", "--text-encoder-steps", "1"]
    fastsd("dreambooth", "train", "mug", "--root", work / "Sessions", "--base-model", "demo", *few)
    fastsd("dreambooth", "export", "mug", "--root", work / "Sessions", "--out", work / "mug.safetensors")
    fastsd("inspect", work / "mug.safetensors")
    fastsd("convert", work / "mug.safetensors", work / "mug-folder")


@path_of("sample", "dreambooth")
def sample(work: Path) -> None:
    """Pictures of what a session has learned."""
    fastsd("dreambooth", "sample", "mug", "--root", work / "Sessions", "--count", "1", "--sample-steps", "2")


@path_of("lora", "dreambooth")
def lora(work: Path) -> None:
    """A LoRA of the built-in pictures."""
    import fastsd_helpers

    root, robots = work / "Sessions", Path(fastsd_helpers.__file__).parent / "demo" / "subjects" / "robot"
    fastsd("dreambooth", "new", "robot", "--root", root)
    fastsd("dreambooth", "prepare", "robot", "--root", root, "--images", robots, "--size", _SIDE)
    few = [*_SMALL, "--method", "lora", "--unet-steps", "2"]
    fastsd("dreambooth", "train", "robot", "--root", root, "--base-model", "demo", *few)
    fastsd("dreambooth", "export", "robot", "--root", root, "--format", "lora", "--out", work / "robot.safetensors")


@path_of("playground", "dreambooth")
def playground(work: Path) -> None:
    """The page to try a session on answers."""
    from fastsd_helpers.playground import PlaygroundConfig, open_playground

    page = open_playground(str(work / "Sessions" / "mug"), PlaygroundConfig(port=0))
    try:
        require(b"<!doctype html>" in fetch(page.url).lower(), "that the playground answers")
    finally:
        page.close()


@path_of("read-auto", "trocr")
def read_auto(work: Path) -> None:
    """Lines of one's own with the reader `auto`, which comes from the Hub."""
    import shutil

    sys.path.append(str(ROOT / "tests"))
    from hub_server import HubServer

    import fastsd_helpers

    served = work / "hub" / "reader"
    if not served.is_dir():
        shutil.copytree(Path(fastsd_helpers.__file__).parent / "demo" / "reader_model", served)
    with HubServer({"microsoft/trocr-base-handwritten": served}) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(work / "hf")}
        from fastsd_helpers.forms.trocr.reading import read_pictures
        from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig

        session = ReadingSession(work / "my lines".replace(" ", "_"))
        read_pictures(ReadPicturesConfig(images=str(work / "lines"), device="cpu"), session)
        require(hub.downloaded(), "that the reader came from the hub")
    require(len(session.lines()) == 4, "that every line was read")


@path_of("read-page", "trocr")
def read_page(work: Path) -> None:
    """Pages of a PNG and a HEIC, and of a PDF, with the lines found."""
    out = work / "read.json"
    *pictures, letter = (work / "pages" / name for name in ("page.png", "page.heic", "letter.pdf"))
    fastsd("trocr", "read", *pictures, "--pages", "--model", "demo-reader", "--out", out, "--format", "json")
    require(out.stat().st_size > 200, "that pages were read")
    fastsd("trocr", "read", letter, "--pages", "--model", "demo-reader", "--out", work / "letter.txt")


@path_of("teach", "trocr")
def teach(work: Path) -> None:
    """Fine-tune on four lines, evaluate, and write vectors."""
    few = ["--epochs", "1", "--batch-size", "2", "--held-out", "0.25", "--no-augment"]
    fastsd("trocr", "finetune", work / "lines", "--model", "demo-reader", "--out", work / "taught", *few)
    fastsd("trocr", "evaluate", work / "lines", "--model", "demo-reader")
    fastsd("trocr", "embed", work / "lines", "--model", "demo-reader", "--out", work / "vectors")


@path_of("teach-lora", "trocr")
def teach_lora(work: Path) -> None:
    """Fine-tune small adapters."""
    few = ["--epochs", "0.5", "--batch-size", "2", "--held-out", "0.25", "--method", "lora"]
    fastsd("trocr", "finetune", work / "lines", "--model", "demo-reader", "--out", work / "adapters", *few)


@path_of("serve", "trocr")
def serve(work: Path) -> None:
    """The page to share a reader on answers, with its login."""
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading.serve import ServeConfig
    from fastsd_helpers.trocr.reading.serve import serve as open_page

    page = open_page(Reader("demo-reader", device="cpu"), ServeConfig(port=0))
    try:
        require(b"<!doctype html>" in fetch(page.local_url).lower(), "that the page answers")
        require(page.password, "that it has a password")
    finally:
        page.close()


@path_of("shrink", "trocr-int8")
def shrink(work: Path) -> None:
    """An int8 copy is made, measured and used."""
    from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
    from fastsd_helpers.trocr.model.openvino_engine import write_graphs

    lines = work / "lines"
    fastsd("trocr", "quantize", "demo-reader", work / "int8", "--evaluate", lines, "--overwrite")
    # The command keeps a copy that is worth having, which is a question of speed too; this one is there in any case.
    write_graphs(open_checkpoint("demo-reader", precision="fp32", device="cpu"), work / "int8-made", method="dynamic")
    fastsd("trocr", "read", lines, "--model", work / "int8-made", "--out", work / "int8.txt")


@path_of("gate", "webui")
def gate(work: Path) -> None:
    """The login gate lets in who has the password, and nobody else."""
    import base64
    import threading
    import urllib.error
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from fastsd_helpers.tunnels import Login
    from fastsd_helpers.tunnels.gate.server import open_gate

    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open_gate(server.server_address[1], Login("me", "a long password")) as door:
        try:
            fetch(door.url)
            raise RuntimeError("the gate let a stranger in")
        except urllib.error.HTTPError as err:
            require(err.code == 401, "that a stranger gets 401")
        word = base64.b64encode(b"me:a long password").decode()
        require(fetch(door.url, {"Authorization": f"Basic {word}"}), "that the password opens")
    server.shutdown()


@path_of("webui", "webui")
def webui(work: Path) -> None:
    """Web UIs without one: what would be started, what there is, and which link a token is missing for."""
    for ui in ("a1111", "forge-neo", "comfyui"):
        fastsd("webui", "launch", "--ui", ui, "--dry-run", "--gpu", "T4", "--family", "sd15", "--store", work / "store")
    fastsd("webui", "status", "--ui", "a1111", "--folder", work / "ui", expect=ui_absent(work))
    fastsd("controlnet", "list", "--base", "sd15", "--ui", "a1111")
    fastsd("models", "list")
    fastsd("doctor")


def ui_absent(work: Path) -> int:
    """The exit status of a question about a web UI that is not installed."""
    return 0


@path_of("links", "webui")
def links(work: Path) -> None:
    """ngrok's and gradio's clients are there, up to the moment at which they would call their service."""
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.tunnels import TunnelConfig, require_shareable

    os.environ.pop("NGROK_AUTHTOKEN", None)
    try:
        require_shareable(TunnelConfig(kind="ngrok"))
        raise RuntimeError("ngrok was not asked for its token")
    except FastSDError as err:
        require("authtoken" in str(err), "that what is missing for ngrok is its token")
    import gradio.networking
    import pyngrok.ngrok  # noqa: F401

    require(hasattr(gradio.networking, "setup_tunnel"), "that gradio can open its tunnel")


@path_of("small-page", "webui")
def small_page(work: Path) -> None:
    """The playground with the built-in model draws."""
    from fastsd_helpers.playground import PlaygroundConfig, open_playground

    page = open_playground("demo", PlaygroundConfig(port=0))
    try:
        require(fetch(page.url), "that the playground answers")
    finally:
        page.close()


def fetch(url: str, headers: dict[str, str] | None = None) -> bytes:
    """What an address on this machine answers."""
    import urllib.request

    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=60).read()


def run_all(work: Path, sets: set[str], names: list[str]) -> list[dict]:
    """Run paths, each in a fresh process of this Python; what one made is there for the next."""
    found = []
    for name, (set_name, _function) in PATHS.items():
        if set_name not in sets and name != "pictures":
            continue
        if names and name not in names:
            continue
        started = time.monotonic()
        command = [sys.executable, "-s", __file__, str(work), "--path", name]
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            command, env=environ, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        (work / f"{name}.log").write_text(done.stdout, encoding="utf-8")
        said = [line for line in done.stdout.splitlines() if line.strip()]
        row = {"set": set_name, "path": name, "ok": done.returncode == 0, "seconds": time.monotonic() - started}
        row["said"] = "" if row["ok"] else "\n".join(said[-6:])
        print(f"  {'ok  ' if row['ok'] else 'FAIL'} {set_name}: {name} ({row['seconds']:.0f} s)", flush=True)
        if row["said"]:
            print("      " + row["said"].replace("\n", "\n      "), flush=True)
        found.append(row)
    return found


def main() -> int:
    """Run the paths that are asked for; 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for everything that is made")
    parser.add_argument("--only", nargs="+", default=sorted({name for name, _ in PATHS.values()}), metavar="SET")
    parser.add_argument("--paths", nargs="+", default=[], choices=list(PATHS), help="these alone")
    parser.add_argument("--path", choices=list(PATHS), help="this one, in this process")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    if chosen.path:
        PATHS[chosen.path][1](chosen.work.resolve())
        return 0
    rows = run_all(chosen.work.resolve(), set(chosen.only), chosen.paths)
    print(json.dumps(rows))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
