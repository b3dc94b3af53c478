"""Why a web UI ended: the last lines of its log and its exit code as a sentence and what to do."""

import re
from collections.abc import Sequence

from fastsd_helpers.errors import WebUICrashed

__all__ = ["explain_crash"]

# (pattern in the last lines, what happened, what to do); the first that fits is taken, so special ones come first.
_CAUSES = (
    (
        r"fastsd guard: ((\S+) of (\S+) [^;\n]+)",
        "its guard does not fit this version of its code ({0}), and it is not started without",
        "Run `fastsd webui install` again: it brings its code and packages to the versions the guard knows. If you "
        "added an extension lately, take it out.",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU's memory was not enough",
        "Choose a lower setting for vram, a smaller picture or a smaller model; close other programs on this GPU.",
    ),
    (
        r"no kernel image is available|is not compatible with the current PyTorch",
        "its PyTorch has no code for this GPU",
        "Run `fastsd webui install` again: its environment must hold a PyTorch for this GPU.",
    ),
    (
        r"Cannot add middleware after an application has started",
        "something opened its page before it was ready",
        "Start it again, and open the link only when it is shown.",
    ),
    (
        r"Cannot find empty port|address already in use|Errno 98",
        "its port is in use",
        "Choose another port with --port, or stop the program that has it: `fastsd webui stop`.",
    ),
    (
        r"Torch is not able to use GPU|Found no NVIDIA driver",
        "it found no GPU it can use",
        "Switch a GPU on (Colab: Runtime > Change runtime type), then start it again.",
    ),
    (
        r"No module named '([\w.]+)'",
        "its environment lacks the module {0}",
        "Run `fastsd webui install`: it adds what is missing.",
    ),
    (
        r"operator torchvision::nms does not exist",
        "torch and torchvision of its environment do not belong together",
        "Delete its environment and run `fastsd webui install`.",
    ),
    (
        r"Couldn't clone|Repository not found|could not read Username",
        "it tried to fetch code from a place that is gone",
        "Run `fastsd webui install`: it gets the code from places that live.",
    ),
    (r"No space left on device", "the disk is full", "Make room on this machine's disk, then start it again."),
    (
        r"Transport endpoint is not connected|Errno 107|Stale file handle",
        "the connection to Drive was lost",
        "Run the cell that connects Drive again, then start it again.",
    ),
    (
        r"bad file inside|Can't get attribute|UnpicklingError",
        "a .ckpt file holds something that may be a program, and was refused",
        "Convert it: fastsd convert FILE.ckpt FILE.safetensors.",
    ),
    (
        r"SafetensorError|MetadataIncompleteBuffer|HeaderTooLarge|InvalidHeader",
        "a model file is damaged or was not copied whole",
        "Look at it with `fastsd inspect FILE`, and fetch it again.",
    ),
    (
        r"unrecognized arguments: (.+)",
        "it does not know the argument {0}",
        "Correct the extra arguments and start it again.",
    ),
)


def explain_crash(title: str, code: int | None, lines: Sequence[str]) -> WebUICrashed:
    """Turn the end of a log and an exit code into an error.

    Args:
        title: the web UI's name.
        code: as subprocess gives it (negative: the signal that ended it); None when it is not known.
        lines: the last lines of its log.
    """
    text = "\n".join(lines)
    if code in (-9, 137):
        return WebUICrashed(
            f"{title} was ended by the system (exit {code}): the machine's RAM was not enough.",
            "Choose a smaller model or a machine with more RAM; for SDXL, a GPU of 12 GB and more with --lowram.",
        )
    for pattern, what, hint in _CAUSES:
        found = re.search(pattern, text)
        if found:
            return WebUICrashed(f"{title} ended: {what.format(*found.groups())}.", hint)
    if code in (-15, 143, -2, 130):
        return WebUICrashed(f"{title} was stopped from outside (exit {code}).", "Start it again.")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f" Its last line: {last[:200]}" if last else " It wrote nothing."
    how = f" (exit {code})" if code is not None else ""
    return WebUICrashed(f"{title} ended by itself{how}.{said}", "See the whole log: fastsd webui log")
