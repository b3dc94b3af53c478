"""Make tests/data/v0.1: what version 0.1 left on its users' disks, to be opened, gone on with and exported ever after.

    python scripts/make_past_fixtures.py [--keep DIR]     # about 3 minutes on one core; needs the training packages

The package that makes them is not the one in this checkout but that of commit 992d797, taken out of git's history.
Nothing here is written by hand: commands of that version are run, and some of them are killed. It is for
tests/test_past_versions.py.

    base.tar.xz     base/, a model of SD 1.5's layout at small widths; single.safetensors, converted from it; models/,
                    the folder that was made of that file when a session began with it
    sessions-*      full-cut: all weights, killed in the U-Net's stage, with its lock, by the notebook's child process
                    full-done: all weights, finished and exported
                    lora-cut: LoRA, class pictures, moving average and min-SNR weights, interrupted
                    lora-done: LoRA, finished and exported, begun from the single file
    readers.tar.xz  plain/, a reader with random weights; reader/, taught to tell four black squares apart; lines/ with
                    their text; int8 folders of both kinds; taught-done/ and taught-cut/, runs that teach; bulk/, a
                    folder read in part; Fast-TrOCR/Sessions/squares, with corrections and a reading that was cut
    others.tar.xz   a download that was cut, the state of a web UI that was killed, notes beside installed packages
    about.json      what was made by what, and what a later version must give: hashes of converted files, texts
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT = "992d797"
OUT = REPOSITORY / "tests" / "data" / "v0.1"
SESSIONS = "Fast-Dreambooth/Sessions"
# At these widths a U-Net of SD 1.5's layout has 36,000 numbers.
WIDTHS = (2, 4, 8, 8)
SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": WIDTHS,
        "cross_attention_dim": 4,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    },
    "vae": {"block_out_channels": WIDTHS, "norm_num_groups": 2},
    "text": {"vocab_size": 300, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2},
}
TRAINING = {
    "resolution": 64,
    "batch_size": 1,
    "precision": "fp32",
    "sample_every": 0,
    "save_every": 4,
    "text_encoder_steps": 2,
    "unet_steps": 6,
    "text_encoder_lr": 1e-3,
    "unet_lr": 1e-3,
}
LORA = {"method": "lora", "lora_rank": 1, "lora_alpha": 2.0}
PRIOR = {"class_prompt": "a robot", "class_images": 2, "min_snr": 5.0, "ema": 0.9}
RUNS: dict[str, dict[str, Any]] = {
    "full-cut": {"base_model": "base", **TRAINING, "keep_last": 2},
    "full-done": {"base_model": "base", **TRAINING, "keep_last": 1},
    "lora-cut": {"base_model": "base", **TRAINING, **LORA, **PRIOR, "keep_last": 2},
    "lora-done": {"base_model": "single.safetensors", **TRAINING, **LORA, "keep_last": 1},
}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {"d_model": 16, "cross_attention_hidden_size": 16, "decoder_ffn_dim": 32, "decoder_layers": 1}
TEACHING = {
    "epochs": 4.0,
    "lr": 5e-3,
    "batch_size": 8,
    "precision": "fp32",
    "held_out": 0.3,
    "patience": 0,
    "measure_every": 2,
    "vocabulary": "replace",
    "token_noise": 0.0,
}
DOWNLOAD = "http://files.example/weights.safetensors"  # asked of a proxy, so that the address is the same everywhere
CUT_AT = 20_000


class Then:
    """The version of that commit, and an empty place to work in."""

    def __init__(self, work: Path) -> None:
        self.package, self.work = work / "then", work / "place"
        for folder in (self.package, self.work, work / "home"):
            folder.mkdir()
        archive = subprocess.run(
            ["git", "archive", COMMIT, "fastsd_helpers", "wheels.lock"], cwd=REPOSITORY, capture_output=True, check=True
        ).stdout
        subprocess.run(["tar", "-x"], input=archive, cwd=self.package, check=True)
        for name in list(os.environ):
            if name.startswith(("FASTSD_", "HF_")) or name.lower().endswith("_proxy"):
                del os.environ[name]
        os.environ |= {
            "HOME": str(work / "home"),
            "XDG_CACHE_HOME": str(work / "home" / "cache"),
            "HF_HUB_OFFLINE": "1",
            "FASTSD_SCRATCH": "scratch",
            "FASTSD_MODELS": "models",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{self.package}{os.pathsep}{REPOSITORY / 'tests'}",
        }
        os.chdir(self.work)
        sys.path[:0] = [str(self.package), str(REPOSITORY / "tests")]
        import fastsd_helpers

        if not Path(fastsd_helpers.__file__).is_relative_to(self.package):
            sys.exit(f"This must be run with the package of {COMMIT}, not {fastsd_helpers.__file__}.")

    def fastsd(self, *words: str, fault: str | None = None) -> dict[str, Any]:
        """Run a command; returns its JSON answer, or nothing when it was to be killed."""
        shown = " ".join(words)
        print(f"  fastsd {shown}{f' (killed at {fault})' if fault else ''}", flush=True)
        environment = os.environ | ({"FASTSD_FAULT": fault} if fault else {})
        command = [sys.executable, "-m", "fastsd_helpers", *words, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != (-signal.SIGKILL if fault else 0):
            sys.exit(f"It ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return {} if fault else json.loads(done.stdout.splitlines()[-1])


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the words of a command line."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="also copy the folder that was worked in to this new folder")
    chosen = parser.parse_args()
    keep = chosen.keep and chosen.keep.absolute()
    with tempfile.TemporaryDirectory(prefix="past-fixtures-") as name:
        then = Then(Path(name).resolve())
        texts = make_readers(then)
        converted = make_base(then)
        for session in RUNS:
            make_session(then, session)
        make_others()
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        pack("base", ["base", "single.safetensors", "models"])
        for session in RUNS:
            live = [path.as_posix() for path in Path("scratch").glob(f"{id_of(session)}-*") if session == "full-cut"]
            pack(f"sessions-{session}", [f"{SESSIONS}/{session}", *live])
        readers = ["plain", "reader", "lines", "many", "int8-dynamic", "int8-static", "taught-done", "taught-cut"]
        pack("readers", [*readers, "bulk", "Fast-TrOCR"])
        pack("others", ["downloads", "webui", "site"])
        write_about({"converted": converted, "texts": texts})
        if keep:
            shutil.copytree(then.work, keep)
        os.chdir(REPOSITORY)
    for path in sorted(OUT.iterdir()):
        print(f"{path.stat().st_size:>9,} {path.name}")
    return 0


# ------------------------------------------------------------------------------------------ models and sessions


def make_base(then: Then) -> dict[str, str]:
    """base/, and the sha256 of every file that is converted from it."""
    import torch
    from tiny_models import build_pipeline

    # Numbers that half precision knows too are numbers that an archive can make smaller.
    pipe = build_pipeline(SIZES, Path("words"), seed=7).to(torch.float16).to(torch.float32)
    pipe.save_pretrained("base")
    then.fastsd("convert", "base", "single.safetensors")
    hashes = {"single.safetensors": sha256_without_date("single.safetensors")}
    for name, *words in (
        ("half.safetensors", "--dtype=fp16"),
        ("brain.safetensors", "--dtype=bf16"),
        ("single.ckpt",),
    ):
        then.fastsd("convert", "base", name, *words)
        hashes[name] = sha256_without_date(name)
    # Where a session that begins with this file finds the folder of it: made there, as its tokenizer is in no file.
    folder = Path("models", "converted", f"single-{sha256_of('single.safetensors')[:12]}")
    then.fastsd("convert", "single.safetensors", str(folder), "--base=base")
    hashes |= {f"folder/{path.relative_to(folder)}": sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}
    return hashes


def make_session(then: Then, name: str) -> None:
    """A session of three pictures and one that is only measured; what becomes of its run, its name says."""
    photos, held_out = draw_photos()
    train = ["dreambooth", "train", name, *flags(RUNS[name])]
    then.fastsd("dreambooth", "new", name)
    then.fastsd("dreambooth", "prepare", name, f"--images={photos}", f"--held-out={held_out}", "--size=64")
    then.fastsd("dreambooth", "caption", name, "--set", "zib robot (2).png=a photo of zib robot on a table")
    checkpoints = Path(SESSIONS, name, "checkpoints")
    if name == "full-cut":
        kill_as_a_notebook_has_it(name)
        steps = sorted(path.name.rsplit("-", 1)[0] for path in checkpoints.iterdir() if "-unet-" in path.name)
        if [step[-6:] for step in steps] != ["000004"] or not Path(SESSIONS, name, ".lock").is_file():
            sys.exit(f"The kill came too early or too late: {steps}.")
    elif name == "lora-cut":
        interrupt(name)
    else:
        answer = then.fastsd(*train)
        if answer["steps"] != 8:
            sys.exit(f"{name} has {answer['steps']} steps.")
    if name == "lora-done":
        then.fastsd("dreambooth", "export", name, "--format=lora")
    shrink_pictures(Path(SESSIONS, name))


def shrink_pictures(session: Path) -> None:
    """Make what is only looked at small: contact sheets, curves and grids are half of what a session takes here."""
    from PIL import Image

    for folder in ("logs", "samples", "exports"):
        for path in (session / folder).rglob("*.png"):
            with Image.open(path) as picture:
                small = picture.convert("RGB")
            small.thumbnail((48, 48))
            small.save(path)


def kill_as_a_notebook_has_it(name: str) -> None:
    """Train in the notebook's child process, which dies at once before the fifth step of the U-Net has ended."""
    from fastsd_helpers.dreambooth.child import start_training

    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.errors import TrainingFailed
    from fastsd_helpers.sessions import Session

    print(f"  train {name} as a notebook does (killed at step.unet:5)", flush=True)
    os.environ["FASTSD_FAULT"] = "step.unet:5"
    try:
        start_training(DreamBoothConfig(**RUNS[name]), Session.open(name)).wait()
    except TrainingFailed:
        return
    finally:
        del os.environ["FASTSD_FAULT"]
    sys.exit("The child was not killed.")


