"""All randomness of a run: each image once in an epoch, nothing shared by keys, the same in every version."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from fastsd_helpers.dreambooth.training.randomness import (  # noqa: E402
    draw_offset,
    draw_step,
    generator_for,
    pick_batch,
    pick_images,
)

SHAPE = (4, 8, 8)


GENERATOR = [0.001438, 0.996628, 0.908777]
ORDER = [1, 2, 3, 4, 0, 4, 2, 0, 1, 3, 1, 0]
IMAGES = [0, 3, 4, 1]
FLIPS = [False, True, False, True]
TIMESTEPS = [749, 720, 834, 633]
NOISE = [0.188152, 1.946322, 0.654045, 1.295256]
POSTERIOR = [1.097833, 0.321042, 1.2671, -0.971847]
OFFSET = [-0.426932, 1.068517, 0.93262, 0.140682]


def draw(seed=42, stage="unet", step=0, part=0, **values):
    return draw_step(seed, stage, step, part, **{"batch_size": 3, "images": [5], "latent_shapes": [SHAPE], **values})


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 11, 17])
def test_every_picture_comes_once_in_each_epoch_whatever_the_batch(images, batch_size):
    epochs = 6
    row = []
    while len(row) < epochs * images:
        picked = pick_images(42, "unet", len(row), batch_size, images)
        assert len(picked) == batch_size
        row += picked
    for epoch in range(epochs):
        assert sorted(row[epoch * images : (epoch + 1) * images]) == list(range(images)), f"epoch {epoch}: {row}"
    assert row == pick_images(42, "unet", 0, len(row), images), "batches are cut from one row"


@pytest.mark.parametrize(("batch_size", "parts"), list(itertools.product((1, 2, 3, 5), (1, 2, 3))))
def test_steps_and_their_parts_go_through_the_epochs_without_a_gap(batch_size, parts):
    images, steps = 7, 14
    row = [
        image
        for step in range(steps)
        for part in range(parts)
        for image in draw(step=step, part=part, parts=parts, batch_size=batch_size, images=[images]).images
    ]
    assert row == pick_images(42, "unet", 0, steps * parts * batch_size, images)
    for start in range(0, len(row), images):
        assert sorted(row[start : start + images]) == list(range(images))


def test_epochs_seeds_and_stages_have_orders_of_their_own():
    epochs = {tuple(pick_images(1, "unet", 9 * epoch, 9, 9)) for epoch in range(20)}
    others = {tuple(pick_images(*key, 0, 9, 9)) for key in ((2, "unet"), (1, "text_encoder"), (1, "unet/class"))}
    assert len(epochs) == 20
    assert len(epochs | others) == 23


# --------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("images", [1, 2, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 11])
def test_with_one_bucket_the_batches_are_those_of_a_run_without_buckets(images, batch_size):
    for number in range(3 * images + 2):
        expected = pick_images(42, "unet", number * batch_size, batch_size, images)
        assert pick_batch(42, "unet", number, batch_size, [images]) == (0, expected)


@pytest.mark.parametrize("buckets", [[1, 1], [1, 6], [4, 1, 3], [2, 2, 2, 2]])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_a_batch_is_of_one_bucket_and_every_image_comes_equally_often(buckets, batch_size):
    epochs, count = 3, sum(buckets)
    rows = [pick_batch(42, "unet", number, batch_size, buckets) for number in range(epochs * count)]
    for epoch in range(epochs):
        own = [bucket for bucket, _ in rows[epoch * count : (epoch + 1) * count]]
        assert [own.count(bucket) for bucket in range(len(buckets))] == buckets, "as many batches as images"
    for bucket, images in enumerate(buckets):
        row = [image for own, picked in rows if own == bucket for image in picked]
        assert [row.count(image) for image in range(images)] == [epochs * batch_size] * images
        for start in range(0, len(row), images):
            assert sorted(row[start : start + images]) == list(range(images)), "once in each of the bucket's epochs"


def test_the_bucket_of_a_batch_gives_the_draw_its_shape_and_changes_with_seed_stage_and_epoch():
    shapes = [(4, 8, 8), (4, 6, 12), (4, 12, 6)]
    draws = [draw(step=step, images=[2, 3, 4], latent_shapes=shapes) for step in range(27)]
    assert {one.bucket for one in draws} == {0, 1, 2}
    for one in draws:
        assert one.noise.shape == one.posterior_noise.shape == (3, *shapes[one.bucket])
        assert max(one.images) < [2, 3, 4][one.bucket]
    orders = {
        tuple(pick_batch(seed, stage, 27 * epoch + place, 1, [9, 9, 9])[0] for place in range(27))
        for seed in (1, 2)
        for stage in ("unet", "unet/class")
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_parts_of_a_step_are_batches_one_after_the_other():
    asked = {"images": [3, 2], "latent_shapes": [SHAPE, SHAPE]}
    parts = [draw(step=step, part=part, parts=2, **asked) for step in range(6) for part in range(2)]
    assert [(one.bucket, one.images) for one in parts] == [pick_batch(42, "unet", n, 3, [3, 2]) for n in range(12)]


# -------------------------------------------------------------------------------------------------- everything else


def test_no_two_draws_of_a_run_share_their_noise():
    keys = [
        {"seed": seed, "stage": stage, "step": step, "part": part}
        for seed in (1, 2)
        for stage in ("unet", "text_encoder", "unet/class")
        for step in (0, 1, 11)
        for part in (0, 1)
    ]
    draws = [draw(**key) for key in keys]
    rows = [row for one in draws for noise in (one.noise, one.posterior_noise) for row in noise]
    rows += [draw_offset(*key.values(), batch_size=3, channels=4) for key in keys]
    assert len({row.flatten()[0].item() for row in rows}) == len(rows)


def test_noise_is_standard_normal_and_timesteps_and_mirrorings_are_even():
    draws = [draw(step=step, flip=True) for step in range(400)]
    for noise in (torch.stack([one.noise for one in draws]), torch.stack([one.posterior_noise for one in draws])):
        # 300,000 values: these bounds are five standard errors.
        assert abs(noise.mean().item()) < 0.01
        assert abs(noise.std().item() - 1) < 0.01
    timesteps = torch.cat([one.timesteps for one in draws])
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min().item() < 10
    assert 990 <= timesteps.max().item() < 1000
    assert abs(timesteps.float().mean().item() - 499.5) < 5 * 289 / 1200**0.5
    flips = [flip for one in draws for flip in one.flips]
    assert 0.42 < sum(flips) / len(flips) < 0.58
    assert not any(any(draw(step=step).flips) for step in range(50)), "without flip nothing is mirrored"


def test_mirroring_changes_nothing_else():
    plain, mirrored = draw(step=3), draw(step=3, flip=True)
    assert plain.images == mirrored.images
    for name in ("noise", "posterior_noise", "timesteps"):
        assert torch.equal(getattr(plain, name), getattr(mirrored, name))


@pytest.mark.parametrize("timesteps", [1, 20, 1000])
def test_timesteps_stay_within_the_schedule(timesteps):
    drawn = torch.cat(
        [
            draw(
                step=step,
                draw_times=lambda count, generator: torch.randint(0, timesteps, (count,), generator=generator),
                batch_size=8,
            ).timesteps
            for step in range(40)
        ]
    )
    assert 0 <= drawn.min() <= drawn.max() < timesteps


def test_offset_noise_is_one_value_for_each_picture_and_channel():
    offset = draw_offset(42, "unet", 5, 0, batch_size=3, channels=4)
    assert offset.shape == (3, 4, 1, 1)
    assert offset.unique().numel() == 12
    many = torch.cat([draw_offset(42, "unet", step, 0, batch_size=4, channels=4) for step in range(500)])
    assert abs(many.mean().item()) < 5 / 8000**0.5
    assert abs(many.std().item() - 1) < 0.05
    noise = draw(step=5).noise
    assert not torch.isin(offset, noise).any(), "it is not taken from the noise it is added to"
    assert torch.equal(noise, draw(step=5).noise)


# ------------------------------------------------------------------------------------------------------- recorded


def test_draws_are_those_that_were_recorded():
    """Other numbers would be another run for everyone who resumes a session that an earlier version began.

    Noise is compared with a tolerance: its last bits depend on the processor's instructions.
    """
    # torch's generator of today looks at the lower 32 bits of a seed alone.
    assert generator_for(42, "held-out").initial_seed() == 8_740_951_495_981_886_598
    assert torch.rand(3, generator=generator_for(42, "held-out")).tolist() == pytest.approx(GENERATOR, abs=1e-6)
    assert pick_images(42, "unet", 0, 12, 5) == ORDER
    one = draw(step=7, part=1, parts=2, flip=True, batch_size=4)
    assert one.images == IMAGES
    assert one.flips == FLIPS
    assert one.timesteps.tolist() == TIMESTEPS
    assert one.noise[2, 1, 0, :4].tolist() == pytest.approx(NOISE, abs=1e-5)
    assert one.posterior_noise[2, 1, 0, :4].tolist() == pytest.approx(POSTERIOR, abs=1e-5)
    offset = draw_offset(42, "unet", 7, 1, batch_size=1, channels=4)
    assert offset.flatten().tolist() == pytest.approx(OFFSET, abs=1e-5)
