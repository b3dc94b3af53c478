"""SDXL against oracles: diffusers' pipeline, a plain training loop, and images that hold their own coordinates."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import numpy as np  # noqa: E402
from closeness import assert_close_to  # noqa: E402
from dreambooth_runs import (  # noqa: E402
    build_base,
    config_for,
    draw_quickly,
    learned,
    make_session,
    same,
    train_in_pieces,
)
from PIL import Image  # noqa: E402

from fastsd_helpers.device import Device  # noqa: E402
from fastsd_helpers.dreambooth import PrepareConfig, export, plan, prepare, train  # noqa: E402
from fastsd_helpers.dreambooth.dataset.prepared import Dataset, PreparedImage, load_dataset  # noqa: E402
from fastsd_helpers.dreambooth.families import Framing, cover, family_named  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig  # noqa: E402
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings  # noqa: E402
from fastsd_helpers.dreambooth.training.base_model import BaseModel  # noqa: E402
from fastsd_helpers.dreambooth.training.cache import Latents, SortedLatents, encode_images, encode_prompts  # noqa: E402
from fastsd_helpers.dreambooth.training.lora import count_lora, write_lora_file  # noqa: E402
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage  # noqa: E402
from fastsd_helpers.errors import SettingsError  # noqa: E402
from fastsd_helpers.registry import find_model, spec_of  # noqa: E402
from fastsd_helpers.sessions import Session  # noqa: E402

CPU = Device(kind="cpu", name="test", memory_bytes=2**33, has_bf16=False)
LONG = " ".join(f"w{number}" for number in range(60))  # far over 75 tokens in the tests' tokenizer


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("xl")
    return {key: build_base(folder / key, key) for key in ("sdxl", "sdxl-v", "sdxl-short", "sdxl-v-short")}


@pytest.fixture(scope="module")
def pipeline(bases):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(bases["sdxl-short"])


def open_base(folder: Path) -> BaseModel:
    return BaseModel(str(folder), folder, spec_of(str(folder), folder))


def open_studio(base: Path, **values) -> TrainingContext:
    """A context with two random photos in its caches, each with numbers of its own."""
    config = config_for(base, lora_rank=4, lora_alpha=6.0, **values)
    model = open_base(base).predicting(config.prediction_type, config.zsnr)
    config, _ = resolve_settings(config, model.spec, CPU)
    context = TrainingContext(model, config, CPU)
    generator = torch.Generator().manual_seed(3)
    mean, std = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2))
    numbers = torch.tensor([[1365.0, 2047, 0, 257, 64, 64], [99, 130, 7, 0, 64, 64]])
    context.latents = SortedLatents.one(Latents(mean, std / 10, None, numbers))
    context.prompts, context.prompt_of = ["a zib dog", "a zib dog runs"], [0, 1]
    return context


# ------------------------------------------------------------------------------------------------------ conditions


@pytest.mark.parametrize("prompt", ["", "a zib dog", "a zib dog runs, in oil!"])
@pytest.mark.numeric
def test_a_prompt_is_encoded_as_diffusers_pipeline_encodes_it(bases, pipeline, prompt) -> None:
    base = open_base(bases["sdxl-short"])
    tokenizers = base.load_tokenizers()
    ours = encode_prompts(base.family, base.load_encoders(), tokenizers, [prompt], device="cpu")
    sequence, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    assert_close_to(ours.sequence, sequence.detach(), of_largest=1e-6)
    assert_close_to(ours.pooled, pooled.detach(), of_largest=1e-6)
    ids = base.family.tokenize(tokenizers, [prompt])
    assert [ids[part][0, 0, -1].item() for part in ids] == [299, tokenizers["text_encoder_2"].pad_token_id]
    assert tokenizers["text_encoder_2"].pad_token == "!"


@pytest.mark.numeric
def test_a_long_prompt_is_read_in_chunks_and_a_short_one_beside_it_goes_on_with_empty_ones(bases) -> None:
    base = open_base(bases["sdxl-short"])
    networks = base.load_encoders(), base.load_tokenizers()
    both = encode_prompts(base.family, *networks, [LONG, "a zib dog"], device="cpu")
    short, empty = (encode_prompts(base.family, *networks, [text], device="cpu") for text in ("a zib dog", ""))
    assert both.sequence.shape[1] > 77
    assert both.sequence.shape[1] % 77 == 0
    assert_close_to(both.sequence[1, :77], short.sequence[0], of_largest=1e-6)
    assert_close_to(both.sequence[1, 77:154], empty.sequence[0], of_largest=1e-6)
    assert_close_to(both.pooled[1], short.pooled[0], of_largest=1e-6)
    assert_close_to(empty.long_as(both).sequence[0, -77:], empty.sequence[0], of_largest=1e-6)
    assert not torch.allclose(both.sequence[0, 77:154], empty.sequence[0], atol=1e-3), "its end is read"
    cut = base.family.tokenize(networks[1], [f"{LONG} " * 9])["text_encoder"]
    assert cut.shape == (1, 3, 77)


def test_sizes_and_crop_are_those_of_the_pipeline_and_exact(bases, pipeline) -> None:
    theirs = pipeline._get_add_time_ids((1365, 2047), (257, 1023), (1024, 768), torch.float32, 24)
    framing = Framing((2047, 1365), (0, 0, 768, 1024))
    ours = family_named("sdxl").picture_numbers([framing], 768, 1024)
    assert ours.dtype == torch.float32
    assert ours[0, [0, 1, 4, 5]].tolist() == theirs[0, [0, 1, 4, 5]].tolist() == [1365, 2047, 1024, 768]
    assert theirs[0, 2:4].tolist() == [257, 1023]


def test_the_crop_is_read_back_from_images_that_hold_their_own_coordinates() -> None:
    draws = random.Random(7)
    for _ in range(200):
        width, height = draws.randint(90, 900), draws.randint(90, 900)
        target = (draws.choice((64, 96, 128)), draws.choice((64, 96, 128)))
        left, top, _, _, *_ = box = cover(width, height, target)
        framing = Framing.whole(width, height).part(box, width, height)
        scale = target[0] / (box[2] - box[0])
        across = Image.fromarray(np.tile(np.arange(width, dtype=np.float32) + 0.5, (height, 1)))
        down = Image.fromarray(np.tile(np.arange(height, dtype=np.float32)[:, None] + 0.5, (1, width)))
        cut = [np.asarray(each.resize(target, Image.Resampling.BILINEAR, box=box)) for each in (across, down)]
        middle = (target[1] // 2, target[0] // 2)
        read_left = cut[0][middle] * scale - middle[1] - 0.5
        read_top = cut[1][middle] * scale - middle[0] - 0.5
        original_h, original_w, crop_top, crop_left, target_h, target_w = framing.numbers(*target)
        assert (original_h, original_w, target_w, target_h) == (height, width, *target)
        assert abs(crop_left - read_left) <= 0.51
        assert abs(crop_top - read_top) <= 0.51
        assert min(left, top) < 1e-6, "as much as fits is kept"
        mirrored = framing.numbers(*target, mirrored=True)
        read_right = (width - cut[0][middle]) * scale - (target[0] - middle[1] - 0.5)
        assert abs(mirrored[3] - read_right) <= 1.02
        assert (*mirrored[:3], *mirrored[4:]) == (height, width, crop_top, target_h, target_w)
    assert Framing((1500, 1000), (250, 0, 1250, 1000)).numbers(1024, 1024) == (1000, 1500, 0, 256, 1024, 1024)


def test_prepared_photos_class_images_and_mirrored_ones_have_their_own_numbers(bases, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    for place, size in enumerate([(300, 200), (100, 180)]):
        noise = np.random.default_rng(place).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"zib dog ({place + 1}).png")
    boxes = {"zib dog (1).png": [90, 0, 290, 200], "zib dog (2).png": [0, 20, 100, 120]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    session = Session.create("dog", root=tmp_path / "sessions")
    prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64, boxes=str(tmp_path / "boxes.json")), session)
    images = load_dataset(session).train
    base = open_base(bases["sdxl-short"])
    latents = encode_images(base.family, base.load("vae"), images, (64, 64), device="cpu", flip=True)
    assert latents.numbers.tolist() == [[200, 300, 0, 29, 64, 64], [180, 100, 13, 0, 64, 64]]
    assert latents.mirrored.numbers.tolist() == [[200, 300, 0, 3, 64, 64], [180, 100, 13, 0, 64, 64]]
    generated = PreparedImage(images[0].path, "", "a dog")  # no photo that it was cut from
    plain = encode_images(base.family, base.load("vae"), (generated,), (64, 64), device="cpu")
    assert plain.numbers.tolist() == [[64, 64, 0, 0, 64, 64]]
    assert latents.numbers_of([1, 0], [False, True])[:, 3].tolist() == [0, 3]
    # As an earlier version prepared them: the box is all that is known.
    record = session.record["dataset"]
    for item in record["images"]:
        del item["photo_size"]
    assert load_dataset(session).train[0].framing == Framing.whole(200, 200)
    context = open_studio(bases["sdxl-short"])
    context.fill_caches(Dataset(images, images[1:]))
    assert context.held_out[0].pictures[:, 3].tolist() == [0.0] * 8
    assert context.held_out[0].pictures[:, 2].tolist() == [13.0] * 8


def test_in_every_bucket_an_image_is_told_with_what_is_cut_off_of_it_there(bases, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    for place, size in enumerate([(300, 200), (100, 180), (120, 120), (200, 60)]):
        noise = np.random.default_rng(place).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{place}.png")
    session = Session.create("dog", root=tmp_path / "sessions")
    prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64, crop="none"), session)
    context = open_studio(bases["sdxl-short"], resolutions="64,128", flip=True)
    context.fill_caches(load_dataset(session))
    told = zip(context.latents.buckets, context.latents.images, strict=True)
    found = {
        (image, *latents.mean.shape[2:]): (latents, row) for latents, images in told for row, image in enumerate(images)
    }
    shapes = {(0, 8, 8), (1, 8, 8), (2, 8, 8), (3, 8, 8), (0, 16, 16), (1, 24, 8), (2, 16, 16), (3, 8, 24)}
    assert set(found) == shapes
    for image, (width, height) in enumerate([(300, 200), (100, 180), (120, 120), (200, 60)]):
        for key in (key for key in found if key[0] == image):
            latents, row = found[key]
            own, mirrored = latents.numbers[row].tolist(), latents.mirrored.numbers[row].tolist()
            target = (key[1] * 8, key[2] * 8)
            scale = max(target[0] / height, target[1] / width)
            over = (round(height * scale) - target[0], round(width * scale) - target[1])
            assert own[:2] == mirrored[:2] == [height, width]
            assert tuple(own[4:]) == tuple(mirrored[4:]) == target
            assert abs(own[3] + mirrored[3] - over[1]) <= 1, "left of it and left of it mirrored: all that is cut off"
            assert own[2] == mirrored[2]
            assert 0 <= own[2] <= over[0] + 1


# ----------------------------------------------------------------------------------------------------- the objective


def plain_losses(context, stage: str) -> tuple[list[float], dict[str, "torch.Tensor"]]:
    """SDXL's step in diffusers' and peft's own classes with our draws: two losses, and the weights after one step."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, spec, ids = context.base.folder, context.base.spec, context.family.tokenize
    settings = {"prediction_type": spec.prediction_type, "rescale_betas_zero_snr": spec.zero_terminal_snr}
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **settings)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    one = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
    two = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2").requires_grad_(False)
    begun = {name: tensor.clone() for name, tensor in open_stage(stage, context, None).weights().items()}
    parameters = {}
    for start, part in [("", unet)] if stage == "unet" else [("text_encoder.", one), ("text_encoder_2.", two)]:
        names = {name.removesuffix(".lora_A.weight") for name in begun if name.startswith(start)}
        names = [f"(.*\\.)?{re.escape(name.removeprefix(start))}" for name in names if ".lora_" not in name]
        part.add_adapter(LoraConfig(r=4, lora_alpha=6.0, target_modules="|".join(names)))
        for name, parameter in part.named_parameters():
            if ".lora_" in name:
                plain = start + name.removeprefix("text_model.").replace(".default.", ".")
                parameter.data.copy_(begun[plain])
                parameters[plain] = parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-3, weight_decay=1e-2, fused=True)
    losses, words = [], ids(context.tokenizers, context.texts)
    for step in range(2):
        batch = context.draw_batch(stage, step, 0)
        # Text that nobody trains is encoded before, prompt by prompt; the last bits depend on that.
        rows = [[prompt] for prompt in batch.prompts] if stage == "unet" else [batch.prompts]
        firsts = [one(words["text_encoder"][row][:, 0], output_hidden_states=True) for row in rows]
        seconds = [two(words["text_encoder_2"][row][:, 0], output_hidden_states=True) for row in rows]
        hidden = [torch.cat([found.hidden_states[-2] for found in each]) for each in (firsts, seconds)]
        text = torch.cat(hidden, dim=-1)
        added = {"text_embeds": torch.cat([found.text_embeds for found in seconds]), "time_ids": batch.pictures}
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        found = unet(noisy, batch.timesteps, text, added_cond_kwargs=added).sample
        wanted = batch.noise
        if spec.prediction_type == "v_prediction":
            wanted = schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
        loss = torch.nn.functional.mse_loss(found, wanted)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return losses, after


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("key", "values", "stage"),
    [
        ("sdxl-short", {}, "unet"),
        ("sdxl-v-short", {"zsnr": False}, "unet"),
        ("sdxl-v-short", {}, "unet"),
        ("sdxl-short", {}, "text_encoder"),
    ],
)
def test_the_losses_of_two_steps_and_the_weights_after_one_are_a_plain_loops(bases, key, values, stage) -> None:
    context = open_studio(bases[key], batch_size=2, **values)
    assert (context.base.spec.prediction_type == "v_prediction") == ("-v" in key)
    assert context.base.spec.zero_terminal_snr == ("-v" in key and not values)
    losses, parameters = plain_losses(context, stage)
    job = open_stage(stage, context, None)
    found = [job.take_step(0, 1e-3)]
    ours = {name: tensor.clone() for name, tensor in job.weights().items()}
    found.append(job.take_step(1, 1e-3))
    assert_close_to(found, losses, of_largest=1e-6)
    assert ours.keys() == parameters.keys()
    assert [name for name, tensor in parameters.items() if not torch.equal(ours[name], tensor)] == []
    changed = sum(bool(tensor.any()) for name, tensor in ours.items() if ".lora_B." in name)
    # CLIP-L's last layer is not read: its six matrices have no gradient.
    assert changed == len(ours) // 2 - (6 if stage == "text_encoder" else 0)


