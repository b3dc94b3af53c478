"""Environment report, what is missing or known to be bad together, and what to do about each.

The report can be pasted anywhere: it names which tokens are there, never their values.
"""

import contextlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.device import Device, count_cores, describe_device, host_memory_bytes
from fastsd_helpers.downloads.hub import offline
from fastsd_helpers.drive import check_health, sessions_root
from fastsd_helpers.errors import DependencyMissing, FastSDError, InstallError
from fastsd_helpers.files import free_bytes
from fastsd_helpers.processes import count_gpus
from fastsd_helpers.registry import find_model
from fastsd_helpers.runtime import install_command, logger, redact, secret, version_of, versions, where
from fastsd_helpers.wheels import find_uv, install, read_lock
from fastsd_helpers.wheels.advisories import old_packages
from fastsd_helpers.wheels.difference import requirements_module
from fastsd_helpers.wheels.environment import missing_constraints
from fastsd_helpers.wheels.known_bad import known_bad
from fastsd_helpers.wording import list_some

__all__ = ["LOOKS", "Diagnosis", "Finding", "examine"]

_TOKENS = ("HF_TOKEN", "CIVITAI_TOKEN", "NGROK_AUTHTOKEN")
_LITTLE_DISK = 12e9  # a base model in two layouts
_LITTLE_DRIVE = 5e9  # one finished model and its checkpoints
_LITTLE_RAM = 6e9
# What is looked at, in this order.
LOOKS = ("python", "torch", "memory", "disks", "versions", "holes", "imported", "settings", "tokens", "lock")
_MOUNT_S = 10.0  # a dead mount does not answer at all

_MARKS = {"problem": "✋", "warning": "⚠", "note": "·", "ok": "✓"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "warning", "problem"]
    what: str
    todo: str = ""
    workflow: str = ""  # the one it is about; empty: all of them


@dataclass(frozen=True)
class Diagnosis:
    """Everything `examine` saw."""

    machine: dict[str, Any]
    versions: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> int:
        """How many findings have to be fixed before anything works."""
        return sum(item.level == "problem" for item in self.findings)

    def lines(self) -> list[str]:
        """The report for people, ready to paste."""
        width = max(len(name) for name in self.machine)
        lines = ["fastsd doctor", *(f"  {name.ljust(width)}  {value}" for name, value in self.machine.items())]
        lines += ["  " + ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        order = ("problem", "warning", "note", "ok")
        for item in sorted(self.findings, key=lambda found: order.index(found.level)):
            lines += _lines_of(item)
        return [redact(line) for line in [*lines, self._verdict()]]

    def summary(self, workflow: str) -> list[str]:
        """A few lines for somebody who wants to start: this machine, what is in the way, and what was found good.

        Args:
            workflow: dreambooth, webui or trocr.
        """
        named = [f"{name} {self.versions[name]}" for name in ("python", "torch") if name in self.versions]
        gpu, memory = self.machine["gpu"], self.machine["memory"]
        lines = [f"This machine: GPU {gpu}; {self.machine['processor']}, {memory} of memory; {', '.join(named)}."]
        for level in ("problem", "warning", "ok"):
            shown = [item for item in self.findings if item.level == level and item.workflow in ("", workflow)]
            lines += [line for item in shown for line in _lines_of(item)]
        return [redact(line) for line in [*lines, f"{self._verdict()} Full report: fastsd doctor"]]

    def _verdict(self) -> str:
        return "No problems found." if not self.problems else f"{self.problems} to fix before you start."


def _lines_of(item: Finding) -> list[str]:
    return [f"{_MARKS[item.level]} {item.what}", *([f"   → {item.todo}"] if item.todo else [])]


def examine(
    *, root: Path | None = None, kept: str = "sessions", folder: str = "", looks: Sequence[str] = LOOKS
) -> Diagnosis:
    """Look at this machine; nothing is changed, downloaded or sent.

    Args:
        root: the sessions folder whose disk is checked; left alone, the usual one.
        kept: what is kept instead of sessions, in words.
        folder: where that is, from Drive or the current folder.
        looks: which of LOOKS; left alone, all of them.

    Returns:
        What was found; `lines()` is the report for people, `problems` what stands in the way.
    """
    device = describe_device()
    found = versions()
    machine = _machine(device)
    findings: list[Finding] = []
    ways: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _look_at_python,
        "torch": lambda: _look_at_torch(device),
        "memory": lambda: _look_at_memory(device),
        "disks": lambda: _look_at_disks(root, kept, folder),
        "versions": _look_at_versions,
        "holes": _look_at_holes,
        "imported": _look_at_imported,
        "settings": _look_at_settings,
        "tokens": _look_at_tokens,
        "lock": _look_at_lock,
    }
    for name in looks:
        findings += _safely(ways[name])
    return Diagnosis(machine, found, tuple(findings))


