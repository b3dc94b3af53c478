"""Measure what a reader learns from few lines: a hand it has not seen, real digits, a new script.

    python scripts/measure_reader_learning.py --work FOLDER --fonts FONTS [--model demo-reader] [--write] [--only PART]

- hand: 200 lines in each held-out font, everything trained; the decoder alone too in Debian's. Measured on lines of
  held-out words.
- digits: strings of 3 to 8 of the handwritten digits that come with scikit-learn (8 x 8 px, enlarged), 1797 by 13
  people, stored one writer after the other: the first 1150 are learned from, the last 447 measured on; the 200 between
  belong to neither, more than one person wrote, so nobody is on both sides.
- script: hiragana in a handwriting font, from 250, 1000 and 4000 lines of letters in no order, beginning with the
  reader and with random weights; and with 1000 lines the decoder alone. Same steps for all.

Each run is a piece of its own in FOLDER; stopped, or after `--minutes`, the same command goes on, a run from its last
measurement. With --write the table goes to benchmarks/results/reader_learning.md.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure_reader import Pieces, draw_lines, fonts_of, machine, percent, write_table

SEED = 9
HIRAGANA = "".join(chr(code) for code in range(0x3042, 0x3094) if chr(code) not in "ぃぅぇぉっゃゅょゎゐゑ")
SCRIPT_FONTS = ("kiloji.ttf", "setofont.ttf", "KleeOne-Regular.ttf")
PARTS = ("hand", "digits", "script")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for figures and runs")
    parser.add_argument("--fonts", type=Path, help="folder with the fonts (default: the system's)")
    parser.add_argument("--model", default="demo-reader", help="key or folder of the reader (default: demo-reader)")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given twice")
    parser.add_argument("--steps", type=int, default=400, help="steps for a hand and for digits (default: 400)")
    parser.add_argument("--script-steps", type=int, default=1500, help="steps for the script (default: 1500)")
    parser.add_argument("--lr", type=float, help="learning rate of all runs (default: what fastsd chooses)")
    parser.add_argument("--test-lines", type=int, default=200, help="lines measured on (default: 200)")
    parser.add_argument("--few", type=float, default=1.0, help="part of the lines learned from, for a try (default: 1)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, to go on another time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reader_learning.md")
    arguments = parser.parse_args()
    about = {name: getattr(arguments, name) for name in ("model", "steps", "script_steps", "test_lines", "few", "lr")}
    pieces = Pieces(arguments.work, about, arguments.minutes)
    parts = {"hand": learn_hands, "digits": learn_digits, "script": learn_script}
    rows = [f"# What the reader {arguments.model} learns", "", machine(), "",
            f"Wrong characters (CER) on {arguments.test_lines} lines that were held out; in brackets the "
            "interval in which 95 % of samples of such lines lie. Batches of 16.", ""]  # fmt: skip
    for name in arguments.only or PARTS:
        rows += [*parts[name](pieces, arguments), ""]
    write_table("reader_learning.md", "\n".join(rows), arguments.write)
    if not pieces.whole:
        raise SystemExit("Not all figures are there yet; the same command goes on.")


def learn(
    pieces: Pieces,
    arguments: argparse.Namespace,
    name: str,
    lines: list[tuple[Any, str, str]],
    held_out: list[tuple[Any, str, str]],
    *,
    steps: int = 0,
    model: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any] | None:
    """One run: the errors before and after, and those measured meanwhile as [step, CER]."""
    from fastsd_helpers.trocr.reading.dataset import read_lines
    from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, finetune

    steps = steps or arguments.steps

    def work() -> dict[str, Any]:
        batches = -(-len(lines) // 16)
        config = FineTuneConfig(
            epochs=steps / batches, batch_size=16, patience=0, measure_every=max(1, steps // 10),
            seed=SEED, lr=arguments.lr, **settings,
        )  # fmt: skip
        result = finetune(
            config, read_lines(lines), arguments.work / name.replace(" ", "-").replace(",", ""),
            model=model or arguments.model, held_out=read_lines(held_out),
        )  # fmt: skip
        before, after = (
            {"cer": found.scores.cer.rate, "low": found.scores.cer.low, "high": found.scores.cer.high}
            for found in (result.before, result.after)
        )
        return {"before": before, "after": after, "curve": result.curve, "steps": result.steps,
                "seconds": result.seconds, "lines": len(lines)}  # fmt: skip

    return pieces.take(name, work)


def row(name: str, found: dict[str, Any] | None) -> str:
    """A row of a table: before, after, and what is left of the errors."""
    if found is None:
        return f"| {name} | - | - | - | - | - |"
    left = found["after"]["cer"] / max(1e-9, found["before"]["cer"])
    return (f"| {name} | {found['lines']} | {found['steps']} | {percent(found['before'])} | {percent(found['after'])} "
            f"| {100 * left:.0f} % |")  # fmt: skip


HEAD = ["| what | lines | steps | before | after | errors left |", "|---|---:|---:|---|---|---:|"]


def named(pictures: list[Any], texts: list[str], group: str) -> list[tuple[Any, str, str]]:
    return [(picture, text, group) for picture, text in zip(pictures, texts, strict=True)]


def compare_curves(full: dict[str, Any] | None, decoder: dict[str, Any] | None) -> str:
    """After how many steps full training is as good as the decoder alone at its best."""
    if full is None or decoder is None:
        return "Steps to equal errors: not all runs are there yet."
    best_step, best = min(decoder["curve"], key=lambda point: (point[1], point[0]))
    reached = next((step for step, rate in full["curve"] if rate <= best), None)
    told = f"the decoder alone is at its best ({100 * best:.1f} %) after {best_step} steps"
    if reached is None:
        return f"Steps to equal errors: {told}; full training does not get there in {full['steps']} steps."
    return f"Steps to equal errors: {told}; full training is as good after {reached}."


def learn_hands(pieces: Pieces, arguments: argparse.Namespace) -> list[str]:
    import train_demo_reader as training

    rows = ["## A hand it has not seen", "", "Lines in a held-out font, of other words than are measured.", "", *HEAD]
    told = []
    held_out = fonts_of(arguments.fonts)[1]
    more = training.usable_fonts(training.MORE_HELD_OUT, training.font_folders(arguments.fonts))
    for font in [*held_out, *more]:
        lines = named(*draw_lines([font], max(8, int(200 * arguments.few)), SEED, held_out=False), "learned")
        test = named(*draw_lines([font], arguments.test_lines, SEED + 1), "measured")
        found = {
            method: learn(
                pieces, arguments, f"hand, {font.stem}, {method}", lines, test, steps=arguments.steps, method=method
            )
            for method in (("full", "decoder") if font in held_out else ("full",))
        }
        rows += [row(f"{font.stem}, {method}", value) for method, value in found.items()]
        if font in held_out:
            told.append(f"{font.stem}. {compare_curves(found['full'], found['decoder'])}")
    return [*rows, "", *[f"- {line}" for line in told]]


def digit_lines(first: int, last: int, count: int, seed: int) -> list[tuple[Any, str, str]]:
    """Lines of 3 to 8 digits, each line of one stretch of 40 in the order they are stored: of one writer or two."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    chance = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        start = int(chance.integers(first, last - 40))
        chosen = chance.integers(start, start + 40, int(chance.integers(3, 9)))
        # 0..16 is the amount of ink.
        cells = [Image.fromarray((255 - digits.images[place] * 255 / 16).astype(np.uint8)) for place in chosen]
        line = Image.new("L", (44 * len(cells) + 24, 60), 255)
        for at, cell in enumerate(cells):
            line.paste(cell.resize((44, 48), Image.Resampling.BICUBIC), (12 + 44 * at, 6))
        lines.append((line, "".join(str(digits.target[place]) for place in chosen), f"digits {start // 40}"))
    return lines


