"""Compare OpenVINO with ONNX Runtime on a reader's two graphs: why int8 on the CPU goes through OpenVINO here.

    python scripts/measure_onnxruntime.py --work FOLDER [--geometry base] [--lines 4] [--rounds 5] [--write]

It needs `pip install --no-deps onnx ml_dtypes` besides what the project has. Both get the same graphs of the same
random weights in the shape of trocr-base: the encoder with the keys of the picture, for `--lines` lines, and one
decoder step after eight tokens. fp32; int8 weights and sums (ONNX Runtime: dynamic, and static with ranges of 8
calibration batches; OpenVINO: weights alone, and static by nncf). Variants take turns, the median of the rounds counts,
and the largest difference to PyTorch's fp32 is given relative to its largest value. With --write the table goes to
benchmarks/results/onnxruntime.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure_reader import machine, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the graphs (5 GB)")
    parser.add_argument("--geometry", choices=("base", "tiny"), default="base", help="shape of the model")
    parser.add_argument("--lines", type=int, default=4, help="lines at once (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each of them (default: 2)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/onnxruntime.md")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    found = {}
    for name in ("encoder", "decoder"):
        found[name] = measure(name, arguments)
    rows = ["# OpenVINO and ONNX Runtime on a reader's graphs", "", machine(), "",
            f"Random weights, {arguments.geometry} geometry, {arguments.threads} threads each; the encoder on "
            f"{arguments.lines} lines, one decoder step for them after 8 tokens.", "",
            "| variant | encoder | against PyTorch | difference | decoder step | against PyTorch | difference |",
            "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for variant in found["encoder"]:
        cells = []
        for graph in found.values():
            if variant not in graph:
                cells += ["-", "-", "-"]
                continue
            milliseconds, difference = graph[variant]
            first = next(iter(graph.values()))[0]
            cells += [f"{milliseconds:.1f} ms", f"{first / milliseconds:.2f} x", f"{difference:.1e}"]
        rows.append(f"| {variant} | " + " | ".join(cells) + " |")
    write_table("onnxruntime.md", "\n".join(rows) + "\n", arguments.write)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds of the median and the largest relative difference, by variant; PyTorch first."""
    runs = variants(name, arguments)
    expected = next(iter(runs.values()))()[0]
    results, times = {}, {variant: [] for variant in runs}
    for _round in range(arguments.rounds + 1):  # the first pays for buffers and is not counted
        for variant, run in runs.items():
            began = time.perf_counter()
            got = run()
            if _round:
                times[variant].append(time.perf_counter() - began)
            results[variant] = float(np.abs(np.asarray(got[0]) - expected).max() / np.abs(expected).max())
    return {variant: (1000 * statistics.median(taken), results[variant]) for variant, taken in times.items()}


def variants(name: str, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    import onnxruntime
    import torch

    from fastsd_helpers.bench.trocr import write_random_reader
    from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
    from fastsd_helpers.trocr.model.openvino_engine import _modules, write_graphs

    work, lines = arguments.work, arguments.lines
    folder = work / f"random-{arguments.geometry}"
    if not (folder / "preprocessor_config.json").is_file():
        write_random_reader(folder, arguments.geometry)
    checkpoint = open_checkpoint(folder, precision="fp32", device="cpu")
    encoder, decoder, (pixels, step) = _modules(checkpoint)
    module, example = (encoder, (pixels,)) if name == "encoder" else (decoder, step)
    chance = torch.Generator().manual_seed(0)
    if name == "encoder":
        inputs = (torch.randn((lines, *pixels.shape[1:]), generator=chance),)
    else:
        inputs = decoder_inputs(step, lines, chance)

    def by_torch() -> Any:
        with torch.inference_mode():
            return [part.numpy() for part in module(*inputs)]

    runs: dict[str, Callable[[], Any]] = {"PyTorch fp32": by_torch}
    arrays = [part.numpy() for part in inputs]
    plain = work / f"{arguments.geometry}-{name}.onnx"
    if not plain.is_file():
        export(module, example, plain)
    for label, path in {"fp32": plain, **shrink(plain, arrays, name)}.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        runs[f"ONNX Runtime {label}"] = lambda session=session, names=names: session.run(
            None, dict(zip(names, arrays, strict=True))
        )
    import openvino

    # Without its hint OpenVINO calculates in bf16 where the CPU can, beside int8 too, as the reader lets it.
    for label, method, hint in (("fp32", "none", "f32"), ("int8 weights", "dynamic", None),
                                ("int8 static", "static", None)):  # fmt: skip
        out = work / f"{arguments.geometry}-{method}"
        if not out.is_dir():
            write_graphs(checkpoint, out, method=method, batches=[torch.randn_like(pixels[:1]) for _ in range(8)])
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": arguments.threads}
        settings |= {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        compiled = openvino.Core().compile_model(str(out / "openvino" / f"{name}.xml"), "CPU", settings)
        request = compiled.create_infer_request()

        def by_openvino(request: Any = request, count: int = len(compiled.outputs)) -> Any:
            request.infer(arrays)
            return [np.array(request.get_output_tensor(place).data) for place in range(count)]

        runs[f"OpenVINO {label}"] = by_openvino
    return runs


def decoder_inputs(example: tuple[Any, ...], lines: int, chance: Any) -> tuple[Any, ...]:
    """Inputs of a step after 8 tokens, one beam a line: tokens, step, own keys and values, those of the picture."""
    import torch

    keys = example[2:]
    own, cross = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    made = [torch.randn((lines, part.shape[1], 8, part.shape[3]), generator=chance) for part in own]
    made += [torch.randn((lines, *part.shape[1:]), generator=chance) for part in cross]
    return (torch.full((lines, 1), 5), torch.tensor([8]), *made)


def export(module: Any, example: tuple[Any, ...], path: Path) -> None:
    """Write a module as ONNX with free numbers of lines, beams and tokens."""
    import torch

    names = [f"in{place}" for place in range(len(example))]
    axes: dict[str, dict[int, str]] = {"in0": {0: "lines"}}
    if len(example) > 1:
        axes["in0"] = {0: "lines", 1: "beams"}
        count = (len(example) - 2) // 2
        for place in range(2, len(example)):
            own = place < 2 + count
            axes[f"in{place}"] = {0: "rows" if own else "lines"} | ({2: "written"} if own else {})
    with torch.no_grad():
        torch.onnx.export(module, example, str(path), input_names=names, dynamic_axes=axes, opset_version=17,
                          dynamo=False)  # fmt: skip


def shrink(plain: Path, arrays: list[Any], name: str) -> dict[str, Path]:
    """int8 copies by ONNX Runtime's own tools: dynamic, and for the encoder static."""
    from onnxruntime import quantization

    ways = {"int8 dynamic": plain.with_name(f"{plain.stem}-dynamic.onnx")}
    if not ways["int8 dynamic"].is_file():
        quantization.quantize_dynamic(
            plain, ways["int8 dynamic"], op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
    if name == "encoder":
        ways["int8 static"] = plain.with_name(f"{plain.stem}-static.onnx")
        if not ways["int8 static"].is_file():
            chance = np.random.default_rng(1)

            class Pictures(quantization.CalibrationDataReader):
                def __init__(self) -> None:
                    shape = (1, *arrays[0].shape[1:])
                    self.left = [{"in0": chance.standard_normal(shape).astype(np.float32)} for _ in range(8)]

                def get_next(self) -> Any:
                    return self.left.pop() if self.left else None

            quantization.quantize_static(
                plain, ways["int8 static"], Pictures(), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8,
            )  # fmt: skip
    return ways


if __name__ == "__main__":
    main()