def test_a_schedule_that_ends_in_pure_noise_has_no_signal_there_and_no_nan(bases) -> None:
    objective = open_studio(bases["sdxl-v-short"]).objective
    assert objective.schedule.alphas_cumprod[-1].item() == 0.0
    times = torch.arange(1000)
    weights = objective.weights(times, 5.0)
    assert torch.isfinite(weights).all()
    assert weights[-1] == 0
    noise = torch.randn(1, 4, 8, 8)
    assert torch.equal(objective.add_noise(torch.ones(1, 4, 8, 8), noise, times[-1:]), noise)
    assert torch.equal(objective.target(torch.ones(1, 4, 8, 8), noise, times[-1:]), -torch.ones(1, 4, 8, 8))
    begin = objective.schedule.alphas_cumprod[0]
    assert begin == pytest.approx(open_studio(bases["sdxl-short"]).objective.schedule.alphas_cumprod[0])
    sampler = open_base(bases["sdxl-v-short"]).load_sampler()
    sampler.set_timesteps(10)
    assert (type(sampler).__name__, sampler.timesteps[0].item()) == ("EulerDiscreteScheduler", 999)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_is_kept_in_the_precision_of_the_sums_and_the_lora_in_float32(bases, precision) -> None:
    context = open_studio(bases["sdxl-short"], precision=precision, gradient_checkpointing=True)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for stage in ("text_encoder", "unet"):
        job = open_stage(stage, context, None)
        kinds = {parameter.requires_grad: parameter.dtype for parameter in job.module.parameters()}
        assert kinds == {False: wanted, True: torch.float32}
        before = {name: tensor.clone() for name, tensor in job.weights().items()}
        assert job.take_step(0, 1e-3) > 0
        assert any(not torch.equal(tensor, before[name]) for name, tensor in job.weights().items())


