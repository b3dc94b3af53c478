"""The optimizer of a stage, its learning rate as a function of the step, and its state as plain tensors."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.processes import Ranks

if TYPE_CHECKING:
    import torch

__all__ = ["build_optimizer", "lr_factor", "lr_factor_in_legs", "pack_optimizer", "sum_gradients", "unpack_optimizer"]

_WEIGHT_DECAY = 1e-2


def build_optimizer(kind: str, parameters: "list[torch.nn.Parameter]", lr: float) -> Any:
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


def pack_optimizer(optimizer: Any, names: list[str]) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """The state as named tensors ("exp_avg/conv_in.weight") and as JSON-able leftovers."""
    import torch

    tensors, rest = {}, {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"{key}/{names[index]}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                rest[name] = value
    return tensors, rest


def unpack_optimizer(
    optimizer: Any, names: list[str], tensors: "dict[str, torch.Tensor]", rest: dict[str, Any]
) -> None:
    """Put a packed state back, by parameter name.

    Raises:
        CheckpointError: the state is of other parameters or another optimizer.
    """
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest}.items():
        key, _, parameter = name.partition("/")
        if parameter not in index:
            raise CheckpointError(
                f"The checkpoint has optimizer state of an unknown parameter {parameter}.",
                "It belongs to another model: start again with --restart.",
            )
        state.setdefault(index[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
