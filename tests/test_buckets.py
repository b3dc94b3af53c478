"""Aspect-ratio buckets: sizes, sorting, what is cut, what is said, and training on images of several shapes."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed import require_installed
from PIL import Image

from fastsd_helpers.dreambooth import DreamBoothConfig
from fastsd_helpers.dreambooth.dataset.buckets import (
    bucket_info,
    bucket_lines,
    bucket_sizes,
    choose_size,
    class_lines,
    sort_into_buckets,
    sort_sizes,
)
from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage, load_dataset
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare
from fastsd_helpers.dreambooth.families import Framing, cover
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.sessions import Session


def write_noise(path: Path, width: int, height: int, seed: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3)).save(path)
    return path


def image_of(path: Path, width: int, height: int, **rest: Any) -> PreparedImage:
    return PreparedImage(write_noise(path, width, height), "", "a zib dog", **rest)


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 64), (128, 64), (512, 64), (576, 64), (768, 32), (1024, 64)])
def test_sides_are_multiples_from_half_to_twice_the_resolution_and_the_area_is_at_most_its_square(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
        assert width * height <= resolution**2
        grown = [(width + multiple, height), (width, height + multiple)]
        assert any(w * h > resolution**2 or max(w, h) > 2 * resolution for w, h in grown), "as large as it may be"


def test_the_sizes_of_1024_are_those_that_stable_diffusion_xl_was_trained_at():
    # Source: Podell et al. 2023, "SDXL", appendix I; those whose sides are more than twice the resolution are not ours.
    published = [(512, 2048), (512, 1984), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152)]
    ours = bucket_sizes(1024, 64)
    assert {size for size in published if size != (512, 1984)} <= set(ours)


def test_an_image_goes_to_the_bucket_whose_shape_is_nearest():
    draws = random.Random(3)
    for _ in range(200):
        width, height, resolution = draws.randint(20, 4000), draws.randint(20, 4000), draws.choice((512, 768, 1024))
        chosen = choose_size(width, height, resolution, 64)
        found = abs(math.log(chosen[0] / chosen[1] / (width / height)))
        assert all(found <= abs(math.log(w / h / (width / height))) + 1e-8 for w, h in bucket_sizes(resolution, 64))
        assert choose_size(height, width, resolution, 64) in (chosen[::-1], chosen), "turned by a quarter"
    for side in (64, 511, 4000):
        assert choose_size(side, side, 512, 64) == (512, 512)


# ------------------------------------------------------------------------------------------------------------- cuts


def test_what_is_cut_off_is_read_back_exactly_from_images_that_hold_their_own_coordinates():
    draws = random.Random(11)
    for _ in range(200):
        width, height = draws.randint(90, 900), draws.randint(90, 900)
        target = choose_size(width, height, draws.choice((128, 192, 256)), 64)
        box = cover(width, height, target, (draws.random(), draws.random()))
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
        assert max((box[2] - box[0]) / width, (box[3] - box[1]) / height) == 1, "as much as fits is kept"
        numbers = Framing.whole(width, height).part(box, width, height).numbers(*target)
        mirrored = Framing.whole(width, height).part(box, width, height).numbers(*target, mirrored=True)
        assert numbers[:2] == mirrored[:2] == (height, width)
        assert numbers[4:] == mirrored[4:] == target[::-1]
        for axis, side in enumerate((width, height)):
            # Values from 0 to 1 over the whole photo; bilinear keeps a slope, so the middle of the result tells.
            ramp = (np.arange(side, dtype=np.float32) + 0.5) / side
            across = np.tile(ramp, (height, 1)) if axis == 0 else np.tile(ramp[:, None], (1, width))
            cut = np.asarray(Image.fromarray(across).resize(target, Image.Resampling.BILINEAR, box=box))
            kept = target[axis]
            place = kept // 2
            value = float(cut[target[1] // 2, place] if axis == 0 else cut[place, target[0] // 2])
            resized = round(side * kept / (box[2 + axis] - box[axis]))  # the whole photo's side after the resize
            read = value * resized - place - 0.5
            assert numbers[3 - axis] == round(read)
            assert abs(read - round(read)) < 0.1, "whole pixels of the resized photo are cut off"
            if axis == 0:
                flipped = float(cut[:, ::-1][target[1] // 2, place])
                assert mirrored[3] == round((1 - flipped) * resized - place - 0.5)
        assert mirrored[2] == numbers[2]


def test_the_subject_is_kept_as_far_as_the_shape_allows(tmp_path):
    wide = image_of(tmp_path / "wide.png", 300, 100, focus=(0.9, 0.5))
    tall = image_of(tmp_path / "tall.png", 100, 300, focus=(0.5, 0.0))
    even = image_of(tmp_path / "even.png", 300, 100)
    for resolution in (64, 128):  # of 64 the square is the one bucket
        boxes = {
            place.name: place
            for bucket in sort_into_buckets((wide, tall, even), (resolution,), 64)
            for place in bucket.places
        }
        if resolution == 64:
            assert boxes["wide.png"].box == (200, 0, 300, 100)
            assert boxes["tall.png"].box == (0, 0, 100, 100)
            assert boxes["even.png"].cut == pytest.approx({"left": 1 / 3, "right": 1 / 3}, abs=0.01)
        else:
            assert not any(place.cut for place in boxes.values()), "3:1 has a bucket of its own"


# -------------------------------------------------------------------------------------------------- sorting, saying


def test_every_image_is_once_in_a_bucket_of_each_resolution(tmp_path):
    shapes = [(90, 90), (200, 100), (64, 300), (128, 127), (301, 299)]
    images = [image_of(tmp_path / f"{number}.png", *shape) for number, shape in enumerate(shapes)]
    buckets = sort_into_buckets(images, (128, 192, 256), 64)
    assert len({bucket.size for bucket in buckets}) == len(buckets)
    for number in range(len(images)):
        own = [bucket.size for bucket in buckets if number in [place.image for place in bucket.places]]
        assert sorted(own) == sorted(choose_size(*shapes[number], side, 64) for side in (128, 192, 256))


def test_which_image_goes_where_and_what_is_cut_off_is_said(tmp_path):
    images = [image_of(tmp_path / f"{name}.png", *shape) for name, shape in [("a", (96, 96)), ("b", (150, 96))]]
    lines = bucket_lines(sort_into_buckets(images, (128,), 64), batch_size=2)
    assert lines[0].startswith("Aspect-ratio buckets: 1,")
    assert lines[1] == "128 x 128 px, 2 images: a.png, b.png (cut off: 18% left, 18% right)."
    assert len(lines) == 2
    images.append(image_of(tmp_path / "c.png", 60, 180))
    lines = bucket_lines(sort_into_buckets(images, (128,), 64), sort_into_buckets(images[2:], (128,), 64), batch_size=2)
    assert "64 x 192 px, 1 image: c.png." in lines
    assert "64 x 192 px, 1 held-out image: c.png." in lines
    assert lines[-1].startswith("Fewer images than the batch size of 2 are in 64 x 192:")


def test_of_class_images_the_sizes_and_the_largest_cut_are_said():
    sizes = [("", size, (0.5, 0.5)) for size in ((96, 96), (150, 96), (128, 128), (60, 180))]
    assert class_lines(sort_sizes(sizes, (128,), 64)) == [
        "64 x 192 px, 1 class image.",
        "128 x 128 px, 3 class images (cut off: at most 36%).",
    ]
    assert class_lines(sort_sizes(sizes[:1], (128,), 64)) == []


def test_a_dry_run_tells_of_a_folder_of_class_images_before_any_is_copied(tmp_path, small_base, shapes_session):
    from dreambooth_runs import config_for

    from fastsd_helpers.dreambooth.running import engine

    folder = tmp_path / "class"
    for number, size in enumerate([(300, 100), (100, 300)]):
        write_noise(folder / f"{number}.png", *size, seed=number + 1)
    turned = Image.open(folder / "0.png")
    turned.getexif()[0x0112] = 6  # a phone held upright
    turned.save(folder / "2.jpg", exif=turned.getexif())

    def notes(**values):
        asked = config_for(small_base, text_encoder_steps=0, resolution=128, class_prompt="a dog", **values)
        return engine.plan(asked, shapes_session).notes

    said = notes(class_folder=str(folder))
    assert f"class images: your own, 3 in {folder}" in said
    assert "64 x 192 px, 2 class images." in said
    assert "192 x 64 px, 1 class image." in said
    assert not shapes_session.class_images.exists() or not any(shapes_session.class_images.iterdir())
    assert sum("class image" in line for line in notes(class_images=5)) == 2, "a group of four, and one of the next"


def test_of_squares_nothing_is_said(tmp_path):
    images = [image_of(tmp_path / f"{side}.png", side, side) for side in (64, 128, 200)]
    buckets = sort_into_buckets(images, (128,), 64)
    assert [bucket.size for bucket in buckets] == [(128, 128)]
    assert bucket_lines(buckets, buckets, batch_size=64) == []


# ------------------------------------------------------------------------------------------------------ preparing


def test_crop_none_keeps_the_shape_with_the_area_of_the_size_and_squares_stay_squares(tmp_path):
    shapes = {"wide": (500, 301), "tall": (301, 700), "square": (333, 333), "small": (40, 100)}
    for number, (name, shape) in enumerate(shapes.items()):
        write_noise(tmp_path / "photos" / f"{name}.png", *shape, seed=number)
    session = Session.create("dog", root=tmp_path / "sessions")
    result = prepare(PrepareConfig(images=str(tmp_path / "photos"), size=128, crop="none"), session)
    for image in load_dataset(session).train:
        width, height = shapes[image.path.stem]
        with Image.open(image.path) as made:
            assert made.width * made.height == pytest.approx(128**2, rel=0.01)
            assert made.width / made.height == pytest.approx(width / height, rel=0.01)
            assert made.size == (128, 128) or image.path.stem != "square"
        assert image.framing == Framing.whole(width, height)
    assert result.lines()[0] == "4 images to train on, each with the area of 128 x 128 px."
    said = {item["source"]: item["warnings"] for item in result.images}
    assert "too small: 40 x 100 px enlarged to 81 x 202 px" in said["small.png"]
    assert any("3 of 4 images are not square: training sorts them" in note for note in result.notes)


@pytest.mark.parametrize(("width", "height"), [(1500, 200), (200, 1500), (900, 200)])
def test_of_a_photo_longer_than_any_bucket_the_part_around_its_subject_is_used_and_that_is_said(
    tmp_path, width, height
):
    photo = np.full((height, width, 3), 120, np.uint8)
    spot = (slice(40, 160), slice(width - 260, width - 140)) if width > height else (slice(140, 260), slice(40, 160))
    photo[spot] = (250, 40, 40)
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo).save(tmp_path / "photos" / "long.png")
    session = Session.create("dog", root=tmp_path / "sessions")
    result = prepare(PrepareConfig(images=str(tmp_path / "photos"), size=128, crop="none"), session)
    (item,) = result.images
    left, top, right, bottom = item["box"]
    assert (right - left, bottom - top) == (min(width, 800), min(height, 800))
    assert left <= spot[1].start < spot[1].stop <= right
    assert top <= spot[0].start < spot[0].stop <= bottom
    kept = f"{right - left} x {bottom - top}"
    assert f"longer than 4:1: only {kept} px of it are used" in item["warnings"]
    (image,) = load_dataset(session).train
    (bucket,) = sort_into_buckets((image,), (128,), 64)
    assert bucket.size == ((256, 64) if width > height else (64, 256))
    assert not bucket.places[0].cut


def test_the_part_of_a_photo_that_a_bucket_keeps_is_around_its_subject(tmp_path):
    photo = np.full((300, 480, 3), 120, np.uint8)
    photo[80:220, 350:470] = (250, 40, 40)
    (tmp_path / "photos").mkdir()
    Image.fromarray(photo).save(tmp_path / "photos" / "right.png")
    session = Session.create("dog", root=tmp_path / "sessions")
    prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64, crop="none"), session)
    (image,) = load_dataset(session).train
    (bucket,) = sort_into_buckets((image,), (64,), 64)
    assert set(bucket.places[0].cut) == {"left"}
    numbers = image.framing.part(bucket.places[0].box, *bucket.places[0].size).numbers(*bucket.size)
    assert numbers == (300, 480, 0, 102 - 64, 64, 64)


def test_whole_photos_of_an_earlier_version_are_told_as_they_were(tmp_path):
    write_noise(tmp_path / "photos" / "a.png", 100, 100)
    session = Session.create("dog", root=tmp_path / "sessions")
    prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64, crop="none"), session)
    del session.record["dataset"]["images"][0]["focus"]
    (image,) = load_dataset(session).train
    assert image.framing is None
    assert image.focus == (0.5, 0.5)


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("text", ["", " ", "512,", "512;768", "512.0", "0,512", "4096", "-512", "auto", "５１２px"])
def test_resolutions_that_are_none_are_refused_with_an_example(text):
    with pytest.raises(SettingsError, match=r"resolutions \(--resolutions\).*such as 512,768,1024"):
        DreamBoothConfig(resolutions=text)


def test_resolutions_have_one_spelling_and_alone_the_resolution_is_trained():
    assert DreamBoothConfig(resolutions=" 1024, 512,512 ").resolutions == "512,1024"
    assert DreamBoothConfig(resolutions="1024,512", resolution=768).training_resolutions == (512, 1024)
    assert DreamBoothConfig(resolution=768).training_resolutions == (768,)
    assert DreamBoothConfig().training_resolutions == ()


# ------------------------------------------------------------------------------------------------------- training


SHAPES = {"a": (96, 96), "b": (60, 170), "c": (170, 60), "d": (50, 50)}


@pytest.fixture
def shapes_session(tmp_path):
    """Four photos of three shapes, prepared whole at 128 px, and one of a fourth shape to be judged on."""
    require_installed("diffusers")
    for number, (name, size) in enumerate(SHAPES.items()):
        write_noise(tmp_path / "photos" / f"{name}.png", *size, seed=number)
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a zib {name}")
    write_noise(tmp_path / "judged" / "e.png", 40, 160, seed=9)
    (tmp_path / "judged" / "e.txt").write_text("a zib e")
    session = Session.create("dog", root=tmp_path / "sessions")
    places = {"images": str(tmp_path / "photos"), "held_out": str(tmp_path / "judged")}
    prepare(PrepareConfig(**places, size=128, crop="none"), session)
    return session


def open_studio(base: Path, session: Session, **values: Any) -> Any:
    """A context whose caches are filled with the session's images."""
    from dreambooth_runs import config_for

    from fastsd_helpers.device import Device
    from fastsd_helpers.dreambooth.prior.own_class_images import ClassImages
    from fastsd_helpers.dreambooth.settings import resolve_settings
    from fastsd_helpers.dreambooth.training.base_model import BaseModel
    from fastsd_helpers.dreambooth.training.stages import TrainingContext

    model = BaseModel.fetch(str(base))
    device = Device(kind="cpu", name="test", memory_bytes=2**33, has_bf16=False)
    config, _ = resolve_settings(config_for(base, **values), model.spec, device)
    context = TrainingContext(model, config, device)
    dataset = load_dataset(session)
    others = ClassImages(session, context, dataset.train).fill(say=print, stopped=lambda: False)
    context.fill_caches(dataset, others)
    return context


def test_a_batch_is_of_one_bucket_and_of_images_with_their_own_prompts(small_base, shapes_session):
    import torch

    from fastsd_helpers.dreambooth.training.cache import encode_images
    from fastsd_helpers.dreambooth.training.randomness import draw_step

    context = open_studio(small_base, shapes_session, resolutions="64,128", batch_size=2, flip=True)
    images, vae = load_dataset(shapes_session).train, context.base.load("vae")
    known, seen = {}, set()
    for step in range(16):
        batch = context.draw_batch("unet", step, 0)
        shape = tuple(batch.latents.shape[2:])
        assert batch.noise.shape == batch.latents.shape == (2, 4, *shape)
        if shape not in known:
            size = (shape[1] * 8, shape[0] * 8)
            known[shape] = encode_images(context.family, vae, images, size, device="cpu", flip=True)
        counted = {"images": context.latents.counts, "latent_shapes": context.latents.shapes}
        drawn = draw_step(42, "unet", step, batch_size=2, flip=True, **counted)
        rows = [context.latents.images[drawn.bucket][row] for row in drawn.images]
        assert torch.equal(batch.latents, known[shape].draw(rows, drawn.flips, drawn.posterior_noise))
        assert [images[row].prompt for row in rows] == [context.prompts[prompt] for prompt in batch.prompts]
        seen |= {(images[row].prompt[-1], shape) for row in rows}
    squares = {*itertools.product("abcd", [(8, 8)]), *itertools.product("ad", [(16, 16)])}
    assert seen == {*squares, ("b", (24, 8)), ("c", (8, 24))}


def test_held_out_images_are_judged_in_their_own_buckets(small_base, shapes_session):
    context = open_studio(small_base, shapes_session, resolutions="64,128")
    assert [tuple(bucket.latents.shape[1:]) for bucket in context.held_out] == [(4, 32, 8), (4, 8, 8)][::-1]
    for bucket in context.held_out:
        assert [context.prompts[prompt] for prompt in bucket.prompts] == ["a zib e"] * 8
    noises = {bucket.noise.flatten()[0].item() for bucket in context.held_out}
    assert len(noises) == 2, "each bucket has noise of its own"


def test_class_images_have_the_photos_shapes_and_count_the_same_in_a_pass_of_their_own(
    small_base, shapes_session, monkeypatch
):
    import torch

    from fastsd_helpers.dreambooth.prior import class_images
    from fastsd_helpers.dreambooth.training.loss import training_loss
    from fastsd_helpers.dreambooth.training.stages import open_stage

    monkeypatch.setattr(class_images, "_STEPS", 1)
    prior = {"class_prompt": "a dog", "class_images": 12, "prior_weight": 0.5}
    context = open_studio(small_base, shapes_session, resolution=128, text_encoder_steps=0, **prior)
    assert sorted(context.class_latents.shapes) == sorted(context.latents.shapes)
    assert context.class_latents.counts == [4, 4, 4]
    trainer = open_stage("unet", context, None)
    batches = [context.draw_batch("unet", step, 0) for step in range(12)]
    apart = [batch for batch in batches if batch.apart is not None]
    assert apart
    assert len(apart) < len(batches), "where both are of one size they share a pass"
    for batch in (apart[0], next(batch for batch in batches if batch.apart is None)):
        own = slice(0, 1)
        parts = [(batch, own), (batch.apart, own) if batch.apart else (batch, slice(1, 2))]
        losses = []
        for part, rows in parts:
            told = part.latents[rows], part.noise[rows], part.timesteps[rows]
            losses.append(
                training_loss(trainer.predict, context.objective, *told, trainer.text_for(part.prompts[rows]))
            )
        assert torch.allclose(trainer.loss_of(batch), losses[0] + 0.5 * losses[1], rtol=1e-5)


def test_class_images_of_a_users_own_keep_their_shapes_where_the_photos_do(small_base, shapes_session, tmp_path):
    for number, size in enumerate([(90, 90), (200, 70)]):
        write_noise(tmp_path / "dogs" / f"{number}.png", *size, seed=20 + number)
    prior = {"class_prompt": "a dog", "class_folder": str(tmp_path / "dogs"), "prior_weight": 1.0, "class_images": 2}
    context = open_studio(small_base, shapes_session, resolution=128, **prior)
    assert sorted(context.class_latents.shapes) == [(4, 8, 24), (4, 16, 16)]


def test_a_run_with_several_resolutions_and_shapes_that_was_stopped_ends_with_the_same_weights(
    small_base, shapes_session, monkeypatch
):
    from dreambooth_runs import config_for, draw_quickly, learned, same, train_in_pieces

    from fastsd_helpers.dreambooth import train

    draw_quickly(monkeypatch)
    asked = config_for(small_base, resolutions="64,128", text_encoder_steps=0, unet_steps=5, accumulation=2)
    train(asked, shapes_session)
    whole = learned(shapes_session)
    train_in_pieces(asked, shapes_session, [("unet", 2), ("unet", 4)], restart=True)
    assert same(learned(shapes_session), whole)


def test_buckets_are_told_as_kohyas_scripts_tell_them_and_a_square_is_none() -> None:
    sizes = [("a", (1000, 1000)), ("b", (800, 1200)), ("c", (832, 1216)), ("d", (1024, 1024))]
    info = bucket_info(sort_sizes([(*each, (0.5, 0.5)) for each in sizes], (1024,), 64))
    assert info["buckets"] == {
        "0": {"resolution": [832, 1216], "count": 2},
        "1": {"resolution": [1024, 1024], "count": 2},
    }
    assert info["mean_img_ar_error"] == pytest.approx((832 / 1216 - 800 / 1200) / 4)
    assert bucket_info(sort_sizes([("a", (900, 1000), (0.5, 0.5))], (64,), 64)) == {}


def test_a_lora_file_says_in_which_buckets_it_was_trained_at_the_end_and_when_it_is_exported(
    small_base, shapes_session, tmp_path, monkeypatch
):
    from dreambooth_runs import config_for, draw_quickly

    from fastsd_helpers.checkpoints.formats.sources import open_file
    from fastsd_helpers.dreambooth import export, train
    from fastsd_helpers.dreambooth.results.learned import ExportConfig

    draw_quickly(monkeypatch)
    asked = config_for(small_base, method="lora", lora_rank=1, resolution=128, text_encoder_steps=0, unet_steps=1)
    made = train(asked, shapes_session).path
    again = export(ExportConfig(format="lora", out=str(tmp_path / "x.safetensors")), shapes_session).path
    said = []
    for path in (made, again):
        source = open_file(path)
        said.append(json.loads(source.metadata["ss_bucket_info"]))
        source.close()
    assert said[0] == said[1]
    sizes = {tuple(bucket["resolution"]): bucket["count"] for bucket in said[0]["buckets"].values()}
    dataset = load_dataset(shapes_session)
    assert sizes == {bucket.size: len(bucket.places) for bucket in sort_into_buckets(dataset.train, (128,), 64)}
    assert len(sizes) > 1
    assert said[0]["mean_img_ar_error"] >= 0


def test_a_dry_run_counts_the_memory_of_the_largest_size_and_the_time_of_all(small_base, shapes_session):
    from dreambooth_runs import config_for

    from fastsd_helpers.dreambooth.running import dry_run, engine

    def rehearsed(**values):
        asked = config_for(small_base, text_encoder_steps=0, **values)
        return engine.plan(asked, shapes_session, rehearse=True)

    small, both = rehearsed(), rehearsed(resolutions="64,128")
    assert both.memory_parts["unet"]["step"] > 1.3 * small.memory_parts["unet"]["step"]
    assert both.minutes > 0
    assert both.bucket_lines
    assert set(both.bucket_lines) <= set(both.lines())
    sizes = [(64, 64, 3), (128, 128, 1)]
    assert dry_run._between(1.0, 4.0, sizes) == pytest.approx(1.75), "three of four images are small"