def interrupt(name: str) -> None:
    """Train, and ask the run to stop after the third step of the U-Net: it saves and ends."""
    from dreambooth_runs import stop_at

    from fastsd_helpers.dreambooth import DreamBoothConfig, train
    from fastsd_helpers.errors import Interrupted
    from fastsd_helpers.sessions import Session

    print(f"  train {name} (interrupted after step 3 of the U-Net)", flush=True)
    try:
        train(DreamBoothConfig(**RUNS[name]), Session.open(name), report=stop_at("unet", 3))
    except Interrupted:
        return
    sys.exit("The run was not interrupted.")


def draw_photos() -> tuple[str, str]:
    import demo_pictures as pictures
    import numpy as np

    generator = np.random.default_rng(0)
    for folder, count in (("photos", 3), ("held-out", 1)):
        if Path(folder).is_dir():
            continue
        Path(folder).mkdir()
        for index in range(count):
            place, background = list(pictures.PLACES)[index], list(pictures.BACKGROUNDS)[index + count]
            picture = pictures.draw_subject("robot", place, background, generator)
            picture.save(Path(folder, f"zib robot ({index + 1}).png"))
    return "photos", "held-out"


def id_of(session: str) -> str:
    return json.loads(Path(SESSIONS, session, "session.json").read_text(encoding="utf-8"))["id"]


