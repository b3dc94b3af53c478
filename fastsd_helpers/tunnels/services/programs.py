"""Programs that make links and are fetched to run: each is hashed before every use, by hashes that are kept here.

What is run is a copy in the link's own private folder, made while it is hashed: the very bytes that were hashed are
run, whatever happens to the kept file meanwhile. What is wrong is deleted and fetched once more, and never run. A
program that the user has installed is the user's own, and is run as it is.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.downloads.transfer import part_name, transfer
from fastsd_helpers.errors import FastSDError, TunnelToolMissing
from fastsd_helpers.files import placed, write_all
from fastsd_helpers.processes import LockHeld, file_lock
from fastsd_helpers.runtime import logger

__all__ = [
    "PAUSES_S",
    "Program",
    "bring_program",
    "copy_hashed",
    "keep_program",
    "known_program",
    "known_programs",
    "own_program",
    "programs_folder",
    "remove_whatever",
    "this_machine",
]

_LARGEST_BYTES = 200 * 2**20  # of a program whose size is not known beforehand
_CHUNK_BYTES = 2**20
PAUSES_S = (1.0,)  # between the tries of one download: somebody waits for a link


@dataclass(frozen=True)
class Program:
    """One program for one kind of machine, at an address whose content does not change."""

    name: str
    version: str
    machine: str  # "linux amd64"
    url: str
    sha256: str
    size: int | None = None  # bytes, where the source of the hash says them


# How a user names a program of their own, and under which names it is looked for on the path.
_OWN = {
    "ngrok": ("PYNGROK_NGROK_PATH", ("ngrok",)),
    "cloudflared": ("FASTSD_CLOUDFLARED", ("cloudflared",)),
    "localtunnel": ("", ("lt", "localtunnel")),
}


def known_programs() -> list[Program]:
    """Every row of programs.toml, which has the sources of the hashes."""
    return [Program(**row) for row in read_table("tunnels/services/programs.toml")["program"]]


def own_program(name: str) -> str | None:
    """The program that the user has installed, or named in the environment; None when there is none.

    Raises:
        TunnelToolMissing: what the environment names is not a program.
    """
    variable, names = _OWN.get(name, ("", ()))
    named = os.environ.get(variable) if variable else None
    if named and shutil.which(named) is None:
        raise TunnelToolMissing(
            f"{variable} names {named}, which is not a program.", "Correct it, or take it out of the environment."
        )
    return named or next(filter(None, map(shutil.which, names)), None)


def programs_folder() -> Path:
    """Where fetched programs are kept, for this user alone.

    Raises:
        TunnelToolMissing: the folder cannot be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fastsd" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as err:
        raise TunnelToolMissing(
            f"The folder {folder}, where the tunnel programs are kept, cannot be used: {err.strerror}.",
            "Set XDG_CACHE_HOME to a folder of yours that can be written, or install the program yourself.",
        ) from err
    return folder


def bring_program(name: str, folder: Path, *, also: Iterable[Path] = (), packaged: Iterable[Path] = ()) -> Path:
    """Put a checked copy of a program into a private folder, ready to run; it is fetched only where none is right.

    Args:
        name: as in programs.toml.
        folder: the link's own folder, for this user alone.
        also: other places where a copy may lie; a wrong one there is deleted too.
        packaged: files of installed packages that may be it; a wrong one is left, since the package has need of it.

    Raises:
        TunnelToolMissing: there is none for this machine, it cannot be had, or what came is not it.
    """
    program = known_program(name)
    copy = folder / program.name
    for place in (_kept(program), *also):
        if _copy_or_delete(place, copy, program):
            return copy
    most = program.size or _LARGEST_BYTES
    for place in packaged:
        if copy_hashed(place, copy, most_bytes=most) == program.sha256:
            return copy
        copy.unlink(missing_ok=True)
    _fetch(program)
    if not _copy_or_delete(_kept(program), copy, program):
        raise _missing(program, "it changed while it was being read")
    return copy


def keep_program(name: str, *, also: Iterable[Path] = (), packaged: Iterable[Path] = ()) -> Path:
    """Make sure that the right program is kept here, without running it; the same errors as `bring_program`."""
    with tempfile.TemporaryDirectory(prefix="fastsd-program-") as folder:
        copy = bring_program(name, Path(folder), also=also, packaged=packaged)
        kept = _kept(known_program(name))
        if not kept.exists():  # it was found in another place
            with placed(kept) as temporary:
                shutil.copyfile(copy, temporary)
    return kept


