"""Small real models of each family that can be trained, and sessions to train them in, for tests of the engine."""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_models import SMALL, assemble, build_parts

FAMILIES = ("sd15", "sd21-512", "sd21-768")  # those with one text encoder


def build_base(folder: Path, key: str = "sd15", *, seed: int = 7) -> Path:
    """A Diffusers folder with random weights: the real classes and SD's own block layout, at small widths.

    sd21-512 and sd21-768 differ from sd15 as the published models do: linear projections, heads per level, gelu and
    23 layers in the text encoder, and for 768 the scheduler's prediction type.
    """
    import diffusers
    import torch
    import transformers

    torch.manual_seed(seed)
    if key.startswith("sdxl"):
        return _build_sdxl(folder, velocity=key.startswith("sdxl-v"), short=key.endswith("short"))
    parts = build_parts(SMALL)
    if key != "sd15":
        parts["unet"] = diffusers.UNet2DConditionModel(
            **{**SMALL["unet"], "attention_head_dim": (1, 2, 4, 4)},
            sample_size=8,
            use_linear_projection=True,
            upcast_attention=key == "sd21-768",
        )
        text = {**SMALL["text"], "hidden_act": "gelu", "num_hidden_layers": 23, "projection_dim": 16}
        size = text["vocab_size"]
        parts["text_encoder"] = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(bos_token_id=size - 2, eos_token_id=size - 1, **text)
        )
    words = folder.with_name(f"{folder.name}-words")
    predicts = "v_prediction" if key == "sd21-768" else "epsilon"
    pipe = assemble(parts, words, SMALL["text"]["vocab_size"], prediction_type=predicts)
    pipe.save_pretrained(folder)
    return folder


def _build_sdxl(folder: Path, *, velocity: bool, short: bool) -> Path:
    """SDXL's own block layout and depths, two text encoders with 12 and 32 layers, at small widths.

    A short one has a layer or two everywhere: quick, but no file has that shape.
    """
    import diffusers
    import transformers
    from tiny_models import make_tokenizer

    size = SMALL["text"]["vocab_size"]
    text = {**SMALL["text"], "bos_token_id": size - 2, "eos_token_id": size - 1}
    # Widths that differ, so that what is exchanged is noticed.
    other = {**text, "hidden_size": 24, "intermediate_size": 48, "hidden_act": "gelu", "projection_dim": 24}
    layers = (3, 4) if short else (12, 32)
    tokenizers = [make_tokenizer(folder.with_name(f"{folder.name}-words-{place}"), size) for place in (1, 2)]
    tokenizers[1].pad_token = "!"
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if velocity:
        settings |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
            **SMALL["vae"],
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(num_hidden_layers=layers[0], **text)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(num_hidden_layers=layers[1], **other)
        ),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 1] if short else [1, 2, 10],
            cross_attention_dim=16 + 24,
            attention_head_dim=[1, 2, 4],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**settings),
    ).save_pretrained(folder)
    return folder


def make_session(folder: Path, *, names: tuple[str, ...] = ("zib robot",), photos: int = 3, held_out: int = 1) -> Any:
    """A session with prepared 64-pixel images of one subject per name."""
    import demo_pictures as pictures
    import numpy as np

    from fastsd_helpers.dreambooth import PrepareConfig, prepare
    from fastsd_helpers.sessions import Session

    generator = np.random.default_rng(0)
    for part, count in (("train", photos), ("held-out", held_out)):
        (folder / part).mkdir(parents=True)
        for name in names:
            for index in range(count):
                place = list(pictures.PLACES)[index % len(pictures.PLACES)]
                background = list(pictures.BACKGROUNDS)[(index + count) % len(pictures.BACKGROUNDS)]
                path = folder / part / f"{name} ({index + 1}).png"
                pictures.draw_subject("robot", place, background, generator).save(path)
    session = Session.create("robot", root=folder / "sessions")
    judged = {"held_out": str(folder / "held-out")} if held_out else {}
    prepare(PrepareConfig(images=str(folder / "train"), size=64, **judged), session)
    return session


