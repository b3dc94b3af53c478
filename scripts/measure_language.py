"""Measure what a language model of characters is worth: lines of unseen hands, with and without, greedy and beam 4.

    python scripts/measure_language.py --work FOLDER --fonts FONTS [--lines 300] [--write]

The lines are those of scripts/measure_reader.py, in the fonts that the demo reader has never seen. Two language models
are tried: one of other texts (the docstrings of Python's standard library and Debian's licences, where they are), and
one of the texts of other lines of the same source, as a fine-tuning has them. Their weights are chosen on lines of
their own, once; then three other sets of lines, one for each seed, are read. Beside that: real digits, read with all
characters and with digits alone.

Each figure is kept in FOLDER/pieces.json: stopped, or after `--minutes`, the same command goes on. With --write the
table goes to benchmarks/results/language.md.
"""

import argparse
import ast
import functools
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import demo_lines
import numpy as np
import train_demo_reader as training
from measure_reader import Pieces, draw_lines, machine, percent, score, write_table
from measure_reader_learning import digit_lines

from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.language.ngram import CharacterModel, learn_characters
from fastsd_helpers.trocr.reading.dataset import read_lines
from fastsd_helpers.trocr.teaching.language import choose_weights

SEEDS = (21, 22, 23)
CHOSEN_ON = 20
LABELS = 500
# Worked out once, by hand; the script does not measure it again.
TRIED = """
What else was tried for greedy decoding with the other texts (2026-11-30; mean of four other sets of 200
lines, the one that weights are chosen on among them; the weights that were best, not chosen for each set):

| way | CER |
|---|---:|
| no language model | 11.09 % |
| beside the search, weight 0.02, 0.05, 0.1 | 11.22 %, 11.20 %, 11.52 % |
| the same, 0.1, only where the two likeliest tokens are within a factor of e^0.5 | 11.16 % |
| a mixture of both probabilities, 5 % of it the language model's | 11.08 % |
| less an n-gram of the reader's own training texts (density ratio), 0.2 | 10.67 %; on one set worse than without |
| alternatives ranked by the reader alone | 10.60 % |
| alternatives, 0.05 and 0 | 10.36 % |

Token by token the other texts make longer words of short ones ("potential)" becomes
"potentially"), and the reader follows.
"""


def docstrings() -> Iterator[str]:
    """The docstrings of Python's standard library, without the language reference that the lines are made of."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        if path.parent.name in ("test", "site-packages", "pydoc_data", "idlelib"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                yield text


def licences() -> Iterator[str]:
    """Debian's licences."""
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        if not path.is_symlink():
            yield path.read_text(encoding="utf-8", errors="replace")


