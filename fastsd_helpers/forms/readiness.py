"""What a notebook's first cell calls: install what is missing here, then say the environment report."""

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from fastsd_helpers.doctor import examine
from fastsd_helpers.errors import InstallError
from fastsd_helpers.forms.quiet import quieten_libraries
from fastsd_helpers.processes import is_found_anyway
from fastsd_helpers.runtime import logger, start_log, where
from fastsd_helpers.wheels import install

__all__ = ["set_up", "tell_children"]

# Where each notebook keeps what is its user's, on Drive or beside the notebook, and what that is.
_KEPT = {
    "dreambooth": ("Fast-Dreambooth/Sessions", "sessions"),
    "trocr": ("Fast-TrOCR/Sessions", "sessions"),
    "webui": ("sd/stable-diffusion-webui", "models and images"),
}

# Linux, and Linux within Windows. Not asked of torch: it would be imported before what it may need is installed.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


def set_up(workflow: str, version: str = "") -> None:
    """Make this Python ready for a workflow and print a few lines about this machine; a second run changes nothing.

    With nothing missing no network is asked. Without an NVIDIA GPU bitsandbytes is left out: it serves no one else.
    Processes that this one starts find this very copy of the library, wherever it lies.

    Args:
        workflow: dreambooth, webui or trocr.
        version: of the notebook; another one than the library's is said.

    Raises:
        InstallError: a package could not be installed, or the runtime has to be restarted first.
        DependencyMissing: there is nothing to install with.
        DiskFull: not enough room.
    """
    start_log()
    quieten_libraries()
    here = Path(__file__).resolve().parents[2]
    # Not by its name: the package itself names the modules of this folder.
    own = sys.modules["fastsd_helpers"].__version__
    if version and version != own:
        logger.warning(
            "This notebook is of version %s, and fastsd_helpers in %s is %s: a cell may not fit it. Use the notebook "
            "and the library of the same release; put the wheel or zip of %s next to the notebook, restart the kernel "
            "and run all cells.",
            *(version, here, own, version),
        )
    tell_children(here)
    skip = () if any(path.exists() for path in _DRIVERS) else ("bitsandbytes",)
    report = install(workflow, skip=skip)
    if report.changes:
        logger.info("%s", "\n".join(report.lines()))
    if report.restart:
        raise InstallError(
            f"Restart the runtime now: {', '.join(report.restart)} is loaded in another version than the one "
            "installed.",
            "In Colab: Runtime > Restart session and run all. Elsewhere: restart the kernel and run all cells.",
        )
    folder, kept = _KEPT[workflow]
    logger.info("%s", "\n".join(examine(folder=folder, kept=kept).summary(workflow)))


def tell_children(here: Path) -> None:
    """Make a copy that no Python finds by itself, such as an unpacked one, known beyond this kernel.

    Processes started from now on find it, and `!fastsd ...` does. On a machine that is lent for some hours the next
    kernel finds it too, so that a cell may be run there before the first one; elsewhere nothing is installed unasked.
    """
    site = Path(sysconfig.get_path("purelib"))
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if is_found_anyway(here):
        return
    if str(here) not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(here), *places])
    with contextlib.suppress(OSError):  # a machine that cannot keep these is used all the same
        if where() in ("colab", "kaggle"):
            (site / "fastsd_helpers.pth").write_text(f"{here}\n", encoding="utf-8")
        if shutil.which("fastsd") is None:
            command = Path.home() / ".cache" / "fastsd" / "bin" / "fastsd"
            command.parent.mkdir(parents=True, exist_ok=True)
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastsd_helpers "$@"\n', encoding="utf-8")
            command.chmod(0o755)
            os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), str(command.parent)]))