# ----------------------------------------------------------------------------------------------------- readers


def draw_square(number: int) -> Any:
    """A made-up letter that a very small reader learns in seconds: one quarter of the picture is black."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 64), "white")
    x, y = divmod(number % 4, 2)
    ImageDraw.Draw(picture).rectangle((32 * x + 2, 32 * y + 2, 32 * x + 29, 32 * y + 29), fill="black")
    return picture


def make_readers(then: Then) -> dict[str, Any]:
    """Everything about reading; returns what each reader read."""
    from tiny_readers import write_reader

    Path("lines").mkdir()
    rows = ["file_name,text,group"]
    for place in range(24):
        draw_square(place % 4).save(Path("lines", f"{place:02}.png"))
        rows.append(f"{place:02}.png,{place % 4},w{place // 4}")
    Path("lines", "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    write_reader(Path("plain"), "stage1", spread=0.15, encoder_changes=ENCODER, **DECODER)
    words = ["trocr", "finetune", "lines", "--model=plain", "--no-augment"]
    then.fastsd(*words, "--out=taught-done", *flags({**TEACHING, "epochs": 500.0, "measure_every": 500}))
    shutil.copytree("taught-done/model", "reader")
    then.fastsd(*words, "--out=taught-cut", *flags(TEACHING), fault="trocr.checkpoint:1")
    read = {"reader": read_squares("reader", precision="fp32")}
    make_int8(then)
    read |= {name: read_squares(name) for name in ("int8-dynamic", "int8-static")}
    for name, lines in read.items():  # so sure that no processor's way of adding up makes another text of it
        if [text for text, _ in lines] != ["0", "1", "2", "3"] or min(sure for _, sure in lines) < 0.8:
            sys.exit(f"{name} has not learned its letters: {lines}")
    make_reading_session()
    # One picture more than is read at a time; the run is killed after the first part.
    Path("many").mkdir()
    for place in range(257):
        draw_square(place % 4).save(Path("many", f"{place:03}.png"))
    bulk = ["trocr", "read", "many", "--out=bulk", "--model=reader", "--batch-size=8", "--precision=fp32"]
    then.fastsd(*bulk, "--device=cpu", fault="trocr.part:1")
    return read


def read_squares(model: str, **settings: Any) -> list[tuple[str, float]]:
    """What a reader reads in the four letters, and how sure it is."""
    from fastsd_helpers.trocr import Reader

    lines = Reader(model, device="cpu", **settings).read([draw_square(number) for number in range(4)])
    return [(line.text, line.confidence) for line in lines]


def make_int8(then: Then) -> None:
    """The folder that `quantize` writes, and one of its other kind: which it would take depends on the machine."""
    from fastsd_helpers.trocr.checkpoint import open_checkpoint
    from fastsd_helpers.trocr.graphs import write_graphs

    then.fastsd("trocr", "quantize", "reader", "int8-dynamic", "--evaluate=lines")
    checkpoint = open_checkpoint("reader", precision="fp32", device="cpu")
    resized = [checkpoint.pixels.resize(draw_square(number)) for number in range(4)]
    batches = [checkpoint.pixels.batch([values]) for values in resized]
    write_graphs(checkpoint, Path("int8-static"), method="static", batches=batches)


def make_reading_session() -> None:
    """A session with eight lines, two of them corrected, and a later reading that was cut after its first lines."""
    from fastsd_helpers.forms import ReadingSessionConfig, open_reading
    from fastsd_helpers.trocr import Reader, reading_session

    session = open_reading(ReadingSessionConfig(session_name="squares"))
    reader = Reader("reader", precision="fp32", device="cpu")
    lines = session.read(reader, [f"lines/{place:02}.png" for place in range(4)], pages="lines")
    session.correct(lines[1].key, "eins")
    session.correct(lines[3].key, "drei  drei")
    session.save(reader="reader", demo=False, images="lines")
    # As a kill between two chunks leaves it: the journal holds the first chunk, lines.jsonl the reading before.
    real, count = reading_session.write_atomic, 0
    reading_session._CHUNK = 2

    class Killed(BaseException):
        pass

    def write(path: Path, data: bytes) -> None:
        nonlocal count
        real(path, data)
        count += path.name == "reading.jsonl"
        if count == 1:
            raise Killed

    reading_session.write_atomic = write
    try:
        session.read(Reader("plain", precision="fp32", device="cpu"), "lines", pages="lines")
    except Killed:
        return
    finally:
        reading_session.write_atomic, reading_session._CHUNK = real, 256
    sys.exit("The reading was not cut.")


# ------------------------------------------------------------------------------------------------------ others


def download_content() -> bytes:
    """A small whole safetensors file."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [65536], "data_offsets": [0, 65536]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(256)) * 256


