"""What `prepare` says at its end: how many images, with which prompts, what was left out and why."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PrepareResult", "counted_prompts", "prompt_lines"]

_MOST_PROMPTS = 12
_MOST_LETTERS = 160
_SAME = "is the same image as "
_MOST_SAME = 4


@dataclass(frozen=True)
class PrepareResult:
    """What was prepared; `lines()` says it in words."""

    train: int
    held_out: int
    size: int
    images: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    contact_sheet: Path
    prompts: tuple[tuple[str, int], ...] = ()  # exact prompt, number of images, the most first

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        held_out = f" and {self.held_out} held out" if self.held_out else ""
        pictures = "image" if self.train == 1 else "images"
        whole = any(item.get("method") == "none" for item in self.images)
        size = f"each with the area of {self.size} x {self.size} px" if whole else f"{self.size} px"
        report = [f"{self.train} {pictures} to train on{held_out}, {size}."]
        report += prompt_lines(self.prompts, named=not any(item.get("caption") for item in self.images))
        report += _skipped_lines(self.skipped)
        report += [f"{item['source']}: {', '.join(item['warnings'])}." for item in self.images if item["warnings"]]
        return [*report, *self.notes, f"Look at the crops: {self.contact_sheet}"]


def counted_prompts(prompts: list[str]) -> tuple[tuple[str, int], ...]:
    """(prompt, number of images), the most first."""
    return tuple(Counter(prompts).most_common())


def prompt_lines(prompts: tuple[tuple[str, int], ...], *, named: bool) -> list[str]:
    """The exact prompts as lines; where they differ that is said.

    Args:
        prompts: see `counted_prompts`.
        named: they come from the names alone, so that one for all may be meant.
    """
    if not prompts:
        return []
    count = sum(number for _prompt, number in prompts)
    if len(prompts) == 1:
        return [
            f"Prompt of {'all ' if count > 1 else ''}{count} image{'s' if count > 1 else ''}: {_short(prompts[0][0])}"
        ]
    lines = [f"{count} images with {len(prompts)} different prompts:"]
    lines += [f"  {number} x {_short(prompt)}" for prompt, number in prompts[:_MOST_PROMPTS]]
    if len(prompts) > _MOST_PROMPTS:
        lines.append(f"  and {len(prompts) - _MOST_PROMPTS} more")
    if named:
        lines.append("If all photos show one subject, give them one prompt: the instance prompt, or captions.")
    return lines


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= _MOST_LETTERS else f"{prompt[: _MOST_LETTERS - 1]}…"


def _skipped_lines(skipped: tuple[dict[str, str], ...]) -> list[str]:
    same = [item for item in skipped if item["reason"].startswith(_SAME)]
    lines = [f"Skipped {item['source']}: {item['reason']}." for item in skipped if item not in same]
    if len(same) <= _MOST_SAME:
        return lines + [f"Skipped {item['source']}: {item['reason']}." for item in same]
    first = same[0]
    return [
        *lines,
        f"{len(same)} photos were given twice and are taken once (such as {first['source']}, which {first['reason']}).",
    ]
