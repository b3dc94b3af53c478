"""Tests of fetch(): one file over real HTTP from a server on 127.0.0.1 that misbehaves as told."""

import errno
import hashlib
import io
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
import urllib.parse
import zipfile
from email.utils import formatdate
from pathlib import Path

import pytest
from fakes import full_disk, small_disk
from file_server import Behaviour, FileServer
from hub_server import Fault, HubServer

from fastsd_helpers import runtime
from fastsd_helpers.downloads import HubFile, Wanted, describe_content, fetch, fetch_all, links
from fastsd_helpers.downloads.links import find_link, safe_name, show_url
from fastsd_helpers.errors import DiskFull, DownloadError, FastSDError, ModelNotFound
from fastsd_helpers.model_lookup import fetch_model

TOKEN = "civitaiKeyOfTheTests0123456789abcdef"


def safetensors(size: int = 4000, seed: int = 0) -> bytes:
    """A real safetensors file with one uint8 tensor of `size` bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


def checkpoint() -> bytes:
    """What a .ckpt file is: a zip archive with a pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 500)
    return made.getvalue()


MODEL = safetensors(300_000)
SHA256 = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("CIVITAI_TOKEN", "HF_ENDPOINT", "FASTSD_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("fastsd_helpers.downloads.retries.PAUSES_S", (0.0,) * 3)


@pytest.fixture
def site():
    server = FileServer({"/model.safetensors": MODEL})
    yield server
    server.stop()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models"


def told(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    return "".join(traceback.format_exception(error)) + str(error) + caplog.text


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ------------------------------------------------------------------------------------------------ a good server


def test_a_file_arrives_whole_and_a_second_fetch_keeps_it(site, folder):
    path = fetch(site.url("/model.safetensors"), folder, sha256=SHA256, size=len(MODEL))
    assert path == folder / "model.safetensors"
    assert path.read_bytes() == MODEL
    assert names_in(folder) == ["model.safetensors"]
    before = path.stat().st_mtime_ns
    assert fetch(site.url("/model.safetensors"), folder, name="model.safetensors", sha256=SHA256) == path
    assert (len(site.seen), path.stat().st_mtime_ns) == (1, before)


def test_the_sites_own_name_is_used_when_the_address_has_none(site, folder):
    site.files["/download"] = MODEL
    site.queue = [Behaviour(headers={"Content-Disposition": 'attachment; filename="dream.safetensors"'})]
    assert fetch(site.url("/download?id=5"), folder).name == "dream.safetensors"
    site.queue = [Behaviour(headers={"Content-Disposition": "attachment; filename*=UTF-8''gr%C3%BCn.safetensors"})]
    assert fetch(site.url("/download?id=6"), folder).name == "grün.safetensors"
    assert fetch(site.url("/download?id=7"), folder).name == "download.safetensors"  # told by its bytes


def test_without_a_folder_it_goes_to_the_models_folder(site, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSD_MODELS", str(tmp_path / "mine"))
    assert fetch(site.url("/model.safetensors")).parent == tmp_path / "mine"


def test_a_path_is_its_own_answer_and_nonsense_is_named(tmp_path):
    file = tmp_path / "here.safetensors"
    file.write_bytes(MODEL)
    assert fetch(file) == file
    assert fetch(str(file)) == file
    with pytest.raises(ModelNotFound, match="not a file here, a link or the key") as caught:
        fetch("nothing-like-it")
    assert "sd15" in caught.value.hint
    with pytest.raises(ModelNotFound, match="has no single file"):
        fetch("sd15-inpaint")


def test_a_file_with_other_content_is_not_replaced_unless_allowed(site, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="exists already, but differs"):
        fetch(site.url("/model.safetensors"), folder)
    assert (folder / "model.safetensors").read_bytes() == b"mine"
    assert fetch(site.url("/model.safetensors"), folder, overwrite=True).read_bytes() == MODEL


# ----------------------------------------------------------------------------------------- broken connections


def test_a_cut_connection_is_taken_up_where_it_broke(site, folder):
    site.queue = [Behaviour(cut_after=100_000), Behaviour(cut_after=50_000)]
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL
    assert [seen.headers.get("Range") for seen in site.seen] == [None, "bytes=100000-", "bytes=150000-"]
    assert site.seen[1].headers["If-Range"] == '"one"'


def test_a_file_that_changed_on_the_server_is_not_glued_together(site, folder):
    other = safetensors(300_000, seed=9)
    site.queue = [Behaviour(cut_after=100_000), Behaviour(body=other, etag='"two"')]
    site.files["/model.safetensors"] = other
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == other


def test_without_a_mark_of_the_version_a_broken_download_starts_again(site, folder):
    site.default = Behaviour(etag=None)
    site.queue = [Behaviour(cut_after=100_000, etag=None)]
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL
    assert [seen.headers.get("Range") for seen in site.seen] == [None, None]
    site.seen.clear()
    site.queue = [Behaviour(cut_after=100_000, etag=None)]
    path = fetch(site.url("/model.safetensors"), folder / "b", sha256=SHA256)  # a known hash makes going on safe
    assert path.read_bytes() == MODEL
    assert site.seen[1].headers["Range"] == "bytes=100000-"


def test_a_server_that_knows_no_ranges_is_read_from_the_start(site, folder):
    site.default = Behaviour(ranges=False)
    site.queue = [Behaviour(cut_after=100_000)]
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL


def test_a_server_that_always_breaks_is_given_up_and_what_arrived_is_kept_for_the_next_try(site, folder):
    site.queue = [Behaviour(cut_after=100_000)] + [Behaviour(cut_after=0)] * 10
    with pytest.raises(DownloadError, match="was interrupted, 4 times in a row") as caught:
        fetch(site.url("/model.safetensors"), folder)
    assert "the partial download is kept" in caught.value.hint
    assert all(name.startswith(".model.safetensors.") or name.startswith(".download.") for name in names_in(folder))
    site.queue.clear()
    site.seen.clear()
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL
    assert site.seen[0].headers["Range"] == "bytes=100000-"
    assert names_in(folder) == ["model.safetensors"]


@pytest.mark.parametrize("announce", [-1, 1, 5000])
def test_a_lie_about_the_length_is_never_taken_for_a_whole_file(site, folder, announce):
    site.default = Behaviour(announce=announce)
    with pytest.raises(DownloadError):
        fetch(site.url("/model.safetensors"), folder)
    assert "model.safetensors" not in names_in(folder)


def test_a_busy_server_is_asked_again_when_it_says(site, folder, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    site.queue = [
        Behaviour(status=429, headers={"Retry-After": "7"}),
        Behaviour(status=503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)}),
    ]
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL
    assert waited[0] == 7
    assert 25 < waited[1] <= 30


def test_a_server_that_asks_for_hours_is_not_waited_for(site, folder):
    site.queue = [Behaviour(status=429, headers={"Retry-After": "7200"})]
    with pytest.raises(DownloadError, match="asks you to wait for 120 minutes"):
        fetch(site.url("/model.safetensors"), folder)


def test_a_host_that_is_not_there_is_one_sentence(folder):
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1: no connection") as caught:
        fetch("http://127.0.0.1:9/x.safetensors", folder)
    assert "Check the network" in caught.value.hint


def test_after_a_kill_the_next_process_goes_on(site, folder):
    site.files["/model.safetensors"] = big = safetensors(3_000_000)
    site.default = Behaviour(stall_s=0.05)
    code = "import sys; from fastsd_helpers.downloads import fetch; fetch(sys.argv[1], sys.argv[2])"
    running = subprocess.Popen([sys.executable, "-c", code, site.url("/model.safetensors"), str(folder)])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            parts = [path for path in folder.glob(".*.part") if path.stat().st_size > 500_000]
            if parts or running.poll() is not None:
                break
            time.sleep(0.02)
        assert parts
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert "model.safetensors" not in names_in(folder)
    site.default = Behaviour()
    site.seen.clear()
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == big
    assert int(site.seen[0].headers["Range"].removeprefix("bytes=").rstrip("-")) > 500_000


# --------------------------------------------------------------------------------------------- wrong content


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<!DOCTYPE html><title>Log in</title>", "web page instead of a file"),
        (b"\xef\xbb\xbf  <html>", "web page instead of a file"),
        (b"MZ\x90\x00" + b"x" * 500, "is a program, not a model"),
        (b"#!/bin/sh\nrm -rf /\n", "is a program, not a model"),
        (b"\x7fELF" + b"x" * 500, "is a program, not a model"),
        (MODEL[:-1], "not a complete safetensors file"),
        (b"PK\x03\x04" + b"x" * 100, "not a complete checkpoint file"),
        (checkpoint()[:-1], "not a complete checkpoint file"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 500, "is an image, not a model"),
        (b"RIFF\x00\x01\x00\x00WEBP" + b"x" * 500, "is an image, not a model"),
        (b"%PDF-1.7\n\xe2\xe3" + b"x" * 500, "is a PDF document, not a model"),
        (b"\x1f\x8b\x08\x00" + b"x" * 500, "is a compressed archive, not a model"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 500, "is a compressed archive, not a model"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 500, "is a document or installer, not a model"),
        (b"not found", "is plain text, not a model"),
        (b"", "empty file"),
    ],
)
def test_what_is_no_model_is_refused_and_not_kept(site, folder, body, said):
    site.files["/model.safetensors"] = body
    with pytest.raises(DownloadError, match=said):
        fetch(site.url("/model.safetensors"), folder)
    assert names_in(folder) == []


