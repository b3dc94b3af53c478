"""The embedded demo: a small Stable-Diffusion-1.5-shaped model and the images it was taught with.

`pictures` draws captioned images and the three demo subjects; `networks` builds the untrained networks
and the tokenizer; `model/` holds the weights that `scripts/train_demo_model.py` made of them.
"""

from pathlib import Path

__all__ = ["MODEL_FOLDER", "SUBJECTS_FOLDER"]

MODEL_FOLDER = Path(__file__).parent / "model"
SUBJECTS_FOLDER = Path(__file__).parent / "subjects"
