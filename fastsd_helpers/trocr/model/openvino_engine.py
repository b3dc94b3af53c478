"""int8 on the CPU: the encoder and one decoder step as OpenVINO graphs, made here and run here.

Two graphs: `encoder` gives what the image looks like and, per decoder layer, the keys and values that every step
looks up; `decoder` is one step. Keys and values of the image are handed to the second graph once, not at every step,
the keys transposed as the product wants them: left as PyTorch has them, every step transposed all of them again, which
at base size was half of its time. Where bf16 is used they also lie in memory as bf16.
Neither package sends anything: the reporting of usage that both bring is left out (see `_without_reports`).
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.device import describe_device
from fastsd_helpers.errors import ModelError, needs_package
from fastsd_helpers.files import new_folder, write_atomic
from fastsd_helpers.inert import require_inert
from fastsd_helpers.model_lookup import GRAPHS, LANGUAGE
from fastsd_helpers.processes import file_lock
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.checkpoint import PICTURES, WORDS, Checkpoint, copy_files, open_in_bitsandbytes
from fastsd_helpers.trocr.model.signal_stack import signal_stack_kept
from fastsd_helpers.trocr.model.torch_engine import TorchEngine, cross_keys, decoder_step, position_rows

if TYPE_CHECKING:
    import torch

__all__ = ["Encoded", "GraphEngine", "int8_engine", "require_packages", "write_graphs"]

_VERSION = 3  # of the two graphs' inputs and outputs
_one_at_a_time = threading.RLock()  # what the two packages see in sys.modules holds for the whole process


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Import and use openvino and nncf as if their reporting package were not installed; both allow for that.

    Left alone, every conversion would be reported to its maker, without a question.
    """
    name = "openvino_telemetry"
    modules: dict[str, Any] = sys.modules
    with _one_at_a_time:
        before = modules.get(name)
        modules[name] = None  # makes `import openvino_telemetry` an ImportError
        # What was imported before holds the real one under the name `tm`. A copy is read: other threads import.
        loaded = [module for key, module in modules.copy().items() if key.startswith("openvino.tools.ovc") and module]
        changed = [module for module in loaded if before is not None and getattr(module, "tm", None) is before]
        try:
            if changed:
                stub = importlib.import_module("openvino.tools.ovc.telemetry_stub")
                for module in changed:
                    module.tm = stub
            yield
        finally:
            for module in changed:
                module.tm = before
            if before is None:
                del modules[name]
            else:
                modules[name] = before


@contextlib.contextmanager
def _quiet_conversion(packages: list[Any]) -> Iterator[None]:
    """Without nncf's tables and the tracer's remarks, which are for those who convert models of their own."""
    import warnings

    # Not by nncf.set_log_level: that quiets every handler hung on nncf's log, those of others too, and for good.
    loggers = [logging.getLogger(package.__name__) for package in packages]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _require(*names: str) -> list[Any]:
    hint = "Run: fastsd install trocr-int8, or choose --precision bf16 or fp32."
    with _without_reports(), needs_package("int8 on a CPU", hint):
        return [importlib.import_module(name) for name in names]


def require_packages() -> None:
    """Refuse to make int8 graphs where it cannot be done, before anything that takes its time.

    Raises:
        DependencyMissing: openvino or nncf is not installed.
    """
    _require("openvino", "nncf")