def test_an_html_answer_is_told_before_its_bytes_are_kept(site, folder):
    site.default = Behaviour(headers={"Content-Type": "text/html; charset=utf-8"}, body=b"<html>log in</html>")
    with pytest.raises(DownloadError, match="returned a web page instead of a file") as caught:
        fetch(site.url("/model.safetensors"), folder)
    assert "login" in caught.value.hint
    assert names_in(folder) == []


def test_one_byte_short_of_the_known_size_is_refused_before_it_is_downloaded(site, folder):
    with pytest.raises(DownloadError, match=f"offers {len(MODEL)} bytes; {len(MODEL) + 1} were expected"):
        fetch(site.url("/model.safetensors"), folder, size=len(MODEL) + 1)
    assert names_in(folder) == []


def test_bytes_changed_on_the_way_are_fetched_again_once_then_refused(site, folder):
    wrong = MODEL[:-1] + bytes([MODEL[-1] ^ 1])
    site.queue = [Behaviour(body=wrong)]
    assert fetch(site.url("/model.safetensors"), folder, sha256=SHA256).read_bytes() == MODEL
    site.default = Behaviour(body=wrong)
    with pytest.raises(DownloadError, match="a file that does not match its SHA-256, twice"):
        fetch(site.url("/model.safetensors"), folder / "b", sha256=SHA256)
    assert names_in(folder / "b") == []


