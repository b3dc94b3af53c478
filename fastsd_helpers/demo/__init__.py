"""The embedded demo: a small Stable-Diffusion-1.5-shaped model, a small recognition model, and images to try them on.

What made them is in scripts/: `demo_pictures.py` draws captioned images and the three subjects, `demo_networks.py`
builds the untrained networks and the tokenizer, `train_demo_model.py` made of them the weights in `model/`.
"""

from pathlib import Path

__all__ = ["MODEL_FOLDER", "SUBJECTS_FOLDER"]

MODEL_FOLDER = Path(__file__).parent / "model"
SUBJECTS_FOLDER = Path(__file__).parent / "subjects"
