"""How fast lines are read at base geometry: transformers as documented and as files are shipped, and this reader.

Random weights in the exact shape of trocr-base (334 million parameters), every line forced to the same number of
tokens: this says speed and memory, nothing of accuracy. Variants take turns; the median of the rounds counts.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.bench import Report
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import describe_device, peak_memory_bytes, versions

__all__ = ["GEOMETRY", "Settings", "measure", "write_random_reader"]

# (encoder width, layers, heads, inner), (decoder width, layers, heads, inner), words, side in pixels
GEOMETRY = {
    "base": ((768, 12, 12, 3072), (1024, 12, 16, 4096), 50265, 384),
    "tiny": ((64, 2, 4, 128), (64, 2, 4, 128), 300, 64),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark of `fastsd trocr read`."""

    geometry: Literal["base", "tiny"] = option("base", help="shape of the model; tiny is for a try")
    lines: int = option(8, help="lines read by every variant in every round", low=1, high=10_000)
    tokens: int = option(16, help="tokens forced per line", low=2, high=128)
    rounds: int = option(3, help="rounds; the median counts", low=1, high=20)
    batch: int = option(8, help="lines in a batch, for the variants that use batches", low=1, high=1024)
    int8: bool = option(True, help="measure int8 too (needs openvino and nncf)")
    beams: bool = option(True, help="measure beam search with 4 beams too")
    work: str = option("", help="folder to keep the model in (1.7 GB); empty: a temporary one")

    def __post_init__(self) -> None:
        check(self)


def write_random_reader(folder: Path, geometry: str) -> Path:
    """Write a reader with random weights and the settings files as Microsoft ships them (cache off)."""
    import tokenizers
    import torch
    import transformers

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
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>")
    )
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
        folder = work / f"random-{settings.geometry}"
        if not (folder / "preprocessor_config.json").is_file():
            write_random_reader(folder, settings.geometry)
        variants, sizes = _variants(folder, work, settings)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _round in range(settings.rounds):
            for name, run in variants.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    device = describe_device()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    rates = {name: settings.lines / value for name, value in medians.items()}
    data: dict[str, Any] = {
        "device": device.name,
        "versions": versions(),
        "settings": {name: getattr(settings, name) for name in ("geometry", "lines", "tokens", "rounds", "batch")},
        "lines_per_second": rates,
        "times_a": {name: first / value for name, value in medians.items()},
        "sizes": sizes,
        "peak_memory_bytes": peak_memory_bytes("cuda" if device.kind == "cuda" else "host"),
    }
    lines = [f"{name:32} {rates[name]:8.3f} lines/s  {first / value:6.2f} x (a)" for name, value in medians.items()]
    theirs, ours = medians.get("(d) transformers, beam 4"), medians.get("(d) ours, beam 4, fp32")
    if theirs and ours:
        data["beam_ratio"] = theirs / ours
        lines.append(f"beam 4: {theirs / ours:.2f} x transformers")
    lines += [f"{name}: {size / 1e6:.0f} MB" for name, size in sizes.items()]
    return Report(data, lines)


def _variants(folder: Path, work: Path, settings: Settings) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.checkpoint import open_checkpoint
    from fastsd_helpers.trocr.graphs import write_graphs

    chance = np.random.default_rng(0)
    pictures = [Image.fromarray(chance.integers(0, 256, (48, 400, 3), dtype=np.uint8)) for _ in range(settings.lines)]
    device = describe_device()
    shipped = transformers.VisionEncoderDecoderModel.from_pretrained(folder).to(device.kind).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    forced = {"min_new_tokens": settings.tokens, "max_new_tokens": settings.tokens}

    def theirs(batch: int, **more: Any) -> Callable[[], Any]:
        def run() -> None:
            for first in range(0, len(pictures), batch):
                pixels = processor(pictures[first : first + batch], return_tensors="pt").pixel_values.to(device.kind)
                with torch.inference_mode():
                    shipped.generate(pixels, **forced, **more)

        return run

    def ours(source: Path, precision: str, beams: int = 1) -> Callable[[], Any]:
        reader = Reader(source, beams, precision, settings.tokens, settings.tokens, False, batch_size=settings.batch)
        return lambda: reader.read(pictures)

    short = "fp16" if device.kind == "cuda" and not device.has_bf16 else "bf16"
    variants: dict[str, Callable[[], Any]] = {
        "(a) transformers as documented": theirs(1),
        "(b) transformers, cache, batches": theirs(settings.batch, use_cache=True),
        "(c) ours, fp32": ours(folder, "fp32"),
        f"(c) ours, {short}": ours(folder, short),
    }
    sizes: dict[str, int] = {"fp32 folder": _bytes_in(folder)}
    if settings.int8:
        int8 = work / f"random-{settings.geometry}-int8"
        if not int8.is_dir():
            write_graphs(open_checkpoint(folder, precision="fp32", device="cpu"), int8, method="dynamic")
        variants["(c) ours, int8 (CPU)"] = ours(int8, "int8")
        sizes["int8 folder"] = _bytes_in(int8)
    if settings.beams:
        variants["(d) transformers, beam 4"] = theirs(settings.batch, use_cache=True, num_beams=4)
        variants["(d) ours, beam 4, fp32"] = ours(folder, "fp32", 4)
    return variants, sizes


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