def test_kinds_are_told_by_bytes(tmp_path):
    def kind(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return describe_content(tmp_path / name)

    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert describe_content(tmp_path / "a.ckpt") == "checkpoint"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme", b"x")
    assert describe_content(tmp_path / "a.zip") == "zip archive"
    assert kind("x.bin", MODEL) == "safetensors"
    assert kind("x.gguf", b"GGUF" + bytes(20)) == "gguf"
    assert kind("x.pt", b"\x80\x02}q") == "checkpoint"
    assert kind("x", bytes(range(256))) == "data"


# -------------------------------------------------------------------------------------------- names and disks


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", ".hidden", "a\\b", "x" * 300, "a\nb", "con:stream"])
def test_a_name_that_leaves_its_folder_is_refused(site, folder, name):
    with pytest.raises(DownloadError, match=r"file name|too long"):
        fetch(site.url("/model.safetensors"), folder, name=name)
    assert site.seen == []
    with pytest.raises(DownloadError):
        safe_name(name)


def test_a_name_that_a_server_sends_cannot_leave_the_folder_either(site, folder):
    site.default = Behaviour(headers={"Content-Disposition": 'attachment; filename="../../evil.safetensors"'})
    with pytest.raises(DownloadError, match="points outside its folder"):
        fetch(site.url("/model.safetensors"), folder)
    assert names_in(folder) == []
    assert not (folder.parent.parent / "evil.safetensors").exists()


def test_too_little_room_is_told_before_it_begins(site, folder, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull, match="the rest of the download"):
        fetch(site.url("/model.safetensors"), folder)
    assert names_in(folder) == []


def test_a_disk_that_fills_up_at_90_percent_is_told_and_the_rest_is_taken_up_later(site, folder):
    with full_disk(folder, after_bytes=int(len(MODEL) * 0.9)), pytest.raises(DiskFull):
        fetch(site.url("/model.safetensors"), folder)
    assert "model.safetensors" not in names_in(folder)
    site.seen.clear()
    assert fetch(site.url("/model.safetensors"), folder).read_bytes() == MODEL
    assert site.seen[0].headers["Range"]


def test_another_mirror_is_not_tried_when_the_disk_is_full(site, folder):
    with full_disk(folder, after_bytes=10, code=errno.ENOSPC), pytest.raises(DiskFull):
        fetch(site.url("/model.safetensors"), folder, mirrors=[site.url("/model.safetensors?2")])
    assert len(site.seen) == 1


# ------------------------------------------------------------------------------------------ mirrors, several


def test_mirrors_are_tried_in_order_and_each_failure_is_told(site, folder, caplog):
    caplog.set_level(logging.INFO, logger="fastsd_helpers")
    site.files["/good"] = MODEL
    site.files["/page"] = b"<html>"
    sources = [site.url("/gone"), site.url("/page"), site.url("/good")]
    path = fetch(sources[0], folder, mirrors=sources[1:], name="m.safetensors", sha256=SHA256)
    assert path.read_bytes() == MODEL
    assert "/gone was not found (HTTP 404)" in caplog.text
    with pytest.raises(DownloadError, match=r"None of the 2 sources worked\. .*404.*does not match its SHA-256"):
        fetch(sources[0], folder / "b", mirrors=[sources[1]], name="m.safetensors", sha256=SHA256)


def test_several_files_come_at_once_and_one_failure_stops_no_other(site, folder):
    for number in range(6):
        site.files[f"/{number}.safetensors"] = safetensors(5000, seed=number)
    wanted = [Wanted(site.url(f"/{number}.safetensors"), folder) for number in range(6)]
    wanted.insert(3, Wanted(site.url("/none.safetensors"), folder))
    results = fetch_all(wanted, at_once=3)
    assert isinstance(results.pop(3), DownloadError)
    assert [path.read_bytes() for path in results] == [safetensors(5000, seed=number) for number in range(6)]


def test_the_sizes_of_several_are_added_up_before_the_first_begins(site, folder, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10**9)
    with pytest.raises(DiskFull, match=r"1\.60 GB are needed for these 2 files"):
        fetch_all([Wanted(site.url("/a"), folder, size=8 * 10**8), Wanted(site.url("/b"), folder, size=8 * 10**8)])
    assert site.seen == []


def test_the_same_file_is_not_downloaded_twice_at_once(site, folder):
    site.files["/model.safetensors"] = safetensors(1_000_000)
    site.default = Behaviour(stall_s=0.02)
    wanted = [Wanted(site.url("/model.safetensors"), folder)] * 2
    first, second = fetch_all(wanted, at_once=2)
    failed = [result for result in (first, second) if isinstance(result, FastSDError)]
    assert [error.problem for error in failed] in (
        [],
        ["The same file is being downloaded to the same folder right now."],
    )
    assert (folder / "model.safetensors").read_bytes() == safetensors(1_000_000)
    assert names_in(folder) == ["model.safetensors"]


# ----------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def civitai(site, monkeypatch):
    """CivitAI's API and download host on the test server."""
    monkeypatch.setattr(links, "_CIVITAI", site.url())

    def about(**values):
        file = {
            "name": "dream.safetensors",
            "primary": True,
            "type": "Model",
            "metadata": {"format": "SafeTensor", "fp": "fp16"},
            "hashes": {"SHA256": SHA256.upper()},
            "downloadUrl": site.url("/api/download/models/77"),
        }
        return {"files": [{**file, **values}, {**file, "primary": False, "name": "vae.pt", "type": "VAE"}]}

    site.about = about
    site.files["/api/v1/model-versions/77"] = json.dumps(about()).encode()
    site.files["/api/v1/models/5"] = json.dumps({"modelVersions": [about(), {"files": []}]}).encode()
    site.files["/api/download/models/77"] = MODEL
    return site


@pytest.mark.parametrize("path", ["/models/5/a-dream", "/models/5?modelVersionId=77", "/api/download/models/77"])
def test_a_civitai_page_or_download_link_leads_to_its_file_and_hash(civitai, folder, path):
    assert fetch(civitai.url(path), folder).read_bytes() == MODEL
    assert names_in(folder) == ["dream.safetensors"]
    link = find_link(civitai.url(path))
    assert (link.sha256, link.name, link.site) == (SHA256, "dream.safetensors", "civitai")


def test_a_civitai_download_link_chooses_the_file_it_names(civitai):
    assert find_link(civitai.url("/api/download/models/77?type=VAE")).name == "vae.pt"


def test_the_token_goes_to_its_site_and_never_to_where_it_redirects(civitai, folder, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    monkeypatch.setenv("CIVITAI_TOKEN", f"  {TOKEN} ")
    civitai.files["/storage"] = MODEL
    civitai.queue = [Behaviour(), Behaviour(redirect=civitai.url("/storage?signature=abc", host="localhost"))]
    fetch(civitai.url("/models/5?modelVersionId=77"), folder)
    sent = {(seen.host, seen.headers.get("Authorization")) for seen in civitai.seen}
    assert sent == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}
    assert TOKEN not in caplog.text
    assert "signature" not in caplog.text


def test_a_token_typed_into_the_link_moves_to_the_header_and_out_of_every_message(civitai, folder, caplog):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    civitai.queue = [Behaviour(), Behaviour(status=401)]
    with pytest.raises(DownloadError, match="refuses the token") as caught:
        fetch(civitai.url(f"/models/5?modelVersionId=77&token={TOKEN}"), folder)
    assert TOKEN not in told(caught.value, caplog)
    assert all(TOKEN not in seen.path for seen in civitai.seen)
    assert civitai.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_civitai_without_a_token_says_where_to_make_one(civitai, folder):
    civitai.queue = [Behaviour(), Behaviour(status=401)]
    with pytest.raises(DownloadError, match="requires a login") as caught:
        fetch(civitai.url("/models/5?modelVersionId=77"), folder)
    assert "CIVITAI_TOKEN" in caught.value.hint
    civitai.queue = [Behaviour(status=403)]
    with pytest.raises(DownloadError, match="requires a login"):
        find_link(civitai.url("/models/5"))


def test_a_token_with_a_blank_inside_is_refused_before_it_is_sent(civitai, monkeypatch, caplog):
    monkeypatch.setenv("CIVITAI_TOKEN", "abc def")
    with pytest.raises(DownloadError, match="contains a space") as caught:
        find_link(civitai.url("/models/5"))
    assert "abc def" not in told(caught.value, caplog)
    assert civitai.seen == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/models/404", "no such model"),
        ("/user/somebody", "not the page of a model"),
        ("/models/6", "has no version"),
        ("/models/5?modelVersionId=abc", "not the page of a model"),
    ],
)
def test_a_civitai_link_that_leads_nowhere_is_told(civitai, path, said):
    civitai.files["/api/v1/models/6"] = b'{"modelVersions": []}'
    with pytest.raises(DownloadError, match=said):
        find_link(civitai.url(path))


