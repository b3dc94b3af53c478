"""How many pages a minute are transcribed, and where the time goes: finding lines, cutting them, reading, writing.

Pages are drawn here, of as many short lines as asked for, and transcribed into files of every format as
`fastsd trocr read --out FOLDER` does. A first page pays for buffers; the median of the rounds counts.
"""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fastsd_helpers.bench import Report
from fastsd_helpers.device import describe_device
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import check, option, options_of
from fastsd_helpers.runtime import versions

__all__ = ["Settings", "draw_pages", "measure"]

_WORDS = ("over", "the", "lazy", "dog", "and", "into", "a", "quiet", "garden", "where", "nobody", "had", "been")
_PARTS = ("finding", "cutting", "reading", "writing", "other")
_SIZE = (1240, 1754)  # A4 at 150 dots per inch


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark of `fastsd trocr read --pages`."""

    model: str = option("demo-reader", help="recognition model: key, folder or Hub id", known="readers")
    pages: int = option(5, help="pages of a round", low=1, high=1000)
    lines: int = option(20, help="lines on a page", low=1, high=24)
    rounds: int = option(3, help="rounds; the median counts", low=1, high=20)
    formats: str = option("txt,json,csv,alto,page,hocr,pdf", help="formats that are written")

    def __post_init__(self) -> None:
        check(self)


def measure(settings: Settings) -> Report:
    """Transcribe drawn pages, and divide the time among the steps."""
    from fastsd_helpers.trocr.exports.formats import parse_formats, require_formats
    from fastsd_helpers.trocr.reading.reader import Reader
    from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, transcribe

    formats = parse_formats(settings.formats)
    require_formats(formats)
    reader = Reader(settings.model)
    config = TranscribeConfig(formats, pages="pages")
    spent: list[dict[str, float]] = []
    used: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="fastsd-bench-") as name:
        scans = Path(name) / "scans"
        draw_pages(scans, settings)
        transcribe(reader, [str(scans / "page1.jpg")], Path(name) / "first", config)
        for turn in range(settings.rounds):
            with _watched() as (seconds, processor):
                began, busy = time.perf_counter(), time.process_time()
                done = transcribe(reader, [str(scans)], Path(name) / f"round{turn}", config)
                whole, busy = time.perf_counter() - began, time.process_time() - busy
            if done.problems:
                raise SettingsError(f"A page could not be read: {done.problems[0]}", "Choose other settings.")
            spent.append({**seconds, "other": whole - sum(seconds.values()), "whole": whole})
            used.append({**processor, "other": busy - sum(processor.values()), "whole": busy})
        sizes = _sizes(Path(name) / "round0", settings.pages)
        scan = sum(path.stat().st_size for path in scans.iterdir()) / settings.pages
    median, busiest = (
        {part: statistics.median(turn.get(part, 0.0) for turn in turns) for part in (*_PARTS, "whole")}
        for turns in (spent, used)
    )
    cpu = {part: seconds / settings.pages for part, seconds in busiest.items()}
    shares = {part: median[part] / median["whole"] for part in _PARTS}
    rate = 60 * settings.pages / median["whole"]
    data: dict[str, Any] = {
        "device": describe_device().name,
        "versions": versions(),
        "settings": {item.name: getattr(settings, item.name) for item in options_of(Settings)},
        "pages_per_minute": rate,
        "seconds": spent,
        "shares": shares,
        "processor_seconds_per_page": cpu,
        "bytes_per_page": {"scan": scan, **sizes},
    }
    told = [f"{part:8} {median[part] / settings.pages:7.3f} s a page  {100 * share:5.1f} %  "
            f"processor {cpu[part]:7.3f} s" for part, share in shares.items()]  # fmt: skip
    told.append(f"processor, all of it: {cpu['whole']:.3f} s a page")
    told.append("bytes a page: " + ", ".join(f"{kind} {size:,.0f}" for kind, size in data["bytes_per_page"].items()))
    return Report(data, [f"{rate:.1f} pages a minute, {settings.lines} lines each, {len(formats)} formats", *told])


def draw_pages(folder: Path, settings: Settings) -> None:
    """Draw the pages of a round into a folder, which is made."""
    import random

    from PIL import Image, ImageDraw, ImageFont

    folder.mkdir()
    chance, font = random.Random(0), ImageFont.load_default(34)
    for number in range(1, settings.pages + 1):
        page = Image.new("RGB", _SIZE, (240, 236, 224))
        for row in range(settings.lines):
            place = (110, 100 + row * 66)
            ImageDraw.Draw(page).text(place, " ".join(chance.choices(_WORDS, k=7)), (40, 40, 60), font)
        page.save(folder / f"page{number}.jpg", quality=90)


def _sizes(out: Path, pages: int) -> dict[str, float]:
    """Bytes of a page in each format, and of what is noted to go on from."""
    sizes: dict[str, float] = defaultdict(float)
    for path in out.rglob("*.*"):
        if path.is_file():
            kind = "notes" if ".fastsd-run" in path.parts else path.name.partition(".")[2]
            sizes[kind] += path.stat().st_size / pages
    return dict(sorted(sizes.items()))


@contextlib.contextmanager
def _watched() -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Add up the seconds of each step while the block runs, on the wall and of the processor; what a step calls counts
    as the inner one alone."""
    from fastsd_helpers.trocr.pages import page_reader
    from fastsd_helpers.trocr.reading import results, transcription
    from fastsd_helpers.trocr.reading.reader import Reader

    clocks = (time.perf_counter, time.process_time)
    seconds: tuple[dict[str, float], ...] = (defaultdict(float), defaultdict(float))
    inside: list[str] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = [clock() for clock in clocks]
            inside.append(part)
            try:
                return call(*given, **named)
            finally:
                inside.pop()
                for sums, clock, then in zip(seconds, clocks, began, strict=True):
                    took = clock() - then
                    sums[part] += took
                    if inside:
                        sums[inside[-1]] -= took

        return run

    places = [
        ("finding", page_reader, "find_lines"), ("finding", page_reader, "_upright_votes"),
        ("cutting", page_reader, "cut_outline"), ("cutting", page_reader, "baseline_of"), ("reading", Reader, "read"),
        ("writing", transcription._Work, "finish"), ("writing", results.LocalResults, "append"),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for part, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds[0], seconds[1]
