"""Train the embedded demo reader from nothing on lines drawn with free fonts, measure it, and put it into the package.

    python scripts/train_demo_reader.py --work reader-training --fonts FOLDER fonts
    python scripts/train_demo_reader.py --work reader-training --fonts FOLDER train
    python scripts/train_demo_reader.py --work reader-training --fonts FOLDER measure
    python scripts/train_demo_reader.py --work reader-training --fonts FOLDER package

Fonts come from Debian: apt-get install fonts-breip fonts-bwht fonts-comfortaa fonts-comic-neue fonts-cwtex-kai
fonts-dancingscript fonts-dkg-handwriting fonts-dustin fonts-ecolier-court fonts-femkeklaver fonts-gfs-neohellenic
fonts-havana fonts-hosny-amiri fonts-humor-sans fonts-joscelyn fonts-jura fonts-kaushanscript fonts-kiloji fonts-klee
fonts-kristi fonts-leckerli-one fonts-lindenhill fonts-lobster fonts-lobstertwo fonts-okolaks fonts-play
fonts-rufscript fonts-seto fonts-sjfonts. `fonts` fetches those of scripts/handwriting_fonts.txt into FOLDER with
`npm pack` (all under the SIL Open Font License or the Apache License).

`train` writes a checkpoint every minute and goes on from it when started again; every line that is drawn is a function
of (seed, step, place), so a run that was stopped sees the same lines. It uses a GPU when there is one, else the CPU
in bf16. `measure` reads lines of held-out words in seen and in held-out fonts.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import demo_lines
import numpy as np
import torch
from demo_reader_network import HEIGHT_PX, WIDTH_PX, build_reader, write_processor
from fontTools.ttLib import TTFont

SEED = 7
LONGEST = 32
PEAK_RATE, FLOOR = 1e-3, 0.02
WARMUP = 500
CTC_WEIGHT = 0.4  # of the encoder's own reading: it makes the attention find the line's order at all, then fades
EMA = 0.999
SAVE_EVERY_S = 60
FIRST_LETTER = 4  # ids 0 to 3 are marks

# Small letters of these look like capitals: only capitals are written with them.
CAPITALS = [
    "BecauseWeBuild-Regular.otf",
    "BecauseWeConnect-Regular.otf",
    "BecauseWeMentor-Regular.otf",
    "BecauseWeOrganize-Regular.otf",
    "Humor-Sans.ttf",
]
SEEN = [
    "Amiri-Slanted.ttf",
    "Breip.ttf",
    "ComicNeue-Bold.otf",
    "ComicNeue-Italic.otf",
    "ComicNeue-Light.otf",
    "ComicNeue-Regular.otf",
    "Comfortaa-Light.ttf",
    "Comfortaa-Regular.ttf",
    "DancingScript-Bold.otf",
    "DancingScript-Regular.otf",
    "Dustismo.ttf",
    "Dustismo_Roman_Italic.ttf",
    "Ecolier-court.ttf",
    "El_Abogado_Loco.ttf",
    "GFSNeohellenicIt.otf",
    "Havana-Regular.otf",
    "Joscelyn-Regular.otf",
    "Jura-Light.otf",
    "Junkyard.ttf",
    "KaushanScript-Regular.otf",
    "KleeOne-Regular.ttf",
    "KleeOne-SemiBold.ttf",
    "Kristi.ttf",
    "LeckerliOne-Regular.ttf",
    "LindenHill-Italic.otf",
    "LobsterTwo-Italic.otf",
    "LobsterTwo-Regular.otf",
    "PenguinAttack.ttf",
    "Play-Regular.ttf",
    "SteveHand.ttf",
    "breipfont.ttf",
    "cwkai.ttf",
    "dkg.ttf",
    "dkgBI.ttf",
    "dkgBd.ttf",
    "dkgIt.ttf",
    "dustismo_italic.ttf",
    "femkeklaver.ttf",
    "kiloji.ttf",
    "kiloji_b.ttf",
    "kiloji_d.ttf",
    "kiloji_p.ttf",
    "lobster.otf",
    "okolaksRegular.ttf",
    "okolaksRegularItalic.ttf",
    "setofont.ttf",
]
HELD_OUT = ("Delphine.ttf", "Domestic_Manners.ttf", "Rufscript010.ttf")
# More of all three, from npm.
_LIST = Path(__file__).with_name("handwriting_fonts.txt").read_text(encoding="utf-8").splitlines()
LISTED = [line.split() for line in _LIST if not line.startswith("#")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def file_of(name: str, weight: str, style: str, *_kind: str) -> str:
    """The file of a listed font inside its package."""
    return f"{name.split('@')[0]}-latin-{weight}-{style}.woff"


ONLY_CAPITALS = {*CAPITALS, *(file_of(*font) for font in LISTED if font[3:] == ["capitals"])}
MORE = [file_of(*font) for font in LISTED if font[3:] != ["held-out"]]
MORE_HELD_OUT = [file_of(*font) for font in LISTED if font[3:] == ["held-out"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["fonts", "train", "measure", "package"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the log")
    parser.add_argument("--fonts", type=Path, help="folder with more fonts than the system's")
    parser.add_argument("--steps", type=int, default=12000, help="optimizer steps of the whole run (default: 12000)")
    parser.add_argument("--batch", type=int, default=32, help="lines a step (default: 32)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")
    parser.add_argument(
        "--begin-with",
        type=Path,
        help="reader.pt of an earlier run, or a reader's folder, to go on from (default: nothing)",
    )
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help=f"highest learning rate (default: {PEAK_RATE:g})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--drawers", type=int, default=1, help="processes that draw lines (default: 1)")
    parser.add_argument("--lines", type=int, default=500, help="lines per figure of `measure` (default: 500)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "fonts":
        fetch_fonts(arguments)
        return
    folders = font_folders(arguments.fonts)
    seen, held_out = usable_fonts([*SEEN, *CAPITALS], folders), usable_fonts(HELD_OUT, folders)
    more = usable_fonts(MORE, folders)
    print(f"{len(seen)} and {len(more)} fonts to learn from, {len(held_out)} held out, on {DEVICE}")
    if arguments.stage == "train":
        train(arguments, seen, more, held_out)
    elif arguments.stage == "measure":
        print(json.dumps(measure(load_weights(arguments.work), seen, held_out, arguments.lines), indent=1))
    else:
        package(arguments, seen, held_out)


def font_folders(more: Path | None) -> list:
    """The system's folders, and one with more fonts."""
    return [*demo_lines._FONT_FOLDERS, *([more] if more else [])]