def test_a_password_in_an_address_is_refused_and_not_shown(site, folder, caplog):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    password = "".join(("secret", "word"))  # so that no line of the traceback holds it
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 contains a user and a password") as caught:
        fetch(f"http://me:{password}@127.0.0.1:{site.port}/model.safetensors?key=hidden", folder)
    assert password not in told(caught.value, caplog)
    assert "leave them out" in caught.value.hint.lower()
    assert site.seen == []
    assert show_url("https://me:pw@example.org/a?token=1") == "https://example.org/a?…"


@pytest.mark.parametrize("word", ["somebodys-word", "two words!", "gr\u00fcn&bunt=1", "100%25 sure"])
@pytest.mark.parametrize(
    "typed",
    ["http://me:{}@127.0.0.1:9/x.safetensors", "https://me:{}@huggingface.co/a/b/resolve/main/c", "civitai?token={}"],
    ids=["a password", "a password to the Hub", "a token of CivitAI"],
)
def test_a_secret_in_a_pasted_link_is_hidden_in_whatever_is_logged_later(civitai, caplog, monkeypatch, typed, word):
    """As it was pasted, and as the program that got it would show it: a link has %XX where the word has a blank."""
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    monkeypatch.setattr(runtime, "_handed_out", set())
    pasted = urllib.parse.quote(word, safe="")
    log = logging.getLogger("fastsd_helpers")
    log.info("before: %s", word)
    assert f"before: {word}" in caplog.text
    with pytest.raises(DownloadError):
        find_link(typed.format(pasted).replace("civitai", civitai.url("/models/404")))
    caplog.clear()
    log.info("afterwards: %s", word)
    log.info("afterwards: %s", pasted)
    assert word not in caplog.text
    if "token=" not in typed:  # no site is sent a token in this form, so nothing could show it
        assert pasted not in caplog.text
    assert caplog.text.count("afterwards: ") == 2


