"""Measure a spread whose pages slope against each other, versus the same spread with level lines.

    python scripts/measure_spread.py [--texts N] [--write]

The left page rises by three degrees, the right one falls by three. Both kinds of spread are drawn in the same two ways:
sharp, where PIL draws letters on the grid of pixels and sloping ones are resampled, level ones never; and smooth, where
all are drawn four times as large, turned (by nothing, where they are level), and reduced. `--write` records it in
benchmarks/results/spread.md.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

RESULT = REPOSITORY / "benchmarks" / "results" / "spread.md"
SIDE, ROWS, SLOPE, SCALE = 900, 7, 3.0, 4
ENDS = ("over the lazy", "in a quiet garden", "had been nobody")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=3, help=f"spreads of each kind, 1 to {len(ENDS)} (default: 3)")
    parser.add_argument("--write", action="store_true", help=f"record it in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from fastsd_helpers.trocr.pages.page_reader import open_detector
    from fastsd_helpers.trocr.reading.reader import Reader

    reader, detector = Reader("demo-reader"), open_detector()
    rows = []
    for drawn, scale in (("sharp", 1), ("smooth", SCALE)):
        for lines, slope in (("level", 0.0), ("sloping", SLOPE)):
            rates, found = measure(reader, detector, scale, slope, ENDS[: chosen.texts])
            rows.append(f"| {drawn} | {lines} | {found} of {2 * ROWS * chosen.texts} | "
                        + " | ".join(f"{100 * rate:.1f} %" for rate in rates) + " |")  # fmt: skip
            print(rows[-1], flush=True)
    page = f"""\
# A spread whose pages slope against each other

`python scripts/measure_spread.py --texts {chosen.texts}`, {datetime.date.today()}: {chosen.texts} spreads of {2 * ROWS}
lines, the left page rising and the right one falling by {SLOPE:g} degrees, the built-in model. Level lines in sharp
letters are the only ones that were never resampled.

| letters | lines | found | CER, left page | CER, right page |
| --- | --- | ---: | ---: | ---: |
{chr(10).join(rows)}
"""
    if chosen.write:
        RESULT.write_text(page, encoding="utf-8")


def measure(
    reader: Any, detector: Any, scale: int, slope: float, ends: tuple[str, ...]
) -> tuple[tuple[float, float], int]:
    """CER of the left and of the right pages, and how many lines were found."""
    from fastsd_helpers.trocr.pages.page_reader import cut_lines
    from fastsd_helpers.trocr.teaching.metrics import score_lines

    truths: list[list[str]] = [[], []]
    texts: list[list[str]] = [[], []]
    count = 0
    for end in ends:
        page, _crops = cut_lines(reader, draw_spread(end, scale, slope), detector=detector)
        count += len(page.lines)
        for half in (0, 1):
            own = [line.text for line in page.lines if (middle_of(line) >= SIDE) == bool(half)]
            wanted = text_of(half, end)
            truths[half] += wanted + [""] * (len(own) - ROWS)
            texts[half] += own + [""] * (ROWS - len(own))
    left, right = (score_lines(truths[half], texts[half]).cer.rate for half in (0, 1))
    return (left, right), count


def middle_of(line: Any) -> float:
    return sum(x for x, _y in line.box) / len(line.box)


def text_of(half: int, end: str) -> list[str]:
    return [f"half {half + 1} line {row + 1} {end}" for row in range(ROWS)]


def draw_spread(end: str, scale: int, slope: float) -> Any:
    """Two pages side by side."""
    from PIL import Image, ImageDraw, ImageFont

    spread = Image.new("RGB", (2 * SIDE, SIDE), "white")
    font = ImageFont.load_default(44 * scale)
    for half in (0, 1):
        page = Image.new("RGB", (SIDE * scale, SIDE * scale), "white")
        for row, text in enumerate(text_of(half, end)):
            ImageDraw.Draw(page).text((110 * scale, (120 + 90 * row) * scale), text, "black", font)
        turned = page.rotate(slope * (-1 if half else 1), Image.Resampling.BICUBIC, fillcolor="white")
        spread.paste(turned.reduce(scale) if scale > 1 else turned, (SIDE * half, 0))
    return spread


if __name__ == "__main__":
    main()
