"""What `fastsd bench dreambooth` measures, and how often."""

from dataclasses import dataclass, replace
from typing import Literal

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import check, option

__all__ = ["Settings"]

_SIDES = {"demo": 128, "sixteenth": 64, "quarter": 256, "sd15": 512, "sdxl": 1024}
_SDXL_SIDES = {"quarter": 512}
_BATCHES = {"demo": 4}  # as models.toml has it; 1 for the others
_OF_FAMILY = {"demo": "sd15", "sixteenth": "sdxl", "sd15": "sd15", "sdxl": "sdxl"}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    family: Literal["sd15", "sdxl"] = option("sd15", help="family: SD 1.5, all weights; or a LoRA of SDXL")
    model: Literal["auto", "demo", "sixteenth", "quarter", "sd15", "sdxl"] = option(
        "auto",
        help="the embedded model (auto for SD 1.5); the family's networks at a quarter of their widths (auto for "
        "SDXL), of SDXL at a sixteenth; or all of it (random weights, for a GPU)",
    )
    resolution: int = option(0, help="resolution: side of the images in pixels; 0 = the model's own", low=0, high=1024)
    batch_size: int = option(0, help="batch size; 0 = the model's default", low=0, high=16)
    precision: Literal["fp32", "fp16", "bf16"] = option("fp32", help="precision: dtype of the forward pass")
    gradient_checkpointing: bool = option(False, help="gradient checkpointing in both loops: less memory, slower")
    steps: int = option(10, help="timed steps per round", low=1, high=1000)
    rounds: int = option(3, help="rounds per loop; the median is reported", low=1, high=25)
    threads: int = option(0, help="CPU threads; 0 = torch's default", low=0, high=256)

    def __post_init__(self) -> None:
        check(self)
        if self.model in _OF_FAMILY and _OF_FAMILY[self.model] != self.family:
            raise SettingsError(
                f"The model {self.model} is of the family {_OF_FAMILY[self.model]}, not {self.family}.",
                f"Add --family {_OF_FAMILY[self.model]}, or choose --model quarter.",
            )

    def filled(self) -> "Settings":
        """With the model's own values in place of "auto" and 0."""
        sdxl = self.family == "sdxl"
        model = self.model if self.model != "auto" else "quarter" if sdxl else "demo"
        side = _SDXL_SIDES.get(model, _SIDES[model]) if sdxl else _SIDES[model]
        return replace(
            self,
            model=model,
            resolution=self.resolution or side,
            batch_size=self.batch_size or _BATCHES.get(model, 1),
        )
