"""What parity_comfyui.py and parity_forge.py share: tensors without memory, and a record of what loaders lack."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# The only weight whose values a loader looks at (SD 2.x: is it a velocity model?); zeros mean no.
_LOOKED_AT = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def tensors_of(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> tensor of the meta device; where a loader looks at the values, zeros in memory."""
    import torch

    formats = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
    made = {}
    for name, (dtype, shape) in listed.items():
        device = "cpu" if name.endswith(_LOOKED_AT) or 0 in shape else "meta"
        made[name] = torch.zeros(shape, dtype=formats[dtype], device=device)
    return made


class Answer:
    """What one UI said about one export."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.predicts: str | None = None
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.errors: list[str] = []

    def note(self, *, whose: str = "", missing: Any = (), extra: Any = ()) -> None:
        """Take down names under what they were loaded into."""
        start = f"{whose}: " if whose else ""
        self.missing += [start + name for name in missing]
        self.extra += [start + name for name in extra]


@contextmanager
def recorded(answer: Answer, whose: Callable[[Any], str]) -> Iterator[None]:
    """Note what every `load_state_dict` of the block lacks and does not use, whatever the UI does with it."""
    import torch

    load = torch.nn.Module.load_state_dict

    def noted(self: Any, given: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
        found = load(self, given, *rest, **options)
        answer.note(whose=whose(self), missing=found.missing_keys, extra=found.unexpected_keys)
        return found

    torch.nn.Module.load_state_dict = noted
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = load


def note_lora(answer: Answer, given: Mapping[str, Any], places: Mapping[str, str], weights: Mapping[str, Any]) -> None:
    """Compare a LoRA's layers with the weights that a UI would add them to.

    Args:
        given: the file's tensors.
        places: layer of the file -> name of the model's weight.
        weights: that name -> its tensor.
    """
    for layer in sorted({name.partition(".")[0] for name in given}):
        if layer not in places:
            continue
        up, down = given[f"{layer}.lora_up.weight"], given[f"{layer}.lora_down.weight"]
        weight = weights[places[layer]]
        if up.shape[0] != weight.shape[0] or down[0].numel() != weight[0].numel():
            shapes = f"{list(up.shape)} and {list(down.shape)}"
            answer.errors.append(f"{layer}: {shapes} do not fit {places[layer]}, {list(weight.shape)}")


def print_answers(answers: Mapping[str, Answer]) -> None:
    """The last line of standard output: all of it as one JSON object."""
    print(json.dumps({name: vars(answer) for name, answer in answers.items()}))