@pytest.mark.parametrize(
    "typed",
    [
        "https://civitai.com/models/5?token={} {}",
        "civitai.com/models/5?token={}",
        "ftp://me:{}@127.0.0.1/x.safetensors",
        "https://me:{} {}@127.0.0.1/x.safetensors",
        "https://127.0.0.1:9/x.safetensors?token={}",
    ],
)
def test_what_was_typed_wrongly_is_named_without_the_secret_in_it(folder, caplog, typed):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    secret = "".join(("word", "ofnobody"))
    for ask in (lambda text: fetch(text, folder), fetch_model):
        with pytest.raises(FastSDError) as caught:
            ask(typed.format(secret, secret))
        assert caught.value.hint
        assert secret not in told(caught.value, caplog)


def test_a_key_in_the_query_of_any_link_is_in_no_message(site, folder, caplog):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    secret = "".join(("key", "ofsomebody"))
    site.queue = [Behaviour(status=503, headers={"Retry-After": "0"}), Behaviour(cut_after=10), Behaviour(status=404)]
    with pytest.raises(DownloadError, match=r"model\.safetensors\?… was not found") as caught:
        fetch(site.url(f"/model.safetensors?signature={secret}"), folder)
    assert secret not in told(caught.value, caplog)


@pytest.mark.parametrize("typed", ["two%20words0123456789", "line%0Abreak0123456789", "gr%C3%BCn0123456789"])
def test_a_token_with_a_blank_in_the_link_is_refused_before_it_is_sent(civitai, folder, caplog, typed):
    with pytest.raises(DownloadError, match="The token in the link contains a space or an unusual character") as caught:
        fetch(civitai.url(f"/models/5?modelVersionId=77&token={typed}"), folder)
    assert "0123456789" not in str(caught.value) + caplog.text
    assert civitai.seen == []


def test_blanks_around_a_token_in_the_link_are_left_out(civitai, folder):
    fetch(civitai.url(f"/models/5?modelVersionId=77&token=%20{TOKEN}%20"), folder)
    assert {seen.headers.get("Authorization") for seen in civitai.seen} == {f"Bearer {TOKEN}"}


def test_the_token_is_not_sent_where_civitai_says_the_file_is_elsewhere(civitai, folder, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    elsewhere = civitai.about(downloadUrl=civitai.url("/model.safetensors", host="localhost"))
    civitai.files["/api/v1/model-versions/77"] = json.dumps(elsewhere).encode()
    fetch(civitai.url("/models/5?modelVersionId=77"), folder)
    sent = {(seen.host, seen.headers.get("Authorization")) for seen in civitai.seen}
    assert sent == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}


# ----------------------------------------------------------------------------------------------- Google Drive

CONFIRM = """<html><form id="download-form" action="{action}" method="get">
<input type="hidden" name="id" value="abcdefghijkl"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1-2-3"><input type="submit" value="Download anyway"></form></html>"""


@pytest.fixture
def drive(site, monkeypatch):
    """Google Drive's download host on the test server: a page that asks first, then the file."""
    monkeypatch.setattr(links, "_DRIVE", site.url())
    page = {"Content-Type": "text/html; charset=utf-8", "Set-Cookie": "asked=yes; Path=/"}
    site.page = lambda text: Behaviour(headers=page, body=text.encode())
    site.files["/download"] = MODEL
    return site


