"""localtunnel's client and the packages it needs: fetched by npm as a lock says, hashed as a whole before every use."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from fastsd_helpers.errors import TunnelToolMissing
from fastsd_helpers.files import placed
from fastsd_helpers.processes import Child, environment_for
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.services.programs import copy_hashed, programs_folder, remove_whatever

__all__ = ["CLIENT_SHA256", "CLIENT_VERSION", "bring_client", "keep_client", "node_missing"]

CLIENT_VERSION = "2.0.2"
_LOCK = Path(__file__).with_name("localtunnel.lock.json")
# Of all files as npm 8, 10 and 11 unpack them: the SHA-256 of the lines "{sha256}  {path}", sorted by path. 2026-11-29.
CLIENT_SHA256 = "cf8dc9df0aedb8251a0a81abbe19c518c39f5428984f18f5f2dd1213998123fc"
_MOST_FILES = 1000
_LARGEST_BYTES = 8 * 2**20
_NPM_S = 120


def node_missing() -> TunnelToolMissing | None:
    """What is missing to run, and where it is not there yet to fetch, the client; None when nothing is."""
    needed = ["node"] if _kept().is_dir() else ["node", "npm"]
    if all(map(shutil.which, needed)):
        return None
    return TunnelToolMissing(
        "localtunnel needs Node.js, and neither `lt` nor Node.js with npm is installed.",
        "Install Node.js (nodejs.org), or choose another service.",
    )


def bring_client(folder: Path, *, within_s: float = _NPM_S) -> list[str]:
    """Put a checked copy of the client into a private folder; returns the words that run it.

    Args:
        folder: the link's own folder, for this user alone.
        within_s: how long npm may take, when it has to be fetched.

    Raises:
        TunnelToolMissing: Node.js is not installed, the packages cannot be had, or what came is not them.
    """
    problem = node_missing()
    if problem is not None:
        raise problem
    copy = folder / "node_modules"
    for fetched in range(3):
        if _copy_or_delete(copy):
            break
        if fetched == 2:
            raise _missing("it was downloaded twice with the wrong hash, and was deleted")
        _fetch(within_s)
    return [str(shutil.which("node")), str(copy / "localtunnel" / "bin" / "lt.js")]


def keep_client(*, within_s: float = _NPM_S) -> None:
    """Make sure that the right client is kept here, without running it; the same errors as `bring_client`."""
    with tempfile.TemporaryDirectory(prefix="fastsd-program-") as folder:
        bring_client(Path(folder), within_s=within_s)


def _kept() -> Path:
    return programs_folder() / f"localtunnel-{CLIENT_VERSION}"


def _missing(reason: str) -> TunnelToolMissing:
    return TunnelToolMissing(
        f"npm could not fetch localtunnel {CLIENT_VERSION}: {reason.rstrip('.')}.",
        "Check the connection, install it yourself (npm install -g localtunnel), or choose another service.",
    )


def _copy_or_delete(copy: Path) -> bool:
    kept = _kept()
    if not os.path.lexists(kept):
        return False
    if _copy_tree(kept, copy) == CLIENT_SHA256:
        return True
    shutil.rmtree(copy, ignore_errors=True)
    logger.warning("%s is not localtunnel %s: it was deleted and not run.", kept, CLIENT_VERSION)
    remove_whatever(kept)
    return False


def _copy_tree(source: Path, target: Path) -> str | None:
    """Copy a folder and hash its bytes on their way; None when it has links, or more than the client has."""
    if source.is_symlink() or not source.is_dir():
        return None
    found: list[Path] = []
    for place, folders, files in os.walk(source):
        found += [Path(place, name) for name in files]
        if len(found) > _MOST_FILES or any(Path(place, name).is_symlink() for name in folders):
            return None
    digest, left = hashlib.sha256(), _LARGEST_BYTES
    for path in sorted(found, key=lambda path: path.relative_to(source).as_posix()):
        inside = path.relative_to(source)
        (target / inside).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sha256 = copy_hashed(path, target / inside, most_bytes=left)
        if sha256 is None:
            return None
        left -= (target / inside).stat().st_size
        digest.update(f"{sha256}  {inside.as_posix()}\n".encode())
    return digest.hexdigest()


def _fetch(within_s: float) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise node_missing() or _missing("npm is not installed")
    logger.info("Downloading localtunnel %s.", CLIENT_VERSION)
    lock = json.loads(_LOCK.read_text(encoding="utf-8"))
    about = {"name": lock["name"], "version": lock["version"], "private": True, **lock["packages"][""]}
    with tempfile.TemporaryDirectory(prefix="fastsd-npm-") as name:
        folder = Path(name)
        (folder / "package.json").write_text(json.dumps(about), encoding="utf-8")
        shutil.copyfile(_LOCK, folder / "package-lock.json")
        # No package's own scripts run, and npm compares each package with the lock; the hash of all of it decides.
        words = ["ci", "--ignore-scripts", "--no-bin-links", "--no-audit", "--no-fund", "--omit=dev"]
        child = Child([npm, *words], env=environment_for("tunnel"), cwd=folder)
        try:
            code = child.wait(within_s)
            said = " / ".join(line for line in child.last_lines(20) if "error" in line.lower())[:200]
        finally:
            child.close()
        if code != 0:
            raise _missing("it did not end in time" if code is None else said or f"it ended with {code}")
        came = folder / "node_modules"
        (came / ".package-lock.json").unlink(missing_ok=True)  # differs between versions of npm, and is not run
        if not came.is_dir():
            raise _missing("it downloaded nothing")
        with placed(_kept()) as temporary:
            shutil.copytree(came, temporary, symlinks=True)
