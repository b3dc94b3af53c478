"""Write docs/reference/commands.md and settings.md: every command, flag and setting, from the code that reads them.

python scripts/make_reference.py

`scripts/renew_snapshots.py` does the same; a test compares the pages with the code.
"""

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.cli.parser import build_parser  # noqa: E402
from fastsd_helpers.options import Option, options_of  # noqa: E402

PAGES = ROOT / "docs" / "reference"
# The settings classes in the order of use: notebook or part, then class and what a reader knows it as.
PARTS = {
    "DreamBooth": {
        "SessionConfig": "The session (cell 2a)",
        "PrepareConfig": "Photos (cell 3a; `prepare`)",
        "CaptionerConfig": "Captioning (cell 3e; `caption`)",
        "DreamBoothConfig": "Training (cell 4; `train`)",
        "RunConfig": "More steps, starting over (cell 5a)",
        "SampleConfig": "Sample images (`sample`)",
        "PlaygroundConfig": "Playground (cell 7a; `fastsd playground`)",
        "ExportConfig": "The model file (cell 8a; `export`)",
        "UploadConfig": "Upload to the Hub (cell 9a; `upload`)",
    },
    "Web UI": {
        "StoreConfig": "The data directory (cell 2a)",
        "InstallConfig": "Installation (cell 3a; `install`)",
        "ModelsConfig": "Models (cell 4a)",
        "ControlNetConfig": "ControlNets (cell 5a)",
        "LaunchConfig": "Start (cell 6a; `launch`)",
        "TunnelConfig": "The link (cell 7a; `fastsd tunnel`)",
    },
    "TrOCR": {
        "ReadingSessionConfig": "The session (cell 2a)",
        "ReadPicturesConfig": "Reading (cell 3a)",
        "ReadConfig": "Reading (`read`)",
        "TeachConfig": "Fine-tuning (cell 5a)",
        "FineTuneConfig": "Fine-tuning (`finetune`)",
        "EvaluateConfig": "Evaluation (cell 6b)",
        "EmbedConfig": "Embeddings (cell 6c; `embed`)",
        "ReaderUploadConfig": "Upload to the Hub (`upload`)",
        "ServeConfig": "The page (cell 8a; `serve`)",
        "SessionUploadConfig": "Upload to the Hub (cell 9a)",
    },
    "Model files": {
        "ConvertConfig": "Conversion (`fastsd convert`)",
        "ConvertFileConfig": "Conversion (DreamBooth, cell 8d)",
        "InspectConfig": "Inspection (`fastsd inspect`)",
        "InspectFileConfig": "Inspection (DreamBooth, cell 8c)",
        "ModelFileConfig": "Inspection and conversion (Web UI, cell 10a)",
    },
}
HEAD = "<!-- Written by scripts/make_reference.py from the code; a test compares. Do not edit. -->"


@functools.cache
def settings_classes() -> dict[str, type]:
    """Every settings class (`...Config`) by its name, but those of benchmarks; no other module is imported."""
    found: dict[str, type] = {}
    for path in sorted((ROOT / "fastsd_helpers").rglob("*.py")):
        place = path.relative_to(ROOT).with_suffix("")
        if "bench" in place.parts or " = option(" not in path.read_text(encoding="utf-8"):
            continue
        for name, thing in vars(importlib.import_module(".".join(place.parts).removesuffix(".__init__"))).items():
            if not isinstance(thing, type) or not dataclasses.is_dataclass(thing) or not name.endswith("Config"):
                continue  # or what several of them begin with
            if any("help" in field.metadata for field in dataclasses.fields(thing)):
                found[thing.__name__] = thing
    return found


def settings_page() -> str:
    """Every setting of every form and command, with its default, limits and help."""
    classes = settings_classes()
    lines = [
        "# Settings",
        "",
        HEAD,
        "",
        "One setting is one field of a form, one flag and one saved value, under one name: `unet_steps` is",
        "`--unet-steps`. An empty default is filled in with what suits the model and the machine, and said; advanced",
        "settings are folded away in a form.",
    ]
    for part, titles in PARTS.items():
        lines += ["", f"## {part}"]
        for name, title in titles.items():
            lines += ["", f"### {title}", "", *settings_table(classes[name])]
    return "\n".join(lines) + "\n"