def languages() -> dict[str, CharacterModel]:
    """The language models that are tried, by what they are made of."""
    source, chance = demo_lines.TextSource(held_out=True), np.random.default_rng(5)
    return {
        "other texts": learn_characters([*docstrings(), *licences()]),
        f"the texts of {LABELS} other lines": learn_characters(source.draw(chance) for _ in range(LABELS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--fonts", type=Path, help="folder with the fonts (default: the system's)")
    parser.add_argument("--lines", type=int, default=300, help="lines per seed (default: 300)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, to go on another time")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/language.md")
    arguments = parser.parse_args()
    fonts = training.usable_fonts([*training.HELD_OUT, *training.MORE_HELD_OUT], training.font_folders(arguments.fonts))
    if not fonts:
        raise SystemExit("The fonts are not there: see the head of scripts/train_demo_reader.py.")
    pieces = Pieces(arguments.work, {"lines": arguments.lines, "fonts": len(fonts)}, arguments.minutes)
    write_table("language.md", measure(pieces, fonts, arguments.lines), arguments.write)
    if not pieces.whole:
        raise SystemExit("Not all figures are there yet; the same command goes on.")


def measure(pieces: Pieces, fonts: list[Path], count: int) -> str:
    made = languages()
    rows = ["# A language model of characters beside the demo reader", "", machine(), "",
            f"{count} lines for each of three seeds, drawn in {len(fonts)} fonts that the reader has not seen, of "
            "words it has not learned. Wrong characters (CER); weights chosen on 200 other lines. Alternatives: a "
            "greedily decoded line, and the lines that follow from the rivals of its two least sure tokens, ranked by "
            "the reader and the language model together, or by the reader alone.", "",
            "| language model | search | weights | seed 1 | seed 2 | seed 3 | mean | CPU time a line |",
            "|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    # So small a weight only breaks ties: what the search finds more is told from what the language model knows.
    alone = replace(next(iter(made.values())), alternatives=(1e-9, 0.0))
    for beams, told, language in ((1, "-", "none"), (1, "alternatives, 0 and 0", alone), (4, "-", "none")):
        found = [
            pieces.take(f"none, {beams}, {told}, {seed}", functools.partial(read, fonts, count, seed, beams, language))
            for seed in SEEDS
        ]
        rows.append(row("none", beams, told, found))
    for name, language in made.items():
        size = f"{len(language.keys):,} n-grams of {language.about['characters']:,} characters"
        chosen = pieces.take(f"weights, {name}", functools.partial(choose, fonts, language))
        for beams, gain in zip((1, 4), chosen or [], strict=False):
            weights = {way: (0.0, 0.0) for way in language.weights}
            if gain["way"] != "none":
                weights[gain["way"]] = (gain["weight"], gain["bonus"])
            used = replace(language, **weights)
            found = [
                pieces.take(f"{name}, {beams}, {seed}", functools.partial(read, fonts, count, seed, beams, used))
                for seed in SEEDS
            ]
            told = f"{gain['way']}, {gain['weight']:g} and {gain['bonus']:g}" if gain["weight"] else "off"
            rows.append(row(f"{name} ({size})", beams, told, found))
    rows += ["", f"{count} lines of 3 to 8 real digits (scikit-learn's, 8 x 8 px, by 43 people), greedy:", "",
             "| characters that may be written | CER |", "|---|---:|"]  # fmt: skip
    for characters in ("", "0-9"):
        found = pieces.take(f"digits {characters}", functools.partial(read_digits, count, characters))
        rows.append(f"| {f'`--allowed-characters {characters}`' if characters else 'all'} | {percent(found)} |")
    return "\n".join(rows) + "\n" + TRIED


def read_digits(count: int, characters: str) -> dict[str, float]:
    """Lines of digits, with all characters or with some."""
    lines = digit_lines(0, 1797, count, SEEDS[0])
    reader = Reader("demo-reader", precision="fp32", allowed_characters=characters)
    return score(
        [text for _picture, text, _group in lines], [line.text for line in reader.read([line[0] for line in lines])]
    )


def choose(fonts: list[Path], language: CharacterModel) -> list[dict[str, Any]]:
    pictures, texts = draw_lines(fonts, 200, CHOSEN_ON)
    lines = read_lines(list(zip(pictures, texts, strict=True)))
    _model, gains = choose_weights(Reader("demo-reader", precision="fp32"), language, lines)
    return [asdict(gain) for gain in gains]


def read(fonts: list[Path], count: int, seed: int, beams: int, language: Any) -> dict[str, float]:
    pictures, texts = draw_lines(fonts, count, seed)
    reader = Reader("demo-reader", beams, "fp32", language=language)
    reader.read(pictures[:8])
    began = time.process_time()
    lines = reader.read(pictures)
    return {**score(texts, [line.text for line in lines]), "ms": 1000 * (time.process_time() - began) / count}


def row(name: str, beams: int, weights: str, found: list[dict[str, float] | None]) -> str:
    there = [one for one in found if one is not None]
    cers = [f"{100 * one['cer']:.2f} %" if one else "-" for one in found]
    mean = f"{100 * sum(one['cer'] for one in there) / len(there):.2f} %" if there else "-"
    cost = f"{sum(one['ms'] for one in there) / len(there):.1f} ms" if there else "-"
    search = "greedy" if beams == 1 else f"beam {beams}"
    return f"| {name} | {search} | {weights} | {' | '.join(cers)} | {mean} | {cost} |"


if __name__ == "__main__":
    main()