def test_the_vae_computes_in_float32_within_half_precision(bases) -> None:
    base = open_base(bases["sdxl-short"])
    vae, latents = base.load("vae"), torch.randn(1, 4, 8, 8)
    alone = base.family.decode(vae, latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.family.decode(vae, latents), alone)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch, blank=False)  # with both text encoders
    return make_session(tmp_path)


def settings_for(base: Path, **values) -> DreamBoothConfig:
    own = {"lora_rank": 4, "lora_alpha": 6.0, "unet_lr": 1e-2, "text_encoder_lr": 1e-2}
    return config_for(base, **{**own, "unet_steps": 2, "text_encoder_steps": 2, **values})


@pytest.mark.numeric
def test_a_run_that_is_stopped_ends_with_the_same_bits_and_diffusers_applies_its_file(bases, session, tmp_path) -> None:
    from diffusers import StableDiffusionXLPipeline

    settings = settings_for(bases["sdxl-v"], min_snr=5.0, flip=True, text_encoder_steps=1, lora_targets="attention")
    whole = train(settings, session)
    tensors = learned(session)
    train_in_pieces(settings, session, [("unet", 1)], restart=True)
    assert same(learned(session), tensors)
    path = export(ExportConfig(format="lora", dtype="fp32", out=str(tmp_path / "x.safetensors")), session).path
    assert whole.path.name == "robot-lora.safetensors"

    base = open_base(bases["sdxl-v"])
    pipe = StableDiffusionXLPipeline.from_pretrained(bases["sdxl-v"])
    plain = pipe.encode_prompt("a zib robot", device="cpu", do_classifier_free_guidance=False)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = pipe.encode_prompt("a zib robot", device="cpu", do_classifier_free_guidance=False)
    config, _ = resolve_settings(settings, base.spec, CPU)
    context = TrainingContext(base, config, CPU)
    for stage in ("text_encoder", "unet"):
        context.trained[stage] = {
            name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{stage}/")
        }
    ours = context.encode_prompts(["a zib robot"])
    assert_close_to(ours.sequence, theirs[0].detach(), of_largest=1e-6)
    assert_close_to(ours.pooled, theirs[2].detach(), of_largest=1e-6)
    assert (theirs[0] - plain[0]).abs().max() > 1e-4
    noisy, numbers = torch.randn(1, 4, 8, 8), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        asked = noisy, torch.tensor([500]), ours, numbers
        mine = base.family.predict(context.load_denoiser(), *asked)
        yours = base.family.predict(pipe.unet, *asked)
        before = base.family.predict(base.load("unet"), *asked)
    assert_close_to(mine, yours, of_largest=1e-6)
    assert (yours - before).abs().max() > 1e-5

    merged = export(ExportConfig(dtype="fp32", out=str(tmp_path / "whole.safetensors")), session).path
    with merged.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert "v_pred" in header
    assert "ztsnr" in header


