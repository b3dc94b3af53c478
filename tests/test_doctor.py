"""Tests of the doctor: what it reports, that it survives whatever it meets, and that no secret is in it."""

import importlib.metadata
import json
import sys
import time

import pytest

from fastsd_helpers import doctor
from fastsd_helpers.cli.answers import plain
from fastsd_helpers.device import Device
from fastsd_helpers.doctor import LOOKS, Finding, examine
from fastsd_helpers.errors import DriveError
from fastsd_helpers.wheels.known_bad import known_bad

CPU = Device("cpu", "Test CPU", 8 * 2**30, False, reason="no GPU is attached")
T4 = Device("cuda", "Tesla T4", 15 * 2**30, False, (7, 5), "CUDA GPU 0 of 1")


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """Describing the real processor imports torch, which these tests do without."""
    monkeypatch.setattr(doctor, "describe_device", lambda: CPU)
    for name in ("CIVITAI_TOKEN", "NGROK_AUTHTOKEN", "UV_CONSTRAINT", "PIP_CONSTRAINT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def installed(monkeypatch, versions):
    real = importlib.metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def texts(findings):
    return " ".join(f"{item.level} {item.what} {item.todo}" for item in findings)


def looked(look, **more):
    """What one look says."""
    return texts(examine(looks=[look], **more).findings)


def test_the_report_is_whole_and_can_be_pasted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SecretOfTheTests0123456789")
    found = examine(looks=[look for look in LOOKS if look != "torch"])
    text = "\n".join(found.lines())
    assert text.startswith("fastsd doctor")
    assert "HF_TOKEN set; CIVITAI_TOKEN, NGROK_AUTHTOKEN not set" in text
    assert "SecretOfTheTests" not in text
    assert "SecretOfTheTests" not in json.dumps(plain(found))
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in text
    assert all(item.todo for item in found.findings if item.level == "problem")


def test_the_summary_leaves_out_notes_and_what_concerns_another_workflow():
    said = {"gpu": "none (no GPU is attached)", "processor": "2 cores", "memory": "13.6 GB"}
    findings = (
        Finding("ok", "Room enough."),
        Finding("ok", "trocr: all is here.", workflow="trocr"),
        Finding("warning", "dreambooth: no lock.", "Install it.", "dreambooth"),
        Finding("note", "Of no matter."),
        Finding("problem", "hf_SecretOfTheTests0123456789 is wrong.", "Copy it again."),
    )
    lines = doctor.Diagnosis(said, {"python": "3.13.15"}, findings).summary("dreambooth")
    assert lines == [
        "This machine: GPU none (no GPU is attached); 2 cores, 13.6 GB of memory; python 3.13.15.",
        "✋ ••• is wrong.",
        "   → Copy it again.",
        "⚠ dreambooth: no lock.",
        "   → Install it.",
        "✓ Room enough.",
        "1 to fix before you start. Full report: fastsd doctor",
    ]


@pytest.fixture
def look_at_gpu(monkeypatch):
    """What one look says on a machine with this processor."""

    def look(name, device):
        monkeypatch.setattr(doctor, "describe_device", lambda: device)
        return looked(name)

    return look


def test_each_token_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "secret", lambda name: asked.append(name) or "two words")
    assert looked("tokens").count("contains a space") == 3
    assert asked == ["HF_TOKEN", "CIVITAI_TOKEN", "NGROK_AUTHTOKEN"]


def test_one_look_that_breaks_does_not_end_the_report(monkeypatch):
    def broken():
        yield "problem", "seen before it broke", ""
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "missing_constraints", broken)
    monkeypatch.setattr(doctor, "old_packages", raise_drive_error)
    seen, broke, refused = examine(looks=["settings", "holes"]).findings
    assert (seen.level, seen.what, broke.level) == ("problem", "seen before it broke", "warning")
    assert "RuntimeError: boom" in broke.what
    assert refused == Finding("warning", "The mount is gone.", "Mount it again.")