@pytest.mark.parametrize(
    "link",
    [
        "https://drive.google.com/file/d/abcdefghijkl/view?usp=sharing",
        "https://drive.google.com/open?id=abcdefghijkl",
        "https://drive.google.com/uc?export=download&id=abcdefghijkl",
    ],
)
def test_every_kind_of_drive_link_is_understood_and_its_question_answered(drive, folder, link):
    named = {"Content-Disposition": 'attachment; filename="shared.safetensors"'}
    drive.queue = [drive.page(CONFIRM.format(action=drive.url("/download"))), Behaviour(headers=named)]
    path = fetch(link, folder)
    assert (path.name, path.read_bytes()) == ("shared.safetensors", MODEL)
    assert "uuid=1-2-3" in drive.seen[1].path
    assert drive.seen[1].headers["Cookie"] == "asked=yes"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            "<html>Google Drive - Quota exceeded. Too many users have viewed or downloaded</html>",
            "has blocked this file for now",
        ),
        ("<html>You need access. Sign in</html>", "not shared with everyone"),
        (CONFIRM.format(action="https://elsewhere.example/x"), "another host"),
    ],
)
def test_a_drive_file_that_cannot_be_had_is_told_why(drive, folder, page, said):
    drive.default = drive.page(page)
    with pytest.raises(DownloadError, match=said):
        fetch("https://drive.google.com/file/d/abcdefghijkl/view", folder)
    assert names_in(folder) == []


def test_a_drive_folder_and_a_link_without_an_id_are_refused():
    with pytest.raises(DownloadError, match="a folder on Google Drive"):
        find_link("https://drive.google.com/drive/folders/abcdefghijkl")
    with pytest.raises(DownloadError, match="names no file"):
        find_link("https://drive.google.com/drive/my-drive")


# ------------------------------------------------------------------------------------- links, the Hub, GitHub


def test_links_to_the_hub_and_github_become_what_they_mean():
    assert find_link("https://huggingface.co/a/b/blob/main/x%20y.safetensors") == HubFile(
        "a/b", "x y.safetensors", "main"
    )
    assert find_link("https://hf.co/a/b/resolve/v1/sub/x.ckpt?download=true") == HubFile("a/b", "sub/x.ckpt", "v1")
    assert find_link("https://github.com/a/b/blob/main/x.pt").url == "https://github.com/a/b/raw/main/x.pt"
    release = "https://github.com/a/b/releases/download/v1/x.safetensors"
    assert find_link(release).url == release
    with pytest.raises(DownloadError, match="page of a repository"):
        find_link("https://huggingface.co/a/b/tree/main")


@pytest.mark.parametrize("text", ["ftp://x/y", "https://", "https://a b/c", "http://[::1", "file:///etc/passwd"])
def test_what_is_no_web_address_is_told(text):
    with pytest.raises(DownloadError):
        find_link(text)


def test_a_redirect_to_something_that_is_no_web_address_is_not_followed(site, folder):
    site.default = Behaviour(redirect="file:///etc/passwd")
    with pytest.raises(DownloadError):
        fetch(site.url("/model.safetensors"), folder)
    assert names_in(folder) == []


@pytest.mark.parametrize("where", ["http://[bad/x", "http://nobody.invalid:99999999/x", "http://nobody.invalid:x/"])
def test_a_redirect_to_an_address_that_makes_no_sense_is_one_sentence(site, folder, where):
    site.default = Behaviour(redirect=where)
    with pytest.raises(DownloadError, match=r"not a web address|no connection"):
        fetch(site.url("/model.safetensors"), folder)
    assert names_in(folder) == []


def test_a_redirect_to_itself_ends(site, folder):
    site.default = Behaviour(redirect=site.url("/model.safetensors"))
    with pytest.raises(DownloadError, match="answered 302"):
        fetch(site.url("/model.safetensors"), folder)


def test_an_address_with_letters_beyond_ascii_works(site, folder):
    site.files["/gr%C3%BCn%20er.safetensors"] = MODEL
    for address in ("/grün%20er.safetensors", "/gr%C3%BCn%20er.safetensors?für=mich"):
        assert fetch(site.url(address), folder).name == "grün er.safetensors"


def test_a_sha256_is_taken_in_capitals_and_nonsense_is_refused_before_anything_is_fetched(site, folder):
    assert fetch(site.url("/model.safetensors"), folder, sha256=f" {SHA256.upper()}").read_bytes() == MODEL
    site.seen.clear()
    with pytest.raises(DownloadError, match="'1234' is not a SHA-256 hash"):
        fetch(site.url("/model.safetensors"), folder, sha256="1234")
    assert site.seen == []