def test_what_is_left_alone_is_a_lora(bases, session) -> None:
    base = {"base_model": str(bases["sdxl"]), "precision": "fp32", "resolution": 64}
    made = plan(DreamBoothConfig(**base), session)
    config = made.config
    assert (config.method, config.lora_targets, config.text_encoder_steps) == ("lora", "all linears", 0)
    assert (config.lr_scheduler, config.unet_lr, config.lora_alpha) == ("constant_with_warmup", 1e-4, 16.0)
    rehearsed = plan(DreamBoothConfig(**base), session, rehearse=True)
    assert rehearsed.memory_bytes.keys() == {"unet"}


@pytest.mark.parametrize("answer", ["epsilon", "v_prediction"])
def test_a_model_that_does_not_say_what_it_predicts_is_asked_about(bases, session, tmp_path, answer) -> None:
    import shutil

    folder = tmp_path / "silent"
    shutil.copytree(bases["sdxl"], folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="whether the model predicts noise or velocity") as caught:
        plan(settings_for(folder), session)
    assert "--prediction-type v_prediction" in caught.value.hint
    assert plan(settings_for(folder, prediction_type=answer), session).config.prediction_type == answer


def test_a_model_that_says_something_else_than_at_the_start_is_refused_and_its_place_is_not_remembered(
    bases, session
) -> None:
    train(settings_for(bases["sdxl"], text_encoder_steps=0, unet_steps=1), session)
    # The same weights: only what their folder says of them is another thing.
    with pytest.raises(
        SettingsError, match=r"started with prediction_type epsilon, but .* says v_prediction"
    ) as caught:
        train(DreamBoothConfig(base_model=str(bases["sdxl-v"])), session)
    assert "--base-model" in caught.value.hint
    assert session.record["base_model"]["ref"] == str(bases["sdxl"])
    assert train(DreamBoothConfig(), session).first_step == 1, "left alone it is the run's own"


