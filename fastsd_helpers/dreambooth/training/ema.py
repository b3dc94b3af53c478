"""A moving average of the weights under training: what is judged and exported when `ema` is on.

Source: the warm-up of the decay, min(decay, (1 + n) / (10 + n)), is that of diffusers' and TensorFlow's averages: a
long memory would otherwise hold on to the first weights for ever in a short run.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Average"]


class Average:
    """The average of some parameters, which keep their own values while training goes on."""

    def __init__(self, parameters: "list[torch.nn.Parameter]", decay: float) -> None:
        self.decay = decay
        self._parameters = parameters
        self._values = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0); no clock or chance, so a resumed run agrees."""
        import torch

        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for value, parameter in zip(self._values, self._parameters, strict=True):
                value.lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Let the module hold the average for a while; nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._values[index] = self._values[index], parameter.data

    def put(self, values: "list[torch.Tensor]") -> None:
        """Go on from a saved average, in the order of the parameters."""
        for own, value in zip(self._values, values, strict=True):
            own.copy_(value)