def make_others() -> None:
    """A cut download, the state of a killed web UI, and a note on a package that was not proved."""
    from fastsd_helpers.webui.process import start_process
    from file_server import Behaviour, FileServer

    from fastsd_helpers.downloads import fetch
    from fastsd_helpers.errors import DownloadError
    from fastsd_helpers.webui import find_places, find_ui
    from fastsd_helpers.wheels.unproved import Unproved, write_unproved

    server = FileServer({DOWNLOAD: download_content()})
    server.queue = [Behaviour(cut_after=CUT_AT), Behaviour(status=503, headers={"Retry-After": "6000"})]
    os.environ["http_proxy"] = server.url()
    try:
        fetch(DOWNLOAD, Path("downloads"))
    except DownloadError:
        print("  a download, cut", flush=True)
    else:
        sys.exit("The download was not cut.")
    finally:
        del os.environ["http_proxy"]
        server.stop()
    places = find_places(find_ui("a1111"), folder="webui/program", store="webui/store")
    places.run.mkdir(parents=True)
    process, _ = start_process(
        ["sleep", "60"],
        env=dict(os.environ),
        cwd=places.root,
        places=places,
        title="AUTOMATIC1111",
        port=7860,
        hidden=["hunter2"],
    )
    process.kill()
    process.wait()
    Path("site").mkdir()
    write_unproved(Path("site"), {"pillow-heif": Unproved("1.1.1", whole=False)})


# ----------------------------------------------------------------------------------------------------- packing


def pack(name: str, parts: list[str]) -> None:
    """Write parts of the working folder as one archive; times stay, for locks and caches are judged by them."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(OUT / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(path for part in parts for path in files_in(Path(part))):
            archive.add(path, recursive=False, filter=plain)


def files_in(path: Path) -> Iterator[Path]:
    if not path.exists():
        sys.exit(f"{path} was not made.")
    yield path
    if path.is_dir():
        yield from path.rglob("*")


def sha256_of(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sha256_without_date(path: Path | str) -> str:
    """The sha256 of a file as if it had been made at the beginning of time: only the date in its header may differ."""
    content = re.sub(rb'("modelspec\.date": ?")[^"]*"', rb'\1"', Path(path).read_bytes(), count=1)
    return hashlib.sha256(content).hexdigest()


def write_about(facts: dict[str, Any]) -> None:
    from fastsd_helpers.runtime import versions

    about = {"commit": COMMIT, "versions": versions(), "settings": RUNS, "teaching": TEACHING, **facts}
    about["download"] = {"url": DOWNLOAD, "cut_at": CUT_AT}
    (OUT / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
