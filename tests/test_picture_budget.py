"""What a run draws of itself, and how its threads wait: by the time of its steps, and by what else the machine does."""

import logging
import os
import sys

import pytest

from fastsd_helpers import runtime
from fastsd_helpers.dreambooth.results import image_budget
from fastsd_helpers.dreambooth.results.image_budget import FULL, Drawing, PictureBudget, Teller
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.runtime import choose_waiting


def budget(
    steps: int, *, batch_size: int = 1, step_s: float = 1.0, grids: int = 0, on_cpu: bool = True
) -> PictureBudget:
    made = PictureBudget(DreamBoothConfig(batch_size=batch_size), on_cpu=on_cpu, steps=steps, grids=grids)
    made.note_step(10 * step_s)  # the first one takes longer, and does not count
    made.note_step(step_s)
    made.note_step(step_s)
    return made


def seconds(drawing: Drawing | None, rows: int, *, batch_size: int = 1, step_s: float = 1.0) -> float:
    """What a grid takes, by the passes of the U-Net that it needs."""
    return 0 if drawing is None else rows * drawing.pictures * (2 * drawing.steps + 4) * step_s / (3 * batch_size)


@pytest.mark.parametrize("steps", [50, 100, 300, 1500])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_all_pictures_of_a_training_on_a_processor_take_under_a_quarter_of_it(steps: int, batch_size: int) -> None:
    made = budget(steps * 3, batch_size=batch_size, grids=4)
    drawn = seconds(made.before_and_after(), 2, batch_size=batch_size)
    drawn += 4 * seconds(made.sample(), 1, batch_size=batch_size)
    assert drawn < 0.25 * steps * 3
    assert made.before_and_after() == FULL or steps * batch_size < 500 * 4


def test_a_tiny_training_draws_no_samples_and_the_cheapest_that_shows_two_subjects() -> None:
    made = budget(6, grids=4)
    assert made.sample() is None
    assert made.before_and_after() == Drawing(2, 4)


def test_a_gpu_draws_in_full_and_so_does_a_long_run() -> None:
    assert (budget(2, on_cpu=False).before_and_after(), budget(2, on_cpu=False).sample()) == (FULL, FULL)
    assert budget(1500, batch_size=4, grids=4).sample() == FULL


def test_a_call_that_makes_no_step_still_draws() -> None:
    made = PictureBudget(DreamBoothConfig(batch_size=1), on_cpu=True, steps=0, grids=0)
    assert made.before_and_after().pictures >= 2


def test_long_drawing_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 8.0, 12.0, 12.0, 16.0, 23.0, 23.0])
    monkeypatch.setattr(image_budget.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    teller = Teller(said.append, "before and after", 5)
    for _ in range(5):
        teller()
    assert said == ["Generating before and after: 60 % ...", "Generating before and after: 100 % ..."]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not loaded PyTorch, on a machine without a GPU and with two cores."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _pid: {0, 1})
    exists = os.path.exists
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: path != "/dev/nvidiactl" and exists(path))


@pytest.mark.parametrize(("load", "passive"), [(0.1, False), (0.6, False), (0.8, True), (9.0, True)])
def test_threads_wait_as_the_load_of_the_last_minute_asks_for(
    plain: None, monkeypatch: pytest.MonkeyPatch, load: float, passive: bool
) -> None:
    monkeypatch.setattr(runtime.os, "getloadavg", lambda: (load, 0.0, 0.0))
    said = choose_waiting()
    assert f"load {load:.1f} on 2 cores" in said
    assert ("passively" in said) == passive
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME")) == (
        ("PASSIVE", "0") if passive else (None, None)
    )
    assert "OMP_NUM_THREADS" not in said


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_chose_stays(plain: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(runtime.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    assert choose_waiting() == ""
    assert dict(os.environ) == before


def test_where_pytorch_is_loaded_already_nothing_is_claimed(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", logging)
    assert choose_waiting() == ""
