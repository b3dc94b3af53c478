"""What is chosen by the memory that is there, and what is refused before anything is loaded, with what would fit."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import build_base, config_for, make_session  # noqa: E402
from test_stages import open_studio  # noqa: E402

from fastsd_helpers.device import Device  # noqa: E402
from fastsd_helpers.dreambooth import plan  # noqa: E402
from fastsd_helpers.dreambooth.running import fitting, following  # noqa: E402
from fastsd_helpers.dreambooth.running.fitting import fit_into_memory  # noqa: E402
from fastsd_helpers.errors import SettingsError  # noqa: E402
from fastsd_helpers.processes import Ranks  # noqa: E402

require_installed("diffusers")

MB = 10**6


class Formula:
    """Stands in for the memory of a training: so many MB an image, a third of them with gradient checkpointing."""

    device = "cuda"

    def __init__(self, *_: object) -> None:
        pass

    def surely_fits(self, _config, room: int) -> bool:
        return room > 10_000 * MB

    def peak_bytes(self, config) -> int:
        weights = 100 if config.method == "lora" else 300
        each = config.resolution / 64 * (100 if config.gradient_checkpointing else 300)
        return int((weights + each * config.batch_size) * MB)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    base = build_base(tmp_path / "base")
    monkeypatch.setattr(fitting, "Memory", Formula)
    context = open_studio(base)

    def choose(megabytes: int, *, given=(), begun=False, **values):
        gpu = Device("cuda", "a GPU", megabytes * MB, has_bf16=False)
        settings = {"gradient_checkpointing": None, "method": "full", "batch_size": 1, "ema": 0.0, **values}
        config = replace(context.config, **settings)
        return fit_into_memory(context.base, config, device=gpu, given=given, begun=begun)

    return choose


def test_gradient_checkpointing_is_chosen_by_what_it_saves_and_says_why(fit) -> None:
    config, reasons = fit(20_000)
    assert config.gradient_checkpointing is False
    assert reasons == ["gradient checkpointing off: this training takes a fraction of the 20.0 GB (a GPU)"]
    config, reasons = fit(1000)
    assert config.gradient_checkpointing is False
    assert reasons == [
        "gradient checkpointing off: this training takes about 0.6 GB without it, and there are 1.0 GB (a GPU)"
    ]
    config, reasons = fit(500)
    assert config.gradient_checkpointing is True
    assert reasons == [
        "gradient checkpointing on: without it this training takes about 0.6 GB, and there are 0.5 GB (a GPU)"
    ]


def test_a_batch_that_does_not_fit_is_divided_into_forward_passes(fit) -> None:
    config, reasons = fit(600, batch_size=4)
    assert (config.gradient_checkpointing, config.batch_size, config.accumulation) == (True, 2, 2)
    assert reasons[-1] == ("batch size 2, 2 forward passes per step: at once the 4 images of a step take about 0.7 GB")
    config, reasons = fit(700, batch_size=4, given=("batch_size",))
    assert (config.batch_size, config.accumulation) == (4, 1)
    assert reasons[-1].endswith("it may run out of memory")


def test_what_does_not_fit_is_refused_with_what_would(fit) -> None:
    with pytest.raises(SettingsError, match=r"takes about 0\.9 GB of memory, and there are 0\.5 GB \(a GPU\)") as told:
        fit(500, gradient_checkpointing=False, batch_size=2, given=("batch_size",))
    assert told.value.hint == "Change batch_size 1 (now 2), gradient_checkpointing on: that takes about 0.4 GB."
    with pytest.raises(SettingsError, match=r"there are 0\.3 GB") as told:
        fit(260, begun=True)
    assert told.value.hint == (
        "Resume it where there is more memory, or start again from step 0 with --restart and method lora (now full): "
        "that takes about 0.2 GB."
    )
    with pytest.raises(SettingsError, match=r"there are 0\.3 GB") as told:
        fit(260, optimizer="adafactor", given=("optimizer",))
    assert told.value.hint.startswith("Change method lora (now full), optimizer adamw (now adafactor): that takes")
    with pytest.raises(SettingsError, match=r"there are 0\.1 GB") as told:
        fit(100)
    assert "No setting makes it fit" in told.value.hint


def test_what_adafactor_cannot_be_combined_with_is_not_advised() -> None:
    asked = {"optimizer": "adafactor", "precision": "fp32", "method": "full", "resolution": 1024}
    assert fitting.savings(asked, "gpu") | {"gradient_checkpointing": True} == {
        "gradient_checkpointing": True,
        "precision": "bf16",
        "resolution": 512,
        "method": "lora",
    }


def test_a_real_models_training_is_refused_before_a_network_is_loaded(tmp_path, monkeypatch) -> None:
    base, session = build_base(tmp_path / "base"), make_session(tmp_path)
    small = Device("cpu", "a small machine", 300 * MB, has_bf16=False)
    monkeypatch.setattr(following, "describe_device", lambda: small)
    with pytest.raises(SettingsError, match=r"there are 0\.3 GB \(a small machine\)"):
        plan(config_for(base), session)


def test_of_two_gpus_the_smaller_one_decides(monkeypatch) -> None:
    sizes = {0: ("Tesla T4", 16, (7, 5)), 1: ("GTX 1650", 8, (7, 5))}

    def describe(index: int) -> SimpleNamespace:
        name, gib, (major, minor) = sizes[index]
        return SimpleNamespace(name=name, total_memory=gib * 2**30, major=major, minor=minor)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 2,
        get_device_properties=describe,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    device, said = following.weakest_device(Ranks(), planned=2)
    assert (device.name, device.memory_gib) == ("Tesla T4 and GTX 1650", 8)
    assert said.startswith("The GPUs differ: settings are chosen for the smallest, GTX 1650 with 8 GiB")
    assert following.weakest_device(Ranks())[0].memory_gib == 16
