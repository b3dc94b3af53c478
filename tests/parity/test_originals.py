"""SD 2.x, SDXL and Flux exports in the original implementations: see README.md beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installed import require_installed
from tiny_families import make_folder

from fastsd_helpers import checkpoints

require_installed("diffusers")

pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "scripts" / "parity_originals.py"
ORIGINALS = os.environ.get("FASTSD_ORIGINALS")


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.skipif(not ORIGINALS, reason="FASTSD_ORIGINALS names no folder of original code (see README.md)")
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("sd21", [686, 280]),
        ("sdxl", [1680, 196, 389, 389]),
        ("sdxl-refiner", [1220, 389, 389]),
        ("flux", [780, 244, 244]),
    ],
)
def test_the_original_code_loads_the_file_strictly_and_computes_the_same(family, keys, tmp_path):
    make_folder(tmp_path / "model", family, seed=11)
    written = checkpoints.convert(tmp_path / "model", tmp_path / "export.safetensors", verify=True)
    command = [sys.executable, SCRIPT, written.path, tmp_path / "model", "--family", family, "--originals", ORIGINALS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["agree"]
    assert [figure["keys"] for figure in result["figures"]] == keys