def fetch_fonts(arguments) -> None:
    """Fetch the listed fonts, those that are not there yet, with `npm pack`."""
    if not arguments.fonts:
        raise SystemExit("--fonts FOLDER: where to put them.")
    arguments.fonts.mkdir(parents=True, exist_ok=True)
    for font in LISTED:
        path = arguments.fonts / file_of(*font)
        if path.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", f"@fontsource/{font[0]}"], cwd=folder, check=True)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as package:
                path.write_bytes(package.extractfile(f"package/files/{path.name}").read())
    print(f"{len(LISTED)} fonts in {arguments.fonts}")


def usable_fonts(names, folders) -> list[Path]:
    """The fonts that are there and have every letter and digit."""
    fonts = []
    needed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for name, path in demo_lines.find_fonts(names, folders).items():
        if needed | (set() if name in ONLY_CAPITALS else {letter.lower() for letter in needed}) <= letters_of(path):
            fonts.append(path)
    missing = sorted({str(name) for name in names} - {path.name for path in fonts})
    if missing:
        print(f"not there, or without all letters: {', '.join(missing)}")
    return fonts


@functools.cache
def letters_of(path: Path) -> frozenset[str]:
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    return frozenset(map(chr, TTFont(path, lazy=True).getBestCmap()))


# ------------------------------------------------------------------------------------------------------- data


@functools.cache
def text_source(held_out: bool) -> demo_lines.TextSource:
    return demo_lines.TextSource(held_out=held_out)


def draw_batch(job) -> tuple[np.ndarray, list[str]]:
    """(seed, step, count, fonts, held-out words?, style) -> uint8 [count, h, w] and the texts."""
    seed, step, count, fonts, held_out, style = job
    source = text_source(held_out)
    pictures, texts = [], []
    for place in range(count):
        chance = np.random.default_rng((seed, step, place))
        font = fonts[int(chance.integers(len(fonts)))]
        text = next(text for text in texts_for(font, source, chance) if set(text) <= letters_of(font) | {" "})
        picture = demo_lines.draw_line(text, font, chance, style, height=56)
        pictures.append(np.asarray(picture.resize((WIDTH_PX, HEIGHT_PX), 2)))
        texts.append(text)
    return np.stack(pictures), texts


def texts_for(font: Path, source: demo_lines.TextSource, chance):
    """Texts without end; a font that lacks a letter of one takes the next."""
    while True:
        text = source.draw(chance, LONGEST)
        yield text.upper() if font.name in ONLY_CAPITALS else text


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(pictures).to(DEVICE).float() / 127.5 - 1
    return values[:, None].expand(-1, 3, -1, -1)


def to_ids(texts: list[str], tokenizer) -> torch.Tensor:
    rows = [[*tokenizer.encode(text, add_special_tokens=False), 2] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows], device=DEVICE)