def learn_digits(pieces: Pieces, arguments: argparse.Namespace) -> list[str]:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return ["## Real digits", "", "Not measured: the package scikit-learn is not installed."]
    lines = digit_lines(0, 1150, max(8, int(400 * arguments.few)), SEED)
    test = digit_lines(1350, 1797, arguments.test_lines, SEED + 1)
    rows = ["## Real digits", "", "Written by hand by 13 people, nobody on both sides.", "", *HEAD]
    for method in ("full", "decoder"):
        found = learn(pieces, arguments, f"digits, {method}", lines, test, method=method)
        rows.append(row(method, found))
    return rows


def script_lines(font: Path, count: int, seed: int) -> list[tuple[Any, str, str]]:
    """Lines of 2 to 10 hiragana in no order, so that nothing can be guessed."""
    import demo_lines

    lines = []
    for place in range(count):
        chance = np.random.default_rng((seed, 1, place))
        text = "".join(HIRAGANA[int(at)] for at in chance.integers(0, len(HIRAGANA), int(chance.integers(2, 11))))
        lines.append((demo_lines.draw_line(text, font, chance, height=56), text, "script"))
    return lines


def learn_script(pieces: Pieces, arguments: argparse.Namespace) -> list[str]:
    import demo_lines
    import train_demo_reader as training

    folders = training.font_folders(arguments.fonts)
    fonts = [path for path in demo_lines.find_fonts(SCRIPT_FONTS, folders).values()
             if set(HIRAGANA) <= training.letters_of(path)]  # fmt: skip
    if not fonts:
        return ["## A new script", "", f"Not measured: none of {', '.join(SCRIPT_FONTS)} is there."]
    font, steps = fonts[0], arguments.script_steps
    test = script_lines(font, arguments.test_lines, SEED + 1)
    rows = ["## A new script", "", f"Hiragana in {font.name}: {len(HIRAGANA)} letters, each a token of its own "
            "(`vocabulary=replace`); random weights have the reader's shape.", "", *HEAD]  # fmt: skip
    scratch = random_reader(arguments)
    found: dict[str, Any] = {}
    for count in (250, 1000, 4000):
        lines = script_lines(font, max(8, int(count * arguments.few)), SEED)
        common = {"steps": steps, "vocabulary": "replace"}
        name = f"script, {count}"
        found[name] = learn(pieces, arguments, name, lines, test, **common)
        rows.append(row(f"{count} lines, from the reader", found[name]))
        found[f"{name}, random"] = learn(pieces, arguments, f"{name}, random", lines, test, model=scratch, **common)
        rows.append(row(f"{count} lines, from random weights", found[f"{name}, random"]))
        if count == 1000:
            found["decoder"] = learn(pieces, arguments, f"{name}, decoder", lines, test, method="decoder", **common)
            rows.append(row(f"{count} lines, the decoder alone", found["decoder"]))
    return [*rows, "", f"With 1000 lines. {compare_curves(found['script, 1000'], found['decoder'])}"]


def random_reader(arguments: argparse.Namespace) -> Path:
    """A folder with the reader's own shape, words and picture settings, and random weights."""
    import shutil

    import torch
    import transformers

    from fastsd_helpers.model_lookup import READER, find_folder

    folder = arguments.work / "random-reader"
    if not (folder / "config.json").is_file():
        own = find_folder(arguments.model, READER)
        torch.manual_seed(SEED)
        config = transformers.VisionEncoderDecoderConfig.from_pretrained(own)
        fresh = folder.with_name("random-reader.part")
        transformers.VisionEncoderDecoderModel(config=config).save_pretrained(fresh)
        for path in own.iterdir():
            if path.suffix in (".json", ".txt", ".model") and path.name != "config.json":
                shutil.copyfile(path, fresh / path.name)
        fresh.rename(folder)
    return folder


if __name__ == "__main__":
    main()
