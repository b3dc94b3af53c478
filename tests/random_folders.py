"""Random Diffusers folders of real classes, converted to another dtype and loaded with diffusers, both times.

As a script: `python tests/random_folders.py 40 PLACE` compares so many and says in what they differed.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

from tiny_models import SMALL, build_parts, make_tokenizer

FORMS = ("file", "shards", "bin", "variant", "sharded variant", "both")


def build_all():
    """The parts of a pipeline, optional ones too: name -> real object."""
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "projection_dim": 8}  # fmt: skip
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20, "projection_dim": 8}  # fmt: skip
    checker = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return {
        **build_parts(SMALL),
        "safety_checker": StableDiffusionSafetyChecker(checker),
        "image_encoder": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)),
        "controlnet": diffusers.ControlNetModel(
            block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"), norm_num_groups=4,
            cross_attention_dim=8, attention_head_dim=2, conditioning_embedding_out_channels=(8, 8),
        ),
    }  # fmt: skip


def make(seed, models, place):
    """Write one random folder; returns what to convert, the variant that diffusers must be told, and a description."""
    import diffusers
    import torch
    import transformers

    choose = random.Random(seed)
    root = place / "real"
    with_variants = choose.random() < 0.4
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    said = []
    for part, model in models.items():
        if part in ("safety_checker", "image_encoder", "controlnet") and choose.random() < 0.5:
            continue
        form = choose.choice(FORMS if with_variants else FORMS[:3])
        dtype = choose.choice(["float32", "float16", "bfloat16"])
        said.append(f"{part} {form} {dtype}")
        model = model.to(getattr(torch, dtype))
        size = {"max_shard_size": "40KB"} if "shard" in form else {}
        if form in ("variant", "sharded variant"):
            model.save_pretrained(root / part, variant="fp16", **size)
        elif form == "bin":
            model.save_pretrained(root / part)
            (file,) = (root / part).glob("*.safetensors")
            stem = "pytorch_model" if file.stem == "model" else file.stem
            file.unlink()
            torch.save(model.state_dict(), root / part / f"{stem}.bin")
        else:
            model.save_pretrained(root / part, **size)
            if form == "both":
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(2.0)  # a variant is another model: which one was taken shows
                model.save_pretrained(root / part, variant="fp16")
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(0.5)
        if part != "controlnet":
            library = "diffusers" if isinstance(model, diffusers.ModelMixin) else "transformers"
            library = "stable_diffusion" if part == "safety_checker" else library
            index[part] = [library, type(model).__name__]
    make_tokenizer(root / "tokenizer", SMALL["text"]["vocab_size"])
    diffusers.DDIMScheduler().save_pretrained(root / "scheduler")
    transformers.CLIPImageProcessor(crop_size=8, size=8).save_pretrained(root / "feature_extractor")
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": index.get("safety_checker", [None, None]),
        "image_encoder": index.get("image_encoder", [None, None]),
    }
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "README.md").write_text("words")
    if choose.random() < 0.3:
        (root / "unet" / "flax_model.msgpack").write_bytes(b"flax")
    lone = any(_only_variant(root / part) for part in index if isinstance(index[part], list))
    source = _linked(root, choose.choice(["plain", "parts", "cache", "files"]), place, said)
    return source, "fp16" if lone else None, ", ".join(said)


def _only_variant(folder):
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(names) and all("fp16" in name for name in names)


def _linked(root, links, place, said):
    said.append(f"links: {links}")
    if links == "parts":
        (place / "elsewhere").mkdir()
        shutil.move(root / "vae", place / "elsewhere" / "vae")
        (root / "vae").symlink_to("../elsewhere/vae")
        (root / "unet").rename(place / "elsewhere" / "unet 2")
        (root / "unet").symlink_to(place / "elsewhere" / "unet 2")
    elif links in ("cache", "files"):
        cache = place / ("models--a--b" if links == "cache" else "a b")
        snapshot = cache / "snapshots" / "abc" if links == "cache" else cache
        (place / "blobs" if links == "files" else cache / "blobs").mkdir(parents=True)
        blobs = next(path for path in (place / "blobs", cache / "blobs") if path.is_dir())
        for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
            link = snapshot / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, blobs / f"{number:040d}")
            link.symlink_to(os.path.relpath(blobs / f"{number:040d}", link.parent))
        if links == "cache":
            (cache / "refs").mkdir()
            (cache / "refs" / "main").write_text("abc")
        return cache
    return root


def load(folder, variant):
    """Every tensor of every part, as diffusers loads it: part -> name -> float32."""
    import diffusers
    import torch

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant, torch_dtype=torch.float32)
    found = {name: part.state_dict() for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if (folder / "controlnet").is_dir():
        only = _only_variant(folder / "controlnet")
        control = diffusers.ControlNetModel.from_pretrained(folder / "controlnet", variant="fp16" if only else None)
        found["controlnet"] = control.float().state_dict()
    return found


def differences(seed, models, place):
    """What differs between a random folder, rounded, and its converted copy, as diffusers loads both."""
    import torch

    from fastsd_helpers import checkpoints

    source, variant, said = make(seed, models, place)
    dtype = random.Random(-seed).choice(["fp16", "bf16", "fp32"])
    checkpoints.convert(source, place / "copy", dtype=dtype, verify=seed % 2 == 0)
    folder = source / "snapshots" / "abc" if (source / "snapshots").is_dir() else source
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    before, after = load(folder, variant), load(place / "copy", variant)
    found = [] if before.keys() == after.keys() else [f"parts {sorted(before)} and {sorted(after)}"]
    for part, tensors in before.items():
        for name, tensor in tensors.items():
            wanted = tensor.to(torch_dtype).float() if tensor.is_floating_point() else tensor
            if not torch.equal(after.get(part, {}).get(name, torch.empty(0)), wanted):
                found.append(f"{part}/{name}")
    for path in sorted(folder.rglob("*.json")) + sorted(folder.rglob("*.txt")):
        beside = place / "copy" / path.relative_to(folder)
        if ".index." not in path.name and (not beside.is_file() or beside.read_bytes() != path.read_bytes()):
            found.append(str(path.relative_to(folder)))
    return [f"{dtype}; {said}: {difference}" for difference in found]


if __name__ == "__main__":
    count, where = int(sys.argv[1]), Path(sys.argv[2])
    parts, bad = build_all(), 0
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    for number in range(count):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        told = differences(number, parts, where)
        bad += bool(told)
        sys.stdout.write(f"{number} {told[:3] or 'the same'}\n")
    shutil.rmtree(where, ignore_errors=True)
    sys.stdout.write(f"{count} folders, {bad} with differences\n")
    sys.exit(bool(bad))
