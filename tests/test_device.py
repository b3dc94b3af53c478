"""The processor and its memory: what is told of them, with and without torch."""

import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastsd_helpers import device as devices

ROOT = Path(__file__).resolve().parents[1]


def test_the_device_here_is_described() -> None:
    device = devices.describe_device()
    assert device.kind in ("cuda", "mps", "cpu")
    assert device.name
    assert device.reason
    assert device.memory_gib > 0.5


def test_without_torch_the_device_is_the_cpu_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    device = devices.describe_device()
    assert device.kind == "cpu"
    assert "not installed" in device.reason


@pytest.mark.parametrize(
    ("gpu", "capability", "has_bf16"), [("Tesla T4", (7, 5), False), ("NVIDIA L4", (8, 9), True), ("G4", (12, 0), True)]
)
def test_bfloat16_needs_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, gpu: str, capability: tuple[int, int], has_bf16: bool
) -> None:
    # The four calls we make to torch.cuda, answered as these GPUs do.
    properties = types.SimpleNamespace(name=gpu, total_memory=15 * 2**30, major=capability[0], minor=capability[1])
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_properties=lambda _index: properties,
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    device = devices.describe_device()
    assert (device.kind, device.name, device.capability, device.has_bf16) == ("cuda", gpu, capability, has_bf16)
    assert device.memory_gib == 15


@pytest.mark.parametrize(
    ("cpuinfo", "has_bf16"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16", True),
        ("model name\t: Xeon\nflags\t\t: fpu amx_bf16 amx_tile", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm", True),
        ("processor\t: 0\nFeatures\t: fp asimd", False),
        ("", False),
    ],
)
def test_cpu_bfloat16_is_read_from_the_processors_own_flags(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, has_bf16: bool
) -> None:
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines())
    monkeypatch.setattr(devices, "_cpu_fields", lambda: {key.strip(): value for key, value in fields.items()})
    assert devices._cpu_has_bf16() is has_bf16


def test_arithmetic_is_named_by_processor_threads_torch_and_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    cpu = devices.Device("cpu", "a processor", 0, has_bf16=False)
    named = devices.name_arithmetic(cpu)
    assert f"{torch.backends.cpu.get_cpu_capability()}, " in named
    assert f"{torch.get_num_threads()} thread" in named
    assert named.endswith(f"torch {torch.__version__}")
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    assert devices.name_arithmetic(cpu) == f"{named}, MKL_CBWR=AVX2,STRICT"
    assert devices.name_arithmetic(devices.Device("cuda", "T4", 0, has_bf16=False)).startswith("T4, torch ")


def test_peak_memory_rises_with_what_is_held_and_is_this_process_own() -> None:
    # In a fresh process: the peak must be neither this test run's nor rise with nothing held.
    code = (
        "from fastsd_helpers.device import peak_memory_bytes as p\n"
        "before = p(); held = b'x' * 80_000_000; print(before, p() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, rise = map(int, done.stdout.split())
    assert 2e6 < before < 80e6
    assert 70e6 < rise < 100e6
    assert devices.peak_memory_bytes("cuda") >= 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_was_freed_below_something_that_stays_goes_back_to_the_system() -> None:
    code = """
import re
from pathlib import Path

import numpy as np

from fastsd_helpers.device import give_back_freed_memory, reuse_freed_memory

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

reuse_freed_memory()
blocks = [np.ones(1 << 20, np.uint8) for _ in range(200)]
stays = np.ones(1 << 20, np.uint8)
full = own()
del blocks
freed = own()
give_back_freed_memory()
print(full - freed, freed - own())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    at_once, given_back = map(int, done.stdout.split())
    assert at_once < 20, "steps of a training want the same blocks again"
    assert given_back > 180
