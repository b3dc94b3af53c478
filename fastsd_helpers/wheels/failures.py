"""Say in the reader's words why uv or pip installed nothing: which package, which line, what to do."""

import os
import re
from pathlib import Path

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.errors import InstallError
from fastsd_helpers.processes import names_set
from fastsd_helpers.runtime import install_command, logger, redact
from fastsd_helpers.wheels.difference import Plan
from fastsd_helpers.wheels.environment import CONSTRAINTS, how_to_unset, missing_constraints
from fastsd_helpers.wheels.lockfile import LockedRow

__all__ = ["explain"]

_UNKNOWN = {
    "pattern": "(?i)error|failed",
    "meaning": "it could not be installed",
    "hint": "Run this again; if the problem persists, report it.",
}


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
    rows = (row for row in read_table("wheels/failures.toml")["failure"] if re.search(row["pattern"], output))
    found = next(rows, _UNKNOWN)
    pattern, meaning = found["pattern"], found.get("meaning", "")
    hint = found.get("hint", "").replace("{install}", install_command(again=True))
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
