"""Real model classes of the SD 1.5 layout at small or full width with random weights, and the recorded key lists.

The small widths change where those of SD 1.5 change, so that every tensor of the original has its counterpart. TINY
are the widths of the recorded list sd15.tiny; SMALL makes files of 4 MB, for tests that write many.
"""

import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
PARTS = ("unet", "vae", "text_encoder")
SMALL = {
    "unet": {
        "block_out_channels": (8, 16, 32, 32),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8},
    "text": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
}
TINY = {
    "unet": {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32, "attention_head_dim": 4},
    "vae": {"block_out_channels": (32, 64, 128, 128)},
    "text": {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4},
}
FULL = {
    "unet": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {"block_out_channels": (128, 256, 512, 512)},
    "text": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}


def build_parts(sizes):
    """The real classes of SD 1.5 with random weights."""
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(sample_size=8, **sizes["unet"])
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        **sizes["vae"],
    )
    config = transformers.CLIPTextConfig(
        num_hidden_layers=12,
        bos_token_id=sizes["text"]["vocab_size"] - 2,
        eos_token_id=sizes["text"]["vocab_size"] - 1,
        **sizes["text"],
    )
    return {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(config)}


def make_tokenizer(folder, vocab_size):
    """A byte-level CLIP tokenizer whose ids fit the vocabulary; it splits every word into letters."""
    import transformers

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: place for place, word in enumerate(words)}
    vocab |= {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return transformers.CLIPTokenizer.from_pretrained(folder)


def assemble(parts, words, vocab_size, **scheduler):
    """A whole Stable Diffusion pipeline of parts; its tokenizer's files are written to the folder `words`."""
    import diffusers

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=make_tokenizer(words, vocab_size),
        scheduler=diffusers.DDIMScheduler(**settings, set_alpha_to_one=False, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_pipeline(sizes, words, *, seed):
    """A whole pipeline with random weights."""
    import torch

    torch.manual_seed(seed)
    return assemble(build_parts(sizes), words, sizes["text"]["vocab_size"])


def reference(name):
    """The recorded key list of the original file: required names -> shapes."""
    recorded = json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in recorded["tensors"].items() if recorded["class"][key] == "required"}


def load_file(path):
    """Read a file with the safetensors library itself, not with ours; into memory, so that the file may be replaced."""
    from safetensors.torch import load_file as load

    return {name: tensor.clone() for name, tensor in load(path).items()}


def same_bits(one, other):
    """Whether two tensors have one type, one shape and the same values."""
    import torch

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
