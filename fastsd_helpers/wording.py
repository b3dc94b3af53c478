"""What the library says, in the words of where it is said: a notebook has fields and cells, and no flags.

Errors and log lines are written once, with the command line's flags and commands. At the notebook's edge (an error
below a cell, the log, a view) `for_notebook` puts the form's field or the cell in their place.
"""

import re
from collections.abc import Iterable

__all__ = ["count_in_words", "for_notebook", "label_of", "list_some", "natural_order", "size_in_words"]

_TRAINING = "(in the training's form)"
_PLACE = "'google drive' or 'shared drive' (in the session's form)"
# Flags whose field in a notebook has another name than the flag; every other flag is the field of its own name.
_FIELDS = {
    "restart": f"'start over' {_TRAINING}",
    "more-steps": f"'more steps' {_TRAINING}",
    "more-text-encoder-steps": f"'more text encoder steps' {_TRAINING}",
    "root": _PLACE,
    "from": "'import from' (in the session's form)",
    "extension": "'extensions'",
    "lowram": "'--lowram' in 'extra args'",  # the web UI's own
}
# Where a flag's advice, or a terminal's, is another one in a notebook.
_PHRASES = (
    (r"if you are sure that it no longer runs, add --take-over", "or run this cell again two minutes after it is gone"),
    (r"start again with --restart", f"choose 'start over' {_TRAINING}"),
    (r"Train again with the same session to resume", "Run the training cell again to resume, in a new kernel too"),
    (r"--take-over", "running this cell again two minutes after the other run is gone"),
)
_COMMANDS = "bench controlnet convert demo doctor dreambooth inspect install models playground trocr tunnel webui"
_CELLS = {
    "dreambooth export": "the cell that writes the file",
    "dreambooth new": "the cell that opens the session",
    "dreambooth prepare": "the cell that reads the photos",
    "dreambooth train": "the training cell",
    "webui install": "the cell that installs the web UI",
    "webui launch": "the cell that starts the web UI",
    "webui stop": "the cell that stops the web UI",
    "controlnet list": "the ControlNets' form",
    "install dreambooth": "the first cell",
    "install trocr": "the first cell",
    "install webui": "the first cell",
}
_PARTS = {"prepare": "the cell that reads the photos", "train": "the training cell"}

_FLAG = r"--(?P<no>no-)?(?P<flag>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])(?: [A-Z]{1,12}(?![\w.\"']))?"
_ARGUMENT = r"(?:[^\n.,;()`]|\.(?=\w))*"  # up to the end of the sentence; a file's name has dots
_COMMAND = re.compile(
    rf"`fastsd (?P<quoted>[^`\n]+)`|(?<!!)\bfastsd (?P<plain>(?:{_COMMANDS.replace(' ', '|')})\b{_ARGUMENT})"
)
_SAME = re.compile(r"\b(?P<name>[a-z]\w*)(?P<value> \S+)? \(--(?P<flag>[a-z][a-z0-9-]*)(?P=value)?\)")
_NAMED = re.compile(r"\b(?P<name>[a-z]\w*) \(--(?P<flag>[a-z][a-z0-9-]*)\)")
# What somebody typed or a program's own words: they stay as they are.
_KEPT = re.compile(
    r"(?<!\w)'[^'\n]*'(?!\w)|\"[^\"\n]*\"|`(?!fastsd)[^`\n]*`|\b(?:pip|uv) [^\n.`]*"
    r"|(?<=extra_args \(--extra-args\) has )[^;\n]*?(?=, which)"
)


def count_in_words(count: int) -> str:
    """A large number as people say it: 859.5 million, 73.7 thousand, 640.

    Args:
        count: 0 or more.
    """
    if count < 1000:
        return str(count)
    return f"{count / 1e6:,.1f} million" if count >= 100_000 else f"{count / 1e3:.1f} thousand"


def size_in_words(count: float) -> str:
    """A number of bytes in the unit people expect, in powers of 1000 as disks and Drive count.

    Args:
        count: of bytes.
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def list_some(names: Iterable[object], most: int = 3) -> str:
    """The first names of a list, and how many more there are: "a, b, c and 4 more".

    Args:
        names: all of them.
        most: how many are named.
    """
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts "dog (2)" before "dog (10)".

    Args:
        name: of a file or folder.
    """
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(p), "") if p.isdecimal() and p.isascii() else (1, 0, p) for p in parts]


def label_of(name: str) -> str:
    """What a setting is called in a form: `unet_steps` is "unet steps".

    Args:
        name: of the setting.
    """
    return name.replace("_", " ")


def for_notebook(text: str) -> str:
    """The text with the notebook's fields and cells in the place of flags and commands.

    Words between quotation marks stay, and so do other programs' commands.

    Args:
        text: a message as the command line has it.
    """
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    if "--" not in text and "`" not in text and "fastsd " not in text:
        return text
    text = _COMMAND.sub(_as_cell, text)
    text = re.sub(r"`([a-z]+)`", lambda found: _PARTS.get(found[1], found[0]), text)
    parts, place = [], 0
    for kept in _KEPT.finditer(text):
        parts += [_with_fields(text[place : kept.start()]), kept[0]]
        place = kept.end()
    return "".join([*parts, _with_fields(text[place:])])


def _with_fields(text: str) -> str:
    text = _NAMED.sub(lambda found: label_of(found["name"]) if _is_same(found) else found[0], text)
    text = _SAME.sub(
        lambda found: label_of(found["name"]) + (found["value"] or "") if _is_same(found) else found[0], text
    )
    return re.sub(_FLAG, _as_field, text)


def _is_same(found: "re.Match[str]") -> bool:
    name, flag = found["name"], found["flag"].replace("-", "_")
    return name in (flag, f"{flag}s")


def _as_field(found: "re.Match[str]") -> str:
    if found["no"]:
        return f"'{label_of(found['flag'].replace('-', '_'))}' off"
    return _FIELDS.get(found["flag"], f"'{found['flag'].replace('-', ' ')}'")


def _as_cell(found: "re.Match[str]") -> str:
    command = (found["quoted"] or found["plain"]).rstrip()
    after = (found["plain"] or "")[len(command) :]
    words, _, flags = command.partition(" --")
    flags = f"--{flags}" if flags else ""
    for name, cell in _CELLS.items():
        if words == name or (words.startswith(f"{name} ") and not name.startswith("install")):
            checkpoint = re.search(r"--checkpoint (\S+)", flags)
            return cell + (f", with {checkpoint[1]} as 'checkpoint'" if checkpoint else "") + after
    more = f", with {_with_fields(flags)}" if flags else ""
    return f"`!fastsd {words}` (in a cell){more}{after}"
