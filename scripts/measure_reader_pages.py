"""Measure whole pages: two columns drawn with fonts, and a scan; is the order right, and what do pages cost in errors?

    python scripts/measure_reader_pages.py --work FOLDER --fonts FONTS [--model demo-reader] [--scan PICTURE] [--write]

Each drawn page has a heading across two columns of ten lines, in one hand, turned by up to two degrees. Its lines are
read twice: as the page reader finds and cuts them, and as they were drawn, one by one. The scan is a page whose text is
in PICTURE with the ending .txt beside it, if there is one; scikit-image's is in its wheel as skimage/data/page.png. For
every page a picture with the boxes and their numbers is written to FOLDER, to be looked at.

Each page is a piece of its own; stopped, or after `--minutes`, the same command goes on. With --write the table goes to
benchmarks/results/reader_pages.md.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure_reader import Pieces, fonts_of, machine, percent, score, write_table

SEED = 11
ROWS = 10
WIDTH_PX, HEIGHT_PX = 1500, 1300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for figures and pictures")
    parser.add_argument("--fonts", type=Path, help="folder with the fonts (default: the system's)")
    parser.add_argument("--model", default="demo-reader", help="key or folder of the reader (default: demo-reader)")
    parser.add_argument("--pages", type=int, default=8, help="drawn pages (default: 8)")
    parser.add_argument("--scan", type=Path, help="picture of a page, with its text in a .txt beside it")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, to go on another time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reader_pages.md")
    arguments = parser.parse_args()
    pieces = Pieces(arguments.work, {"model": arguments.model}, arguments.minutes)
    fonts = fonts_of(arguments.fonts)[0]
    rows = [f"# The reader {arguments.model} on whole pages", "", machine(), "",
            "Drawn pages: a heading across two columns of ten lines. Wrong characters (CER) when the page reader finds "
            "and cuts the lines, and when each line is read as it was drawn.", "",
            "| page | turned | lines found | order right | as a page | line by line | difference |",
            "|---|---:|---:|---|---|---|---:|"]  # fmt: skip
    texts: dict[str, list[str]] = {"truth": [], "page": [], "lines": []}
    for place in range(arguments.pages):
        chance = np.random.default_rng((SEED, place))
        font = fonts[int(chance.integers(len(fonts)))]

        def work(font: Path = font, place: int = place) -> dict[str, Any]:
            return read_drawn(arguments, font, place)

        found = pieces.take(f"page {place + 1}", work)
        if found is None:
            rows.append(f"| {place + 1}, {font.stem} | - | - | - | - | - | - |")
            continue
        for name, values in texts.items():
            values += found[name]
        page, lines = score(found["truth"], found["page"]), score(found["truth"], found["lines"])
        rows.append(
            f"| {place + 1}, {font.stem} | {found['turned']:.1f}° | {found['found']} of {2 * ROWS + 1} "
            f"| {'yes' if found['order'] else '**no**'} | {percent(page, interval=False)} "
            f"| {percent(lines, interval=False)} | {100 * (page['cer'] - lines['cer']):+.1f} points |"
        )
    if texts["truth"]:
        page, lines = score(texts["truth"], texts["page"]), score(texts["truth"], texts["lines"])
        rows.append(f"| **all** | | | | {percent(page)} | {percent(lines)} "
                    f"| {100 * (page['cer'] - lines['cer']):+.1f} points |")  # fmt: skip
    if arguments.scan:
        rows += ["", *scan_rows(pieces.take(f"scan {arguments.scan.name}", lambda: read_scan(arguments)), arguments)]
    write_table("reader_pages.md", "\n".join(rows) + "\n", arguments.write)
    if not pieces.whole:
        raise SystemExit("Not all figures are there yet; the same command goes on.")


def draw_page(font: Path, chance: np.random.Generator) -> tuple[Any, list[tuple[Any, str, tuple[int, int, int, int]]]]:
    """A page, and its lines in reading order: picture, text and box on the page before it is turned."""
    import demo_lines
    import train_demo_reader as training
    from PIL import Image

    source = demo_lines.TextSource(held_out=True)
    style = demo_lines.LineStyle(rotation=0.0, slant=0.1, wobble=0.02, elastic=0.02, noise=0.0)
    known = training.letters_of(font) | {" "}
    page = Image.new("L", (WIDTH_PX, HEIGHT_PX), 255)
    places = [(300, 60)] + [(left, 200 + 105 * row) for left in (70, 800) for row in range(ROWS)]
    lines = []
    for left, top in places:
        while True:
            text = next(text for text in training.texts_for(font, source, chance) if set(text) <= known)
            picture = demo_lines.draw_line(text, font, chance, style, height=58)
            # A line of two letters says little about finding lines; one wider than its column is no column.
            if 8 <= len(text) <= 26 and picture.width <= 600 and picture.height <= 95:
                break
        page.paste(picture, (left, top))
        lines.append((picture, text, (left, top, left + picture.width, top + picture.height)))
    return page, lines


def read_drawn(arguments: argparse.Namespace, font: Path, place: int) -> dict[str, Any]:
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.pages.page_reader import read_page

    chance = np.random.default_rng((SEED, place, 1))
    page, lines = draw_page(font, chance)
    angle = float(chance.uniform(-2, 2))
    turned = page.rotate(angle, resample=2, expand=True, fillcolor=255)
    reader = Reader(arguments.model, 1, "fp32")
    found = read_page(reader, turned.convert("RGB"))
    draw_boxes(turned, found.lines, arguments.work / f"page-{place + 1}.png")
    matched = match(found.lines, lines, turned.size, page.size, angle)
    order = [at for at in matched if at is not None]
    texts = [" ".join(line.text for line, at in zip(found.lines, matched, strict=True) if at == number)
             for number in range(len(lines))]  # fmt: skip
    # What was read where nothing is written counts as errors of the page.
    extra = [line.text for line, at in zip(found.lines, matched, strict=True) if at is None]
    return {
        "turned": angle,
        "found": len(set(order)),
        "order": order == sorted(order) and len(set(order)) == len(lines),
        "truth": [text for _picture, text, _box in lines] + [""] * len(extra),
        "page": texts + extra,
        "lines": [line.text for line in reader.read([picture for picture, _text, _box in lines])] + [""] * len(extra),
    }


def match(found: Any, lines: Any, size: tuple[int, int], before: tuple[int, int], angle: float) -> list[int | None]:
    """For each line that was found the drawn line that its middle lies in."""
    from fastsd_helpers.trocr.pages.page_reader import turn_back

    places: list[int | None] = []
    for line in found:
        xs, ys = zip(*line.box, strict=True)
        x, y = turn_back((sum(xs) / 4, sum(ys) / 4), size, before, angle)
        inside = [at for at, (_picture, _text, box) in enumerate(lines)
                  if box[0] <= x <= box[2] and box[1] - 5 <= y <= box[3] + 5]  # fmt: skip
        places.append(inside[0] if inside else None)
    return places


def read_scan(arguments: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.pages.page_reader import read_page

    picture = Image.open(arguments.scan).convert("RGB")
    # Detectors are made for letters of twenty pixels and more.
    scale = max(1, round(1200 / picture.width))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    found = read_page(Reader(arguments.model, 1, "fp32"), picture)
    draw_boxes(picture, found.lines, arguments.work / f"scan-{arguments.scan.stem}.png")
    tops = [min(y for _x, y in line.box) for line in found.lines]
    truth = arguments.scan.with_suffix(".txt")
    told = {"lines": [line.text for line in found.lines], "down": tops == sorted(tops), "scale": scale}
    if truth.is_file():
        text = " ".join(truth.read_text(encoding="utf-8").split())
        told["score"] = score([text], [" ".join(line.text for line in found.lines)])
    return told


def scan_rows(found: dict[str, Any] | None, arguments: argparse.Namespace) -> list[str]:
    if found is None:
        return [f"The scan {arguments.scan.name}: not there yet."]
    told = f"The scan {arguments.scan.name}, enlarged {found['scale']} times: {len(found['lines'])} lines found, "
    told += "read downwards" if found["down"] else "**not** read downwards"
    if "score" in found:
        told += f"; CER {percent(found['score'], interval=False)} against {arguments.scan.stem}.txt"
    return [told + ".", "", "```", *found["lines"], "```"]


def draw_boxes(picture: Any, lines: Any, path: Path) -> None:
    """The page with every line's box, its number in reading order and its text."""
    from PIL import ImageDraw, ImageFont

    shown = picture.convert("RGB")
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(22)
    for number, line in enumerate(lines, 1):
        corners = [tuple(corner) for corner in line.box]
        pen.polygon(corners, outline="red", width=2)
        x, y = corners[0]
        pen.text((x - 4, y - 24), f"{number}: {line.text}", font=font, fill="blue")
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.save(path)


if __name__ == "__main__":
    main()