def settings_table(settings: type) -> list[str]:
    """The table of one settings class, as lines of Markdown."""
    lines = ["| setting | default | values | what it does |", "| --- | --- | --- | --- |"]
    for item in options_of(settings):
        more = "; ".join(word for word in ("advanced", "secret: never saved") if getattr(item, word.split(":")[0]))
        words = cell(item.help) + (f" *({more})*" if more else "")
        lines.append(f"| `{item.name}` | {_default(item)} | {_values(item)} | {words} |")
    return lines


def _default(item: Option) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default is None or item.default == "":
        return ""
    if isinstance(item.default, bool):
        return "yes" if item.default else "no"
    return f"`{cell(str(item.default))}`"


def _values(item: Option) -> str:
    if item.choices:
        return ", ".join(f"`{choice}`" for choice in item.choices)
    if item.low is not None and item.high is not None:
        return f"{item.low:g} to {item.high:g}"
    if item.low is not None or item.high is not None:
        return f"{item.low:g} or more" if item.low is not None else f"{item.high:g} or less"
    return {bool: "yes or no", int: "an integer", float: "a number", str: "text"}[item.kind]


def commands_page() -> str:
    """What `--help` says of every command: its use, arguments, flags, defaults and choices."""
    lines = [
        "# Commands",
        "",
        HEAD,
        "",
        "Every command has `--help`, and with `--json` it prints one JSON object, for errors too. Exit status: 0 done;",
        "2 something to correct, with a sentence and a hint; 1 a failure of the program; 130 after Ctrl-C.",
    ]
    for parser in commands():
        lines += ["", f"## {parser.prog}", "", cell(parser.description or ""), "", "```text", _usage(parser), "```"]
        shown = [action for action in parser._actions if _is_shown(action)]
        if shown:
            lines += ["", "| argument or flag | what it does |", "| --- | --- |"]
            lines += [f"| {_names(action)} | {_help(action)} |" for action in shown]
    return "\n".join(lines) + "\n"


def commands(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """Every command that does something, in the order in which help lists them."""
    parser = parser or build_parser()
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for action in groups:
        for inner in action.choices.values():
            yield from commands(inner)


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _usage(parser: argparse.ArgumentParser) -> str:
    words = [parser.prog]
    for action in parser._actions:
        if not _is_shown(action) or (action.option_strings and not action.required):
            continue
        name = str(action.metavar or action.dest.upper())
        word = f"{action.option_strings[0]} {name}" if action.option_strings else name
        words.append({"*": f"[{word} ...]", "?": f"[{word}]", "+": f"{word} [{name} ...]"}.get(str(action.nargs), word))
    return " ".join([*words, "[flags]"])


def _names(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{cell(name)}`"
    takes = "" if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) else f" {cell(name)}"
    return ", ".join(f"`{flag}{takes if flag.startswith('--') else ''}`" for flag in action.option_strings)


def _help(action: argparse.Action) -> str:
    words = cell(action.help or "")
    if action.choices and not all(str(choice) in words for choice in action.choices):
        words += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    plain = action.default not in (None, False, True, "", argparse.SUPPRESS) and action.default != []
    return words + (f" Default: `{action.default}`." if plain and "default" not in words.lower() else "")


def cell(text: str) -> str:
    """A text as a cell of a table: one line, no bar, nothing that would be taken for HTML; percent signs once."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def pages() -> dict[Path, str]:
    """Every page with what it has to hold."""
    return {PAGES / "commands.md": commands_page(), PAGES / "settings.md": settings_page()}


def write() -> list[Path]:
    """Write the pages; returns those that changed."""
    changed = []
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    print("\n".join(f"written: {path.relative_to(ROOT)}" for path in write()) or "Nothing changed.")
