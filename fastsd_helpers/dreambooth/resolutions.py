"""The sides in pixels that images may be trained at, and a list of them as a user writes it."""

__all__ = ["LEAST_PX", "MOST_PX", "read_resolutions"]

LEAST_PX, MOST_PX = 64, 2048


def read_resolutions(text: str) -> tuple[int, ...]:
    """The sides in "512,768,1024", the smallest first and each once.

    Raises:
        ValueError: one of them is no whole number, or too small or too large.
    """
    sides = [part.strip() for part in text.split(",")]
    if not all(side.isdecimal() and LEAST_PX <= int(side) <= MOST_PX for side in sides):
        raise ValueError(f"is {text!r}; it must be sides in pixels from {LEAST_PX} to {MOST_PX}, such as 512,768,1024")
    return tuple(sorted({int(side) for side in sides}))
