"""Make a full-size SD 1.5 Diffusers folder with random weights, or export one and compare it with the recorded list.

For trying the whole pipeline at true size without downloading a model: the weights mean nothing, everything else is
as in SD 1.5. It takes 4.3 GB of disk in fp32, half of that in fp16, and as much again for the exported file.

    python scripts/full_size_export.py --make FOLDER [--dtype fp16]
    python scripts/full_size_export.py --export FOLDER FILE.safetensors [--dtype fp16] [--verify]
"""

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "sd15.json.gz"
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def main() -> int:
    """Make or export; 0 when the exported file has exactly the original's names and shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--make", type=Path, metavar="FOLDER", help="write the model to this new folder")
    action.add_argument("--export", type=Path, nargs=2, metavar=("FOLDER", "FILE"), help="convert and check")
    parser.add_argument("--dtype", choices=("keep", "fp32", "fp16", "bf16"), default="keep", help="number format")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--verify", action="store_true", help="read the exported file back, tensor by tensor")
    options = parser.parse_args()
    if options.make:
        make_folder(options.make, options.dtype, options.seed)
        return 0
    return export(*options.export, dtype=options.dtype, verify=options.verify)


def make_folder(folder: Path, dtype: str, seed: int) -> None:
    """Write a whole pipeline folder, one part in memory at a time."""
    import diffusers
    import torch
    import transformers

    folder.mkdir(parents=True)
    formats = {"keep": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    builders = {
        "unet": lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": lambda: diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        "text_encoder": lambda: transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
            )
        ),
    }
    for part, build in builders.items():
        torch.manual_seed(seed)
        build().to(formats[dtype]).save_pretrained(folder / part)
        print(f"made {folder / part}")
    diffusers.DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    make_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def make_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer without merges: every byte is a token, so that any prompt can be read."""
    # CLIP spells a byte as itself where that is a visible character, and as one from 256 upwards elsewhere.
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [chr(256 + place) for place in range(256 - len(visible))]
    letters = [*(chr(code) for code in visible), *hidden]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab: dict[str, Any] = {word: place for place, word in enumerate(words)}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def export(folder: Path, file: Path, *, dtype: str, verify: bool) -> int:
    """Convert, compare names and shapes with the recorded list, and print time and memory."""
    from safetensors import safe_open

    from fastsd_helpers import checkpoints
    from fastsd_helpers.device import peak_memory_bytes

    import torch  # isort: skip  # counted as the memory that was there before

    before = peak_memory_bytes()
    started = time.monotonic()
    written = checkpoints.convert(folder, file, dtype=dtype, verify=verify)
    seconds = time.monotonic() - started
    recorded = json.loads(gzip.decompress(REFERENCE.read_bytes()))
    wanted = {name: shape for name, shape in recorded["tensors"].items() if recorded["class"][name] == "required"}
    peak = peak_memory_bytes()
    with safe_open(file, "pt") as stored:
        found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    result = {
        "path": str(file.absolute()),
        "sha256": written.sha256,
        "bytes": written.bytes,
        "tensors": written.tensors,
        "verified": verify,
        "equals_reference": found == wanted,
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(peak / 1e6),
        "memory_before_mb": round(before / 1e6),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    return 0 if found == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
