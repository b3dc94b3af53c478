"""What a notebook's first cell calls: install what is missing here, then say what this machine is."""

import logging
from pathlib import Path

from fastsd_helpers.doctor import examine
from fastsd_helpers.errors import InstallError
from fastsd_helpers.forms.quiet import quieten_libraries
from fastsd_helpers.runtime import start_log
from fastsd_helpers.wheels import install

__all__ = ["set_up"]

logger = logging.getLogger("fastsd_helpers")

# Linux, and Linux within Windows. Not asked of torch: it would be imported before what it may need is installed.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


def set_up(workflow: str) -> None:
    """Make this Python ready for a workflow and print a few lines about this machine; a second run changes nothing.

    With nothing missing no network is asked. Without an NVIDIA GPU bitsandbytes is left out: it serves no one else.

    Args:
        workflow: dreambooth, webui or trocr.

    Raises:
        InstallError: a package could not be installed, or the runtime has to be restarted first. DependencyMissing:
        there is nothing to install with. DiskFull: not enough room.
    """
    start_log()
    quieten_libraries()
    skip = () if any(path.exists() for path in _DRIVERS) else ("bitsandbytes",)
    report = install(workflow, skip=skip)
    if report.changes:
        logger.info("%s", "\n".join(report.lines()))
    if report.restart:
        raise InstallError(
            f"Restart the runtime now: {', '.join(report.restart)} is in memory at another version than is installed.",
            "In Colab: Runtime > Restart session and run all. Elsewhere: restart the kernel and run all cells.",
        )
    logger.info("%s", "\n".join(examine().summary(workflow)))
