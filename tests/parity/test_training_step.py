"""One training step of ours against diffusers' own: the same weights, latents, noise and timesteps, to 1e-5.

Reference: the step that diffusers' examples/dreambooth/train_dreambooth.py publishes, written here from its formula
with diffusers' scheduler (add_noise, get_velocity), diffusers' compute_snr, peft through diffusers' add_adapter, and
torch's AdamW; nothing of ours computes it. The min-SNR weights are the paper's (Hang et al. 2023, section 3.4).
"""

import copy
import functools
from pathlib import Path

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from closeness import assert_close_to  # noqa: E402
from dreambooth_runs import FAMILIES, build_base, config_for  # noqa: E402

from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage  # noqa: E402

require_installed("diffusers")

pytestmark = pytest.mark.numeric
STEPS = 2
LR = 1e-3


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {key: build_base(folder / key, key) for key in FAMILIES}


def open_studio(base: Path, **values):
    """A context with random latents in its caches: two photos, and two class images where the prior is on."""
    from fastsd_helpers.device import Device
    from fastsd_helpers.dreambooth.settings import resolve_settings
    from fastsd_helpers.dreambooth.training.base_model import BaseModel
    from fastsd_helpers.dreambooth.training.cache import Latents, SortedLatents

    model = BaseModel.fetch(str(base))
    device = Device(kind="cpu", name="test", memory_bytes=2**33, has_bf16=False)
    config, _ = resolve_settings(config_for(base, unet_lr=LR, text_encoder_lr=LR, **values), model.spec, device)
    context = TrainingContext(model, config, device)
    generator = torch.Generator().manual_seed(3)

    def latents(count: int) -> SortedLatents:
        shape = (count, 4, 8, 8)
        mean = torch.randn(shape, generator=generator)
        return SortedLatents.one(Latents(mean, torch.rand(shape, generator=generator) / 10))

    context.latents, context.prompts, context.prompt_of = latents(2), ["a zib dog", "a zib dog runs"], [0, 1]
    if config.class_prompts:
        context.class_latents, context.class_prompt_of = latents(2), [2, 2]
    return context


@functools.cache
def read_with_diffusers(folder: Path) -> tuple:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return (
        DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )


def reference_losses(context, stage: str, start: dict, *, prior_weight: float, gamma: float) -> list[float]:
    """Diffusers' step, with the draws of ours; `start` are the weights of a LoRA, and without any all are trained."""
    from diffusers.training_utils import compute_snr
    from peft import LoraConfig

    lora = bool(start)
    scheduler, unet, text_encoder, tokenizer = copy.deepcopy(read_with_diffusers(context.base.folder))
    texts = ["a zib dog", "a zib dog runs", "a dog"]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    trained = unet if stage == "unet" else text_encoder
    if lora:
        names = ["to_q", "to_k", "to_v", "to_out.0"] if stage == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        trained.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=names))
        for name, parameter in trained.named_parameters():
            if ".lora_" in name:
                parameter.data.copy_(start[name.removeprefix("text_model.").replace(".default.", ".")])
    parameters = [parameter for name, parameter in trained.named_parameters() if not lora or ".lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        batch = context.draw_batch(stage, step, 0)
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        hidden = text_encoder(ids[batch.prompts], return_dict=False)[0]
        prediction = unet(noisy, batch.timesteps, hidden, return_dict=False)[0]
        if scheduler.config.prediction_type == "epsilon":
            target = batch.noise
        else:
            target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        error = (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))
        if gamma:
            snr = compute_snr(scheduler, batch.timesteps)
            shift = 0 if scheduler.config.prediction_type == "epsilon" else 1
            error = error * torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + shift)
        if prior_weight:
            instance, prior = error.chunk(2)
            loss = instance.mean() + prior_weight * prior.mean()
        else:
            loss = error.mean()
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["text_encoder", "unet"])
@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.parametrize(
    ("prior", "gamma"),
    [(0.0, 0.0), (0.7, 5.0), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.7, 0.0), (0.0, 5.0)))],
)
def test_steps_have_the_losses_of_diffusers_own(bases, key, stage, method, prior, gamma) -> None:
    values = {"method": method, "batch_size": 2, "min_snr": gamma, "lora_rank": 4, "lora_alpha": 2.0}
    if prior:
        values |= {"class_prompt": "a dog", "prior_weight": prior}
    context = open_studio(bases[key], **values)
    job = open_stage(stage, context, None)
    start = {name: tensor.clone() for name, tensor in job.weights().items()} if method == "lora" else {}
    ours = [job.take_step(step, LR * (1 - step / STEPS)) for step in range(STEPS)]
    theirs = reference_losses(context, stage, start, prior_weight=prior, gamma=gamma)
    # fp32 through a whole U-Net leaves 3e-7 of a mean over a batch. There is room for Adam, whose first step is as long
    # for a gradient that is only noise, so that on another processor such weights may go the other way.
    assert_close_to(ours, theirs, of_largest=1e-5)
    assert len(set(ours)) == STEPS


def test_the_noise_schedule_predicts_what_the_registry_says(bases) -> None:
    types = {key: open_studio(base).objective.schedule.config.prediction_type for key, base in bases.items()}
    assert types == {"sd15": "epsilon", "sd21-512": "epsilon", "sd21-768": "v_prediction"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers_at_every_timestep(kind) -> None:
    from diffusers import DDPMScheduler

    from fastsd_helpers.dreambooth.families.diffusion import Diffusion

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    timesteps = torch.arange(1000)
    alpha_bar = schedule.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    paper = torch.minimum(snr, torch.tensor(5.0)) / (snr if kind == "epsilon" else snr + 1)
    ours = Diffusion(schedule).weights(timesteps, 5.0).double()
    # Of every weight, not of the largest: 1 - alpha_bar, near 0 at the first steps, has lost a digit of fp32.
    assert_close_to(ours / paper, torch.ones(1000), of_largest=1e-5)
    ended = DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert torch.isfinite(Diffusion(ended).weights(timesteps, 5.0)).all()