def raise_drive_error():
    raise DriveError("The mount is gone.", "Mount it again.")


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"transformers": "5.15.0"}, "cannot load the tokenizers"),
        ({"transformers": "4.40.0"}, "problem transformers 4.40.0 is older"),
        ({"numpy": "2.1.0", "torch": "2.2.1"}, "problem numpy 2.1.0 and a torch older than 2.3"),
        ({"opencv-python": "5.0.0.93"}, "no longer has the Haar face detector"),
        ({"opencv-python": "5.0.0.93", "opencv-contrib-python": "4.14.0.94"}, "Several builds of OpenCV"),
        ({"xformers": "0.0.35"}, "is not used here"),
        ({"pyngrok": "7.1.0"}, "no longer accepts"),
    ],
)
def test_versions_that_are_known_to_be_bad_are_named_with_what_to_do(monkeypatch, versions, said):
    installed(monkeypatch, versions)
    assert said in looked("versions")


def test_good_versions_and_other_places_are_not_complained_about(monkeypatch):
    every = {row.package: None for row in known_bad()} | {"opencv-python-headless": None, "opencv-contrib-python": None}
    installed(
        monkeypatch, every | {"transformers": "4.57.0", "numpy": "2.1.0", "torch": "2.11.0", "ipywidgets": "8.1.9"}
    )
    assert looked("versions") == ""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_2026")
    assert "does not show in Colab" in looked("versions")


def test_a_gpu_without_kernels_and_a_driver_without_torch_are_problems(monkeypatch, look_at_gpu):
    torch = type(sys)("torch")
    torch.__version__ = "2.1.2+cu121"
    torch.cuda = type(sys)("cuda")
    torch.cuda.get_arch_list = lambda: ["sm_50", "sm_80", "sm_90"]
    monkeypatch.setitem(sys.modules, "torch", torch)
    blackwell = Device("cuda", "RTX PRO 6000", 95 * 2**30, True, (12, 0))
    assert "problem torch 2.1.2+cu121 has no kernels" in look_at_gpu("torch", blackwell)
    assert "problem" in look_at_gpu("torch", T4)
    torch.cuda.get_arch_list = lambda: ["sm_70", "sm_75", "sm_80"]
    assert "ok torch" in look_at_gpu("torch", T4)
    a6000 = Device("cuda", "A6000", 48 * 2**30, True, (8, 6))
    assert "ok torch" in look_at_gpu("torch", a6000)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "problem PyTorch cannot be imported" in look_at_gpu("torch", CPU)


def test_a_gpu_too_small_for_full_training_is_told(look_at_gpu):
    assert look_at_gpu("memory", T4) == ""
    small = Device("cuda", "RTX 3070", int(8e9), True, (8, 6))
    assert "warning RTX 3070 has 8 GB: full fine-tuning of SD 1.5 needs 10 GB. Choose the method 'lora'" in look_at_gpu(
        "memory", small
    )


def test_a_mount_that_hangs_is_told_and_does_not_hang_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_MOUNT_S", 0.1)
    monkeypatch.setattr(doctor, "check_health", lambda folder: time.sleep(5))
    assert "problem The sessions folder does not answer: no answer within 0 s" in looked("disks", root=tmp_path)


def test_little_room_for_sessions_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: int(1e9))
    said = looked("disks", root=tmp_path / "MyDrive" / "Sessions")
    assert "warning 1.0 GB are free on this machine's disk" in said
    assert "empty Drive's trash" in said


def test_a_constraint_file_that_is_not_there_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("UV_CONSTRAINT", f"{tmp_path}/gone.txt")
    said = looked("settings")
    assert "nothing can be installed" in said
    assert "unset UV_CONSTRAINT" in said


def test_a_package_that_was_not_seen_to_work_is_a_warning_of_its_workflow(monkeypatch):
    from pathlib import Path

    from fastsd_helpers.wheels import InstallReport

    def report(name, *, dry_run):
        notes = ("bitsandbytes",) if name == "dreambooth" else ()
        return InstallReport(name, "3.13", Path("p"), (), 9, 0, 0.1, "none", (), (), dry_run, notes)

    monkeypatch.setattr(doctor, "install", report)
    first, *others = examine(looks=["lock"]).findings
    assert (first.level, first.workflow) == ("warning", "dreambooth")
    assert "bitsandbytes was installed but its import check has not passed yet" in first.what
    assert "fastsd install dreambooth" in first.todo
    assert {item.level for item in others} == {"ok"}


def test_a_package_in_memory_at_another_version_asks_for_a_restart(monkeypatch):
    module = type(sys)("peft")
    module.__version__ = "0.1.0"
    monkeypatch.setitem(sys.modules, "peft", module)
    installed(monkeypatch, {"peft": "0.20.0"})
    assert "problem peft 0.1.0 is in memory, but 0.20.0 was installed" in looked("imported")
