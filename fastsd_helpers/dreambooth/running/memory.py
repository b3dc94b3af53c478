"""What a stage's optimizer step holds in memory at its peak: one formula for every family, method and processor.

    weights + optimizer's state + averages + (values of the forward pass, gradients) at their most + the library's own

No weights are loaded and no device is asked. The networks are built on the `meta` device as they are trained, with
their LoRA; weights, state and averages are counted. What the forward pass keeps is what autograd saves in one forward
pass there, in the dtypes of autocast. On the way back it is given up in the opposite order, while gradients come: the
sum is taken at every tensor and every function, which has the gradients of what it made and of what it was given at
once. With gradient checkpointing each block's inputs are kept, and one block at a time goes its own way back.
What an allocator loses is not in it, nor what is there before and after the steps (the VAE, samples).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.families import Family
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel, dtypes_of, suit_cpu, suits_cpu
from fastsd_helpers.dreambooth.training.lora import add_lora
from fastsd_helpers.dreambooth.training.optimizers import state_bytes
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["Memory", "StageMemory"]

_MIB = 2**20
# CUDA's context and libraries; Python with torch and diffusers.
_OWN_BYTES = {"cuda": 600 * _MIB, "cpu": 700 * _MIB, "mps": 700 * _MIB}
# In float32 a tensor itself, its gradient, the mean square, the step and the chance of its rounding.
_STEP_BYTES = 5 * 4
_ATTENTION = "scaled_dot_product_attention"
# What autocast computes in 16 bits, and on a GPU in float32 (torch's documentation, "Autocast Op Reference").
_PRODUCTS = frozenset(["linear", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm"]) | {_ATTENTION}
_NORMS = frozenset(["layer_norm", "group_norm", "softmax"])


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage's optimizer step holds at its peak.

    Attributes:
        weights: of the networks.
        learning: the optimizer's state and the averages of ema.
        step: values of the forward pass and gradients, when they are most.
        own: what the library takes for itself.
    """

    weights: int
    learning: int
    step: int
    own: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.learning + self.step + self.own


class Memory:
    """The memory of a model's training on one kind of device, by its settings.

    Args:
        base: whose shapes are looked at.
        device: cuda, mps or cpu.
    """

    def __init__(self, base: BaseModel, device: str) -> None:
        self._base, self.device = base, device
        self._built: dict[tuple, dict[str, Any]] = {}

    def peak_bytes(self, config: ResolvedConfig) -> int:
        """The most that any of a run's stages holds."""
        stages = [stage for stage in STAGE_NAMES if getattr(config, f"{stage}_steps")]
        return max(self.of_stage(config, stage).total for stage in stages)

    def surely_fits(self, config: ResolvedConfig, room: int) -> bool:
        """Whether so many bytes are so much more than this training takes that nothing need be worked out.

        A bound that costs no time, several times too large: what the forward pass keeps goes with the networks' width,
        which is the root of their weights, and with the latents' area.
        """
        family, folder = self._base.family, self._base.folder
        weights = sum(
            path.stat().st_size // 2
            for part in {family.denoiser, *family.trained_encoders}
            for path in (folder / part).iterdir()
            if path.suffix in (".safetensors", ".bin")
        )
        rows = config.batch_size * (2 if config.class_prompts else 1)
        _, height, width = family.latent_shape(*[max(config.training_resolutions)] * 2)
        return _OWN_BYTES[self.device] + 20 * weights + 200 * int(weights**0.5) * rows * height * width < room // 2

    def of_stage(self, config: ResolvedConfig, stage: str, size: tuple[int, int] | None = None) -> StageMemory:
        """The memory of a stage's optimizer step.

        Args:
            config: with the method, precision, optimizer, batch and resolutions.
            stage: that is trained.
            size: width and height of the largest images; if it is not given, the largest resolution's square.

        Raises:
            DependencyMissing: the method is lora, and peft is not installed.
        """
        networks = self._networks(config, stage)
        weights = [each for module in networks.values() for each in module.parameters()]
        trained = [each for each in weights if each.requires_grad]
        values, gradients = sum(each.numel() for each in trained), sum(map(_size, trained))
        one_by_one = config.optimizer == "adafactor" and config.accumulation * (config.processes or 1) == 1
        recorded = _Forward(self._base.family, config, self.device, one_by_one=one_by_one)
        recorded.run(networks, size)
        # Several processes sum the gradients beside their own.
        sums = 0 if one_by_one else gradients * (2 if (config.processes or 1) > 1 else 1)
        return StageMemory(
            weights=sum(map(_size, weights)),
            learning=values * (state_bytes(config.optimizer) + (4 if config.ema else 0)),
            step=max(recorded.most(gradients if config.accumulation > 1 else 0), sums),
            own=_OWN_BYTES[self.device],
        )

    def _networks(self, config: ResolvedConfig, stage: str) -> dict[str, Any]:
        """The networks of a stage's step by part, with what is trained in them marked."""
        family, (_, weights) = self._base.family, dtypes_of(self._base.family, config)
        lora = (config.lora_rank, config.lora_targets) if config.method == "lora" else None
        plain = suits_cpu(config, self.device)
        key = (stage, weights, lora, plain)
        if key in self._built:
            return self._built[key]
        learning = family.parts_of(stage)
        networks = {
            part: _cast_weights(self._base.build_empty(part), weights).requires_grad_(part in learning and not lora)
            for part in {*learning, family.denoiser}
        }
        if lora:  # its alpha and its values do not matter here
            own = {part: networks[part] for part in learning}
            add_lora(family, own, stage, rank=lora[0], alpha=1.0, seed=0, targets=lora[1])
        for network in networks.values() if plain else ():
            suit_cpu(network)
        self._built = {key: networks}  # a model at a time: its thousand modules are large themselves
        return networks