# What a server can do to `fastsd models get LINK`, and what is said then.
_BAD_LINKS = {
    "login page": (Behaviour(headers={"Content-Type": "text/html"}, body=b"<html>"), "returned a web page instead"),
    "to a login page": (Behaviour(redirect="/login"), "returned a web page instead"),
    "not there": (Behaviour(status=404), "was not found (HTTP 404)"),
    "refused": (Behaviour(status=401), "refuses access (HTTP 401)"),
    "proxy": (Behaviour(status=407), "A proxy on the network requires a login"),
    "busy for hours": (Behaviour(status=429, headers={"Retry-After": "9999"}), "asks you to wait for 167 minutes"),
    "a byte short": (Behaviour(body=MODEL[:-1]), "is not a complete safetensors file"),
    "exe": (Behaviour(body=b"MZ" + b"x" * 900), "is a program, not a model"),
    "name": (Behaviour(headers={"Content-Disposition": "attachment; filename=../x.ckpt"}), "points outside its folder"),
}


@pytest.mark.parametrize("case", _BAD_LINKS)
def test_the_command_line_says_one_sentence_and_what_to_do_and_ends_with_2(site, folder, case, capsys):
    from fastsd_helpers.cli import main

    site.default, said = _BAD_LINKS[case]
    site.files["/login"] = b"<!DOCTYPE html>"
    if case == "to a login page":
        site.queue, site.default = [site.default], Behaviour(headers={"Content-Type": "text/html"})
    assert main(["models", "get", site.url("/model.safetensors"), "--to", str(folder)]) == 2
    shown = capsys.readouterr()
    last = shown.err.rstrip().splitlines()[-2:]
    assert last[0].startswith("✋ ")
    assert said in last[0]
    assert last[1].startswith("   → ")
    assert "Traceback" not in shown.err + shown.out
    assert names_in(folder) == []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("fastsd_helpers.downloads.hub.PAUSES_S", (0.01, 0.01))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    served = tmp_path / "served"
    served.mkdir()
    (served / "net.safetensors").write_bytes(MODEL)
    with HubServer({"a/b": served}, members=["hf_MemberOfTheTests0123456789"]) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_file_of_the_hub_gets_its_name_in_the_folder_without_a_second_copy(hub, folder):
    path = fetch(HubFile("a/b", "net.safetensors"), folder, name="control.safetensors", sha256=SHA256)
    assert path.read_bytes() == MODEL
    assert path.stat().st_nlink == 2  # the cache's blob and this name are one file
    hub.requests.clear()
    assert fetch(HubFile("a/b", "net.safetensors"), folder, name="control.safetensors", sha256=SHA256) == path
    assert hub.requests == []


def test_a_hub_file_that_changed_is_refused_before_it_is_downloaded(hub, folder):
    with pytest.raises(DownloadError, match="not the expected version"):
        fetch(HubFile("a/b", "net.safetensors"), folder, sha256="0" * 64)
    assert hub.downloaded() == []
    with pytest.raises(DownloadError, match="has 300"):
        fetch(HubFile("a/b", "net.safetensors"), folder, size=5)


def test_a_missing_file_repository_and_gate_of_the_hub_are_told_apart(hub, folder):
    with pytest.raises(DownloadError, match=r"has no file 'other\.safetensors'"):
        fetch(HubFile("a/b", "other.safetensors"), folder)
    with pytest.raises(DownloadError, match="no model 'a/c'"):
        fetch(HubFile("a/c", "net.safetensors"), folder)
    hub.gated = {"a/b"}
    with pytest.raises(DownloadError, match="is gated") as caught:
        fetch(HubFile("a/b", "net.safetensors"), folder)
    assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "no token with access was given"),
        ("hf_stranger0123456789", "this token has no access to it"),
        ("hf_expired0123456789", "refused the Hugging Face token"),
        ("hf_two words0123456789", "contains a space or an unusual character"),
        ("  hf_MemberOfTheTests0123456789\n", ""),
    ],
)
def test_a_gated_file_is_had_with_a_members_token_only_and_no_token_is_shown(
    hub, folder, monkeypatch, caplog, token, said
):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    hub.gated, hub.strangers = {"a/b"}, {"hf_stranger0123456789"}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if not said:
        assert fetch(HubFile("a/b", "net.safetensors"), folder).read_bytes() == MODEL
        return
    with pytest.raises(FastSDError, match=said) as caught:
        fetch(HubFile("a/b", "net.safetensors"), folder)
    assert caught.value.exit_code == 2
    assert "settings/tokens" in caught.value.hint
    assert "0123456789" not in str(caught.value) + caplog.text
    assert names_in(folder) == []


