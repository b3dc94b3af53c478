"""A run's time by others' figures: of the same GPU and family alone, scaled by the work, with the source."""

import pytest

from fastsd_helpers.dreambooth.families import family_named
from fastsd_helpers.dreambooth.running.published_speed import published_lines
from fastsd_helpers.dreambooth.settings import DreamBoothConfig


def line(gpu: str = "Tesla T4", family: str = "sd15", steps: int = 1500, **values) -> str:
    settings = {"resolution": 512, "batch_size": 1, "precision": "fp16", "gradient_checkpointing": True}
    return "".join(published_lines(gpu, family_named(family), DreamBoothConfig(**{**settings, **values}), steps))


def test_the_figure_is_said_with_its_source() -> None:
    assert line() == (
        "By others' figures about 27 minutes of the U-Net stage: 1.1 s a step on this GPU at 512 px with one image "
        "(ShivamShrirao's DreamBooth README), scaled by the work to 1.1 s."
    )


@pytest.mark.parametrize(
    ("values", "minutes"),
    [
        ({"batch_size": 2}, 54),
        ({"accumulation": 4}, 108),
        ({"resolution": 768}, 72),
        ({"gradient_checkpointing": False}, 22),
        ({"class_prompt": "a dog", "prior_weight": 1.0, "class_images": 2}, 54),
        ({"gpu": "NVIDIA H100 80GB HBM3", "family": "sdxl", "resolution": 1024, "precision": "bf16"}, 27),
    ],
)
def test_it_is_scaled_by_the_work(values, minutes) -> None:
    assert f"about {minutes} minutes" in line(**values)


@pytest.mark.parametrize(
    "values", [{"gpu": "NVIDIA L4"}, {"family": "sd21"}, {"precision": "fp32"}, {"steps": 0}, {"gpu": "NVIDIA H100X"}]
)
def test_where_nobody_has_published_it_nothing_is_said(values) -> None:
    assert line(**values) == ""