def config_for(base: Path, **values: Any) -> Any:
    """Few steps, large enough that a lost or different one cannot round to the same weights."""
    from fastsd_helpers.dreambooth import DreamBoothConfig

    few = {"resolution": 64, "batch_size": 1, "sample_every": 0, "save_every": 0, "precision": "fp32"}
    few |= {"unet_steps": 3, "text_encoder_steps": 3, "unet_lr": 1e-3, "text_encoder_lr": 1e-3}
    return DreamBoothConfig(base_model=str(base), **{**few, **values})


def train_again(session: Path, settings: Mapping[str, str]) -> Path:
    """The file of the same training of a session, with the same images, that nobody stopped; done in this process.

    Args:
        session: its folder; the copy that is trained lies beside its root.
        settings: as a form names them, with blanks.
    """
    import shutil

    from fastsd_helpers.cli import main

    again = shutil.copytree(session, session.parents[1] / "again" / session.name)
    shutil.rmtree(again / "exports")
    flags = [part for name, value in settings.items() for part in (f"--{name.replace(' ', '-')}", value)]
    assert main(["dreambooth", "train", again.name, "--root", str(again.parent), *flags, "--restart"]) == 0
    (made,) = (again / "exports").glob("*.safetensors")
    return made


def draw_quickly(monkeypatch: Any, *, blank: bool = True) -> None:
    """Blank images before and after, one denoising step for others, and no loss plot: none of it goes into a weight.

    Args:
        monkeypatch: what undoes it.
        blank: without it, the images before and after have one denoising step too.
    """
    from PIL import Image

    from fastsd_helpers.dreambooth.prior import class_images
    from fastsd_helpers.dreambooth.results import finishing
    from fastsd_helpers.dreambooth.running import engine
    from fastsd_helpers.dreambooth.training import sampling

    def no_plot(history: Any, held_out: Any, path: Path, *, label: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"plot")
        return path

    monkeypatch.setattr(engine, "plot_losses", no_plot)
    monkeypatch.setattr(finishing, "plot_losses", no_plot)
    draw = sampling.draw_pictures
    for module in (finishing, sampling):
        monkeypatch.setattr(module, "draw_pictures", lambda *args, **options: draw(*args, **options | {"steps": 1}))
    if blank:
        monkeypatch.setattr(
            finishing, "draw_with", lambda _context, _vae, asked, **_: [Image.new("RGB", (64, 64))] * len(asked)
        )
    monkeypatch.setattr(class_images, "_STEPS", 1)


def learned(session: Any, role: str | None = None) -> dict[str, Any]:
    """Every tensor of the session's newest generation, as role/name."""
    from fastsd_helpers.dreambooth.resume.generation import list_generations, read_generation

    run = str(session.record.get("run", 1))
    names = list_generations(session.checkpoints)
    newest = next(
        found for found in (read_generation(session.checkpoints, name) for name in names) if found.timeline == run
    )
    roles = [role] if role else [each for each in newest.roles if each != "history"]
    return {f"{each}/{name}": tensor for each in roles for name, tensor in newest.load(each).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of tensors have the same names and bits."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_at(stage: str, step: int) -> Callable[[Any], None]:
    """A report function that stops the run after a step, as `kill` does."""

    def report(progress: Any) -> None:
        if (progress.stage, progress.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def train_in_pieces(config: Any, session: Any, moments: list[tuple[str, int]], **options: Any) -> Any:
    """Train, stopped after each of the moments and gone on with; returns the last call's result."""
    from fastsd_helpers.dreambooth import train
    from fastsd_helpers.errors import Interrupted

    for moment in moments:
        with contextlib.suppress(Interrupted):
            train(config, session, report=stop_at(*moment), **options)
            raise AssertionError(f"was not stopped at {moment}")
        options.pop("restart", None)
    return train(config, session, **options)
