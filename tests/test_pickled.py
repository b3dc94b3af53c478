"""Pickles that hold no flat state dict: what is inside is named all the same, and nothing is read twice."""

import pytest

from fastsd_helpers import checkpoints
from fastsd_helpers.errors import FastSDError

torch = pytest.importorskip("torch")

ZERO = torch.zeros(2, 2)


def networks():
    return tuple({"linear.0.weight": ZERO, "linear.0.bias": torch.zeros(2)} for _ in range(2))


@pytest.mark.parametrize(
    ("holds", "what"),
    [
        ({"image_proj": {"proj.weight": ZERO}, "ip_adapter": {"1.to_k_ip.weight": ZERO}}, "an IP-Adapter"),
        ({"id_encoder": {"a.weight": ZERO}, "lora_weights": {"unet.to_q_lora.up.weight": ZERO}}, "PhotoMaker"),
        ({768: networks(), 320: networks(), "step": 5, "name": "x"}, "a hypernetwork"),
        ([ZERO, ZERO, ZERO], "a list of tensors without names"),
        ({"sks": torch.zeros(768)}, "a textual inversion embedding for Stable Diffusion 1.x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_inside_dictionaries_and_lists_have_names_by_which_the_file_is_told(holds, what, zipped, tmp_path):
    torch.save(holds, tmp_path / "in.bin", _use_new_zipfile_serialization=zipped)
    found = checkpoints.inspect(tmp_path / "in.bin", hashes=False)
    assert what in found.what
    with pytest.raises(FastSDError, match=what) as caught:
        checkpoints.convert(tmp_path / "in.bin", tmp_path / "out.safetensors")
    assert caught.value.hint


def circle():
    inside = {}
    return {"a": ZERO, "b": inside | {"c": [inside]}, "d": inside}


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (ZERO, "one tensor without a name"),
        ({1: ZERO, "1": torch.ones(1)}, "holds two values under '1'"),
        ({"a": ZERO, "b": {"c": {"d": {"e": {"f": ZERO}}}}}, "holds dict under 'b.c.d.e'"),
        ({"a": ZERO, "b": circle()}, "holds dict under"),
        ({"a": [1, 2], "b": "words"}, "holds no tensors"),
        (7, "cannot be read as plain tensors"),
    ],
    ids=["one", "twice", "deep", "in two places", "counters", "number"],
)
def test_what_has_no_names_or_two_of_them_is_refused_in_a_sentence(holds, message, tmp_path):
    torch.save(holds, tmp_path / "in.pt")
    for use in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(FastSDError, match=message) as caught:
            use(tmp_path / "in.pt")
        assert caught.value.hint


def test_lists_that_double_at_every_level_take_no_time(tmp_path):
    holds = [ZERO]
    for _ in range(60):
        holds = [holds, holds]
    torch.save({"a": holds}, tmp_path / "in.pt")
    with pytest.raises(FastSDError, match="holds list under"):
        checkpoints.inspect(tmp_path / "in.pt")