def known_program(name: str) -> Program:
    """The row of a program for this machine.

    Raises:
        TunnelToolMissing: there is none.
    """
    here = this_machine()
    for program in known_programs():
        if (program.name, program.machine) == (name, here):
            return program
    raise TunnelToolMissing(
        f"The program {name} is not installed, and no download with a known hash exists for {here}.",
        "Install it yourself, so that it is on the PATH, or choose another service.",
    )


def this_machine() -> str:
    """This kind of machine as programs.toml names it: "linux amd64"."""
    machine = platform.machine().lower()
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    return f"{sys.platform} {names.get(machine, machine)}"


def _kept(program: Program) -> Path:
    return programs_folder() / f"{program.name}-{program.version}-{program.machine.replace(' ', '-')}"


def _missing(program: Program, reason: str) -> TunnelToolMissing:
    return TunnelToolMissing(
        f"The program {program.name} is not installed, and {program.name} {program.version} could not be fetched: "
        f"{reason.rstrip('.')}.",
        "Check the connection, install it yourself so that it is on the PATH, or choose another service.",
    )


def _fetch(program: Program) -> None:
    """Bring it to where it is kept; what arrives wrong is deleted and fetched once more."""
    kept = _kept(program)
    part = kept.with_name(part_name(kept.name, program.url))
    logger.info("Downloading %s %s.", program.name, program.version)
    try:
        with file_lock(kept.with_name(f".{kept.name}.lock"), wait_s=120, mode=0o600):
            if os.path.lexists(kept):  # another process has brought it meanwhile
                return
            if not (_fetch_once(program, part, kept) or _fetch_once(program, part, kept)):
                raise _missing(program, "it was downloaded twice with the wrong hash, and was deleted")
    except LockHeld as err:
        raise _missing(program, "another process has been fetching it for two minutes") from err
    except (FastSDError, OSError) as err:
        raise (
            err if isinstance(err, TunnelToolMissing) else _missing(program, getattr(err, "problem", str(err)))
        ) from err


def _fetch_once(program: Program, part: Path, kept: Path) -> bool:
    if part.is_symlink():
        part.unlink()
    try:
        remote = transfer(
            program.url, part, size=program.size, sha256=program.sha256, most=_LARGEST_BYTES, pauses_s=PAUSES_S
        )
        if remote.is_page or remote.status >= 400:
            raise _missing(program, f"its address answers with something else (status {remote.status})")
        digest = None
        with contextlib.suppress(_WrongBytes), placed(kept) as temporary:
            digest = copy_hashed(part, temporary, most_bytes=program.size or _LARGEST_BYTES)
            if digest != program.sha256:
                raise _WrongBytes
        return digest == program.sha256
    finally:
        for path in (part, part.with_name(f"{part.name}.json")):
            path.unlink(missing_ok=True)


class _WrongBytes(Exception):
    pass


def _copy_or_delete(place: Path, copy: Path, program: Program) -> bool:
    """Whether a checked copy of what lies at `place` was made; what lies there and is wrong is deleted."""
    if not os.path.lexists(place):
        return False
    if copy_hashed(place, copy, most_bytes=program.size or _LARGEST_BYTES) == program.sha256:
        return True
    copy.unlink(missing_ok=True)
    logger.warning("%s is not %s %s: it was deleted and not run.", place, program.name, program.version)
    try:
        remove_whatever(place)
    except OSError as err:
        logger.warning("It could not be deleted: %s.", err)
    return False


def remove_whatever(place: Path) -> None:
    """Delete a file, a folder with what is in it, or a link and not what it leads to."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def copy_hashed(source: Path, target: Path, *, most_bytes: int) -> str | None:
    """Copy a file for this user alone, and hash the bytes on their way; `target` must not exist.

    Returns:
        the SHA-256 of what was written; None for a link, for what is not a plain file, and for one that is too large or
        cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        reading = os.open(source, flags)
    except OSError:
        return None
    try:
        facts = os.fstat(reading)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most_bytes:
            return None
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o700)
        digest, written = hashlib.sha256(), 0
        try:
            while chunk := os.read(reading, _CHUNK_BYTES):
                written += len(chunk)
                if written > most_bytes:
                    return None
                digest.update(chunk)
                write_all(writing, chunk)
        finally:
            os.close(writing)
        return digest.hexdigest()
    finally:
        os.close(reading)
