"""The embedded model draws what its captions say; how often is measured by scripts/judge_demo_model.py."""

import pytest
from installed import require_installed

pytest.importorskip("torch")
pytest.importorskip("transformers")
import demo_pictures as pictures
import numpy as np

from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.cache import encode_prompts
from fastsd_helpers.dreambooth.training.sampling import draw_pictures

require_installed("diffusers")


@pytest.mark.numeric
def test_it_draws_the_object_where_the_caption_says():
    captions = [f"a flat black ball {place}, sky background" for place in pictures.PLACES]
    base = BaseModel.fetch("demo")
    text = encode_prompts(base.load_text_encoder(), base.load_tokenizer(), [*captions, ""], device="cpu")
    settings = {"size": pictures.SIZE_PX, "seeds": range(len(captions)), "guidance": 4.0, "device": "cpu"}
    made = draw_pictures(base, base.load_unet(), base.load_vae(), text[:-1], text[-1:], **settings)
    for image, (place, wanted) in zip(made, pictures.PLACES.items(), strict=True):
        dark = np.argwhere(np.asarray(image.convert("L")) < 60)  # black on light blue
        assert 0.05 < len(dark) / pictures.SIZE_PX**2 < 0.25, place
        y, x = dark.mean(0) / pictures.SIZE_PX
        nearest = min(pictures.PLACES, key=lambda name: np.hypot(*(np.array(pictures.PLACES[name]) - (x, y))))
        assert nearest == place, (x, y, wanted)
