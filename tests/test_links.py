"""What links lead to, one by one: which site, which file of several, what is shown of them and what never."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from file_server import Behaviour, FileServer

from fastsd_helpers.downloads import HubFile, links
from fastsd_helpers.downloads.links import (
    Link,
    confirm_drive,
    find_link,
    holds_secret,
    is_link,
    safe_name,
    show_typed,
    show_url,
)
from fastsd_helpers.downloads.transfer import Answer
from fastsd_helpers.errors import DownloadError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIVITAI_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [("https://a.example/b", True), (" HTTP://a", True), ("https://", True), ("ftp://a", False), ("a/b", False),
     ("see https://a", False), ("", False)],
)  # fmt: skip
def test_what_begins_as_a_web_address_is_taken_for_one(text: str, expected: bool) -> None:
    assert is_link(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://a.example/b?token=x", True),
        ("https://a.example/b?c=1&API_KEY=x", True),
        ("https://a.example/b?access_token=x#f", True),
        ("https://a.example/b?apikey=x", True),
        ("https://a.example/b?auth=x", True),
        ("https://a.example/b?password=x", True),
        ("https://a.example/b?key=x", True),
        ("https://a.example/b?api-key=x", True),
        ("https://me:pw@a.example/b", True),
        ("https://me@a.example", True),
        ("  https://me@a.example/b", True),
        ("https://a.example/b@c", False),
        ("https://a.example/b?mail=me@home", False),
        ("https://a.example/b?tokens=x", False),
        ("https://a.example/b#?token=x", True),
        ("https://a.example/b?c=1#token=x", False),
        ("/a/folder?token=x", False),
        ("", False),
    ],
)
def test_an_address_with_a_secret_is_known(text: str, expected: bool) -> None:
    assert holds_secret(text) is expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pw@a.example:8443/b/c?token=x#f", "https://a.example:8443/b/c?…"),
        ("https://a.example/b#f", "https://a.example/b"),
        ("https://a.example", "https://a.example"),
    ],
)
def test_an_address_is_shown_without_login_and_query(url: str, shown: str) -> None:
    assert show_url(url) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("htps://me:pw@a.example/b?token=x\nmore", "htps://a.example/b?…"),
        ("a/b#secret", "a/b?…"),
        ("just words", "just words"),
        ("x" * 300, "x" * 120),
    ],
)
def test_what_was_typed_is_shown_short_and_without_what_may_be_secret(text: str, shown: str) -> None:
    assert show_typed(text) == shown


@pytest.mark.parametrize(
    "name", ["model.safetensors", "a b.ckpt", "ü.pt", "x" * 200, "ü" * 100, "a..b", "a-(1)[2].bin"]
)
def test_names_that_every_disk_can_keep_are_taken(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [("x" * 201, "is too long"), ("ü" * 101, "is too long"), ("a\x1fb", "characters"), ("a\nb", "characters"),
     *((f"a{letter}b", "characters") for letter in '<>:"|?*'), ("", "not a file name"), (".", "not a file name"),
     ("..", "not a file name"), (".hidden", "is hidden"), ("a/b", "points outside"), ("a\\b", "points outside")],
)  # fmt: skip
def test_names_that_lead_out_or_that_some_disk_cannot_keep_are_not(name: str, said: str) -> None:
    with pytest.raises(DownloadError, match=said):
        safe_name(name)


# ------------------------------------------------------------------------------------------------ where it leads


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://huggingface.co/a/b/resolve/main/x.ckpt?download=true", HubFile("a/b", "x.ckpt", "main")),
        ("https://www.hf.co/a/b.c/blob/refs%2Fpr%2F1/d/e%20f.ckpt", HubFile("a/b.c", "d/e f.ckpt", "refs/pr/1")),
        ("https://huggingface.co/a-b/c_d/raw/0123/f.json", HubFile("a-b/c_d", "f.json", "0123")),
        ("https://huggingface.co/spaces/a/b", Link("https://huggingface.co/spaces/a/b")),
        ("https://github.com/a/b/blob/main/c/blob/d.bin",
         Link("https://github.com/a/b/raw/main/c/blob/d.bin", site="github")),
        ("https://github.com/a/b/releases/download/v1/c.zip",
         Link("https://github.com/a/b/releases/download/v1/c.zip", site="github")),
        (" https://a.example:8443/ü b".replace(" b", "") + "?q=ä%20%C3%BC ",
         Link("https://a.example:8443/%C3%BC?q=%C3%A4%20%C3%BC")),
        ("HTTPS://A.Example/b", Link("https://A.Example/b")),
        ("https://drive.google.com/file/d/1234567890ab/view?usp=sharing",
         Link("https://drive.usercontent.google.com/download?id=1234567890ab&export=download&confirm=t", site="drive")),
        ("https://drive.google.com/open?id=1234567890", Link(
            "https://drive.usercontent.google.com/download?id=1234567890&export=download&confirm=t", site="drive")),
        ("https://docs.google.com/document/d/abcdefghij_-/edit", Link(
            "https://drive.usercontent.google.com/download?id=abcdefghij_-&export=download&confirm=t", site="drive")),
    ],
)  # fmt: skip
def test_every_site_is_known_by_its_host(text: str, found: Link | HubFile) -> None:
    assert find_link(text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://huggingface.co/a/b", "is the page of a repository"),
        ("https://hf.co/a/b/tree/main/c", "is the page of a repository"),
        ("https://huggingface.co/a/b/", "is the page of a repository"),
        ("https://a b.example/c", "is not a web address"),
        ("model.safetensors", "is not a web address"),
        ("https:///b", "has no host name"),
        ("https://[::1/b", "its host name is invalid"),
        ("https://a.example:port/b", "its host name is invalid"),
        ("https://me@a.example/b", "contains a user and a password"),
        ("https://:secret@a.example/b", "contains a user and a password"),
        ("https://drive.google.com/drive/folders/1234567890ab", "leads to a folder on Google Drive"),
        ("https://drive.google.com/file/d/short/view", "names no file on Google Drive"),
        ("https://drive.google.com/open?id=123456789", "names no file on Google Drive"),
        ("https://drive.google.com/", "names no file on Google Drive"),
        ("https://civitai.com/images/5", "is not the page of a model on CivitAI"),
        ("https://civitai.com/models/abc", "is not the page of a model on CivitAI"),
        ("https://civitai.com/models/5?modelVersionId=x1", "is not the page of a model on CivitAI"),
    ],
)
def test_what_leads_to_no_file_is_said(text: str, said: str) -> None:
    with pytest.raises(DownloadError, match=said):
        find_link(text)


def test_the_hubs_address_can_be_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    link = "http://mirror.example:5000/a/b/resolve/main/x.bin"
    assert isinstance(find_link(link), Link)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:5000")
    assert find_link(link) == HubFile("a/b", "x.bin", "main")


# ------------------------------------------------------------------------------------------------------- CivitAI


def file(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "downloadUrl": f"/get/{name}", **more}


@pytest.fixture
def civitai(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    site = FileServer({})
    monkeypatch.setattr(links, "_CIVITAI", site.url())
    monkeypatch.setattr("fastsd_helpers.downloads.retries.PAUSES_S", (0.0,))
    yield site
    site.stop()


def version(civitai: FileServer, *files: Any, number: int = 7) -> None:
    civitai.files[f"/api/v1/model-versions/{number}"] = json.dumps({"files": list(files)}).encode()


def test_the_newest_version_is_taken_unless_one_is_named(civitai: FileServer) -> None:
    versions = [{"files": [file("new.safetensors")]}, {"files": [file("old.safetensors")]}]
    civitai.files["/api/v1/models/12"] = json.dumps({"modelVersions": versions}).encode()
    version(civitai, file("seven.safetensors"))
    base = civitai.url()
    assert find_link(f"{base}/models/12/any-name").name == "new.safetensors"
    for place in (
        "/models/12?modelVersionId=7",
        "/api/download/models/7",
        "/model-versions/7",
        "/api/v1/model-versions/7",
    ):
        found = find_link(base + place)
        assert (found.name, found.url, found.site) == ("seven.safetensors", f"{base}/get/seven.safetensors", "civitai")
    assert not any("authorization" in {name.lower() for name in seen.headers} for seen in civitai.seen)


def test_of_several_files_the_one_that_the_link_means_is_taken_and_no_other(civitai: FileServer) -> None:
    version(
        civitai,
        file("a.ckpt", type="Model", metadata={"format": "PickleTensor", "size": "full", "fp": "fp32"}),
        file("b.safetensors", type="Model", metadata={"format": "SafeTensor", "size": "pruned", "fp": "fp16"}),
        file(
            "c.safetensors", type="Model", primary=True, metadata={"format": "SafeTensor", "size": "full", "fp": "fp16"}
        ),
        file("v.safetensors", type="VAE"),
        {"name": "no-address.safetensors", "primary": True},
    )
    base = f"{civitai.url()}/api/download/models/7"
    for query, name in [
        ("", "c.safetensors"),
        ("?type=vae", "v.safetensors"),
        ("?format=PICKLETENSOR", "a.ckpt"),
        ("?size=pruned&fp=fp16", "b.safetensors"),
        ("?fp=fp16", "c.safetensors"),
        ("?type=Model&format=SafeTensor&size=full&fp=fp16", "c.safetensors"),
    ]:
        assert find_link(base + query).name == name, query
    for query in ("?fp=fp8", "?size=pruned&fp=fp32", "?type=Training%20Data", "?fileId=99"):
        with pytest.raises(DownloadError, match="has no file with") as caught:
            find_link(base + query)
        assert "b.safetensors" in caught.value.hint, "what there is"
    version(civitai, file("new.safetensors", type="Model"), file("v.safetensors", type="VAE", metadata={"fp": "fp16"}))
    assert find_link(f"{base}?fp=fp16&type=Model").name == "new.safetensors", "it says nothing of its numbers"
    version(civitai, file("x.ckpt"), file("y.safetensors"), file("z.pt"))
    assert find_link(base).name == "y.safetensors", "no pickle where there is another"


def test_a_link_with_the_number_of_a_file_gives_that_file(civitai: FileServer) -> None:
    version(
        civitai,
        file("first.safetensors", id=70, type="Model", primary=True, metadata={"format": "SafeTensor", "fp": "fp16"}),
        file("second.safetensors", id=71, type="Model", metadata={"format": "SafeTensor", "fp": "fp16"}),
    )
    for place in (
        "/api/download/models/7?type=Model&format=SafeTensor&fileId=71",
        "/models/12?modelVersionId=7&fileId=71",
    ):
        found = find_link(civitai.url() + place)
        assert found.name == "second.safetensors"
        assert found.url.endswith("/get/second.safetensors?fileId=71"), "two files may have one address but for this"
    assert find_link(f"{civitai.url()}/api/download/models/7").name == "first.safetensors"


def test_hash_and_name_are_taken_only_when_they_are_some(civitai: FileServer) -> None:
    link = f"{civitai.url()}/api/download/models/7"
    version(civitai, file("../a/b.safetensors", hashes={"SHA256": "AB" * 32}))
    found = find_link(link)
    assert (found.name, found.sha256) == ("b.safetensors", "ab" * 32)
    for hashes in ({"SHA256": "AB" * 31}, {"SHA256": None}, {"AutoV2": "x"}, {}, None):
        version(civitai, file("b", hashes=hashes))
        assert find_link(link).sha256 is None
    version(civitai, {"downloadUrl": "/get/x"})
    assert find_link(link).name is None


def test_a_token_goes_with_the_question_and_with_the_file_to_civitai_alone(
    civitai: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(civitai, file("a.safetensors"))
    link = f"{civitai.url()}/api/download/models/7"
    assert find_link(f"{link}?token=%20typed-token-1").token == "typed-token-1"
    assert civitai.seen[-1].headers["Authorization"] == "Bearer typed-token-1"
    assert "token" not in civitai.seen[-1].path
    monkeypatch.setenv("CIVITAI_TOKEN", "set-token-1")
    assert find_link(link).token == "set-token-1"
    assert find_link(f"{link}?token=typed-token-1").token == "typed-token-1", "the link's own comes first"
    version(civitai, {"name": "b", "downloadUrl": "https://elsewhere.example/b"})
    assert find_link(link).token is None
    version(civitai, {"name": "b", "downloadUrl": "https://www.civitai.red/b"})
    assert find_link(link).token == "set-token-1"


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (Behaviour(status=404, body=b"{}"), "CivitAI has no such model or version"),
        (Behaviour(status=401, body=b"{}"), "requires a login"),
        (Behaviour(status=403, body=b"{}"), "requires a login"),
        (Behaviour(status=418, body=b"{}"), r"no usable answer \(418\)"),
        (Behaviour(body=b"<html>"), r"no usable answer \(200\)"),
        (Behaviour(body=b"[]"), r"no usable answer \(200\)"),
        (Behaviour(body=b"{}"), "lists no file for that version"),
        (Behaviour(body=b'{"files": [{"name": "x"}]}'), "lists no file for that version"),
    ],
)
def test_what_civitai_does_not_tell_is_said(civitai: FileServer, behaviour: Behaviour, said: str) -> None:
    civitai.default = behaviour
    with pytest.raises(DownloadError, match=said):
        find_link(f"{civitai.url()}/model-versions/7")


def test_a_model_without_versions_is_said(civitai: FileServer) -> None:
    civitai.default = Behaviour(body=b'{"modelVersions": []}')
    with pytest.raises(DownloadError, match="has no version to download"):
        find_link(f"{civitai.url()}/models/7")


# -------------------------------------------------------------------------------------------------- Google Drive


DRIVE = Link("https://drive.usercontent.google.com/download?id=1&confirm=t", site="drive")


def page(text: str, cookies: str | None = None) -> Answer:
    return Answer(200, text.encode(), {}, cookies)


def test_drives_question_is_answered_with_its_own_form() -> None:
    form = (
        '<form id="search" action="/search"><input type="hidden" name="q" value="x"></form>'
        '<form id="download-form" action="/download?old=1" method="get"><input type="submit" name="s" value="y">'
        '<input type="hidden" name="id" value="1 2"><input type="hidden" name="uuid"><input type="hidden"></form>'
    )
    found = confirm_drive(DRIVE, page(form, "a=1"))
    assert found.url == "https://drive.usercontent.google.com/download?q=x&id=1+2&uuid="
    assert (found.cookies, found.site) == ("a=1", "drive")
    for form_id in ('id="downloadForm"', ""):
        form = f'<form {form_id} action="/go"><input type="hidden" name="id" value="1"></form>'
        assert confirm_drive(DRIVE, page(form)).url == "https://drive.usercontent.google.com/go?id=1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '<form action="https://evil.example/x"><input type="hidden" name="id" value="1"></form>',
            "leads to another host",
        ),
        ("<p>Sorry, the download Quota\n for this file is over", "has blocked this file for now"),
        ("<p>Too  many users have viewed it", "has blocked this file for now"),
        ("<p>You need access", "is not shared with everyone"),
        ('<form action="/x"></form>', "is not shared with everyone"),
        (
            '<form id="other" action="/x"><input type="hidden" name="id" value="1"></form>',
            "is not shared with everyone",
        ),
    ],
)
def test_another_page_of_drive_is_said(text: str, said: str) -> None:
    with pytest.raises(DownloadError, match=said):
        confirm_drive(DRIVE, page(text))
