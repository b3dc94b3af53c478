"""The optimizer of a stage, its learning rate as a function of the step, and its state as plain tensors."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.training.adafactor import OneByOne
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.processes import Ranks

if TYPE_CHECKING:
    import torch

__all__ = ["Stepper", "lr_factor", "lr_factor_in_legs", "state_bytes", "sum_gradients", "weight_bytes"]

_WEIGHT_DECAY = 1e-2


def weight_bytes(config: Any) -> int:
    """Bytes of a weight that is trained: those of a run in bf16 Adafactor keeps in bf16."""
    return 2 if config.optimizer == "adafactor" and config.precision == "bf16" else 4


def state_bytes(kind: str) -> int:
    """Bytes that an optimizer keeps for a weight: two moments of one byte or of float32, or next to nothing."""
    return {"adamw8bit": 2, "adafactor": 0}.get(kind, 8)


class Stepper:
    """A stage's optimizer, how its step is taken, and its state.

    Attributes:
        optimizer: torch's or bitsandbytes' own.
    """

    def __init__(
        self,
        kind: str,
        parameters: "dict[str, torch.nn.Parameter]",
        lr: float,
        *,
        device: Any,
        scaled: bool = False,
        parts: int = 1,
    ) -> None:
        """Set it up.

        Args:
            kind: adamw, adamw8bit or adafactor.
            parameters: name -> parameter that is trained.
            lr: the learning rate at the beginning.
            device: the torch device.
            scaled: whether gradients are those of a scaled loss, as fp16 needs them.
            parts: forward passes whose gradients a step sums.
        """
        import torch

        self._names, self._parameters = list(parameters), list(parameters.values())
        self._one_by_one = OneByOne(parameters, lr) if kind == "adafactor" else None
        self.optimizer = self._one_by_one.optimizer if self._one_by_one else _adamw(kind, self._parameters, lr)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        if self._one_by_one and parts == 1:  # else a gradient is complete only after the last part
            self._one_by_one.step_in_backward()

    def begin(self, lr: float, key: tuple) -> None:
        """Begin a step with this learning rate; `key` is what its chance is drawn with."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._one_by_one:
            self._one_by_one.key = key

    def scale(self, loss: "torch.Tensor") -> "torch.Tensor":
        """The loss as its backward pass is begun with."""
        return self._scaler.scale(loss)

    def step(self) -> None:
        """Step what was not stepped yet, and free its gradients.

        AdamW's gradients are cut to a common norm of 1. Adafactor cuts each tensor's step by itself, which a step
        within the backward pass allows.
        """
        import torch

        if self._one_by_one:
            self._one_by_one.step()
            return
        self._scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
        """The state as named tensors ("exp_avg/conv_in.weight"), and the rest of it for a checkpoint's record."""
        import torch

        tensors, rest = {}, {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                name = f"{key}/{self._names[index]}"
                if isinstance(value, torch.Tensor):
                    tensors[name] = value
                else:
                    rest[name] = value
        return tensors, {"optimizer": rest, "scaler": self._scaler.state_dict()}

    def restore(self, tensors: "dict[str, torch.Tensor]", record: dict[str, Any]) -> None:
        """Put a state back, by parameter name.

        Args:
            tensors: as `state` gave them.
            record: the checkpoint's.

        Raises:
            CheckpointError: the state is of other parameters or another optimizer.
        """
        index = {name: number for number, name in enumerate(self._names)}
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**tensors, **record["optimizer"]}.items():
            key, _, parameter = name.partition("/")
            if parameter not in index:
                raise CheckpointError(
                    f"The checkpoint has optimizer state of an unknown parameter {parameter}.",
                    "It belongs to another model: start again with --restart.",
                )
            state.setdefault(index[parameter], {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if record["scaler"]:
            self._scaler.load_state_dict(record["scaler"])


def _adamw(kind: str, parameters: "list[torch.nn.Parameter]", lr: float) -> Any:
    """AdamW (decay 0.01, betas 0.9 and 0.999), or bitsandbytes' 8-bit form of it."""
    import torch

    if kind == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, weight_decay=_WEIGHT_DECAY)
    # One pass over all weights: on a CPU a small U-Net's hundreds of tensors take six times as long one by one.
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=_WEIGHT_DECAY, fused=True)


def sum_gradients(
    ranks: Ranks, parts: int, parameters: "list[torch.nn.Parameter]", backward: Callable[[int], float]
) -> float:
    """Sum the gradients of a step's parts, of which every process works out its own; returns the mean loss.

    They are summed in the parts' order, whoever works them out: the bits are those of one process, so that every
    process takes the same optimizer step, and another number of them may go on.

    Args:
        ranks: the processes.
        parts: of a step; their number divides it.
        parameters: whose gradients are none before, and the sums after.
        backward: adds a part's gradients to what there is, and returns its loss.
    """
    total = 0.0
    sums: list[torch.Tensor | None] = [None] * len(parameters)
    for first in range(0, parts, ranks.size):
        loss = backward(first + ranks.rank)
        if ranks.size > 1:
            ranks.add_in_order(sums, [parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
        for each in ranks.gather(loss):
            total += each / parts
    if ranks.size > 1:
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
    return total


def lr_factor(kind: str, step: int, steps: int) -> float:
    """The share of the learning rate at `step` (from 0) of `steps`: a pure function, so a resumed run agrees.

    linear falls to zero at the end, cosine too; constant_with_warmup rises over the first tenth.
    """
    if kind == "linear":
        return 1 - step / steps
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    if kind == "constant_with_warmup":
        return min(1.0, (step + 1) / max(1, steps // 10))
    return 1.0


def lr_factor_in_legs(kind: str, step: int, legs: list[int]) -> float:
    """The share of the learning rate at `step` of a stage that was lengthened: each leg has a schedule of its own."""
    for steps in legs:
        if step < steps:
            return lr_factor(kind, step, steps)
        step -= steps
    return 0.0
