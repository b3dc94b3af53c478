"""The memory a stage needs at its peak, computed from the model's shapes: no weights are loaded, no device is asked.

Weights, gradients, the optimizer's state and averages are counted exactly. What the forward pass keeps for the backward
pass is found by running the U-Net on the `meta` device and adding up what autograd saves; half precision and gradient
checkpointing are then two factors, so that part is good to about a fifth. Allocator losses are not in it.
"""

from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.stages import Studio, suit_cpu

if TYPE_CHECKING:
    import torch

__all__ = ["peak_bytes", "saved_bytes"]

# Under autocast most values are kept in 16 bits, those of norms in 32.
_HALF = 0.6
# Each block's inputs, and the whole of one block while it is computed again.
_CHECKPOINTED = 0.3
_CUDA_BYTES = 600 * 2**20  # CUDA's own context and libraries


def peak_bytes(studio: Studio, stage: str) -> int:
    """Bytes at the peak of a stage's optimizer step, on the device that the studio trains on."""
    config = studio.config
    unet, trained = studio.count_of("unet"), studio.trained_count_of(stage)
    present = unet + (studio.count_of("text_encoder") if stage == "text_encoder" else 0)
    weights = present * (
        4 if studio.dtype is None else 6
    )  # autocast keeps a 16-bit copy of each until the step is done
    state_bytes = 2 if config.optimizer == "adamw8bit" else 8
    learning = trained * (4 + state_bytes + (4 if config.ema else 0))
    kept = saved_bytes(studio, learns=stage == "unet") * (_HALF if studio.dtype else 1.0)
    kept *= _CHECKPOINTED if config.gradient_checkpointing else 1.0
    own = _CUDA_BYTES if studio.device.type == "cuda" else 0
    return int(weights + learning + kept) + own


def saved_bytes(studio: Studio, *, learns: bool) -> int:
    """Bytes in float32 that one forward pass of the U-Net keeps for its backward pass, weights not counted.

    Args:
        studio: for the U-Net's configuration and the settings' batch and resolution.
        learns: whether the U-Net itself is trained, or only what comes before it.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    config = studio.config
    unet = studio.build_empty("unet").requires_grad_(learns and config.method == "full")
    if studio.suits_cpu():
        suit_cpu(unet)
    rows = config.batch_size * (2 if config.class_prompts else 1)
    side = config.resolution // 8
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    seen: dict[int, Any] = {}  # holds the storages, so that no number is given twice

    def note(tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, tensor.numel() * tensor.element_size())
        return tensor

    with torch.device("meta"):
        latents = torch.empty(rows, unet.config.in_channels, side, side)
        text = torch.empty(rows, 77, unet.config.cross_attention_dim, requires_grad=True)
        timesteps = torch.empty(rows, dtype=torch.int64)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            unet(latents, timesteps, text)
    return sum(size for _, size in seen.values())
