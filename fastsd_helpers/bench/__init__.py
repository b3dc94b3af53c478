"""The measurements behind `fastsd bench`: a plain register of them.

Each benchmark is a module with two names: `Settings`, a frozen dataclass of options, and `measure(settings) -> Report`.
It compares side by side, interleaved, median of three, in one run, and prints ratios.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

__all__ = ["BENCHMARKS", "Benchmark", "Report", "load_benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """One row of the register: what it measures, and the module that does."""

    about: str
    module: str


@dataclass(frozen=True)
class Report:
    """What a benchmark found: `data` for programs, `lines` for people."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


BENCHMARKS = {
    "dreambooth": Benchmark("a training step, versus diffusers' published script as baseline", "dreambooth"),
    "convert": Benchmark(
        "converting a full-size model to a single file, versus a plain copy of as many bytes", "convert"
    ),
    "install": Benchmark("installing what a workflow lacks, versus plain pip", "install"),
    "trocr": Benchmark("lines read per second at base size, versus transformers' own generate loop", "trocr"),
    "trocr pages": Benchmark(
        "pages transcribed per minute into files of every format, split into finding, cutting, reading and writing",
        "trocr_pages",
    ),
}


def load_benchmark(name: str) -> Any:
    """Import the module of a benchmark; only now, as some need packages that others do not.

    Args:
        name: one of `BENCHMARKS`.

    Returns:
        The module, with `Settings` and `measure(settings) -> Report`.
    """
    return import_module(f"{__name__}.{BENCHMARKS[name].module}")