def write_graphs(
    checkpoint: Checkpoint, out: Path, *, method: str, batches: "list[torch.Tensor] | None" = None
) -> Path:
    """Write a model as a folder of graphs that opens like any other model.

    Args:
        checkpoint: opened with fp32 weights.
        out: the folder; it must not exist.
        method: none (fp32 graphs), dynamic (int8 weights) or static (the encoder's activations in int8 too, with ranges
            measured on `batches`; the decoder as in dynamic).
        batches: float32 [n, 3, h, w] each, for static.

    Raises:
        DependencyMissing: openvino, or nncf for int8, is not installed.
    """
    import torch

    openvino, *rest = _require("openvino", *(() if method == "none" else ("nncf",)))
    encoder_module, decoder_module, examples = _modules(checkpoint)
    config = checkpoint.model.config
    with (
        signal_stack_kept(),
        _without_reports(),
        _quiet_conversion(rest),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        height, width = checkpoint.pixels.height, checkpoint.pixels.width
        encoder = openvino.convert_model(encoder_module, example_input=examples[0])
        encoder.reshape({0: openvino.PartialShape([-1, 3, height, width])})
        decoder = openvino.convert_model(decoder_module, example_input=examples[1])
        layers = config.decoder.decoder_layers
        _name_ends(encoder, decoder, layers)
        if rest:
            encoder, decoder = _in_int8(rest[0], encoder, decoder, batches or [] if method == "static" else None)
    with new_folder(out) as fresh:
        (fresh / GRAPHS).mkdir()
        openvino.save_model(encoder, fresh / GRAPHS / "encoder.xml", compress_to_fp16=False)
        openvino.save_model(decoder, fresh / GRAPHS / "decoder.xml", compress_to_fp16=False)
        copy_files(checkpoint.folder, ("config.json", "generation_config.json", *PICTURES, *WORDS, LANGUAGE), fresh)
        about = {"version": _VERSION, "method": method, "from": checkpoint.folder.name, "layers": layers}
        about |= {"most_steps": config.decoder.max_position_embeddings, "openvino": openvino.__version__}
        write_atomic(fresh / GRAPHS / "about.json", json.dumps(about, indent=1).encode())
    return out


def _name_ends(encoder: Any, decoder: Any, layers: int) -> None:
    names = [f"{what}{layer}{part}" for what in ("own_", "cross_") for layer in range(layers) for part in "kv"]
    for ends, called in (
        (encoder.inputs, ["pixels"]),
        (encoder.outputs, ["hidden", *names[2 * layers :]]),
        (decoder.inputs, ["tokens", "step", *names]),
    ):
        for end, name in zip(ends, called, strict=True):
            end.get_tensor().set_names({name})


def _in_int8(nncf: Any, encoder: Any, decoder: Any, batches: "list[torch.Tensor] | None") -> tuple[Any, Any]:
    """Both graphs with int8 weights; with batches the encoder's activations too (W8A8), in the ranges of these."""
    mode = nncf.CompressWeightsMode.INT8_ASYM
    if batches is None:
        encoder = nncf.compress_weights(encoder, mode=mode)
    else:
        data = nncf.Dataset([batch.numpy() for batch in batches])
        kind = nncf.ModelType.TRANSFORMER
        encoder = nncf.quantize(encoder, data, model_type=kind, subset_size=max(1, len(batches)))
    return encoder, nncf.compress_weights(decoder, mode=mode)


def _modules(checkpoint: Checkpoint) -> tuple[Any, Any, tuple[Any, Any]]:
    """The two graphs as modules, with example inputs of the right kinds; shapes stay free."""
    import torch

    model = checkpoint.model
    decoder, head = model.decoder.model.decoder, model.decoder.output_projection
    config = model.config.decoder
    layers, heads = config.decoder_layers, config.decoder_attention_heads

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden = self.model.encoder(pixels).last_hidden_state
            inner = self.model.enc_to_dec_proj(hidden) if hasattr(self.model, "enc_to_dec_proj") else hidden
            return (
                hidden,
                *(part for keys, values in cross_keys(decoder, inner) for part in (keys.transpose(2, 3), values)),
            )

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.head = decoder, head
            rows = position_rows(decoder, config.max_position_embeddings)
            self.register_buffer("positions", rows.detach().clone())
            self.padding = None if config.use_learned_position_embeddings else decoder.padding_idx

        def forward(self, tokens: torch.Tensor, step: torch.Tensor, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pairs = [(keys[place], keys[place + 1]) for place in range(0, len(keys), 2)]
            position = self.positions.index_select(0, step)[None]
            if self.padding is not None:
                position = position * (tokens != self.padding)[..., None]
            own, cross = pairs[:layers], pairs[layers:]
            scores, own = decoder_step(self.decoder, self.head, tokens, position, own, cross, attend=_attend)
            return (scores, *(part for pair in own for part in pair))

    pixels = torch.zeros(2, 3, checkpoint.pixels.height, checkpoint.pixels.width)
    with torch.no_grad():
        places = model.encoder(pixels[:1]).last_hidden_state.shape[1]
    size = config.hidden_size // heads
    own = [torch.zeros(6, heads, 2, size) for _ in range(2 * layers)]
    cross = [torch.zeros(2, heads, *shape) for _ in range(layers) for shape in ((size, places), (places, size))]
    step = (torch.full((2, 3), 2), torch.tensor([2]), *own, *cross)
    return Encoder().eval(), Step().eval(), (pixels, step)


def _attend(
    query: "torch.Tensor", keys: "torch.Tensor", values: "torch.Tensor", scaling: float, of_picture: bool
) -> "torch.Tensor":
    """Attention by hand. Its own past is one query long: sums, which OpenVINO leaves as they are.

    What looks like attention OpenVINO 2026.4 makes into one operation, which for keys that grow by one a step is wrong
    from the sixteenth on.
    """
    query = query * scaling
    if of_picture:
        return (query @ keys).softmax(dim=-1) @ values
    weights = (query * keys).sum(dim=-1).softmax(dim=-1)
    return (weights[..., None] * values).sum(dim=2, keepdim=True)


@dataclass
class Encoded:
    """What the encoder graph gave for some lines: `hidden` [n, places, width] (torch) and the keys and values."""

    hidden: "torch.Tensor"
    # numpy, k [n, heads, d, places] and v [n, heads, places, d] of layer 0, of layer 1, ...; bf16 in float16's clothes,
    # since numpy has no bf16: to be moved, not to be computed with.
    cross: list[Any]

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, lines: Any) -> "Encoded":
        return Encoded(self.hidden[lines], [array[lines] for array in self.cross])


@dataclass
class _State:
    request: Any
    encoded: Encoded
    own: list[Any]
    lines: int
    beams: int
    steps: int = 0


class GraphEngine:
    """A model's graphs, as the searches use them; see TorchEngine."""

    def __init__(self, folder: Path) -> None:
        require_inert(folder / GRAPHS)
        (openvino,) = _require("openvino")
        self._openvino = openvino
        about = json.loads((folder / GRAPHS / "about.json").read_text(encoding="utf-8"))
        if about["version"] != _VERSION:
            raise ModelError(
                f"The graphs in {folder} were made by another version of fastsd_helpers.", "Quantize the model again."
            )
        self.most_steps, self._layers = int(about["most_steps"]), int(about["layers"])
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdigit():
            settings["INFERENCE_NUM_THREADS"] = int(threads)
        # fp32 graphs stay fp32; beside int8 a shorter format costs nothing in accuracy that int8 has not cost.
        short = about["method"] != "none" and describe_device().has_bf16
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if short else "f32"
        self._held = openvino.Type.bf16 if short else openvino.Type.f32
        try:
            with signal_stack_kept():
                core = openvino.Core()
                encoder, decoder = (core.read_model(folder / GRAPHS / f"{name}.xml") for name in ("encoder", "decoder"))
                self._encoder = core.compile_model(self._holding(encoder, encoder.outputs), "CPU", settings)
                self._decoder = core.compile_model(self._holding(decoder, decoder.inputs), "CPU", settings)
        except RuntimeError as err:
            raise ModelError(
                f"The graphs in {folder} cannot be opened: {str(err).splitlines()[0]}", "Quantize the model again."
            ) from err

    def _holding(self, model: Any, ends: list[Any]) -> Any:
        """The graph with the image's keys and values among these inputs or outputs in the type they are held in."""
        from openvino.preprocess import PrePostProcessor

        process = PrePostProcessor(model)
        for end in ends:
            if any(name.startswith("cross_") for name in end.get_names()):
                side = process.input if end in model.inputs else process.output
                side(end.get_any_name()).tensor().set_element_type(self._held)
        return process.build()

    def encode(self, pixels: "torch.Tensor") -> Encoded:
        """float32 [lines, 3, h, w] -> the lines as the decoder graph takes them."""
        import numpy as np
        import torch

        request = self._encoder.create_infer_request()
        request.infer([pixels.numpy()])
        # Copied: the memory is the request's, which ends here.
        hidden, *cross = (np.array(request.get_output_tensor(at).data) for at in range(len(self._encoder.outputs)))
        return Encoded(torch.from_numpy(hidden), cross)

    def begin(self, hidden: Encoded, beams: int, steps: int) -> _State:
        """Prepare the search over encoded lines."""
        import numpy as np

        lines, heads, _places, size = hidden.cross[1].shape
        own = [np.zeros((lines * beams, heads, 0, size), np.float32) for _ in hidden.cross]
        state = _State(self._decoder.create_infer_request(), hidden, own, lines, beams)
        self._set_cross(state)
        return state

    def _set_cross(self, state: _State) -> None:
        for place, array in enumerate(state.encoded.cross):
            tensor = self._openvino.Tensor(array, array.shape, self._held)  # the same memory
            state.request.set_input_tensor(2 + len(state.own) + place, tensor)

    def step(self, state: _State, tokens: "torch.Tensor") -> "torch.Tensor":
        """tokens [lines, beams] -> float32 scores before softmax, [lines, beams, vocabulary]."""
        import numpy as np
        import torch

        tensor = self._openvino.Tensor
        inputs = [np.ascontiguousarray(tokens.numpy()), np.array([state.steps], np.int64), *state.own]
        for place, array in enumerate(inputs):
            state.request.set_input_tensor(place, tensor(array, shared_memory=False))
        state.request.infer()
        scores = np.array(state.request.get_output_tensor(0).data, dtype=np.float32)
        # Copied: the next step writes its own into the same memory.
        state.own = [np.array(state.request.get_output_tensor(1 + place).data) for place in range(len(state.own))]
        state.steps += 1
        return torch.from_numpy(scores)

    def keep(self, state: _State, lines: "torch.Tensor") -> None:
        """Go on with these lines alone."""
        import numpy as np

        lines = lines.numpy()
        rows = (lines[:, None] * state.beams + np.arange(state.beams)).ravel()
        state.own = [array[rows] for array in state.own]
        state.encoded = state.encoded[lines]
        state.lines = len(lines)
        self._set_cross(state)

    def reorder(self, state: _State, beams: "torch.Tensor") -> None:
        """Let beam j of line i go on from what was beam `beams[i, j]`."""
        import numpy as np

        rows = (np.arange(state.lines)[:, None] * state.beams + beams.numpy()).ravel()
        state.own = [array[rows] for array in state.own]


# ------------------------------------------------------------------------------------------- int8 when opened


def int8_engine(checkpoint: Checkpoint) -> Any:
    """The int8 engine for a reader: its own graphs, bitsandbytes on a GPU, else graphs made now and kept.

    Made on load they have int8 weights and no calibration; `quantize` makes and measures better ones.

    Raises:
        DependencyMissing: openvino or nncf is not installed.
    """
    if checkpoint.has_graphs:
        return GraphEngine(checkpoint.folder)
    if checkpoint.device == "cuda":
        return TorchEngine(open_in_bitsandbytes(checkpoint), device="cuda")
    require_packages()
    folder = _kept_folder(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that begin together would make it over each other.
    with file_lock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            logger.info("Making the int8 graphs of %s, once; they are kept in %s", checkpoint.folder.name, folder)
            write_graphs(checkpoint, folder, method="dynamic")
    checkpoint.model = None  # 1.3 GB of weights at base size that nobody needs any more
    return GraphEngine(folder)


def _kept_folder(checkpoint: Checkpoint) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    state = hashlib.sha256()
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file():
            about = path.resolve().stat()
            state.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return cache / "fastsd" / "readers" / f"{checkpoint.folder.name}-int8-{_VERSION}-{state.hexdigest()[:16]}"
