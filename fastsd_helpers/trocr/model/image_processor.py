"""Images as the model's encoder takes them: the checkpoint's own processor, done in two cheap halves.

The size is changed image by image with PIL (in as many threads as there are), numbers are made of whole batches
with torch. The result is that of transformers' image processor with its PIL back end, to rounding.
"""

from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import ModelError

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Pixels"]

_DARK = 100  # of 255: paper, even old and badly lit, is brighter
_STANDS_OUT = 40


class Pixels:
    """The image settings of one checkpoint: side lengths, filter, mean and deviation.

    Read from its own file, without transformers: some versions of its image processors want torchvision, and those
    that do round differently.

    Args:
        settings: the content of preprocessor_config.json, or of its part in processor_config.json.

    Raises:
        ModelError: it cuts images, which no TrOCR model does, or lacks the size.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.height, self.width = _sides(settings.get("size"))
        cut = settings.get("do_center_crop") and settings.get("crop_size") is not None
        if not settings.get("do_resize", True) or (cut and _sides(settings["crop_size"]) != (self.height, self.width)):
            raise ModelError(
                "The image settings of this model crop images; TrOCR's resize them without aspect ratio.",
                "Copy preprocessor_config.json of the model it was trained from into the folder.",
            )
        self.resample = int(settings.get("resample", 2))
        self.scale = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        normalise = settings.get("do_normalize", True)
        self.mean = list(settings.get("image_mean") or [0.5] * 3) if normalise else [0.0] * 3
        self.deviation = list(settings.get("image_std") or [0.5] * 3) if normalise else [1.0] * 3

    def resize(self, picture: "Image.Image") -> Any:
        """An RGB image of any size -> uint8 [h, w, 3] (resized without aspect ratio, as in training).

        Light ink on dark ground is inverted: the models know dark ink alone.
        """
        import numpy as np
        from PIL import Image

        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling(self.resample))
        values = np.asarray(picture, dtype=np.uint8)
        return 255 - values if _is_negative(values) else values

    def batch(self, resized: list[Any]) -> "torch.Tensor":
        """Results of `resize` -> float32 [n, 3, h, w], scaled and normalised."""
        import numpy as np
        import torch

        values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() * self.scale
        mean, deviation = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (self.mean, self.deviation))
        return ((values - mean) / deviation).contiguous()


def _is_negative(values: Any) -> bool:
    """Whether most of a line is dark, and what stands out of it is light."""
    import numpy as np

    grey = values[::4, ::4].mean(2)
    low, usual, high = np.percentile(grey, (1, 50, 99))
    return bool(usual < _DARK and high - usual > 2 * (usual - low) + _STANDS_OUT)


def _sides(size: Any) -> tuple[int, int]:
    """Older files give one number, newer ones height and width."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[1]), int(size[0])
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    raise ModelError(
        f"The image settings of this model have no size that can be used: {size!r}.",
        "Copy preprocessor_config.json of the model it was trained from into the folder.",
    )
