"""Draws the pages of one PDF to standard output, within limits of memory and time: the child that `pdf.py` starts.

It runs by itself, with the standard library and pypdfium2. Each answer is a line of JSON; behind the one of a page come
its pixels. Nobody reads while a page is used, so at most one more is drawn ahead.
"""

import contextlib
import json
import math
import os
import sys
import time
from typing import Any

__all__ = ["draw"]

_LEAST_DPI = 5  # below, a page that says it is a scan measures hundreds of metres
_MOST_PICTURES = 200  # of a page that are looked at


def draw(path: str, first: int, last: int, dpi: int, most_pixels: int, seconds: int, out: int) -> None:
    """Draw the pages from `first` up to, and without, `last`; counted from 0.

    Args:
        dpi: of pages that are no scan; one that would have more than `most_pixels` gets fewer.
        seconds: of processor time for opening the file and for each page; then the system ends this process.
        out: the descriptor that the answers are written to.
    """
    import pypdfium2

    _allow(seconds)
    try:
        document = pypdfium2.PdfDocument(path)
        count = len(document)
    except pypdfium2.PdfiumError as err:
        _say(out, problem=str(err))
        return
    _say(out, pages=count)
    for number in range(first, min(count, last)):
        _allow(seconds)
        try:
            page = document[number]
            width, height = page.get_size()
            own = _scale_of_scan(page, width, height)
            scale = min(own or dpi / 72, math.sqrt(most_pixels / max(1.0, width * height)))
            if scale * 72 < (_LEAST_DPI if own else 72):
                _say(out, page=number, inches=[round(width / 72), round(height / 72)])
                continue
            bitmap = page.render(scale=scale)
            rows = memoryview(bitmap.buffer).cast("B")
            size = [bitmap.width, bitmap.height]
            _say(
                out,
                page=number,
                dpi=round(scale * 72, 2),
                size=size,
                stride=bitmap.stride,
                mode=bitmap.mode,
                bytes=len(rows),
            )
            _write(out, rows)
            bitmap.close()
            page.close()
        except (pypdfium2.PdfiumError, MemoryError) as err:
            _say(out, page=number, problem=str(err) or "there is not enough memory for it")


def _scale_of_scan(page: Any, width: float, height: float) -> float:
    """Pixels per point of the picture that covers most of a page; 0 where there is none.

    Many scanners, phones and libraries write pages of as many points as the picture has pixels, or of the wrong size.
    """
    import pypdfium2.raw

    scale = 0.0
    for count, item in enumerate(page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE], max_depth=3)):
        if count == _MOST_PICTURES:
            break
        with contextlib.suppress(pypdfium2.PdfiumError):
            left, bottom, right, top = (item.get_bounds if hasattr(item, "get_bounds") else item.get_pos)()
            across, down = item.get_px_size() if hasattr(item, "get_px_size") else item.get_size()
            if (right - left) * (top - bottom) > width * height / 2:
                # A picture may lie on its side: its longer side is the page's.
                scale = max(scale, max(across, down) / max(right - left, top - bottom))
    return scale


def _allow(seconds: int) -> None:
    """Let this process use so many more seconds of processor time."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def _limit(memory_bytes: int) -> None:
    """Bound memory; write no file and no core dump."""
    with contextlib.suppress(ImportError):  # no such limits where there is no such module
        import resource

        for name, most in (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS knows some only by name
                resource.setrlimit(getattr(resource, name), (most, most))


def _say(out: int, **words: object) -> None:
    _write(out, memoryview(json.dumps(words).encode() + b"\n"))


def _write(out: int, data: memoryview) -> None:
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    # What a library prints must not get between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    _limit(int(sys.argv[3]))
    try:
        first, last, dpi, most_pixels, seconds = (int(word) for word in sys.argv[4:9])
        draw(sys.argv[2], first, last, dpi, most_pixels, seconds, answers)
    except BrokenPipeError:
        pass  # nobody wants more pages
    except Exception as error:  # an answer, whatever it is: nobody reads what this process prints
        _say(answers, problem=f"{type(error).__name__}: {error}"[:300])
