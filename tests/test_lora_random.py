"""Random LoRA of every family, naming and way of stating their strength: no layer ever counts differently.

scripts/compare_loras.py does the same with as many as are asked for.
"""

import pytest

pytest.importorskip("numpy")
from lora_cases import FAMILIES, NAMINGS, ROUNDING, changes_of, largest_difference, make_case, table_shapes

from fastsd_helpers import checkpoints

DTYPES = tuple(ROUNDING)


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_random_loras_keep_every_layers_change_there_and_back(family, tmp_path) -> None:
    shapes, namings = table_shapes(family), set()
    for seed in range(24):
        place, dtype = tmp_path / str(seed), DTYPES[seed % 4]
        case = make_case(place / "in", family, seed, shapes)
        namings.add(case.naming)
        there = checkpoints.convert(case.source, place / "there.safetensors", dtype=dtype)
        assert there.family == f"{family}-lora"
        assert largest_difference(changes_of(there.path, family), case.truth) <= ROUNDING[dtype], case.words
        back = checkpoints.convert(there.path, place / "back.safetensors")
        assert largest_difference(changes_of(back.path, family), case.truth) <= ROUNDING[dtype], case.words
    assert namings == set(NAMINGS[family])


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_was_written_and_applies_every_layer_so(family, tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from lora_readers import DiffusersReader

    reader = DiffusersReader(family)
    shapes = reader.shapes()
    for seed in range(100, 106):
        place = tmp_path / str(seed)
        case = make_case(place / "in", family, seed, shapes)
        path = checkpoints.convert(case.source, place / "there.safetensors").path
        if case.naming != "kohya":
            path = checkpoints.convert(path, place / "back.safetensors").path
        assert largest_difference(reader.changes(path), case.truth) <= ROUNDING["keep"], case.words
