"""Tests of the commands about this machine and about models, through the command line itself."""

import json

import pytest
from file_server import FileServer
from test_fetch import MODEL, SHA256

from fastsd_helpers import controlnet, doctor
from fastsd_helpers.cli import main
from fastsd_helpers.doctor import Diagnosis, Finding
from fastsd_helpers.downloads import Wanted


@pytest.fixture
def run(capsys):
    """Run `fastsd ...` in this process; (exit code, standard output, standard error)."""

    def run(*words):
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def site(monkeypatch):
    server = FileServer({"/dream.safetensors": MODEL})
    monkeypatch.setattr("fastsd_helpers.downloads.retries.PAUSES_S", (0.0,))
    yield server
    server.stop()


def test_doctor_answers_for_people_and_for_programs(run, monkeypatch):
    found = Diagnosis({"place": "test"}, {"python": "3.13.15"}, (Finding("problem", "It hurts.", "Rest."),))
    monkeypatch.setattr(doctor, "examine", lambda root=None: found)
    code, out, _err = run("doctor")
    assert code == 0
    assert "✋ It hurts.\n   → Rest." in out
    said = json.loads(run("doctor", "--json")[1])
    assert (said["problems"], said["machine"], said["findings"][0]["todo"]) == (1, {"place": "test"}, "Rest.")


def test_install_refuses_what_no_set_is_for(run):
    code, _out, err = run("install", "paint")
    assert code == 2
    assert "no set 'paint'" in err
    assert "dreambooth" in err
    code, _out, err = run("install", "a1111")
    assert code == 2
    assert "an environment of its own" in err or "locked for Python 3.11" in err


def test_a_link_is_downloaded_checked_and_described(run, site, tmp_path):
    words = ("models", "get", site.url("/dream.safetensors"), "--to", str(tmp_path / "m"), "--json")
    code, out, _err = run(*words)
    said = json.loads(out)
    assert (code, said["sha256"], said["bytes"], said["kind"]) == (0, SHA256, len(MODEL), "safetensors")
    assert said["path"] == str(tmp_path / "m" / "dream.safetensors")
    code, _out, err = run(*words[:-1], "--name", "x.safetensors", "--sha256", "0" * 64)
    assert code == 2
    assert "a file that does not match its SHA-256" in err


def test_a_path_and_a_packaged_model_are_described(run, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(MODEL)
    assert json.loads(run("models", "get", str(file), "--json")[1])["sha256"] == SHA256
    said = json.loads(run("models", "get", "demo", "--json")[1])
    assert said["path"].endswith("demo/model")
    code, _out, err = run("models", "get", "no-such-thing")
    assert code == 2
    assert "not a registry key" in err


def test_models_of_every_kind_are_listed_when_asked(run):
    assert "trocr-base-handwritten" not in run("models", "list")[1]
    assert "trocr-base-handwritten" in run("models", "list", "--all")[1]
    assert "about_bytes" in run("models", "show", "trocr-base-handwritten", "--json")[1]


def test_controlnets_that_fit_are_listed_and_others_refused(run):
    code, out, _err = run("controlnet", "list", "--base", "sd15", "--ui", "a1111", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["bytes"] == sum(row["bytes"] for row in said["controlnets"])
    assert all("a1111" in row["uis"] for row in said["controlnets"])
    assert "recommended" in run("controlnet", "list", "--base", "sdxl")[1]
    code, _out, err = run("controlnet", "list", "--base", "flux-dev", "--ui", "a1111")
    assert code == 2
    assert "no ControlNet for flux-dev in AUTOMATIC1111" in err
    assert "ComfyUI" in err
    code, _out, err = run("controlnet", "list", "--base", "flux-dev", "--ui", "a1111", "--task", "canny")
    assert "canny works with flux in ComfyUI" in err


def test_all_controlnets_that_fit_come_and_a_failure_is_named(run, site, tmp_path, monkeypatch):
    def from_here(row, folder):
        path = "/dream.safetensors" if "Depth" in row.title else "/none"
        return Wanted(site.url(path), folder, name=row.save_as)

    monkeypatch.setattr(controlnet, "controlnet_file", from_here)
    words = ("controlnet", "get", "all", "--base", "flux-dev", "--ui", "playground", "--to", str(tmp_path), "--json")
    code, out, err = run(*words)
    said = json.loads(out)
    assert code == 0
    assert f"{len(said['controlnets'])} files" in err
    made = [item for item in said["controlnets"] if "path" in item]
    assert made
    assert all((tmp_path / item["path"]).read_bytes() == MODEL for item in made)
    assert said["failed"] == len(said["controlnets"]) - len(made) > 0