def test_velocity_is_never_trained_as_noise(bases, session) -> None:
    with pytest.raises(SettingsError, match=r"is epsilon, but .* says v_prediction") as caught:
        plan(settings_for(bases["sdxl-v"], prediction_type="epsilon"), session)
    assert "of a file, fastsd convert makes one" in caught.value.hint, "a single file has no scheduler_config.json"
    with pytest.raises(SettingsError, match="ends the noise schedule in pure noise"):
        plan(settings_for(bases["sdxl"], zsnr=True), session)
    assert plan(settings_for(bases["sdxl-v"]), session).config.zsnr is True


# ------------------------------------------------------------------------------------------------------- full size


def test_at_full_size_the_lora_has_kohyas_layers_and_values(tmp_path) -> None:
    from tiny_families import build_parts

    family, spec = family_named("sdxl"), find_model("sdxl")
    with torch.device("meta"):
        parts = build_parts("sdxl", "full")
    for targets, known in family.published.items():
        counts = {
            part: count_lora(family, parts[part], part, rank=16, targets=targets)
            for part in ("unet", "text_encoder", "text_encoder_2")
        }
        assert counts["unet"] == 16 * known.lora_unet
        assert counts["text_encoder"] + counts["text_encoder_2"] == 16 * known.lora_text_encoder
    assert counts["unet"] == 42_557_440
    trained = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        trained[part] = {}
        for name, layer in parts[part].named_modules():
            if family.takes_lora(part, name, "all linears"):
                plain = name.removeprefix("text_model.")
                # Of rank 1: names and shapes are looked at, and a file of 100 MB is not.
                trained[part][f"{plain}.lora_A.weight"] = torch.ones(1, layer.weight.shape[1])
                trained[part][f"{plain}.lora_B.weight"] = torch.ones(layer.weight.shape[0], 1)
    path = tmp_path / "full.safetensors"
    write_lora_file(path, trained, spec=replace(spec, prediction_type="epsilon"), alpha=1.0, px=1024)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    layers = [name.removesuffix(".alpha") for name in header if name.endswith(".alpha")]
    starts = {start: sum(name.startswith(start) for name in layers) for start in ("lora_unet", "lora_te1", "lora_te2")}
    assert starts == {"lora_unet": 722, "lora_te1": 72, "lora_te2": 192}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in layers
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in layers
    known = {name for part in (r"input_blocks_\d+_1", "middle_block_1", r"output_blocks_\d_1") for name in layers
             if re.match(f"lora_unet_{part}_", name)}  # fmt: skip
    assert len(known) == 722


