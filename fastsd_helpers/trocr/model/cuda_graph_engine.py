"""The model's decoder steps on an NVIDIA GPU: recorded once as a CUDA graph, then replayed with a single call.

A step of trocr-base is some four hundred small kernels, and starting them one by one takes longer than their work. A
recording has fixed shapes and addresses, so keys and values lie in buffers that are filled step by step, steps to come
are masked, and lines that have ended leave room that is used again.

Our tests have no GPU: they show that a step over the buffers gives the tokens of the plain one, on the CPU. Whether a
recording gives what the step gives is checked on the user's GPU, each time one is made; where it does not, or cannot
be made, the step runs without one, and that is said.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.torch_engine import DecoderState, TorchEngine, decoder_step

if TYPE_CHECKING:
    import torch

__all__ = ["RecordedEngine"]

_STEPS_UNIT = 32  # buffers are made for this many steps, or twice, three times as many
_WARM_UP = 3  # runs before the recording, in which libraries choose their kernels; as PyTorch's documentation has it
_TOLERANCE = 1e-3  # of the largest score: the same kernels on the same numbers


@dataclass
class _Buffers:
    """What recordings read and write; every tensor begins with `lines` or with `lines * beams`.

    cross, own: per layer (k, v), as in DecoderState, `own` with room for `steps` steps. mask: [1, 1, 1, steps], added
    to the attention's scores. place: int64 [1], the step. recorded: number of lines -> (graph, its scores).
    """

    lines: int
    beams: int
    steps: int
    cross: list[tuple[Any, Any]]
    own: list[tuple[Any, Any]]
    tokens: Any
    position: Any
    mask: Any
    place: Any
    recorded: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def fits(self, lines: int, beams: int, steps: int, places: int) -> bool:
        """Whether a search of this size has room, over images with so many places."""
        return (
            lines <= self.lines and beams == self.beams and steps <= self.steps and places == self.cross[0][0].shape[2]
        )


class RecordedEngine(TorchEngine):
    """A TorchEngine whose steps are recorded, while `record` holds: until one could not be."""

    def __init__(self, model: Any, *, device: str) -> None:
        super().__init__(model, device=device)
        self.record = True
        self._held: _Buffers | None = None

    @property
    def _buffers(self) -> _Buffers:
        assert self._held is not None  # `begin` made them
        return self._held

    def begin(self, hidden: "torch.Tensor", beams: int, steps: int) -> DecoderState:
        """Prepare the search over the lines of `hidden`; only one search runs at a time."""
        cross = self._cross_keys(hidden)
        lines, places = len(hidden), cross[0][0].shape[2]
        if self._held is None or not self._held.fits(lines, beams, steps, places):
            self._held = None  # gives their memory back before more is asked for
            self._held = self._make_buffers(cross, lines, beams, steps)
        for buffers, found in zip(self._buffers.cross, cross, strict=True):
            for buffer, values in zip(buffers, found, strict=True):
                buffer[:lines].copy_(values)
        self._buffers.mask.fill_(float("-inf"))
        return DecoderState(self._buffers.cross, self._buffers.own, lines, beams)

    def step(self, state: DecoderState, tokens: "torch.Tensor", weights: list | None = None) -> "torch.Tensor":
        """As TorchEngine's."""
        buffers, lines = self._buffers, state.lines
        buffers.tokens[:lines].copy_(tokens)
        buffers.position[:lines].copy_(self._position(state.steps, tokens))
        buffers.place.fill_(state.steps)
        buffers.mask[..., state.steps] = 0
        state.steps += 1
        size = self._size(lines)
        if self.record and size not in buffers.recorded:
            self._record(size)
        if weights is not None or not self.record:
            return self._step(lines, weights).float()
        graph, scores = buffers.recorded[size]
        graph.replay()
        return scores[:lines].float()

    def _select(self, pairs: list[tuple[Any, Any]], rows: "torch.Tensor") -> list[tuple[Any, Any]]:
        """As TorchEngine's, but they move to the front of the buffers: recordings know no other place."""
        for pair in pairs:
            for values in pair:
                values[: len(rows)] = values.index_select(0, rows)
        return pairs

    def _make_buffers(self, cross: list[tuple[Any, Any]], lines: int, beams: int, steps: int) -> _Buffers:
        import torch

        steps = min(-(-steps // _STEPS_UNIT) * _STEPS_UNIT, self.most_steps)
        own = []
        for keys, _values in cross:
            shape = (lines * beams, keys.shape[1], steps, keys.shape[3])
            # Zeros, for what is masked is still multiplied by zero, and that must not be a NaN.
            own.append(tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv"))
        width = self._positions.shape[-1]
        return _Buffers(
            lines, beams, steps, [tuple(torch.zeros_like(values) for values in pair) for pair in cross], own,
            tokens=torch.zeros((lines, beams), dtype=torch.long, device=self.device),
            position=torch.zeros((lines, beams, width), dtype=self.dtype, device=self.device),
            mask=torch.zeros((1, 1, 1, steps), dtype=self.dtype, device=self.device),
            place=torch.zeros(1, dtype=torch.long, device=self.device),
        )  # fmt: skip

    def _size(self, lines: int) -> int:
        """How many lines are computed for so many: all there is room for, or a half, a quarter, an eighth of them."""
        size = self._buffers.lines
        while size % 2 == 0 and size // 2 >= lines:
            size //= 2
        return size

    def _step(self, lines: int, weights: list | None) -> "torch.Tensor":
        """The scores of the first lines in the buffers; running it again changes nothing."""
        from torch.nn.functional import scaled_dot_product_attention

        buffers = self._buffers
        rows = lines * buffers.beams

        def append(own: Any, keys: Any, values: Any) -> tuple[Any, Any]:
            own[0].index_copy_(2, buffers.place, keys)
            own[1].index_copy_(2, buffers.place, values)
            return own

        def attend(query: Any, keys: Any, values: Any, scaling: float, of_picture: bool) -> Any:
            return scaled_dot_product_attention(query, keys, values, attn_mask=None if of_picture else buffers.mask)

        scores, _own = decoder_step(
            self.decoder, self.head, buffers.tokens[:lines], buffers.position[:lines],
            [(keys[:rows], values[:rows]) for keys, values in buffers.own],
            [(keys[:lines], values[:lines]) for keys, values in buffers.cross],
            weights, attend, append,
        )  # fmt: skip
        return scores

    def _record(self, lines: int) -> None:
        """Record the step for so many lines. Source: PyTorch's documentation, "CUDA semantics", CUDA graphs."""
        import torch

        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    expected = self._step(lines, None)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores = self._step(lines, None)
            graph.replay()
            away = float((scores - expected).abs().max() / expected.abs().max())
        except torch.cuda.OutOfMemoryError:
            self._held = None  # what is tried next is smaller
            raise
        except RuntimeError as err:
            self._give_up(f"a step cannot be recorded ({str(err).splitlines()[0]})")
            return
        if away <= _TOLERANCE:
            self._buffers.recorded[lines] = (graph, scores)
        else:  # a NaN too
            self._give_up(f"a recorded step's scores are off by {away:.1e}")

    def _give_up(self, reason: str) -> None:
        self.record = False
        logger.warning("Reading without CUDA graphs, which is slower: %s.", reason)
