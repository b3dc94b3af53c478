"""Say in the reader's words why uv or pip installed nothing: which package, which line, what to do."""

import logging
import os
import re
from pathlib import Path

from fastsd_helpers.errors import InstallError
from fastsd_helpers.processes import names_set
from fastsd_helpers.runtime import install_command, redact
from fastsd_helpers.wheels.difference import Plan
from fastsd_helpers.wheels.environment import CONSTRAINTS, how_to_unset, missing_constraints
from fastsd_helpers.wheels.lockfile import LockedRow

__all__ = ["explain"]

logger = logging.getLogger("fastsd_helpers")

# What uv and pip say, and what it means for the user. The first that fits wins.
_MEANINGS = (
    (
        r"hash mismatch|DO NOT MATCH THE HASHES|Hash mismatch",
        "the downloaded file is not the one in the lock (its SHA-256 differs)",
        "Run this again: the connection may have broken. If the problem persists, a proxy between this machine "
        "and the package index changes files, or the lock is damaged: try another network, or "
        f"{install_command(again=True)}",
    ),
    (
        r"No space left on device|os error 28|ENOSPC",
        "the disk is full",
        "Free some space on this machine (not on Drive), then run this again.",
    ),
    (
        r"Read-only file system|os error 30|Permission denied|os error 13",
        "its files cannot be written here",
        "Make an environment (python3 -m venv .venv) and run this with its Python.",
    ),
    (
        r"lack of valid authentication|\(?40[137] (Unauthorized|Forbidden|Proxy Authentication)|40[137] Client Error|"
        r"ProxyError|Tunnel connection failed",
        "the package index, or a proxy in front of it, requires a login or refuses access",
        "Put the correct user and password into its address (UV_DEFAULT_INDEX or PIP_INDEX_URL, HTTPS_PROXY), or unset "
        "that variable, then run this again.",
    ),
    (
        r"Retrying \(Retry|NewConnectionError|Max retries exceeded",
        "the network or the package index did not answer",
        "Check the network and run this again: what was downloaded is kept.",
    ),
    (
        r"no version of|No matching distribution|was not found in the package registry|not found in the provided|"
        r"no wheels? with a matching|Network connectivity is disabled|404 (Not Found|Client Error)",
        "",  # see _gone
        "",
    ),
    (
        r"Failed to build|build_wheel|Building wheel|metadata-generation-failed|subprocess-exited-with-error",
        "building it from source failed",
        "Run this again with FASTSD_DEBUG=1 and report the output of `fastsd doctor`.",
    ),
    (
        r"(?i)<!doctype html|text/html|expected value at line|Failed to parse|invalid wheel|not a zip|crc|"
        r"Failed to extract|Failed to read zip|Failed to unzip",
        "it returned a web page or a broken file instead of a package",
        "A login page or a proxy answers for the package index: log in to the network, then run this again.",
    ),
    (
        r"(?i)client error|dns|connection|timed? ?out|Failed to fetch|Failed to download|error sending request|"
        r"incomplete|unexpected eof|network|reset by peer|end of file",
        "the network or the package index did not answer",
        "Check the network and run this again: what was downloaded is kept.",
    ),
    (
        r"(?i)distutils installed project|Cannot uninstall|RECORD file",
        "the version that is here cannot be removed",
        "Uninstall it by hand as it was installed, then run this again.",
    ),
)


def explain(tool: str, output: str, plan: Plan, wheel_folder: Path | None, *, offline: bool) -> InstallError:
    """Name the package and the line that failed, in the reader's words."""
    output = re.sub(r"//[^/\s@]*@", "//", redact(re.sub(r"\x1b\[[0-9;]*m", "", output)))
    logger.debug("%s said:\n%s", tool, output)
    for path, problem, todo in missing_constraints():
        if path in output:
            return InstallError(f"'{plan.lock_set.name}' was not installed: {problem}", todo)
    lines = [line.strip(" ×╰─▶│├\t") for line in output.splitlines()]
    lines = [
        line for line in lines if line and not line.startswith(("Using Python", "Resolved", "warning:", "WARNING"))
    ]
    pattern, meaning, hint = next(
        (item for item in _MEANINGS if re.search(item[0], output)),
        ("(?i)error|failed", "it could not be installed", "Run this again; if the problem persists, report it."),
    )
    if (setting := _setting_named_in(output, by_value=meaning == "it could not be installed")) is not None:
        meaning, hint = f"{setting}, which the environment sets, cannot be used", how_to_unset(setting)
    if not meaning:
        meaning, hint = _gone(output, offline)
    line = next((item for item in lines if re.search(pattern, item)), lines[-1] if lines else "no message")
    row = _row_named_in(output, lines, line, plan)
    what = f"{row.name} {row.version}" if row else f"'{plan.lock_set.name}'"
    where = f" from {wheel_folder}" if wheel_folder else ""
    return InstallError(f"{what} was not installed{where}: {meaning}. {tool} said: {line[:300]}", hint)


def _setting_named_in(output: str, *, by_value: bool) -> str | None:
    """The variable of uv or pip that a failure is about: named itself, or by its value where nothing else is known."""
    for name in names_set("UV_", "PIP_"):
        value = os.environ[name]
        if re.search(rf"error: .*\b{name}\b", output):
            return name
        whole = re.compile(rf"error: .*[`'\" ]{re.escape(value)}([`'\":]|\s|$)", re.M)
        if by_value and name not in CONSTRAINTS and len(value) > 2 and whole.search(output):
            return name
    return None


def _gone(output: str, offline: bool) -> tuple[str, str]:
    """No such version was found. An index that is a login page looks just so: it is a page that names no file."""
    if offline:
        return (
            "this version is not where it is looked for (the folder of wheels)",
            "Add its file to the folder, or run this with the network.",
        )
    if "from versions: none" in output:  # all that pip says of an index it cannot reach
        return (
            "the package index gave no version of it (no connection, or a login page answers in its place)",
            "Open any web page: if the network requires a login, log in. Then run this again.",
        )
    return (
        "this version is not where it is looked for (withdrawn, or no index answers there but a login page)",
        "Open any web page: if the network requires a login, log in and run this again. If it does not, install the "
        "latest fastsd_helpers, whose lock names another version.",
    )


def _row_named_in(output: str, lines: list[str], line: str, plan: Plan) -> LockedRow | None:
    """The row a failure is about: named in its line, else on a line of its own kind anywhere."""
    # pip heads its list of files with other hashes by a line without names.
    rest = "\n".join(lines[lines.index(line) :]) if line in lines else ""
    texts = [line, rest, *(item for item in lines if re.search(r"(?i)error|failed|mismatch|because", item)), output]
    for text in texts:
        plain = re.sub(r"[-_.]+", "-", text).lower()
        for row in sorted(plan.rows, key=lambda item: -len(item.name)):
            if re.search(rf"(?<![a-z0-9-]){re.escape(row.name)}(?![a-z0-9])", plain):
                return row
    return None
