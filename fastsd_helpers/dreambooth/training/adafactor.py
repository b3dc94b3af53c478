"""Adafactor for all weights of a large model: one parameter at a time, within the backward pass, and in bfloat16.

Sources: Shazeer and Stern 2018, "Adafactor", whose arithmetic is torch's own here; PyTorch's tutorial "How to save
memory by fusing the optimizer step into the backward pass"; Zamirai et al. 2020, "Revisiting BFloat16 Training", for
stochastic rounding.
"""

from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.training.randomness import generator_for

if TYPE_CHECKING:
    import torch

__all__ = ["OneByOne", "round_stochastically"]

# The first keeps torch from dividing by zero and is far below any gradient; torch's default of 1e-7 is above the
# squares of a large model's. With the second the learning rate is absolute ("scale_parameter" off, as in the recipes of
# others) wherever a tensor's values are not larger than 1 on average.
_EPS = (1e-18, 1.0)
_LOW_BITS = 16  # of a float32, those that a bfloat16 lacks


class OneByOne:
    """Takes the optimizer step of each parameter by itself and frees its gradient at once.

    torch's optimizer knows stand-ins in float32, which hold values only while their parameter is stepped. So its state
    is in float32, whatever the weights are kept in. A convolution's kernel stands there as a matrix with a row for each
    output: torch would factor its 3 x 3 pixels alone, whose state takes 1 GB for SDXL instead of 19 MB.

    Attributes:
        optimizer: torch.optim.Adafactor over the stand-ins, in the order of the parameters.
        key: what the rounding of the step under way is drawn with, besides each parameter's name.
    """

    def __init__(self, parameters: "dict[str, torch.nn.Parameter]", lr: float) -> None:
        """Set it up.

        Args:
            parameters: name -> parameter, in float32 or bfloat16.
            lr: the learning rate at the beginning.
        """
        import torch

        self.key: tuple = ()
        self._parameters = parameters
        self._nothing = {name: torch.empty(0, device=each.device) for name, each in parameters.items()}
        self._stand_ins = {name: torch.nn.Parameter(nothing) for name, nothing in self._nothing.items()}
        self.optimizer = torch.optim.Adafactor(list(self._stand_ins.values()), lr=lr, eps=_EPS)

    def step_in_backward(self) -> None:
        """From now on step each parameter as soon as a backward pass has completed its gradient."""
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _parameter, name=name: self._step(name))

    def step(self) -> None:
        """Step the parameters that have a gradient now."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._step(name)

    def _step(self, name: str) -> None:
        parameter, stand_in = self._parameters[name], self._stand_ins[name]
        weights, gradient = parameter.data, parameter.grad
        parameter.grad = None
        shape = (len(weights), -1) if weights.dim() > 2 else weights.shape
        stand_in.data = weights.view(shape).float()  # float32 weights themselves, which are stepped in place
        stand_in.grad = gradient.reshape(shape).float()
        group: dict[str, Any] = self.optimizer.param_groups[0]
        everyone, group["params"] = group["params"], [stand_in]
        self.optimizer.step()
        group["params"] = everyone
        if weights.dtype != stand_in.dtype:
            generator = generator_for(*self.key, "rounding", name, device=weights.device)
            weights.copy_(round_stochastically(stand_in.data, generator).view(weights.shape))
        stand_in.grad, stand_in.data = None, self._nothing[name]


def round_stochastically(values: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """Round to bfloat16, up or down by chance, so that the mean of many roundings is the value itself.

    Rounding to the nearest would lose every change that is smaller than half of the last place, which at usual
    learning rates are nearly all of them.

    Args:
        values: float32; it is used up.
        generator: on the same device.
    """
    import torch

    bits = values.view(torch.int32)
    # Of a float32's bits the upper half is the bfloat16 below it in magnitude. What is added carries into it as often
    # as the lower half is a share of the last place.
    bits += torch.randint(2**_LOW_BITS, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits &= -(2**_LOW_BITS)
    return values.to(torch.bfloat16)
