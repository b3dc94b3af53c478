"""What each kind of adapter adds to a weight: as peft's own layers merge it, and as the definition says elsewhere."""

import pytest

pytest.importorskip("numpy")
import numpy as np
from closeness import assert_close_to

from fastsd_helpers.checkpoints.lora.lycoris import (
    Decomposed,
    Differences,
    HadamardProduct,
    KroneckerProduct,
    LowRank,
    Scaled,
    rank_of_factors,
)

# Of the largest value: sums of up to a few dozen products in fp32, in any order.
ROUNDING = 1e-6


def noise(*shape, seed=0, size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype("<f4")


def whole(change, weight, *, step=5):
    """The change of a whole weight, a few rows at a time, as a stream asks for it."""
    flat = weight.reshape(len(weight), -1)
    pieces = [
        change.rows(first, min(first + step, len(flat)), lambda one, other: flat[one:other])
        for first in range(0, len(flat), step)
    ]
    return np.concatenate(pieces).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------ by definition


def lora(rank=3, kernel=()):
    up, down = noise(12, rank, seed=1), noise(rank, 10, *kernel, seed=2)
    return LowRank(up, down, 0.5), 0.5 * np.tensordot(up.astype("<f8"), down.astype("<f8"), 1)


def loha(kernel=(), tucker=False):
    rank = 3
    factors = {"hada_w1_a": noise(12, rank, seed=1), "hada_w2_a": noise(12, rank, seed=3)}
    columns = (10,) if tucker else (10 * int(np.prod(kernel, initial=1)),)
    factors |= {"hada_w1_b": noise(rank, *columns, seed=2), "hada_w2_b": noise(rank, *columns, seed=4)}
    if tucker:
        for name, seed in (("hada_t1", 5), ("hada_t2", 6)):
            factors[name] = noise(rank, rank, *kernel, seed=seed)
        factors |= {name: np.ascontiguousarray(factors[name].T) for name in ("hada_w1_a", "hada_w2_a")}
    wide = {name: values.astype("<f8") for name, values in factors.items()}

    def half(number):
        left, right = wide[f"hada_w{number}_a"], wide[f"hada_w{number}_b"]
        if tucker:
            return np.einsum("ijhw,ip,jr->prhw", wide[f"hada_t{number}"], left, right)
        return (left @ right).reshape(12, 10, *kernel)

    return HadamardProduct(factors, 0.5), 0.5 * half(1) * half(2)


def lokr(form, kernel=()):
    """form: which of the two is a product of narrower factors, and whether the second is in Tucker form."""
    factors = {}
    if "1" in form:
        factors |= {"lokr_w1_a": noise(3, 2, seed=1), "lokr_w1_b": noise(2, 5, seed=2)}
    else:
        factors["lokr_w1"] = noise(3, 5, seed=1)
    if "t" in form:
        factors |= {"lokr_t2": noise(2, 2, *kernel, seed=3), "lokr_w2_a": noise(2, 4, seed=4)}
        factors["lokr_w2_b"] = noise(2, 2, seed=5)
    elif "2" in form:
        factors |= {
            "lokr_w2_a": noise(4, 2, seed=4),
            "lokr_w2_b": noise(2, 2 * int(np.prod(kernel, initial=1)), seed=5),
        }
    else:
        factors["lokr_w2"] = noise(4, 2, *kernel, seed=4)
    wide = {name: values.astype("<f8") for name, values in factors.items()}
    left = wide["lokr_w1"] if "lokr_w1" in wide else wide["lokr_w1_a"] @ wide["lokr_w1_b"]
    if "lokr_w2" in wide:
        right = wide["lokr_w2"]
    elif "t" in form:
        right = np.einsum("ijhw,ip,jr->prhw", wide["lokr_t2"], wide["lokr_w2_a"], wide["lokr_w2_b"])
    else:
        right = (wide["lokr_w2_a"] @ wide["lokr_w2_b"]).reshape(4, 2, *kernel)
    made = np.kron(left.reshape(3, 5, *(1,) * len(kernel)), right)
    return KroneckerProduct(factors, 0.5), 0.5 * made


CASES = {
    "lora": lambda: lora(),
    "locon": lambda: lora(kernel=(3, 3)),
    "lora of a high rank": lambda: lora(rank=40),
    "loha": lambda: loha(),
    "loha, convolution": lambda: loha(kernel=(3, 3)),
    "loha, tucker": lambda: loha(kernel=(3, 3), tucker=True),
    "lokr, whole": lambda: lokr(""),
    "lokr, second apart": lambda: lokr("2"),
    "lokr, first apart": lambda: lokr("1"),
    "lokr, both apart": lambda: lokr("12"),
    "lokr, convolution, whole": lambda: lokr("", (3, 3)),
    "lokr, convolution, apart": lambda: lokr("2", (3, 3)),
    "lokr, convolution, tucker": lambda: lokr("t", (3, 3)),
    "lokr, convolution, tucker, both apart": lambda: lokr("1t", (3, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 5, 100])
def test_a_change_is_that_of_its_definition_however_many_rows_are_asked_for(case, step):
    change, wanted = CASES[case]()
    found = whole(change, np.zeros(wanted.shape, "<f4"), step=step)
    assert_close_to(found, wanted, of_largest=ROUNDING)
    assert np.prod(change.shape) == wanted.size
    assert change.shape[0] == len(wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("on_input", [False, True])
def test_a_dora_brings_the_changed_weight_to_its_lengths(case, on_input):
    change, added = CASES[case]()
    weight = noise(*added.shape, seed=9)
    lengths = np.abs(noise(added.shape[int(on_input)], seed=8)) + 0.5
    changed = weight + added
    axes = tuple(axis for axis in range(changed.ndim) if axis != int(on_input))
    norms = np.sqrt((changed.astype("<f8") ** 2).sum(axis=axes, keepdims=True))
    shape = [-1 if axis == int(on_input) else 1 for axis in range(changed.ndim)]
    wanted = changed / norms * lengths.reshape(shape) - weight
    found = whole(Decomposed(change, lengths, weight.shape, on_input=on_input), weight)
    assert_close_to(found, wanted, of_largest=3e-6)  # lengths are sums of up to 108 squares


def test_differences_are_added_and_ia3_multiplies_rows_or_columns():
    weight, difference = noise(12, 10, 3, 3, seed=1), noise(12, 10, 3, 3, seed=2)
    flat = difference.reshape(12, -1)
    change = Differences(difference.shape, lambda first, last: flat[first:last])
    assert np.array_equal(whole(change, weight), difference)
    rows, columns = noise(12, seed=3), noise(10, seed=4)
    assert_close_to(whole(Scaled(weight.shape, rows, False), weight), weight * rows[:, None, None, None], of_largest=0)
    assert_close_to(whole(Scaled(weight.shape, columns, True), weight), weight * columns[:, None, None], of_largest=0)


def test_the_rank_that_an_alpha_is_divided_by_is_that_of_the_factors():
    assert rank_of_factors({"down": (4, 10), "up": (12, 4)}) == 4
    assert rank_of_factors({"hada_w1_b": (3, 10)}) == 3
    assert rank_of_factors({"lokr_w1_b": (2, 5), "lokr_w2": (4, 2)}) == 2
    assert rank_of_factors({"lokr_w1_b": (2, 5), "lokr_w2_b": (6, 2)}) == 6
    assert rank_of_factors({"lokr_w1": (3, 5), "lokr_w2": (4, 2)}) is None


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        (HadamardProduct, {f"hada_w{n}_{s}": noise(4, 5) for n in "12" for s in "ab"}),
        (KroneckerProduct, {"lokr_w1": noise(3, 5), "lokr_w2_a": noise(4, 3), "lokr_w2_b": noise(2, 4)}),
        (KroneckerProduct, {"lokr_w1": noise(3), "lokr_w2": noise(4, 3)}),
    ],
)
def test_factors_that_do_not_fit_each_other_are_refused(kind, factors):
    with pytest.raises(ValueError, match=r"\["):
        kind(factors, 1.0)


# ------------------------------------------------------------------------------------------------ as peft merges


def peft_layer(config, layer):
    """A layer of peft's around `layer`, its factors random, and the weight it merges to."""
    import peft
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        model = peft.get_peft_model(torch.nn.Sequential(layer), config)
        for name, tensor in model.named_parameters():
            if "base_layer" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.2 if "magnitude" in name else torch.randn_like(tensor))
        state = peft.get_peft_model_state_dict(model)
        before = model.base_model.model[0].get_base_layer().weight.detach().clone().numpy()
        merged = model.merge_and_unload()[0].weight.detach().numpy()
    names = {name.removeprefix("base_model.model.0."): tensor.numpy() for name, tensor in state.items()}
    return names, before, merged


