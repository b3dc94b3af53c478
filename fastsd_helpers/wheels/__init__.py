"""Ready in seconds: install only what is missing here, at locked versions, checked by hash, then prove it imports.

`wheels.lock` (made by `make lock`) holds one set per workflow and Python for the platform's own Python (`dreambooth`,
`webui`, `trocr`, `trocr-int8`), and one per web UI, which gets an environment of its own (`a1111`, `comfyui`). torch,
torchvision, numpy, ipywidgets and the CUDA packages belong to the platform: a set for its own Python holds none of
them.

    install("dreambooth")                                      # into this Python: only the difference
    python = make_environment(Path("/content/a1111"), python="3.11")
    install("a1111", python=python)                            # everything, exactly as locked
    install("dreambooth", cache=Path("/content/drive/MyDrive"))  # and keep the wheels in one archive on Drive
"""

from fastsd_helpers.wheels.difference import PROTECTED, Change, Plan, make_plan
from fastsd_helpers.wheels.environment import Environment, find_uv, make_environment, own_environ, read_environment
from fastsd_helpers.wheels.installer import InstallReport, install
from fastsd_helpers.wheels.lockfile import Lock, LockedFile, LockedRow, LockSet, read_lock

__all__ = [
    "PROTECTED",
    "Change",
    "Environment",
    "InstallReport",
    "Lock",
    "LockSet",
    "LockedFile",
    "LockedRow",
    "Plan",
    "find_uv",
    "install",
    "make_environment",
    "make_plan",
    "own_environ",
    "read_environment",
    "read_lock",
]
