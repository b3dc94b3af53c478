"""DreamBooth: teach a Stable Diffusion model a subject from a few photos, in a session that survives any cut.

`prepare` turns photos into training images, `train` trains and goes on after a cut, `export` and `sample` use what a
session has learned.
"""

from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.dreambooth.results.learned import export, sample
from fastsd_helpers.dreambooth.running.engine import TrainResult, plan, train
from fastsd_helpers.dreambooth.running.live import Progress
from fastsd_helpers.dreambooth.settings import DreamBoothConfig

__all__ = [
    "DreamBoothConfig",
    "PrepareConfig",
    "PrepareResult",
    "Progress",
    "TrainResult",
    "export",
    "plan",
    "prepare",
    "sample",
    "train",
]
