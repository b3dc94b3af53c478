"""How fast lines are read at base geometry: transformers as documented and as files are shipped, and this model.

Random weights in the exact shape of trocr-base (334 million parameters), every line forced to the same number of
tokens: this says speed and memory, nothing of accuracy. Variants take turns, in an order that changes from round to
round; one line (or batch) of each before the first round pays for buffers; the median of the rounds counts. Ours also
turns tokens into text and works out confidences, theirs does not. Memory is the peak of a process of its own.
"""

import contextlib
import functools
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.bench import Report
from fastsd_helpers.device import describe_device, peak_memory_bytes
from fastsd_helpers.files import bytes_in
from fastsd_helpers.inert import require_inert
from fastsd_helpers.options import check, option, options_of
from fastsd_helpers.runtime import versions

__all__ = ["GEOMETRY", "INT8", "Settings", "measure", "write_random_reader"]

_THEIR_BEAMS, _OUR_BEAMS = "(d) transformers, beam 4", "(d) ours, beam 4, fp32"
# Ways to int8, see quantize: the weights alone, or the encoder's activations too.
INT8 = ("dynamic", "static")
# What every variant imports.
_OF_ALL = (
    "torch",
    "transformers.models.vit.modeling_vit",
    "transformers.models.trocr.modeling_trocr",
    "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder",
)
# (encoder width, layers, heads, inner), (decoder width, layers, heads, inner), words, side in pixels
GEOMETRY = {
    "base": ((768, 12, 12, 3072), (1024, 12, 16, 4096), 50265, 384),
    "tiny": ((64, 2, 4, 128), (64, 2, 4, 128), 300, 64),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark of `fastsd trocr read`."""

    geometry: Literal["base", "tiny"] = option("base", help="size of the model; tiny is for a quick try")
    lines: int = option(8, help="lines read by every variant in every round", low=1, high=10_000)
    tokens: int = option(16, help="tokens forced per line", low=2, high=128)
    rounds: int = option(3, help="rounds; the median counts", low=1, high=20)
    batch: int = option(8, help="batch size of the variants that use batches", low=1, high=1024)
    int8: bool = option(True, help="measure int8 too (needs openvino and nncf)")
    beams: bool = option(True, help="measure beam search with 4 beams too")
    threads: int = option(0, help="CPU threads of every variant; 0: their default", low=0, high=256)
    memory: bool = option(True, help="measure each variant's peak memory, in a separate process")
    work: str = option("", help="folder for the model (1.7 GB); empty: a temporary one")

    def __post_init__(self) -> None:
        check(self)


def write_random_reader(folder: Path, geometry: str) -> Path:
    """Write a model with random weights and the settings files as Microsoft ships them (cache off)."""
    import tokenizers
    import torch
    import transformers
    from tokenizers.models import WordLevel

    outer, inner, words, side = GEOMETRY[geometry]
    encoder = transformers.ViTConfig(
        image_size=side, hidden_size=outer[0], num_hidden_layers=outer[1], num_attention_heads=outer[2],
        intermediate_size=outer[3], qkv_bias=False,
    )  # fmt: skip
    decoder = transformers.TrOCRConfig(
        vocab_size=words, d_model=inner[0], decoder_layers=inner[1], decoder_attention_heads=inner[2],
        decoder_ffn_dim=inner[3], cross_attention_hidden_size=outer[0], is_decoder=True,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(config=config)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, use_cache=False
    )
    model.save_pretrained(folder)
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{place}" for place in range(4, words))]
    tokenizer = tokenizers.Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    pictures = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}, "resample": 2,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    return folder


def measure(settings: Settings) -> Report:
    """Time every variant and compare with (a), transformers as documented, one line at a time."""
    with tempfile.TemporaryDirectory(prefix="fastsd-bench-") as temporary:
        work = Path(settings.work) if settings.work else Path(temporary)
        with _threads(settings.threads):
            folder = work / f"random-{settings.geometry}"
            if not (folder / "preprocessor_config.json").is_file():
                write_random_reader(folder, settings.geometry)
            sizes = {"fp32 folder": bytes_in(folder)}
            if settings.int8:
                for method in INT8:
                    sizes[f"int8 folder, {method}"] = bytes_in(_int8_folder(folder, method))
            # Before the models are loaded here: a machine may not have room for them twice.
            names = list(_makers(folder, settings)) if settings.memory else []
            peaks = _peaks_apart(names, str(folder), settings) if names else {}
            seconds = _time_all({name: make() for name, make in _makers(folder, settings).items()}, settings)
    device = describe_device()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: settings.lines / value for name, value in medians.items()}
    a, b = (medians[name] for name in list(medians)[:2])
    data: dict[str, Any] = {
        "device": device.name,
        "versions": versions(),
        "settings": {item.name: getattr(settings, item.name) for item in options_of(Settings) if item.name != "work"},
        "seconds": seconds,
        "lines_per_second": rates,
        "times_a": {name: a / value for name, value in medians.items()},
        "times_b": {name: b / value for name, value in medians.items()},
        "sizes": sizes,
        "peak_memory_bytes": peaks,
    }
    lines = [
        f"{name:32} {rates[name]:8.3f} lines/s  {a / value:6.2f} x (a)  {b / value:6.2f} x (b)"
        + (f"  {peaks[name] / 1e9:5.2f} GB" if name in peaks else "")
        for name, value in medians.items()
    ]
    theirs, ours = medians.get(_THEIR_BEAMS), medians.get(_OUR_BEAMS)
    if theirs and ours:
        data["beam_ratio"] = theirs / ours
        lines.append(f"beam 4: {theirs / ours:.2f} x transformers")
    lines += [f"{name}: {size / 1e6:.0f} MB" for name, size in sizes.items()]
    return Report(data, lines)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give PyTorch and OpenVINO (which asks the environment) so many threads for a while; 0 changes nothing."""
    import torch

    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    if count:
        torch.set_num_threads(count)
        os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if count:
            os.environ.pop("OMP_NUM_THREADS")
            os.environ |= {"OMP_NUM_THREADS": variable} if variable is not None else {}


def _time_all(runs: "dict[str, Callable[[int], Any]]", settings: Settings) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(min(settings.batch, settings.lines))
    for turn in range(settings.rounds):
        names = list(runs)
        # Nobody is always the one who comes after the same other: a processor that is warm or throttled favours none.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            runs[name](settings.lines)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _peaks_apart(names: list[str], folder: str, settings: Settings) -> dict[str, int]:
    """Peak memory of each variant in a fresh process: the model loaded, one batch read.

    They are forks of one that has imported what all of them need, which takes longer than reading with a small model.
    """
    import multiprocessing  # not at import: it enters a second name for the main module

    context = multiprocessing.get_context("spawn")
    answer, there = context.Pipe(duplex=False)
    process = context.Process(target=_peaks_of_forks, args=(there, names, folder, settings))
    process.start()
    there.close()
    found = answer.recv()
    process.join()
    if isinstance(found, Exception):
        raise found
    return dict(found)


def _peaks_of_forks(there: Any, names: list[str], folder: str, settings: Settings) -> None:
    import multiprocessing

    context, peaks = multiprocessing.get_context("fork"), {}
    try:
        for module in _OF_ALL:
            importlib.import_module(module)
        for name in names:
            with context.Pool(1) as pool:
                peaks[name] = pool.apply(_peak_here, (name, folder, settings))
    except Exception as err:
        there.send(err)
    else:
        there.send(peaks)


def _peak_here(name: str, folder: str, settings: Settings) -> int:
    with _threads(settings.threads):
        _makers(Path(folder), settings)[name]()(min(settings.batch, settings.lines))
    return peak_memory_bytes("cuda" if describe_device().kind == "cuda" and "CPU" not in name else "host")


def _int8_folder(folder: Path, method: str) -> Path:
    from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
    from fastsd_helpers.trocr.model.openvino_engine import write_graphs

    int8 = folder.with_name(f"{folder.name}-int8-{method}")
    if not int8.is_dir():
        checkpoint = open_checkpoint(folder, precision="fp32", device="cpu")
        # Ranges of noise say nothing about accuracy, and neither do random weights: the speed is that of any ranges.
        lines = [checkpoint.pixels.batch([checkpoint.pixels.resize(picture)]) for picture in _noise(4)]
        write_graphs(checkpoint, int8, method=method, batches=lines if method == "static" else None)
    return int8


def _noise(count: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    return [Image.fromarray(chance.integers(0, 256, (48, 400, 3), dtype=np.uint8)) for _ in range(count)]


def _makers(folder: Path, settings: Settings) -> "dict[str, Callable[[], Callable[[int], Any]]]":
    """For each variant what loads it and gives what reads so many lines."""
    pictures = _noise(settings.lines)
    device = describe_device()
    forced = {"min_new_tokens": settings.tokens, "max_new_tokens": settings.tokens}

    @functools.cache
    def shipped() -> tuple[Any, Any]:
        import transformers

        require_inert(folder)
        model = (
            transformers.VisionEncoderDecoderModel.from_pretrained(folder, local_files_only=True).to(device.kind).eval()
        )
        return model, transformers.AutoImageProcessor.from_pretrained(
            folder, use_fast=False, local_files_only=True, trust_remote_code=False
        )

    def theirs(batch: int, **more: Any) -> "Callable[[], Callable[[int], Any]]":
        def make() -> "Callable[[int], Any]":
            import torch

            model, processor = shipped()

            def run(count: int) -> None:
                for first in range(0, count, batch):
                    chosen = pictures[first : min(count, first + batch)]
                    pixels = processor(chosen, return_tensors="pt").pixel_values.to(device.kind)
                    with torch.inference_mode():
                        model.generate(pixels, **forced, **more).cpu()  # a GPU is waited for

            return run

        return make

    def ours(precision: str, beams: int = 1) -> "Callable[[], Callable[[int], Any]]":
        def make() -> "Callable[[int], Any]":
            from fastsd_helpers.trocr import Reader

            method = precision.removeprefix("int8 ")
            source = folder if method == precision else _int8_folder(folder, method)
            kind, tokens = precision.partition(" ")[0], settings.tokens
            reader = Reader(source, beams, kind, tokens, tokens, False, batch_size=settings.batch)
            return lambda count: reader.read(pictures[:count])

        return make

    short = "fp16" if device.kind == "cuda" and not device.has_bf16 else "bf16"
    made = {
        "(a) transformers as documented": theirs(1),
        "(b) transformers, cache, batches": theirs(settings.batch, use_cache=True),
        "(c) ours, fp32": ours("fp32"),
        f"(c) ours, {short}": ours(short),
    }
    if settings.int8:
        made |= {f"(c) ours, int8 {method} (CPU)": ours(f"int8 {method}") for method in INT8}
    if settings.beams:
        made[_THEIR_BEAMS] = theirs(settings.batch, use_cache=True, num_beams=4)
        made[_OUR_BEAMS] = ours("fp32", 4)
    return made