# --------------------------------------------------------------------------------------------------- training


class ReaderWithCtc(torch.nn.Module):
    """The reader, and while it trains a second way to be wrong: the encoder's columns read on their own (CTC)."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = build_reader()
        self.ctc = torch.nn.Linear(self.reader.config.encoder.hidden_size, 257)  # 256 bytes and a blank

    def forward(self, pixels, labels, noise):
        hidden = self.reader.encoder(pixels).last_hidden_state
        inputs = torch.full_like(labels, 1)
        inputs[:, 0] = 2
        inputs[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] < 0, 1)
        # Some of what was "written before" is wrong, as it will be in use: the decoder must keep looking.
        swap = (torch.rand(inputs.shape, generator=noise) < 0.06).to(inputs.device)
        swap[:, 0] = False
        other = torch.randint(FIRST_LETTER, 260, inputs.shape, generator=noise).to(inputs.device)
        scores = self.reader.decoder(torch.where(swap, other, inputs), encoder_hidden_states=hidden).logits
        loss = torch.nn.functional.cross_entropy(
            scores.float().flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.02
        )
        columns = hidden[:, 1:].unflatten(1, (2, -1)).mean(1)
        log_probs = self.ctc(columns).float().log_softmax(-1).transpose(0, 1)
        targets = (labels - FIRST_LETTER + 1).clamp(min=0)
        lengths = (labels >= FIRST_LETTER).sum(1)
        own = torch.nn.functional.ctc_loss(
            log_probs, targets, torch.full_like(lengths, log_probs.shape[0]), lengths, zero_infinity=True
        )
        return loss, own


def rate_at(step: int, steps: int, peak: float) -> float:
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    part = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1, part))))


def make_optimizers(model: ReaderWithCtc) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else, at one learning rate.

    From the same checkpoint, at 5e-4 and after 250 steps of the same lines: loss 0.97, with AdamW alone 1.11; a step
    takes a tenth longer (2 cores). Muon: Jordan et al. 2024; its steps are scaled to the size of AdamW's.
    """
    inside = [
        weight
        for name, weight in model.reader.named_parameters()
        if weight.dim() == 2 and "embed" not in name and "output_projection" not in name
    ]
    known = {id(weight) for weight in inside}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(inside, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(arguments, seen: list[Path], more: list[Path], held_out: list[Path]) -> None:
    torch.manual_seed(SEED)
    model = ReaderWithCtc().to(DEVICE)
    ctc_weight = CTC_WEIGHT
    if arguments.begin_with and arguments.begin_with.is_dir():
        begun = type(model.reader).from_pretrained(arguments.begin_with, dtype=torch.float32)
        known = model.reader.state_dict()  # opening a folder adds a pooler, which no TrOCR model uses
        model.reader.load_state_dict({name: weight for name, weight in begun.state_dict().items() if name in known})
        ctc_weight = 0.0  # a new head would be wrong by so much that nothing else was learned
    elif arguments.begin_with:
        begun = torch.load(arguments.begin_with, weights_only=True, map_location=DEVICE)
        model.load_state_dict(begun["model"])
        model.reader.load_state_dict(begun["average"])
    average = {name: weight.detach().clone() for name, weight in model.reader.state_dict().items()}
    optimizers = make_optimizers(model)
    path = arguments.work / "reader.pt"
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        average, first = state["average"], state["step"]
        print(f"resuming from step {first}")
    tokenizer = load_tokenizer(arguments.work)
    style = demo_lines.LineStyle()
    jobs = ((SEED, step, arguments.batch, [*seen, *more], False, style) for step in range(first, arguments.steps))
    began = saved = told = time.monotonic()
    losses: list[tuple[float, float]] = []
    # Fork would copy the threads of torch, which then wait for ever.
    with multiprocessing.get_context("spawn").Pool(arguments.drawers) as pool:
        drawn = drawn_batches(pool, jobs, 4 * arguments.drawers)
        for step in range(first, arguments.steps):
            pictures, texts = next(drawn)
            noise = torch.Generator().manual_seed(SEED * 1_000_003 + step)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate_at(step, arguments.steps, arguments.rate)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss, own = model(to_pixels(pictures), to_ids(texts, tokenizer), noise)
            weight = ctc_weight * (1 - step / arguments.steps)
            (loss + weight * own).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            keep = min(EMA, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in model.reader.state_dict().items():
                    average[name].lerp_(value, 1 - keep)
            losses.append((loss.item(), own.item()))
            now = time.monotonic()
            done = step + 1
            if now - told >= 30 or done == arguments.steps:
                mean = np.mean(losses, axis=0)
                print(f"step {done} of {arguments.steps}  loss {mean[0]:.3f}  ctc {mean[1]:.3f}  "
                      f"{(now - began) / (done - first):.2f} s a step", flush=True)  # fmt: skip
                told, losses = now, []
            stop = now - began > arguments.minutes * 60
            if now - saved >= SAVE_EVERY_S or stop or done == arguments.steps:
                kept = [optimizer.state_dict() for optimizer in optimizers]
                save(path, {"model": model.state_dict(), "optimizers": kept, "average": average, "step": done})
                saved = time.monotonic()
            if done % 2000 == 0 or done == arguments.steps:
                figures = measure(weights_of(average), seen, held_out, 100, brief=True)
                with open(arguments.work / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": done, "minutes": (now - began) / 60, **figures}) + "\n")
                print(json.dumps(figures), flush=True)
            if stop:
                print(f"stopped at step {done}; the same command goes on")
                return


def drawn_batches(pool, jobs, count: int):
    """Results of the jobs in order, at most `count` drawn and not yet taken: imap alone would draw all of them at once.

    On a CPU drawing and learning take turns: side by side, the threads of one wait for a core that the other has
    (2 cores: 0.40 s a step, 0.47 s side by side).
    """
    if DEVICE == "cpu":
        while chunk := list(itertools.islice(jobs, count)):
            yield from pool.map(draw_batch, chunk)
        return
    waiting = []
    for job in jobs:
        waiting.append(pool.apply_async(draw_batch, (job,)))
        if len(waiting) > count:
            yield waiting.pop(0).get()
    for result in waiting:
        yield result.get()


def save(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_tokenizer(work: Path):
    from fastsd_helpers.trocr.model.checkpoint import load_tokenizer

    write_processor(work / "processor")
    return load_tokenizer(work / "processor")


# -------------------------------------------------------------------------------------------------- measuring


def weights_of(average: dict[str, torch.Tensor]):
    model = build_reader()
    model.load_state_dict(average)
    return model.eval()


def load_weights(work: Path):
    return weights_of(torch.load(work / "reader.pt", weights_only=True, map_location="cpu")["average"])


def write_folder(model, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)
    write_processor(folder)


def measure(model, seen: list[Path], held_out: list[Path], count: int, *, brief: bool = False) -> dict:
    """Character error rates on lines of held-out words: seen and held-out fonts, greedy and beam 4, plain and rough."""
    from PIL import Image

    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.teaching.metrics import score_lines

    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(model, folder, torch.float32)
        plans = [("seen", seen, 1), ("held_out", held_out, 1)]
        if not brief:
            plans += [("seen_beam4", seen, 4), ("held_out_beam4", held_out, 4)]
            plans += [(f"held_out_{path.stem}", [path], 1) for path in held_out]
        for label, fonts, beams in plans:
            if not fonts:
                continue
            pictures, texts = draw_batch((SEED + 1, 0, count, fonts, True, demo_lines.LineStyle()))
            reader = Reader(folder, beams=beams, precision="fp32", batch_size=32)
            read = reader.read([Image.fromarray(picture) for picture in pictures])
            scores = score_lines(texts, [line.text for line in read])
            figures[f"cer_{label}"] = round(scores.cer.rate, 4)
            if not brief:
                figures[f"cer_{label}_interval"] = [round(scores.cer.low, 4), round(scores.cer.high, 4)]
    return figures


def package(arguments, seen: list[Path], held_out: list[Path]) -> None:
    """Write the averaged weights in float16 to fastsd_helpers/demo/reader_model, what was measured, and samples."""
    from PIL import Image

    import fastsd_helpers.demo

    root = Path(fastsd_helpers.demo.__file__).parent
    model = load_weights(arguments.work)
    write_folder(model, root / "reader_model", torch.float16)
    (root / "reader_model" / "model.safetensors").chmod(0o644)  # transformers leaves it to its owner alone
    figures = measure(load_weights(arguments.work), seen, held_out, arguments.lines)
    (root / "reader_model" / "measured.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    samples = root / "reader_samples"
    samples.mkdir(exist_ok=True)
    # One hand it has not seen, and enough lines of it to learn from.
    pictures, texts = draw_batch((SEED + 2, 0, 48, (held_out or seen)[:1], True, demo_lines.LineStyle(noise=0.6)))
    rows = ["file_name,text,group"]
    for place, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        Image.fromarray(picture).save(samples / f"line-{place + 1:02d}.png", optimize=True)
        quoted = text.replace('"', '""')
        rows.append(f'line-{place + 1:02d}.png,"{quoted}",{place // 4 + 1}')
    (samples / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in (root / "reader_model").iterdir())
    print(f"{size / 1e6:.1f} MB in {root / 'reader_model'}; {json.dumps(figures)}")


if __name__ == "__main__":
    main()
