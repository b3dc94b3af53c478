"""The objective, each part by its own formula; and what a model is judged on."""

import functools
import itertools

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from fastsd_helpers.dreambooth.families import Conditions, family_named  # noqa: E402
from fastsd_helpers.dreambooth.families.diffusion import Diffusion  # noqa: E402
from fastsd_helpers.dreambooth.training.cache import Latents  # noqa: E402
from fastsd_helpers.dreambooth.training.loss import (  # noqa: E402
    held_out_loss,
    make_held_out,
    training_loss,
)
from fastsd_helpers.dreambooth.training.randomness import draw_step  # noqa: E402

require_installed("diffusers")

# From nearly clean to nearly all noise: where the weights are far from 1, and where they are 1.
TIMESTEPS = torch.tensor([3, 60, 240, 500, 760, 990])
HELD_OUT_NOISE = [0.777563, 0.516136, -1.493283, -0.029731]


@pytest.fixture(scope="module")
def unet():
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    ).requires_grad_(False)


def schedule_of(prediction):
    import diffusers

    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    shape = (len(TIMESTEPS), 4, 8, 8)
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return latents, noise, TIMESTEPS, torch.randn(len(TIMESTEPS), 77, 8, generator=generator)


def asking(unet):
    """The denoiser as the loss asks it."""
    return functools.partial(family_named("sd15").predict, unet)


def told(batch):
    """The batch with its text as a record."""
    *rest, text = batch
    return (*rest, Conditions(text))


def held_out_of(*args, **named):
    return make_held_out(*args, **named, objective=Diffusion(schedule_of("epsilon")))


def row_losses(unet, schedule, batch):
    """Each row's mean squared error, from the papers' formulas: x = a x0 + s e; v = a e - s x0."""
    latents, noise, timesteps, text = batch
    alpha_bar = schedule.alphas_cumprod[timesteps][:, None, None, None]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = noise if schedule.config.prediction_type == "epsilon" else a * noise - s * latents
    return ((unet(a * latents + s * noise, timesteps, text).sample - target) ** 2).mean(dim=(1, 2, 3))


def snr_weights(schedule, timesteps, gamma):
    """Hang et al. 2023, as printed: min(SNR, gamma) / SNR, and for v-prediction min(SNR, gamma) / (SNR + 1)."""
    alpha_bar = schedule.alphas_cumprod[timesteps].double()
    snr = alpha_bar / (1 - alpha_bar)
    clipped = torch.minimum(snr, torch.tensor(float(gamma)))
    return clipped / (snr if schedule.config.prediction_type == "epsilon" else snr + 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0, 1, 5, 20])
@pytest.mark.parametrize(("class_rows", "prior_weight"), [(0, 1.0), (2, 1.0), (2, 0.25), (3, 0.0)])
def test_the_loss_is_the_formulas(unet, batch, prediction, gamma, class_rows, prior_weight):
    schedule = schedule_of(prediction)
    rows = row_losses(unet, schedule, batch).double()
    if gamma:
        rows = rows * snr_weights(schedule, TIMESTEPS, gamma)
    subject = len(rows) - class_rows
    expected = rows[:subject].mean()
    if class_rows:
        expected = expected + prior_weight * rows[subject:].mean()
    settings = {"min_snr": float(gamma), "class_rows": class_rows, "prior_weight": prior_weight}
    loss = training_loss(asking(unet), Diffusion(schedule), *told(batch), **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_setting_of_the_objective_gives_another_loss(unet, batch):
    losses = [
        training_loss(
            asking(unet),
            Diffusion(schedule_of(prediction)),
            *told(batch),
            min_snr=gamma,
            class_rows=class_rows,
            prior_weight=0.5,
        )
        for prediction, gamma, class_rows in itertools.product(("epsilon", "v_prediction"), (0.0, 1.0, 5.0), (0, 2, 3))
    ]
    assert len({f"{loss.item():.5g}" for loss in losses}) == len(losses)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_follow_the_signal_to_noise_ratio(prediction, gamma):
    schedule = schedule_of(prediction)
    weights = Diffusion(schedule).weights(TIMESTEPS, gamma)
    assert torch.allclose(weights.double(), snr_weights(schedule, TIMESTEPS, gamma), rtol=1e-5)
    assert weights[0] < 0.05, "a nearly clean image counts little"
    if prediction == "epsilon":
        assert weights[-1] == 1


# ---------------------------------------------------------------------------------------------------- held out


def pictures(count):
    generator = torch.Generator().manual_seed(2)
    return Latents(torch.randn(count, 4, 8, 8, generator=generator), torch.ones(count, 4, 8, 8))


def test_every_held_out_picture_is_judged_at_the_same_noise_levels_with_its_own_prompt():
    latents = pictures(3)
    held_out = held_out_of(latents, [1, 0, 1], seed=42, label="these")
    levels = held_out.timesteps[:8].tolist()
    # As recorded: a session's curve goes on at the levels it began with.
    assert levels == [60, 180, 300, 420, 540, 660, 780, 900]
    assert held_out.timesteps.tolist() == levels * 3
    assert held_out.prompts == (1,) * 8 + (0,) * 8 + (1,) * 8
    assert held_out.label == "these"
    for row in range(24):
        assert torch.equal(held_out.latents[row], latents.mean[row // 8]), "without the posterior's own noise"


def test_the_noise_of_the_held_out_loss_is_fixed_and_never_trained_with():
    one, again = (held_out_of(pictures(2), [0, 0], seed=42, label="") for _ in range(2))
    assert torch.equal(one.noise, again.noise)
    assert not torch.equal(one.noise, held_out_of(pictures(2), [0, 0], seed=43, label="").noise)
    more = held_out_of(pictures(3), [0, 0, 0], seed=42, label="")
    assert one.noise.shape == (16, 4, 8, 8)
    firsts = {row.flatten()[0].item() for row in more.noise}
    assert len(firsts) == 24
    for stage, step in itertools.product(("unet", "text_encoder", "unet/class"), range(50)):
        draw = draw_step(42, stage, step, batch_size=2, images=[2], latent_shapes=[(4, 8, 8)])
        for noise in (draw.noise, draw.posterior_noise):
            assert firsts.isdisjoint(row.flatten()[0].item() for row in noise)
    # As recorded: with another noise the curve of a resumed session would have a step in it.
    assert one.noise[9, 1, 0, :4].tolist() == pytest.approx(HELD_OUT_NOISE, abs=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_held_out_loss_is_the_mean_over_all_rows_whatever_the_batch(unet, prediction):
    schedule = schedule_of(prediction)
    held_out = held_out_of(pictures(3), [1, 0, 1], seed=42, label="")
    text = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(4)) * 10
    rows = row_losses(
        unet, schedule, (held_out.latents, held_out.noise, held_out.timesteps, text[list(held_out.prompts)])
    )
    for batch_size in (1, 5, 7, 8, 24, 100):
        asked = asking(unet), Diffusion(schedule), [held_out]
        loss = held_out_loss(*asked, Conditions(text), device="cpu", batch_size=batch_size)
        assert loss == pytest.approx(rows.mean().item(), rel=1e-5), batch_size
    exchanged = held_out_loss(*asked, Conditions(text.flip(0)), device="cpu")
    assert exchanged != pytest.approx(rows.mean().item(), rel=1e-5), "the prompts must matter, or nothing was tested"
