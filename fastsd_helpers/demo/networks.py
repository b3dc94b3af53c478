"""The demo's untrained networks: Stable Diffusion 1.5's blocks and tensor names at small widths, and its tokenizer.

Every name, level and layer count is that of SD 1.5 (12 text layers, four levels of two blocks), so that whatever
works on the demo works on the full-size model. Widths: U-Net and VAE 64-96-64-64, text encoder 96. GroupNorm has 32
groups as in the original code, so 64 is the smallest width at which a group still sees more than one channel: with
one, the norm would erase each channel's mean, and with it plain backgrounds. The second level is wider because shortcut
convolutions stand where the width changes, and SD 1.5 has them at its second and third level and not at its fourth.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.demo.pictures import SIZE_PX, all_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

__all__ = [
    "TEXT_WIDTH",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer_files",
    "build_unet",
    "build_vae",
    "learn_merges",
]

TEXT_WIDTH = 96
_WIDTHS = (64, 96, 64, 64)


def build_unet() -> "UNet2DConditionModel":
    """A narrow SD 1.5 U-Net with random weights; latents are float32 [batch, 4, 16, 16]."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE_PX // 8,
        block_out_channels=_WIDTHS,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # the number of heads, by its historical name
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def build_vae() -> "AutoencoderKL":
    """A narrow SD 1.5 VAE with random weights: [batch, 3, h, w] in -1..1 to [batch, 4, h/8, w/8]."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=_WIDTHS,
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=SIZE_PX,
        scaling_factor=0.18215,
    )


def build_text_encoder(vocabulary_size: int) -> "CLIPTextModel":
    """A CLIP text encoder of 12 layers and width 96 with random weights; at most 77 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=12,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )


def build_scheduler() -> "DDIMScheduler":
    """SD 1.5's noise schedule; sampling starts at the noisiest step, which a small image needs for its background."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word.

    Source: Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1.
    """
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    index = 0
    while index < len(parts):
        if parts[index : index + 2] == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(parts[index])
            index += 1
    return tuple(merged)


def build_tokenizer_files(folder: Path) -> int:
    """Write a CLIP tokenizer for the demo's captions; returns the size of its vocabulary.

    Its first 512 tokens are the single bytes (inside and at the end of a word), so any text at all has tokens.
    """
    from transformers.models.clip import tokenization_clip

    words = Counter(word.strip(",") for scene in all_scenes() for word in scene.caption.split())
    words.update({"of": 1, "photo": 1, "picture": 1, ",": 1})
    merges = learn_merges(words)
    letters = list(_byte_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = tokenization_clip.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    return len(tokens)


def _byte_letters() -> dict[int, str]:
    """Byte -> printable letter, as in GPT-2's and CLIP's vocabularies: bytes without a glyph move to 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters
