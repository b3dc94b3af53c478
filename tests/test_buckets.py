"""Aspect-ratio buckets: sizes, sorting, what is cut, what is said, and training on images of several shapes."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd_helpers.dreambooth import DreamBoothConfig
from fastsd_helpers.dreambooth.dataset.buckets import bucket_lines, bucket_sizes, choose_size, sort_into_buckets
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
        longer = (max(width, height) + multiple) * min(width, height)
        assert longer > resolution**2 or max(width, height) + multiple > 2 * resolution or width == height


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
            assert abs(read - round(read)) < 0.02, "whole pixels of the resized photo are cut off"
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
    images = [image_of(tmp_path / f"{name}.png", *shape) for name, shape in [("a", (96, 96)), ("b", (170, 96))]]
    lines = bucket_lines(sort_into_buckets(images, (128,), 64), batch_size=2)
    assert lines[0].startswith("Aspect-ratio buckets: 1,")
    assert lines[1] == "128 x 128 px, 2 images: a.png, b.png (cut off: 22% left, 22% right)."
    assert len(lines) == 2
    images.append(image_of(tmp_path / "c.png", 60, 180))
    lines = bucket_lines(sort_into_buckets(images, (128,), 64), sort_into_buckets(images[2:], (128,), 64), batch_size=2)
    assert "64 x 192 px, 1 image: c.png." in lines
    assert "64 x 192 px, 1 held-out image: c.png." in lines
    assert lines[-1].startswith("Fewer images than the batch size of 2 are in 64 x 192:")


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
    said = {item["source"]: item["warnings"] for item in result.images}
    assert "too small: 40 x 100 px enlarged to 128" in said["small.png"]
    assert any("3 of 4 images are not square: training sorts them" in note for note in result.notes)


@pytest.mark.parametrize(("width", "height"), [(4000, 200), (200, 4000), (900, 200)])
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
