"""A finished session goes to the Hub: private, with a card that the Hub accepts, compared after it arrived."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault
from hub_upload_server import TOKEN, HubUploadServer, upload_hub

from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig, upload
from fastsd_helpers.errors import DownloadError, SessionError, SettingsError
from fastsd_helpers.sessions import Session

pytest.importorskip("huggingface_hub.constants")

CARD = """---
license: "CreativeML OpenRAIL-M"
base_model: "sd15"
tags: ["dreambooth"]
---
# rex

![before and after](before-after.png)
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubUploadServer]:
    with upload_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def session(tmp_path: Path) -> Session:
    session = Session.create("rex", root=tmp_path / "sessions")
    model = session.exports / "rex.safetensors"
    model.write_bytes(b"weights" * 50_000)
    (session.exports / "README.md").write_text(CARD)
    for path in (session.samples / "before-after.png", session.samples / "unet-000100.png", session.logs / "loss.png"):
        path.write_bytes(path.name.encode())
    paths = {"grid": "samples/before-after.png", "loss_plot": "logs/loss.png", "model_card": "exports/README.md"}
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    losses = {"loss_before": 0.2, "loss_after": 0.1}
    session.save(run=1, result={"run": 1, "path": "exports/rex.safetensors", "sha256": sha256, **paths, **losses})
    return session


def test_model_card_and_pictures_arrive_in_a_private_repository(hub: HubUploadServer, session: Session) -> None:
    result = upload(UploadConfig(repo="rex-model"), session)
    assert (result.repo, result.private) == ("ada/rex-model", True)
    assert hub.private == {"ada/rex-model"}
    folder = hub.folder / "ada" / "rex-model"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"README.md", "before-after.png", "loss.png", "rex.safetensors", "samples/unet-000100.png"}
    assert hashlib.sha256((folder / "rex.safetensors").read_bytes()).hexdigest() == result.sha256
    card = (folder / "README.md").read_text()
    assert 'base_model: "stable-diffusion-v1-5/stable-diffusion-v1-5"' in card
    assert "license: creativeml-openrail-m" in card
    assert "![before and after](before-after.png)" in card
    assert TOKEN not in card
    assert (session.exports / "README.md").read_text() == CARD, "the session's own card stays as it is"


def test_without_samples_they_stay_here_and_public_is_a_choice(hub: HubUploadServer, session: Session) -> None:
    result = upload(UploadConfig(repo="ada/rex-model", samples=False, private=False), session)
    assert not any(name.startswith("samples/") for name in result.files)
    assert result.private is False
    assert hub.private == set()


def test_a_second_upload_sends_no_large_file_again(hub: HubUploadServer, session: Session) -> None:
    upload(UploadConfig(repo="rex-model"), session)
    sent = list(hub.sent)
    upload(UploadConfig(repo="rex-model"), session)
    assert hub.sent == sent


def test_a_public_repository_is_refused_while_private_is_asked_for(hub: HubUploadServer, session: Session) -> None:
    folder = hub.add_repo("ada/rex-model", private=False)
    with pytest.raises(DownloadError, match="everybody can see it"):
        upload(UploadConfig(repo="rex-model"), session)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("base_model", "licence", "expected", "missing"),
    [
        ("demo", "Apache-2.0", "license: apache-2.0", "base_model"),
        ("/content/my model", "Apache-2.0", "license: apache-2.0", "base_model"),
        ("ada/own", "Somebody's own terms", 'license_name: "Somebody\'s own terms"', "nothing"),
        ("sd21-768", "CreativeML Open RAIL++-M", "license: openrail++", "nothing"),
    ],
)
def test_the_card_says_only_what_the_hub_accepts(
    hub: HubUploadServer, session: Session, base_model: str, licence: str, expected: str, missing: str
) -> None:
    text = CARD.replace("sd15", base_model).replace("CreativeML OpenRAIL-M", licence)
    (session.exports / "README.md").write_text(text)
    upload(UploadConfig(repo="rex-model"), session)  # the hub's own check of the head runs in here
    card = (hub.folder / "ada" / "rex-model" / "README.md").read_text()
    assert expected in card
    assert missing not in card


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("repos/create", 401, "does not let this token write"),
        ("repos/create", 403, "does not let this token write"),
        ("/commit/", 500, "refused the upload"),
        ("preupload", 429, "'too many requests'"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence_without_the_token(
    hub: HubUploadServer, session: Session, path: str, status: int, words: str
) -> None:
    hub.faults.append(Fault(path, method="POST", status=status, times=50))
    with pytest.raises(DownloadError, match=words) as caught:
        upload(UploadConfig(repo="rex-model"), session)
    assert TOKEN not in str(caught.value)


def test_somebody_elses_name_and_a_reading_token_are_refused(
    hub: HubUploadServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match="HTTP 403"):
        upload(UploadConfig(repo="grace/rex-model"), session)
    with pytest.raises(DownloadError) as caught:
        upload(UploadConfig(repo="rex-model", hf_token="hf_" + "read" * 6), session)
    assert "write access" in caught.value.hint


def test_a_hub_that_is_not_there_is_a_sentence(hub: HubUploadServer, session: Session) -> None:
    hub.stop()
    with pytest.raises(DownloadError, match="cannot be reached"):
        upload(UploadConfig(repo="rex-model"), session)


def test_without_a_token_or_a_name_nothing_is_asked(
    hub: HubUploadServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="repo"):
        upload(UploadConfig(), session)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DownloadError, match="needs a Hugging Face token"):
        upload(UploadConfig(repo="rex-model"), session)
    assert hub.requests == []
    with pytest.raises(SettingsError, match="a name has"):
        UploadConfig(repo="https://huggingface.co/ada/rex")


def test_an_unfinished_or_changed_model_is_not_uploaded(hub: HubUploadServer, session: Session) -> None:
    (session.exports / "rex.safetensors").write_bytes(b"changed")
    with pytest.raises(SessionError, match="not the one that training wrote"):
        upload(UploadConfig(repo="rex-model"), session)
    session.save(result={})
    with pytest.raises(SessionError, match="no finished model"):
        upload(UploadConfig(repo="rex-model"), session)
    assert hub.requests == []
