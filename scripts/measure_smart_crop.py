"""Measure how much of a hand-drawn subject box the smart crop keeps, against the centre crop, on real photos.

The photos of the sets measured here are square, so their largest square is the full photo. What is measured are the
wide and tall photos that lie in them: windows of 3:2 and 16:9 cut so that the subject stands at the start of the long
side, at its end, or wherever the photographer put it ("framed"). `best` is what the best possible square of the same
size keeps: 100 % is out of reach when the subject is longer than the short side.

    python scripts/measure_smart_crop.py PHOTOS_DIR [--write]
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BOXES = ROOT / "tests" / "data" / "subject_boxes.json"
RESULT = ROOT / "benchmarks" / "results" / "smart_crop.md"
SHAPES = {"3:2": 3 / 2, "16:9": 16 / 9}
PLACES = ("start", "end", "framed")
MARGIN = 0.03  # of the photo, between the subject and the side it stands at

Box = tuple[int, int, int, int]


class Window(NamedTuple):
    """A wide or tall photo cut out of a square one, and the subject's visible box in it."""

    photo: str
    shape: str
    place: str
    window: Box
    box: Box


class Kept(NamedTuple):
    """Shares of the subject's box that are inside the square, 0..1."""

    smart: float
    center: float
    best: float


def windows_of(photo: str, box: Box, width: int, height: int) -> list[Window]:
    """Cut every shape at every place along both sides of a photo; those too short for that are left out."""
    found = []
    for shape, ratio in SHAPES.items():
        for wide in (True, False):
            long, across = (width, height) if wide else (height, width)
            low, high = (box[0], box[2]) if wide else (box[1], box[3])
            low_across, high_across = (box[1], box[3]) if wide else (box[0], box[2])
            for place in PLACES:
                start = max(0, low - MARGIN * long) if place == "start" else 0
                end = min(long, high + MARGIN * long) if place == "end" else long
                short = (end - start) / ratio
                if not 200 <= short <= across:
                    continue
                side = min(max((low_across + high_across) / 2 - short / 2, 0), across - short)
                edges = (start, side, end, side + short) if wide else (side, start, side + short, end)
                left, top, right, bottom = (round(edge) for edge in edges)
                inside = (
                    max(box[0], left) - left,
                    max(box[1], top) - top,
                    min(box[2], right) - left,
                    min(box[3], bottom) - top,
                )
                found.append(
                    Window(photo, f"{shape} {'wide' if wide else 'tall'}", place, (left, top, right, bottom), inside)
                )
    return found


def share_kept(box: Box, square: Box) -> float:
    """The part of a box's area that lies in a square."""
    width = max(0, min(box[2], square[2]) - max(box[0], square[0]))
    height = max(0, min(box[3], square[3]) - max(box[1], square[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def measure(photos: Path, boxes: dict[str, Box]) -> tuple[dict[Window, Kept], float]:
    """Crop every window of every photo; returns what was kept and the median processor seconds of a smart crop."""
    from PIL import Image

    from fastsd_helpers.images.smart_crop import crop_box

    kept, seconds = {}, []
    for name, box in boxes.items():
        with Image.open(photos / name) as opened:
            photo = opened.convert("RGB")
        for window in windows_of(name, tuple(box), *photo.size):
            image = photo.crop(window.window)
            started = time.process_time()
            smart = crop_box(image)
            seconds.append(time.process_time() - started)
            center = crop_box(image, method="center")
            side = min(image.size)
            visible = window.box
            best = min(1.0, side / (visible[2] - visible[0] if image.width > side else visible[3] - visible[1]))
            kept[window] = Kept(share_kept(visible, smart.as_tuple()), share_kept(visible, center.as_tuple()), best)
    return kept, statistics.median(seconds)


def table_of(kept: dict[Window, Kept], group: str) -> list[str]:
    """A Markdown table of mean and worst shares, one line for each value of `group` and one for all."""
    groups = defaultdict(list)
    for window, shares in kept.items():
        key = {"set": window.photo.split("/")[0], "place": window.place, "shape": window.shape}[group]
        groups[key].append(shares)
    lines = [
        f"| {group} | crops | smart mean | centre mean | best possible | smart worst | centre worst "
        "| smart better / same / worse |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, shares in [*groups.items(), ("**all**", list(kept.values()))]:
        smart, center, best = (statistics.mean(values) for values in zip(*shares, strict=True))
        gains = [s.smart - s.center for s in shares]
        counts = sum(g > 0.005 for g in gains), sum(abs(g) <= 0.005 for g in gains), sum(g < -0.005 for g in gains)
        lines.append(
            f"| {key} | {len(shares)} | {smart:.1%} | {center:.1%} | {best:.1%} | {min(s.smart for s in shares):.1%} "
            f"| {min(s.center for s in shares):.1%} | {counts[0]} / {counts[1]} / {counts[2]} |"
        )
    return lines


def main() -> None:
    """Print the tables and, when asked, write them to benchmarks/results/smart_crop.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="PHOTOS_DIR", help="folder that holds cat/00.jpg and so on")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    chosen = parser.parse_args()
    boxes = {name: tuple(box) for name, box in json.loads(BOXES.read_text()).items()}
    missing = [name for name in boxes if not (chosen.photos / name).is_file()]
    if missing:
        sys.exit(f"{chosen.photos} lacks {', '.join(missing[:5])}: give the folder that holds the sets.")

    import cv2
    import numpy
    import PIL

    kept, seconds = measure(chosen.photos, boxes)
    uncut = {w: k for w, k in kept.items() if w.place == "framed"}
    lines = [
        "# Smart crop against centre crop",
        "",
        f"Share of a hand-drawn subject box that the square keeps: {len(boxes)} photos of "
        f"{len({name.split('/')[0] for name in boxes})} subjects, {len(kept)} wide and tall photos cut from them.",
        "The photos are square as they are: both crops keep all of them, so there is nothing to compare.",
        "The weights of the saliency were chosen on these same photos, so expect somewhat less on others.",
        "",
        *table_of(kept, "set"),
        "",
        *table_of(kept, "place"),
        "",
        *table_of(kept, "shape"),
        "",
        f"Framed as the photographer did ({len(uncut)} crops), by set:",
        "",
        *table_of(uncut, "set"),
        "",
        f"A smart crop takes {seconds * 1000:.0f} ms of processor time (median). Measured on "
        f"{datetime.date.today().isoformat()}: {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {numpy.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}; "
        "no face model, so every crop is by saliency.",
        "",
        "Again: `python scripts/measure_smart_crop.py PHOTOS_DIR --write`; boxes: tests/data/subject_boxes.json.",
        "The photos are the sets cat, clock, colorful_sneaker, dog, duck_toy and teapot of google/dreambooth.",
    ]
    print("\n".join(lines))
    if chosen.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nWritten to {RESULT}")


if __name__ == "__main__":
    main()
