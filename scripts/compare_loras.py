"""Convert random LoRA there and back and compare every layer's change with what was made; prints every difference.

    python scripts/compare_loras.py [--count 400] [--first 0] [--diffusers]

The truth is made before the file is (tests/lora_cases.py) and needs no reader. What was written is read by the
definition of kohya's and of diffusers' layout; with --diffusers, files in diffusers' layout are also loaded by
diffusers and peft into real classes. fp32 and `keep` may differ by 1e-6 of a layer's norm; storing both matrices in
fp16 adds about 4e-4, in bf16 3e-3.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests")]

from lora_cases import FAMILIES, ROUNDING, changes_of, largest_difference, make_case, table_shapes  # noqa: E402

from fastsd_helpers import checkpoints  # noqa: E402


def main() -> int:
    """Compare as many as were asked for; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--diffusers", action="store_true")
    asked = parser.parse_args()
    readers = _readers() if asked.diffusers else {}
    shapes = {family: readers[family].shapes() if readers else table_shapes(family) for family in FAMILIES}
    begun, wrong, layers = time.monotonic(), 0, 0
    worst: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for seed in range(asked.first, asked.first + asked.count):
        family, dtype = FAMILIES[seed % 4], tuple(ROUNDING)[seed // 4 % 4]
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            case = make_case(place / "in", family, seed, shapes[family])
            there = checkpoints.convert(case.source, place / "there.safetensors", dtype=dtype, verify=True).path
            back = checkpoints.convert(there, place / "back.safetensors", verify=True).path
            found = [largest_difference(changes_of(path, family), case.truth) for path in (there, back)]
            if readers:
                path = there if case.naming == "kohya" else back
                found.append(largest_difference(readers[family].changes(path), case.truth))
        layers += len(case.truth)
        kinds[f"{family} {case.naming}"] += 1
        worst[dtype] = max(worst[dtype], *found)
        if max(found) > ROUNDING[dtype]:
            wrong += 1
            print(f"{seed}: {case.words}, written as {dtype}: {', '.join(f'{one:.2e}' for one in found)}")
    print(f"{asked.count} LoRA with {layers} layers in {time.monotonic() - begun:.0f} s, {wrong} differ")
    print("largest difference:", ", ".join(f"{dtype} {value:.1e}" for dtype, value in worst.items()))
    print("of each kind:", ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return min(wrong, 1)


def _readers():
    import diffusers
    from lora_readers import DiffusersReader

    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    return {family: DiffusersReader(family) for family in FAMILIES}


if __name__ == "__main__":
    raise SystemExit(main())