def _cast_weights(network: Any, dtype: Any) -> Any:
    import torch

    return torch.nn.Module.to(network, dtype)  # diffusers' own warns that a checkpoint's dtypes would be lost


def _size(tensor: "torch.Tensor") -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(storages: dict[int, Any]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _learned(values: Any) -> "list[torch.Tensor]":
    """The tensors among a function's values that a gradient comes to."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor) and each.requires_grad]


class _Forward:
    """One forward pass on `meta`: what it keeps for the way back, and where gradients come there.

    Args:
        family: of the model.
        config: with the batch, the resolutions, precision and gradient checkpointing.
        device: for which autocast is imitated; torch has none for `meta`.
        one_by_one: each tensor is stepped and its gradient freed as soon as that is there.
    """

    def __init__(self, family: Family, config: ResolvedConfig, device: str, *, one_by_one: bool) -> None:
        self._family, self._config, self._on_gpu = family, config, device == "cuda"
        self._dtype, self._one_by_one = dtypes_of(family, config)[0], one_by_one
        self._weights: set[int] = set()
        self._copies: dict[int, torch.Tensor] = {}  # autocast makes those of trained weights once
        self._saved: dict[int, Any] = {}  # storages by number, held so that no number is given twice
        # In the order of the forward pass: bytes kept, of weights' gradients, of the gradients of a function's values;
        # or those of a block that is computed again.
        self._events: list[tuple[int, int, int] | list] = []

    def most(self, earlier: int) -> int:
        """Bytes of kept values and gradients when they are most.

        Args:
            earlier: bytes of gradients that are there before the pass, of the same weights.
        """
        copies = {each.untyped_storage()._cdata: each.untyped_storage() for each in self._copies.values()}
        found, _ = self._most_on_the_way_back(self._events, 0, earlier, there=bool(earlier))
        return max(found, _bytes(self._saved | copies) + earlier)

    def _most_on_the_way_back(self, events: list, kept: int, gradients: int, *, there: bool) -> tuple[int, int]:
        """The most bytes while these are given up, and those of the weights' gradients after it.

        Args:
            events: in the order of the forward pass.
            kept: bytes of values from before them.
            gradients: bytes of the weights' gradients so far.
            there: the weights' gradients are all there already.
        """
        most, kept = 0, kept + sum(each[0] for each in events if isinstance(each, tuple))
        for event in reversed(events):
            if isinstance(event, list):
                found, gradients = self._most_on_the_way_back(event, kept, gradients, there=there)
                most = max(most, found)
                continue
            more, gradient, of_values = event
            if self._one_by_one:
                gradients = gradient
            elif not there:
                gradients += gradient
            most = max(most, kept + of_values + gradients)
            kept -= more
        return most, gradients

    def run(self, networks: dict[str, Any], size: tuple[int, int] | None) -> None:
        """Make the pass.

        Args:
            networks: the denoiser, and the text encoders if they learn.
            size: width and height of the images; if it is not given, the largest resolution's square.
        """
        import torch
        from torch.autograd.graph import saved_tensors_hooks

        config, family = self._config, self._family
        encoders = dict(networks)
        denoiser = encoders.pop(family.denoiser)
        modules = [module for network in networks.values() for module in network.train().modules()]
        self._weights = {each.untyped_storage()._cdata for module in modules for each in module.parameters()}
        for module in modules:
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = bool(config.gradient_checkpointing)
                module._gradient_checkpointing_func = self._block
        rows, largest = config.batch_size * (2 if config.class_prompts else 1), max(config.training_resolutions)
        with torch.device("meta"):
            latents = torch.empty(rows, *family.latent_shape(*(size or (largest, largest))))
            timesteps = torch.empty(rows, dtype=torch.int64)
            with _watch_functions(self._call), saved_tensors_hooks(self._note, lambda kept: kept):
                text, told = family.blank_conditions(denoiser, rows, encoders)
                family.predict(denoiser, latents, timesteps, text, told)

    def _note(self, tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._saved:
            self._saved[storage._cdata] = storage
            self._events.append((storage.nbytes(), 0, 0))
        return tensor

    def _block(self, function: Callable[..., Any], *args: Any) -> Any:
        """One block that is computed again: its inputs are kept to its end, its own values while that is done."""
        import torch

        given = [each for each in args if isinstance(each, torch.Tensor)]
        saved, events = self._saved, self._events
        inside: list[tuple[int, int, int] | list] = []
        self._saved = {each.untyped_storage()._cdata: each.untyped_storage() for each in given}
        self._events = inside
        found = function(*args)
        self._saved, self._events = saved, events
        if inside:
            for each in given:
                self._note(each)
            self._events.append(inside)
        return found

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A function of torch as autocast calls it, noting what is trained of its inputs."""
        import torch
        from torch.utils._pytree import tree_map_only

        name = getattr(function, "__name__", "")
        to = self._dtype if name in _PRODUCTS else torch.float32 if name in _NORMS and self._on_gpu else None
        if name in _PRODUCTS | _NORMS | {"embedding"}:
            args, kwargs = tree_map_only(torch.Tensor, partial(self._cast, to if self._dtype else None), (args, kwargs))
        if name == _ATTENTION:
            # Every processor has a kernel that keeps no attention map; `meta` would choose the one that does.
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        else:
            found = function(*args, **kwargs)
        self._note_gradients((args, kwargs), found)
        return found

    def _note_gradients(self, given: Any, made: Any) -> None:
        """What a function has at once on the way back: gradients of the values it made and of those it was given."""
        outer, inner = (
            {each.untyped_storage()._cdata: each for each in _learned(of)}
            for of in (made, given)  # two views of one tensor have one gradient
        )
        if outer and not outer.keys() & inner.keys():  # else it is a view: the gradient is handed on
            inner = {place: each for place, each in inner.items() if place not in self._weights}
            self._events.append((0, 0, sum(map(_size, [*outer.values(), *inner.values()]))))

    def _cast(self, to: Any, tensor: "torch.Tensor") -> "torch.Tensor":
        if tensor.is_leaf and tensor.requires_grad and tensor.untyped_storage()._cdata in self._weights:
            step = _STEP_BYTES * tensor.numel() if self._one_by_one else 0
            self._events.append((0, _size(tensor) + step, 0))
            if to == self._dtype and to is not None and tensor.dtype != to:
                return self._copies.setdefault(id(tensor), tensor.to(to))
        return tensor if to is None or not tensor.is_floating_point() else tensor.to(to)


def _watch_functions(call: Callable[[Any, Any, Any], Any]) -> Any:
    """While this lasts, every function of torch is called by `call(function, args, kwargs)`."""
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return call(function, args, kwargs or {})

    return Watch()
