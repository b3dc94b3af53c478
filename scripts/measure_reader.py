"""Measure a reader on lines drawn with fonts it has seen and has not: beams, int8, Tesseract, rotation.

    python scripts/measure_reader.py --work FOLDER --fonts FONTS [--model demo-reader] [--tesseract PROGRAM] [--write]

The fonts are those of scripts/train_demo_reader.py; every line has words that were held out from its training, and is a
function of a seed. Tesseract is Debian's (apt-get install tesseract-ocr), or unpacked into a folder without being
installed: `apt-get download tesseract-ocr tesseract-ocr-eng libtesseract5 liblept5 libwebpmux3`, `dpkg -x FILE ROOT`
for each, and `--tesseract ROOT`. It gets the pictures as they were drawn, one line at a time (page mode 7).

Each figure is a piece of its own, kept in FOLDER/pieces.json: stopped, or after `--minutes`, the same command goes on.
With --write the table goes to benchmarks/results/reader.md.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
RESULTS = ROOT / "benchmarks" / "results"
SEED = 8  # train_demo_reader draws with 7
ANGLES = (0, 1, 2, 3, 5, 7, 10)


class Pieces:
    """Figures by name, each worked out once and kept at once; what takes too long goes on the next time.

    Args:
        folder: where pieces.json is kept.
        about: what the figures depend on; a folder with figures of other settings is refused.
        minutes: no piece begins after so long, and the one at work is interrupted.
    """

    def __init__(self, folder: Path, about: dict[str, Any], minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._about = folder / "pieces.json", about
        self._end = time.monotonic() + 60 * minutes
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"about": about}
        if kept["about"] != about:
            raise SystemExit(f"{self.path} has figures of other settings: {kept['about']}. Name another --work.")
        self.figures: dict[str, Any] = kept.get("figures", {})
        self.whole = True
        if minutes < 1e6:
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """The figure of that name, worked out when it is not there and there is time; else None."""
        if name in self.figures:
            return self.figures[name]
        if time.monotonic() >= self._end:
            self.whole = False
            return None
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        try:
            found = work()
        except KeyboardInterrupt:
            self._end, self.whole = 0, False
            print("stopped; the same command goes on", flush=True)
            return None
        self.figures[name] = found
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps({"about": self._about, "figures": self.figures}, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)
        print(f"  {json.dumps(found)[:200]}  ({time.monotonic() - began:.0f} s)", flush=True)
        return found


def machine() -> str:
    """The machine, the versions and the day, in one line."""
    from fastsd_helpers.device import describe_device
    from fastsd_helpers.runtime import versions

    device = describe_device()
    shown = {name: text for name, text in versions().items() if name in ("python", "torch", "transformers", "openvino")}
    told = ", ".join(f"{name} {text}" for name, text in shown.items())
    return f"{device.name}, {os.cpu_count()} cores, {platform.system()}; {told}; {datetime.date.today():%Y-%m-%d}"


def write_table(name: str, text: str, write: bool) -> None:
    """Print a result, and with `write` put it into benchmarks/results."""
    print(text)
    if write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(f"written: {RESULTS / name}")


def fonts_of(folder: Path | None) -> tuple[list[Path], list[Path]]:
    """The fonts the demo reader has seen, and those held out, as far as they are there."""
    import train_demo_reader as training

    folders = training.font_folders(folder)
    seen = training.usable_fonts([*training.SEEN, *training.CAPITALS], folders)
    held_out = training.usable_fonts(training.HELD_OUT, folders)
    if not seen or not held_out:
        raise SystemExit("The fonts are not there: see the head of scripts/train_demo_reader.py.")
    return seen, held_out


def draw_lines(
    fonts: list[Path], count: int, seed: int, *, held_out: bool = True, straight: bool = False
) -> tuple[list[Any], list[str]]:
    """Draw lines as train_demo_reader does, in their own size: pictures ("L") and texts."""
    import demo_lines
    import train_demo_reader as training

    source = demo_lines.TextSource(held_out=held_out)
    style = demo_lines.LineStyle(rotation=0.0) if straight else demo_lines.LineStyle()
    pictures, texts = [], []
    for place in range(count):
        chance = np.random.default_rng((seed, 0, place))
        font = fonts[int(chance.integers(len(fonts)))]
        known = training.letters_of(font) | {" "}
        text = next(text for text in training.texts_for(font, source, chance) if set(text) <= known)
        pictures.append(demo_lines.draw_line(text, font, chance, style, height=56))
        texts.append(text)
    return pictures, texts


def turn(picture: Any, angle: float) -> Any:
    """The line turned by so many degrees, on paper of its own colour."""
    paper = int(np.median(np.asarray(picture)[[0, -1]]))
    return picture.rotate(angle, resample=2, expand=True, fillcolor=paper)


def score(truths: list[str], texts: list[str]) -> dict[str, float]:
    """CER and WER with the interval of the CER, and the part of lines without an error."""
    from fastsd_helpers.trocr.teaching.metrics import score_lines

    scores = score_lines(truths, texts)
    return {"cer": scores.cer.rate, "low": scores.cer.low, "high": scores.cer.high, "wer": scores.wer.rate,
            "exact": scores.exact}  # fmt: skip


def percent(found: dict[str, float] | None, *, interval: bool = True) -> str:
    """`4.2 % (3.1 to 5.4)`, or a dash where there is no figure yet."""
    if found is None:
        return "-"
    around = f" ({100 * found['low']:.1f} to {100 * found['high']:.1f})" if interval else ""
    return f"{100 * found['cer']:.1f} %{around}"


def find_tesseract(given: str) -> tuple[list[str], dict[str, str]] | None:
    """The program and its environment: installed, named, or below a folder that packages were unpacked into."""
    root = Path(given) if given else None
    if root is not None and root.is_dir():
        libraries = ":".join(str(path) for path in sorted(root.glob("usr/lib/*-linux-gnu")))
        data = next(iter(sorted(root.glob("usr/share/tesseract-ocr/*/tessdata"))), root)
        environment = os.environ | {"LD_LIBRARY_PATH": libraries, "TESSDATA_PREFIX": str(data), "OMP_THREAD_LIMIT": "1"}
        return [str(root / "usr" / "bin" / "tesseract")], environment
    program = given or shutil.which("tesseract")
    return ([program], os.environ | {"OMP_THREAD_LIMIT": "1"}) if program else None


def tesseract_version(found: tuple[list[str], dict[str, str]]) -> str:
    """Its name and version."""
    return subprocess.run(
        [*found[0], "--version"], env=found[1], capture_output=True, text=True, check=True
    ).stdout.split("\n")[0]


def read_with_tesseract(found: tuple[list[str], dict[str, str]], pictures: list[Any]) -> list[str]:
    """Read lines with Tesseract, one by one, English, as single lines."""
    import io

    texts = []
    for picture in pictures:
        data = io.BytesIO()
        # Tried: twice the size, and a border of paper around it, as its manual advises. Neither was better.
        picture.convert("L").save(data, "PNG", dpi=(300, 300))
        command = [*found[0], "stdin", "stdout", "--psm", "7", "-l", "eng"]
        done = subprocess.run(command, input=data.getvalue(), env=found[1], capture_output=True, check=True)
        texts.append(" ".join(done.stdout.decode("utf-8", "replace").split()))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the figures and the int8 copy")
    parser.add_argument("--fonts", type=Path, help="folder with the fonts (default: the system's)")
    parser.add_argument("--model", default="demo-reader", help="key or folder of the reader (default: demo-reader)")
    parser.add_argument("--tesseract", default="", help="the program, or a folder its packages were unpacked into")
    parser.add_argument("--lines", type=int, default=500, help="lines per figure (default: 500)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, to go on another time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reader.md")
    arguments = parser.parse_args()
    seen, held_out = fonts_of(arguments.fonts)
    pieces = Pieces(arguments.work, {"model": arguments.model, "lines": arguments.lines}, arguments.minutes)
    table = measure_all(pieces, arguments, {"seen fonts": seen, "fonts it has not seen": held_out})
    write_table("reader.md", table, arguments.write)
    if not pieces.whole:
        raise SystemExit("Not all figures are there yet; the same command goes on.")


def measure_all(pieces: Pieces, arguments: argparse.Namespace, sets: dict[str, list[Path]]) -> str:
    from fastsd_helpers.trocr import Reader

    count, model = arguments.lines, arguments.model
    rows = [f"# The reader {model} on drawn lines", "", machine(), "",
            f"{count} lines per figure, of words that were not trained on. Wrong characters (CER); in brackets the "
            "interval in which 95 % of samples of such lines lie.", "",
            "| read with | " + " | ".join(sets) + " |", "|---" * (1 + len(sets)) + "|"]  # fmt: skip
    for label, beams in (("greedy", 1), ("beam 4", 4)):
        found = {}
        for name, fonts in sets.items():

            def read(fonts: list[Path] = fonts, beams: int = beams) -> dict[str, float]:
                pictures, texts = draw_lines(fonts, count, SEED)
                return score(texts, [line.text for line in Reader(model, beams, "fp32").read(pictures)])

            found[name] = pieces.take(f"{label}, {name}", read)
        rows.append(f"| {label}, fp32 | " + " | ".join(percent(value) for value in found.values()) + " |")
    tesseract = find_tesseract(arguments.tesseract)
    if tesseract is not None:
        version = pieces.take("tesseract", lambda: tesseract_version(tesseract))
        found = {}
        for name, fonts in sets.items():

            def ocr(fonts: list[Path] = fonts) -> dict[str, float]:
                pictures, texts = draw_lines(fonts, count, SEED)
                return score(texts, read_with_tesseract(tesseract, pictures))

            found[name] = pieces.take(f"tesseract, {name}", ocr)
        rows.append(
            f"| {version}, the same pictures | " + " | ".join(percent(value) for value in found.values()) + " |"
        )
    else:
        rows.append("| Tesseract | not found | not found |")
    rows += ["", *int8_rows(pieces, arguments, sets), "", *rotation_rows(pieces, arguments, sets)]
    return "\n".join(rows) + "\n"


def int8_rows(pieces: Pieces, arguments: argparse.Namespace, sets: dict[str, list[Path]]) -> list[str]:
    """int8 against fp32 on lines of fonts it has not seen, calibrated on lines of seen ones."""
    from fastsd_helpers.trocr.teaching.quantization import quantize

    def shrink() -> list[dict[str, Any]]:
        (seen, unseen) = sets.values()
        pictures, texts = draw_lines(unseen, arguments.lines, SEED)
        calibration = draw_lines(seen, 128, SEED + 1, held_out=False)[0]
        result = quantize(arguments.model, arguments.work / "int8", evaluate_on=list(zip(pictures, texts, strict=True)),
                          calibrate_on=calibration, overwrite=True)  # fmt: skip
        return [trial.__dict__ | {"chosen": trial.method == result.method} for trial in result.trials]

    trials = pieces.take("int8", shrink)
    rows = ["int8 on the same lines of fonts it has not seen; static is calibrated on 128 lines of seen fonts.", "",
            "| numbers | size | lines per second | CER | same text as fp32 |", "|---|---:|---:|---|---:|"]  # fmt: skip
    for trial in trials or []:
        told = percent({"cer": trial["cer"], "low": trial["cer_low"], "high": trial["cer_high"]})
        chosen = " (chosen)" if trial["chosen"] else ""
        rows.append(f"| {trial['method']}{chosen} | {trial['bytes'] / 1e6:.1f} MB | {trial['lines_per_second']:.1f} "
                    f"| {told} | {100 * trial['same_text']:.1f} % |")  # fmt: skip
    return rows


def rotation_rows(pieces: Pieces, arguments: argparse.Namespace, sets: dict[str, list[Path]]) -> list[str]:
    """CER of lines turned by an angle, half of them either way; nothing straightens single lines."""
    from fastsd_helpers.trocr import Reader

    rows = ["Lines turned as a whole, half of them either way; lines of pages are straightened first, these are not.",
            "", "| degrees | " + " | ".join(sets) + " |", "|---:" + "|---" * len(sets) + "|"]  # fmt: skip
    for angle in ANGLES:
        found = []
        for name, fonts in sets.items():

            def read(fonts: list[Path] = fonts, angle: float = angle) -> dict[str, float]:
                pictures, texts = draw_lines(fonts, arguments.lines, SEED, straight=True)
                turned = [turn(picture, angle * (-1) ** place) for place, picture in enumerate(pictures)]
                return score(texts, [line.text for line in Reader(arguments.model, 1, "fp32").read(turned)])

            found.append(percent(pieces.take(f"turned by {angle}, {name}", read)))
        rows.append(f"| {angle} | " + " | ".join(found) + " |")
    return rows


if __name__ == "__main__":
    main()
