"""Take a full-size SDXL model with random weights through everything: prepare, train a LoRA, kill, resume, load.

    python scripts/full_size_sdxl.py WORK_FOLDER [--images DIR] [--resolution 512] [--model sixteenth] [--write]

It needs about 12 GB of memory and 10 GB of disk in WORK_FOLDER. The weights mean nothing; names, shapes, bytes and
times are those of the real model. The run is killed (SIGKILL) right after the second step and before it is saved, so
the resumed run takes that step again. At last diffusers loads the LoRA file into its own pipeline, and the U-Net is
called with it and without it. --write records the figures in benchmarks/results/full_size_sdxl.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

from full_size_run import run

from fastsd_helpers.bench.dreambooth_models import make_model
from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.device import describe_device

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "full_size_sdxl.md"
SESSION = "full-size-sdxl"


def main() -> int:
    """Run every phase; 0 when diffusers loaded as many layers as the file has, and they change what the U-Net says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the session and the results")
    parser.add_argument("--images", type=Path, default=SUBJECTS_FOLDER / "robot", help="photos to train on")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--model", choices=("sixteenth", "quarter", "sdxl"), default="sdxl", help="widths of the model")
    parser.add_argument("--write", action="store_true", help=f"record the figures in {RESULTS.name}")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the last phase, a process of its own
    options = parser.parse_args()
    base, root = options.work / f"{options.model}-random", options.work / "sessions"
    if options.load:
        return load(base, options.load)
    if not (base / "model_index.json").exists():
        make_half(options.model, base)
    side = str(options.resolution)
    train = ["train", SESSION, "--base-model", str(base), "--resolution", side, "--method", "lora"]
    train += ["--lora-targets", "all linears", "--text-encoder-steps", "0", "--unet-steps", "2", "--save-every", "1"]
    train += ["--precision", "bf16", "--sample-every", "0", "--batch-size", "1", "--json"]
    phases = [
        run("new", ["new", SESSION], root),
        run("prepare", ["prepare", SESSION, "--images", str(options.images), "--size", side], root),
        run("train, killed after step 2", train, root, fault="step.unet:2"),
        run("train again: resume, finish, export", train, root),
    ]
    last = json.loads(phases[-1].lines[-1]) if phases[-1].status == 0 else {}
    loaded = {}
    if last:
        command = [sys.executable, __file__, str(options.work), "--model", options.model, "--load", last["path"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        loaded = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    going_on = [line for line in phases[-1].lines if line.startswith("Resuming")]
    rows = "\n".join(
        f"| {phase.name} | {phase.seconds:.0f} | {phase.peak_gb:.1f} | {phase.disk_gb:.2f} | {phase.status} |"
        for phase in phases
    )
    good = bool(loaded) and loaded["layers"] == loaded["in_file"] and loaded["change"] > 0
    text = (
        "# A LoRA of a full-size SDXL model, random weights, from photos to file\n\n"
        f"`python scripts/full_size_sdxl.py WORK --resolution {side} --write`, {date.today()}, "
        f"{describe_device().name}, {os.cpu_count()} cores, {platform.machine()}.\n\n"
        "| command | seconds | peak memory, GB | session on disk, GB | exit status |\n|---|---:|---:|---:|---:|\n"
        f"{rows}\n\n"
        f"LoRA of all linears, rank 16, bf16, two steps, a checkpoint after each; model: {options.model}.\n"
        f"It went on with: {' '.join(going_on) or 'nothing said'}\n\n"
        + (
            f"diffusers' StableDiffusionXLPipeline.load_lora_weights: {loaded['layers']} of {loaded['in_file']} layers "
            f"of the file, {loaded['values']:,} values; what the U-Net says changes by {loaded['change']:.2g} (largest "
            f"difference); peak memory {loaded['peak_gb']:.1f} GB.\n"
            if loaded
            else "diffusers did NOT load the file.\n"
        )
    )
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if good else 1


def make_half(model: str, base: Path) -> None:
    """The model with its weights in float16, as it is published: half the memory and half the disk."""
    import torch

    torch.set_default_dtype(torch.float16)
    try:
        make_model("sdxl", model, base)
    finally:
        torch.set_default_dtype(torch.float32)


def load(base: Path, file: Path) -> int:
    """Load the LoRA with diffusers and call the U-Net with it and without it; prints JSON."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        in_file = sum(name.endswith("lora_down.weight") for name in stored.keys())  # noqa: SIM118
        values = sum(stored.get_tensor(name).numel() for name in stored.keys() if "lora_" in name.split(".", 1)[1])  # noqa: SIM118
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
    pipeline.load_lora_weights(file)
    layers = sum(hasattr(module, "lora_A") and len(module.lora_A) > 0 for module in pipeline.unet.modules())
    unet, config = pipeline.unet, pipeline.unet.config
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    told = {"time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]]).bfloat16(), "text_embeds": noise(1, pooled)}
    given = (noise(1, 4, 16, 16), torch.tensor([500]), noise(1, 77, config.cross_attention_dim))
    with torch.no_grad():
        first = unet(*given, added_cond_kwargs=told).sample.float()
        pipeline.disable_lora()
        second = unet(*given, added_cond_kwargs=told).sample.float()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    change = (first - second).abs().max().item()
    print(json.dumps({"layers": layers, "in_file": in_file, "values": values, "change": change, "peak_gb": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
