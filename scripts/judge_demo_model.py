"""Judge the demo model: does it draw what captions it never saw say?

    python scripts/judge_demo_model.py [--model FOLDER] [--pictures 160] [--grid grid.png] [--write]

A small classifier learns object, colour, place, background and style from drawn pictures, and is itself checked on
drawn held-out ones. Then it reads pictures that the model makes from held-out captions.

--write records the figures in benchmarks/results/.
"""

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import demo_pictures as pictures
import numpy as np
import torch
from PIL import Image
from torch import nn

from fastsd_helpers.demo import MODEL_FOLDER
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.cache import encode_prompts
from fastsd_helpers.dreambooth.training.sampling import draw_grid, draw_pictures

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "demo_model.md"
WORDS = {
    "object": list(pictures.OBJECTS),
    "colour": list(pictures.COLOURS),
    "place": list(pictures.PLACES),
    "background": list(pictures.BACKGROUNDS),
    "style": list(pictures.STYLES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="registry key or Diffusers folder")
    parser.add_argument("--pictures", type=int, default=160, help="pictures to make from held-out captions")
    parser.add_argument("--grid", type=Path, help="write the first 12 pictures here")
    parser.add_argument("--write", action="store_true", help=f"record the figures in {RESULTS.name}")
    arguments = parser.parse_args()
    started = time.time()
    scenes = pictures.all_scenes()
    held_out = [scene for scene in scenes if pictures.is_held_out(scene)]
    reader = train_reader([scene for scene in scenes if not pictures.is_held_out(scene)])
    generator = np.random.default_rng(1)
    drawn = read(reader, [pictures.draw_scene(scene, generator) for scene in held_out], held_out)
    chosen = [held_out[index] for index in np.random.default_rng(2).permutation(len(held_out))[: arguments.pictures]]
    made = make(arguments.model, [scene.caption for scene in chosen])
    judged = read(reader, made, chosen)
    lines = [
        f"| pictures, % read right | {' | '.join(WORDS)} | object and colour | all five |",
        f"|---|{'---:|' * (len(WORDS) + 2)}",
        row(f"{len(held_out)} drawn by the code, held out (the classifier's own limit)", drawn),
        row(f"{len(chosen)} made by the model from held-out captions", judged),
    ]
    print("\n".join(lines))
    if arguments.grid:
        halves = [
            draw_grid([made[start : start + 6]], [""], [scene.caption for scene in chosen[start : start + 6]])
            for start in (0, 6)
        ]
        sheet = Image.new("RGB", (halves[0].width, 2 * halves[0].height), "white")
        for index, half in enumerate(halves):
            sheet.paste(half, (0, index * half.height))
        sheet.crop((88, 0, *sheet.size)).save(arguments.grid, optimize=True)  # the row titles' room is empty
    if arguments.write and arguments.model == "demo":
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        weights = sum(path.stat().st_size for path in MODEL_FOLDER.rglob("*.safetensors"))
        RESULTS.write_text(
            "# The demo model on captions it never saw\n\n"
            f"`python scripts/judge_demo_model.py --pictures {arguments.pictures} --write`, {date.today()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{time.time() - started:.0f} s; weights {weights / 1e6:.1f} MB.\n\n" + "\n".join(lines) + "\n",
            encoding="utf-8",
        )


def row(what: str, right: np.ndarray) -> str:
    figures = [*right, right[:2].all(0), right.all(0)]
    return f"| {what} | {' | '.join(f'{100 * figure.mean():.1f}' for figure in figures)} |"


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    array = np.stack([np.asarray(image.reduce(2)) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_reader(scenes: list[pictures.Scene], steps: int = 500) -> nn.Module:
    """Four strided convolutions, and an answer for each kind of word.

    It sees slightly blurred and noisy pictures, as a model would make them.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    reader = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, sum(map(len, WORDS.values()))))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    generator = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        picked = [scenes[index] for index in generator.integers(0, len(scenes), 64)]
        pixels = to_tensor([pictures.draw_scene(scene, generator) for scene in picked])
        blurred = nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = torch.lerp(pixels, blurred, torch.rand(64, 1, 1, 1)) + 0.08 * torch.randn_like(pixels)
        loss = sum(map(nn.functional.cross_entropy, answers(reader, pixels), right_answers(picked)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.eval()


@torch.no_grad()
def read(reader: nn.Module, images: list[Image.Image], scenes: list[pictures.Scene]) -> np.ndarray:
    """bool [5, n]: whether each picture's object, colour, place, background and style are read as its caption says."""
    batches = [to_tensor(images[start : start + 64]) for start in range(0, len(images), 64)]
    found = torch.cat([torch.stack([part.argmax(1) for part in answers(reader, batch)]) for batch in batches], 1)
    return (found == torch.stack(right_answers(scenes))).numpy()


def answers(reader: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each kind of word, logits [n, words]."""
    return reader(pixels).split([len(words) for words in WORDS.values()], 1)


def right_answers(scenes: list[pictures.Scene]) -> list[torch.Tensor]:
    """Of each kind of word, the place of every scene's own in the list: int64 [n]."""
    return [torch.tensor([words.index(getattr(scene, kind)) for scene in scenes]) for kind, words in WORDS.items()]


def make(model: str, captions: list[str], batch_size: int = 16) -> list[Image.Image]:
    base = BaseModel.fetch(model)
    unet, vae = base.load("unet"), base.load("vae")
    texts = base.load_encoders(), base.load_tokenizers()
    text = encode_prompts(base.family, *texts, [*captions, ""], device="cpu")
    made: list[Image.Image] = []
    for start in range(0, len(captions), batch_size):
        part = text[start : min(start + batch_size, len(captions))]
        seeds = range(start, start + len(part))
        with torch.autocast("cpu", torch.bfloat16):
            made += draw_pictures(
                base, unet, vae, part, text[-1:], size=pictures.SIZE_PX, seeds=seeds, guidance=4.0, device="cpu"
            )
    return made


if __name__ == "__main__":
    main()