def layers():
    import torch

    return {
        "linear": torch.nn.Linear(10, 12),
        "convolution": torch.nn.Conv2d(10, 12, 3),
    }


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("effective", [False, True])
def test_a_loha_is_what_peft_merges(kind, effective):
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=3, alpha=2, target_modules=["0"], use_effective_conv2d=effective)
    factors, before, merged = peft_layer(config, layers()[kind])
    added = whole(HadamardProduct(factors, 2 / 3), before)
    assert_close_to(before + added, merged, of_largest=ROUNDING)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(("rank", "both"), [(1, True), (1, False), (8, False)])
def test_a_lokr_is_what_peft_merges(kind, effective, rank, both):
    peft = pytest.importorskip("peft")
    config = peft.LoKrConfig(
        r=rank, alpha=2, target_modules=["0"], use_effective_conv2d=effective, decompose_both=both, decompose_factor=-1
    )
    factors, before, merged = peft_layer(config, layers()[kind])
    assert ("lokr_w2" in factors) == (rank == 8), factors.keys()
    added = whole(KroneckerProduct(factors, 2 / rank), before)
    assert_close_to(before + added, merged, of_largest=ROUNDING)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_dora_is_what_peft_merges(kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    named, before, merged = peft_layer(config, layers()[kind])
    down, up = named["lora_A.weight"], named["lora_B.weight"]
    change = LowRank(up.reshape(len(up), -1), down, 2 / 3)
    lengths = next(values for name, values in named.items() if "magnitude" in name)
    added = whole(Decomposed(change, lengths, before.shape, on_input=False), before)
    assert_close_to(before + added, merged, of_largest=ROUNDING)