def _safely(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """One look; what it cannot do is a finding too, not the end of the report."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except FastSDError as err:
        found.append(Finding("warning", err.problem, err.hint))
    except Exception as err:  # the doctor has to come back with whatever it saw
        logger.debug("A check failed.", exc_info=True)
        found.append(Finding("warning", f"One check failed: {type(err).__name__}: {redact(str(err))[:200]}."))
    return found


def _machine(device: Device) -> dict[str, Any]:
    gpu = device.name if device.kind != "cpu" else f"none ({device.reason})"
    if device.capability:
        gpu += f", compute {device.capability[0]}.{device.capability[1]}, {device.memory_gib:.1f} GiB"
    said = {
        "place": where() + (f" {os.environ['COLAB_RELEASE_TAG']}" if os.environ.get("COLAB_RELEASE_TAG") else ""),
        "system": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver()) or 'libc unknown'}",
        "processor": f"{count_cores()} cores",
        "memory": f"{host_memory_bytes() / 1e9:.1f} GB",
        "gpu": gpu,
    }
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        with contextlib.suppress(OSError, IndexError):
            said["driver"] = driver.read_text(encoding="ascii", errors="replace").split("Module")[1].split()[0]
    try:
        uv = find_uv()
        said["installer"] = f"uv ({uv})" if uv else "pip"
    except DependencyMissing as err:
        said["installer"] = f"none: {err.problem} {err.hint}"
    return said


# -------------------------------------------------------------------------------------------------- the looks


def _look_at_python() -> Iterator[Finding]:
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    locked = sorted({item.python for item in read_lock().sets if not item.own_environment})
    if minor in locked:
        yield Finding("ok", f"Python {minor} has locked packages.")
    else:
        yield Finding(
            "warning",
            f"Python {minor} has no locked packages (there are some for {', '.join(locked)}).",
            f"Use one of those, or install by hand: {install_command('dreambooth')}",
        )


def _look_at_torch(device: Device) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as err:
        yield Finding(
            "problem",
            f"PyTorch cannot be imported: {' '.join(str(err).split())[:160]}.",
            "Install it as pytorch.org > Get started says for this machine; fastsd never does.",
        )
        return
    driver_here = Path("/proc/driver/nvidia/version").exists()
    if device.kind == "cuda":
        kernels = set(torch.cuda.get_arch_list())
        major, minor = device.capability or (0, 0)
        # A build for sm_80 runs on every 8.x; one for another major version does not.
        fits = any(
            name.startswith(f"sm_{major}") and int(name[3 + len(str(major)) :] or 0) <= minor for name in kernels
        )
        if kernels and not fits and not any(name.startswith("compute_") for name in kernels):
            yield Finding(
                "problem",
                f"torch {torch.__version__} has no kernels for this GPU (compute {major}.{minor}).",
                "Install a newer torch, as pytorch.org says.",
            )
        else:
            yield Finding("ok", f"torch {torch.__version__} works on {device.name}.")
        if (gpus := count_gpus()) > 1:
            processes = f"A DreamBooth training uses all {gpus} GPUs: {gpus} processes, one on each (--processes)."
            yield Finding("ok", processes, workflow="dreambooth")
    elif driver_here:
        yield Finding(
            "problem",
            f"A GPU driver is here, but torch {torch.__version__} cannot use it ({device.reason}).",
            "Restart the runtime; if the problem persists, install the CUDA build of torch that pytorch.org names.",
        )
    elif where() == "colab":
        yield Finding(
            "warning",
            "No GPU is attached: training with the full models would take days.",
            "Runtime > Change runtime type > T4 GPU; then run the cells again.",
        )
    elif where() == "kaggle":
        yield Finding("warning", "No GPU is attached.", "Settings > Accelerator > GPU T4 x2; the notebook restarts.")
    else:
        yield Finding(
            "note", "No GPU: the embedded demo models work here; the full models need one.", "Use Colab for those."
        )


def _look_at_memory(device: Device) -> Iterator[Finding]:
    ram = host_memory_bytes()
    if 0 < ram < _LITTLE_RAM:
        yield Finding(
            "warning",
            f"{ram / 1e9:.1f} GB of memory is not much: converting a full model may be killed (exit code -9).",
        )
    needed = find_model("sd15").vram_gb["full"]
    if device.kind == "cuda" and device.memory_bytes < needed * 1e9:
        yield Finding(
            "warning",
            f"{device.name} has {device.memory_bytes / 1e9:.0f} GB: full fine-tuning of SD 1.5 needs {needed:g} GB.",
            "Choose the method 'lora', or a larger GPU.",
        )


def _look_at_disks(root: Path | None, kept: str = "sessions", below: str = "") -> Iterator[Finding]:
    here = free_bytes(Path.cwd())
    level: Literal["warning", "ok"] = "warning" if here < _LITTLE_DISK else "ok"
    todo = "Delete what you no longer need on this machine." if level == "warning" else ""
    yield Finding(level, f"{here / 1e9:.1f} GB are free on this machine's disk.", todo)
    folder, problem = _within(_MOUNT_S, lambda: sessions_root().parents[1] / below if below else sessions_root(root))
    if problem is None and folder is not None:
        _there, problem = _within(_MOUNT_S, lambda: check_health(_first_existing(folder)))
    if problem is not None:
        yield Finding("problem", f"The {kept} folder does not answer: {problem[0]}", problem[1])
        return
    free = free_bytes(folder)
    on_drive = "MyDrive" in folder.parts or "Shareddrives" in folder.parts
    if where() == "colab" and not on_drive:
        # A note, because a notebook's first cell looks before the one that mounts it had its turn.
        yield Finding(
            "note",
            "Google Drive is not mounted: what is kept on this machine is lost with it.",
            f"Run the cell that opens the {'session' if kept == 'sessions' else 'folder'}: it asks for access.",
        )
    if free < _LITTLE_DRIVE:
        yield Finding(
            "warning",
            f"{free / 1e9:.1f} GB are free where {kept} are kept ({folder}).",
            f"Delete old {kept} and empty Drive's trash: deleted files count until then."
            if on_drive
            else f"Delete old {kept}.",
        )
    else:
        yield Finding("ok", f"{free / 1e9:.1f} GB are free where {kept} are kept ({folder}).")


def _first_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _within(seconds: float, work: Callable[[], Any]) -> tuple[Any, tuple[str, str] | None]:
    """Do something that may hang on a dead mount; (result, None) or (None, (problem, hint))."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append((work(), None))
        except FastSDError as err:
            answer.append((None, (err.problem, err.hint)))
        except OSError as err:
            answer.append((None, (f"{err.strerror}.", "Check whether the folder opens in the file browser.")))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if answer:
        return answer[0]
    hint = "Runtime > Restart session, then run the Drive cell again. What was saved before is still there."
    return None, (f"no answer within {seconds:.0f} s.", hint)


def _look_at_versions() -> Iterator[Finding]:
    specifiers = requirements_module().Requirement
    for row in known_bad():
        version = version_of(row.package)
        if version is None or (row.only and row.only != where()):
            continue
        if not specifiers(f"x{row.versions}").specifier.contains(version, prereleases=True):
            continue
        if row.beside:
            other = version_of(row.beside[0])
            if other is None or not specifiers(f"x{row.beside[1]}").specifier.contains(other, prereleases=True):
                continue
        yield Finding(row.level, f"{row.package} {version} {row.what}.", row.todo)
    builds = {
        name: version
        for name in ("opencv-python", "opencv-python-headless", "opencv-contrib-python")
        if (version := version_of(name))
    }
    if len(set(builds.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in builds.items())
        yield Finding("note", f"Several builds of OpenCV share one folder ({listed}); the last one installed is used.")


def _look_at_holes() -> Iterator[Finding]:
    for package in old_packages():
        yield Finding("warning" if package.is_open else "note", package.sentence(), package.remedy())


def _look_at_imported() -> Iterator[Finding]:
    for name in ("torch", "transformers", "diffusers", "accelerate", "peft", "huggingface_hub", "numpy"):
        module = sys.modules.get(name)
        imported, installed = getattr(module, "__version__", None), version_of(name)
        if imported and installed and str(imported) != installed:
            yield Finding(
                "problem",
                f"{name} {imported} is in memory, but {installed} was installed meanwhile.",
                "Restart the runtime (Colab: Runtime > Restart session).",
            )


def _look_at_settings() -> Iterator[Finding]:
    for _path, problem, todo in missing_constraints():
        yield Finding("problem", problem, todo)
    if offline():
        yield Finding("note", "HF_HUB_OFFLINE is set: only models that are here already can be used.")
    if os.environ.get("HF_ENDPOINT"):
        yield Finding("note", "HF_ENDPOINT is set: models come from there instead of huggingface.co.")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("warning", "CUDA_VISIBLE_DEVICES is empty, which hides every GPU.", "Unset it.")


def _look_at_tokens() -> Iterator[Finding]:
    values = {name: secret(name) for name in _TOKENS}  # asked once: in Colab each may open a dialog
    for name, value in values.items():
        if value and len(value.split()) > 1:
            yield Finding("warning", f"{name} contains a space.", "Copy the token again, without spaces.")
    here = [name for name in _TOKENS if values[name]]
    absent = [name for name in _TOKENS if name not in here]
    yield Finding("ok", f"Tokens: {', '.join(here) or 'none'} set; {', '.join(absent) or 'none'} not set.")


def _look_at_lock() -> Iterator[Finding]:
    for name in ("dreambooth", "webui", "trocr"):
        try:
            report = install(name, dry_run=True)
        except InstallError as err:
            yield Finding("warning", f"{name}: {err.problem}", err.hint, name)
            continue
        if report.unproved:
            yield Finding(
                "warning",
                f"{name}: {', '.join(report.unproved)} was installed but its import check has not passed yet.",
                f"Run: fastsd install {name} (it repeats the import check)",
                name,
            )
            continue
        if not report.changes:
            yield Finding("ok", f"{name}: all {report.kept} packages are installed and compatible.", workflow=name)
            continue
        listed = list_some((change.name for change in report.changes), 6)
        yield Finding(
            "note",
            f"{name}: still to be installed: {listed} ({report.bytes / 1e6:.0f} MB).",
            f"Before you use it: fastsd install {name}",
            name,
        )