def test_two_hub_files_of_one_name_are_not_taken_for_each_other(hub, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.safetensors").write_bytes(MODEL[:-1] + bytes([MODEL[-1] ^ 1]))
    hub.repos["c/d"] = other
    assert fetch(HubFile("a/b", "net.safetensors"), folder).read_bytes() == MODEL
    with pytest.raises(DownloadError, match="exists already, but differs"):
        fetch(HubFile("c/d", "net.safetensors"), folder)
    assert fetch(HubFile("a/b", "net.safetensors"), folder).read_bytes() == MODEL
    assert fetch(HubFile("c/d", "net.safetensors"), folder, overwrite=True).read_bytes() != MODEL
    assert names_in(folder) == ["net.safetensors"]


def test_without_the_hub_a_file_that_is_here_is_kept_and_that_is_said(hub, folder, caplog):
    path = fetch(HubFile("a/b", "net.safetensors"), folder)
    hub.stop()
    assert fetch(HubFile("a/b", "net.safetensors"), folder) == path
    assert "is kept unchanged, not verified" in caplog.text


def test_what_is_to_be_replaced_stays_when_the_new_file_cannot_be_kept(hub, folder, monkeypatch):
    folder.mkdir()
    (folder / "net.safetensors").write_bytes(b"mine")

    def no_links(*args):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    with full_disk(folder, after_bytes=1000), pytest.raises(DiskFull):
        fetch(HubFile("a/b", "net.safetensors"), folder, overwrite=True, sha256=SHA256)
    assert (folder / "net.safetensors").read_bytes() == b"mine"
    assert names_in(folder) == ["net.safetensors"]
    assert fetch(HubFile("a/b", "net.safetensors"), folder, overwrite=True, sha256=SHA256).read_bytes() == MODEL


def test_a_real_disk_that_fills_up_under_the_hubs_cache_is_told_and_holds_no_half_file(
    hub, folder, tmp_path, monkeypatch
):
    big = safetensors(1_200_000)
    hub.repos["a/b"].joinpath("net.safetensors").write_bytes(big)
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(disk))
        monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10**12)
        with (
            pytest.warns(UserWarning, match="Not enough free disk space"),  # the client's own
            pytest.raises(DiskFull, match="filled up while a/b was downloaded"),
        ):
            fetch(HubFile("a/b", "net.safetensors"), folder)
        assert names_in(folder) == []
        assert not list(disk.rglob("net.safetensors"))


def test_a_real_disk_that_fills_up_under_a_link_is_told(site, tmp_path, monkeypatch):
    site.files["/model.safetensors"] = safetensors(1_200_000)
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10**12)
        with pytest.raises(DiskFull):
            fetch(site.url("/model.safetensors"), disk)
        assert "model.safetensors" not in names_in(disk)


def test_a_hub_file_damaged_on_the_way_is_fetched_again(hub, folder):
    hub.faults = [Fault("/cdn/", flip=True)]
    assert fetch(HubFile("a/b", "net.safetensors"), folder).read_bytes() == MODEL


# -------------------------------------------------------------------------------------------- random faults


def _random_run(site: FileServer, folder: Path, seed: int) -> tuple[str, bool]:
    """One download, with a token, through a server with random faults; every outcome must be right."""
    chance = random.Random(seed)
    content = safetensors(chance.randrange(1, 200_000), seed=seed)
    sha256 = hashlib.sha256(content).hexdigest()
    site.files["/api/download/models/77"] = site.files["/other"] = content
    site.files["/api/v1/model-versions/77"] = json.dumps(site.about(hashes={"SHA256": sha256})).encode()
    link = site.url("/api/download/models/77")
    site.seen.clear()
    site.queue.clear()
    for _ in range(chance.randrange(0, 5)):
        etag = chance.choice(['"one"', '"one"', '"two"', None, 'W/"weak"'])
        site.queue.append(
            chance.choice(
                [
                    Behaviour(cut_after=chance.randrange(0, len(content)), etag=etag),
                    Behaviour(announce=chance.choice([-1, 1, -100, 4096]), etag=etag),
                    Behaviour(status=chance.choice([429, 500, 502, 503]), headers={"Retry-After": "0"}),
                    Behaviour(redirect=site.url("/other", host="localhost")),
                    Behaviour(headers={"Content-Type": "text/html"}, body=b"<html>log in</html>"),
                    Behaviour(body=content[:-1] + bytes([content[-1] ^ 1]), etag=etag),
                    Behaviour(ranges=False, cut_after=chance.randrange(0, len(content))),
                    Behaviour(status=404),
                ]
            )
        )
    try:
        path = fetch(link, folder, name="m.safetensors")
    except FastSDError:
        assert "m.safetensors" not in names_in(folder)
        outcome = "refused"
        site.queue.clear()
        path = fetch(link, folder, name="m.safetensors")
    else:
        outcome = "whole"
    assert path.read_bytes() == content
    assert names_in(folder) == ["m.safetensors"]
    sent = {(seen.host, seen.headers.get("Authorization")) for seen in site.seen}
    assert sent <= {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}
    return outcome, "localhost" in dict(sent)


@pytest.mark.parametrize(
    "runs", [pytest.param((0, 30), id="30"), pytest.param((30, 230), id="200", marks=pytest.mark.slow)]
)
def test_random_faults_end_in_the_exact_file_or_a_typed_error(civitai, tmp_path, runs, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="fastsd_helpers")
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    outcomes = [_random_run(civitai, tmp_path / str(seed), seed) for seed in range(*runs)]
    assert {outcome for outcome, _led_away in outcomes} == {"whole", "refused"}
    assert any(led_away for _outcome, led_away in outcomes), "some of them were led to another host"
    assert TOKEN not in caplog.text


def test_the_tests_own_server_leaves_no_file_open(site, folder):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(20):
        fetch(site.url(f"/model.safetensors?{number}"), folder, name=f"{number}.safetensors")
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after - before < 15
