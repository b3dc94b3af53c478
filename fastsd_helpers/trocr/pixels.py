"""Pictures as the reader's encoder takes them: the checkpoint's own processor, done in two cheap halves.

The size is changed picture by picture with PIL (in as many threads as there are), numbers are made of whole batches
with torch. The result is that of the checkpoint's image processor with its PIL back end, to rounding.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Pixels"]


class Pixels:
    """The picture settings of one checkpoint: side lengths, filter, mean and deviation."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        size = processor.size
        self.height, self.width = int(size["height"]), int(size["width"])
        plain = processor.do_resize and not getattr(processor, "do_center_crop", False)
        self._plain = plain and not getattr(processor, "do_pad", False)

    def resize(self, picture: "Image.Image") -> Any:
        """An RGB picture of any size -> uint8 [h, w, 3] (the line squashed, as the models learnt it)."""
        import numpy as np
        from PIL import Image

        if not self._plain:  # an unusual processor does its own work, and `batch` none
            values = self.processor(picture, return_tensors="np")["pixel_values"][0]
            return np.ascontiguousarray(values, dtype=np.float32)
        filter_kind = Image.Resampling(int(self.processor.resample))
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), filter_kind)
        return np.asarray(picture, dtype=np.uint8)

    def batch(self, resized: list[Any]) -> "torch.Tensor":
        """Results of `resize` -> float32 [n, 3, h, w], scaled and normalised."""
        import numpy as np
        import torch

        values = torch.from_numpy(np.stack(resized))
        if not self._plain:
            return values
        values = values.permute(0, 3, 1, 2).float()
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean = torch.tensor(self.processor.image_mean).view(1, -1, 1, 1)
            deviation = torch.tensor(self.processor.image_std).view(1, -1, 1, 1)
            values = (values - mean) / deviation
        return values.contiguous()