def test_only_families_and_the_registry_know_a_family_by_name() -> None:
    import fastsd_helpers.dreambooth as package

    root = Path(package.__file__).parent
    names = re.compile(r"""["'](sd15|sd21|sdxl|flux)["']|StableDiffusion\d|AutoencoderKL|UNet2D""")
    found = [
        f"{path.relative_to(root)}: {match[0]}"
        for wing in ("training", "running", "results", "resume", "dataset")
        for path in sorted((root / wing).glob("*.py"))
        if (match := names.search(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "said"),
    [("sd_xl_turbo", True), ("juggernaut-Lightning-4steps.safetensors", True), ("my-lcm", True), ("lcmodel", False)],
)
def test_a_model_that_was_distilled_to_a_few_steps_is_said_by_its_name(name, said) -> None:
    from fastsd_helpers.dreambooth.training.beginning import _distilled_line

    assert bool(_distilled_line(f"/models/{name}")) is said


def test_sample_images_begin_with_the_words_of_quality_that_the_model_knows(bases) -> None:
    context = open_studio(bases["sdxl-short"])
    assert context.texts == context.prompts == [context.as_shown(prompt) for prompt in context.prompts]
    context.base = replace(context.base, spec=replace(context.base.spec, quality="score_9"))
    assert context.texts == [*context.prompts, "score_9, a zib dog", "score_9, a zib dog runs"]
    assert len(open_stage("unet", context, None).text) == 4
