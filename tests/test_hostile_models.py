"""Nothing in a model runs: hostile models of every kind through every door, as the user's own and from the Hub."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import require_installed

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hostile_doors import DOORS, LOCAL
from hostile_models import FOREIGN, KINDS, contents, write
from hub_server import HubServer

from fastsd_helpers.errors import FastSDError

require_installed("diffusers")

CASES = [(kind, door) for kind in KINDS for door in DOORS[KINDS[kind].model]]

# A link brings a file alone, without what describes it.
FETCHED = [case for case in CASES if case[1] not in LOCAL and KINDS[case[0]].model != "described checkpoint"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Every kind, written once; and the file that would be there if anything of one had run."""
    place = tmp_path_factory.mktemp("hostile")
    mark = place / "it-ran"
    made = {name: write(name, place / name.replace(" ", "-"), mark) for name in KINDS}
    foreign = made["part of a foreign library"].parent
    sys.path.insert(0, str(foreign))
    yield mark, made
    sys.path.remove(str(foreign))
    sys.modules.pop(FOREIGN, None)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_args: object) -> str:
        raise AssertionError("somebody is asked")

    monkeypatch.setattr("builtins.input", ask)


def refuse(call: object, *args: object) -> FastSDError:
    with pytest.raises(FastSDError) as caught:
        call(*args)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    return caught.value


@pytest.mark.parametrize(("kind", "door"), CASES)
def test_nothing_of_a_users_own_hostile_model_runs_and_nothing_of_it_is_touched(
    hostile: tuple[Path, dict[str, Path]], tmp_path: Path, kind: str, door: str
) -> None:
    mark, made = hostile
    before = contents(made[kind].parent)
    refuse(DOORS[KINDS[kind].model][door], str(made[kind]), tmp_path)
    assert not mark.exists(), "it ran"
    assert contents(made[kind].parent) == before
    assert models_in(tmp_path) == []


@pytest.mark.parametrize(("kind", "door"), FETCHED)
def test_nothing_of_a_hostile_model_of_the_hub_runs_and_nothing_of_it_stays(
    hostile: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, door: str
) -> None:
    mark, made = hostile
    cache = tmp_path / "hub"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    path = made[kind]
    with HubServer({"evil/model": path if path.is_dir() else path.parent}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        ref = "evil/model" if path.is_dir() else f"{hub.url}/evil/model/resolve/main/{path.name}"
        refuse(DOORS[KINDS[kind].model][door], ref, tmp_path)
        assert not [name for name in hub.downloaded() if name.endswith(".py")], "code is not even fetched"
    assert not mark.exists(), "it ran"
    assert models_in(tmp_path) == []


def models_in(place: Path) -> list[str]:
    """The files that anything of a model could be in, and links to it; not the marks of the libraries themselves."""
    others = (".lock", ".log", ".TAG")
    found = [path for path in place.rglob("*") if not path.is_dir() and path.suffix not in others]
    return [str(path) for path in found if "Microsoft" not in path.parts]  # onnxruntime counts its uses there
